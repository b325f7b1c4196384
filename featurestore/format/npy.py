"""Arrays in numpy's own file format, read in any number of threads."""

import io
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

# numpy reads a file's header by ast.literal_eval, which Python 3.11 may fail in two threads at once: "AST constructor
# recursion depth mismatch" (cpython#106905).
_lock = threading.Lock()


def read_npy(data: bytes | memoryview) -> NDArray[Any]:
    """Read the array in the bytes of an .npy file. Raises ValueError where they are none; nothing is unpickled."""
    with _lock:
        array: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    return array
