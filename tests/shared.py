"""Folders that several processes of a test run share: each is made once, by whichever process needs it first."""

import fcntl
import os
from collections.abc import Callable
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
