"""A process that makes a store of another one and dies by kill -9 at a write."""

import os
import signal
from collections.abc import Callable, Sequence

from featurestore import FeatureStore
from featurestore.storage.storage import Storage
from tests.fuse import small_process

Make = Callable[[FeatureStore, str], object]


def kill_at(prefix: str, writes: int, source: str, target: str, make: Make, methods: Sequence[str]) -> None:
    """Make `target` of `source`, until that many writes below `prefix` by these methods of Storage."""
    process = small_process(_die_at, prefix, writes, source, target, make, methods)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _die_at(prefix: str, writes: int, source: str, target: str, make: Make, methods: Sequence[str]) -> None:
    left = writes

    def dying(method: Callable[..., object]) -> Callable[..., object]:
        def call(storage: Storage, path: str, *rest: object) -> object:
            nonlocal left
            left -= path.startswith(prefix)
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return method(storage, path, *rest)

        return call

    opened = FeatureStore.open(source)
    for name in methods:
        setattr(Storage, name, dying(getattr(Storage, name)))
    make(opened, target)
