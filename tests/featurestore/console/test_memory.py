"""What a server has freed goes back to the system, whichever thread had it."""

import subprocess
import sys

import pytest

_FREED = """
import re, threading
from pathlib import Path
import numpy as np
import pyarrow as pa
from featurestore.console.memory import bound_freed_memory, return_freed_memory

def taken_mb():
    return int(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def work():
    blocks = [np.ones(50_000, np.uint8) for _ in range(400)]
    pools.append(pa.allocate_buffer(1 << 20, resizable=True) and pa.default_memory_pool().backend_name)
    kept.append(blocks[200])

bound_freed_memory(1 << 20)
before, kept, pools = taken_mb(), [], []
for _ in range(4):
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
return_freed_memory()
print(taken_mb() - before, *set(pools))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_of_threads_goes_back_and_arrow_takes_its_own_from_the_same_place() -> None:
    command = [sys.executable, "-c", _FREED]
    taken_mb, *pools = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert float(taken_mb) < 15, "320 MB were taken, 20 MB of them at once"
    assert pools == ["system"]
