"""Arrays in numpy's file format: read in many threads, and nothing unpickled."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from featurestore.format.codec import read_npy


def written(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_threads_read_what_was_written() -> None:
    files = [written(np.arange(number)) for number in range(200)]
    with ThreadPoolExecutor(8) as pool:
        assert [len(array) for array in pool.map(read_npy, files)] == list(range(200))


def test_pickles_and_other_bytes_are_refused() -> None:
    for data in (written(np.array([{}], object)), b"", b"no array"):
        with pytest.raises((ValueError, EOFError)):
            read_npy(data)
