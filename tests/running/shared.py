"""Folders that several processes of a test run share: each is made once, by whichever process needs it first."""

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def shared_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """Return a folder of this test run that all of its processes have in common; tests only read what is in it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared-{name}"
    folder.mkdir(exist_ok=True)
    return folder


def made_once(folder: Path, name: str, make: Callable[[], object]) -> None:
    """Call `make` unless a process of this test run has; wait for one that is at it. What fails is tried again."""
    done, lock_file = (folder.with_name(f"{folder.name}-{name}.{kind}") for kind in ("done", "lock"))
    with lock_file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed, and with a process that dies
        if not done.exists():
            make()
            done.touch()


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For folders whose tests open models and stores without a place for the cache.

    In the user's own, which each opening lists, the files of all test runs of a month would gather.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        yield
