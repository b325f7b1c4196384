"""A process that makes a store of another one and dies by kill -9 at a write."""

import signal
import subprocess
import sys
from collections.abc import Sequence

_SCRIPT = """
import os, signal, sys
from featurestore import FeatureStore
from featurestore.storage.storage import Storage
from featurestore.upkeep.remake.recode import recode
from featurestore.upkeep.remake.reduce import reduce

source, target, prefix, left = FeatureStore.open(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])

def dying(method):
    def call(storage, path, *rest):
        global left
        left -= path.startswith(prefix)
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(storage, path, *rest)
    return call

for name in sys.argv[6:]:
    setattr(Storage, name, dying(getattr(Storage, name)))
eval(sys.argv[5])
"""


def kill_at(prefix: str, writes: int, source: str, target: str, call: str, methods: Sequence[str]) -> None:
    """Run `call`, of `source` and `target`, until that many writes below `prefix` by these methods of Storage."""
    command = [sys.executable, "-c", _SCRIPT, source, target, prefix, str(writes), call, *methods]
    died = subprocess.run(command, check=False, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
