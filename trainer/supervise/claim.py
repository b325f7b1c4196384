"""One supervisor for one run: a lock that ends with its process, however it ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import ConfigError, TrainerError


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold the run in `folder` for this process. Raises ConfigError where another supervisor has it."""
    file = folder.parent / f".{folder.name}.supervised"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as failure:
        raise TrainerError(f"{file} cannot be written: {failure}; choose another run.dir") from failure
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as failure:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            raise ConfigError(f"{folder} is supervised already, by {holder}; end that first") from failure
        except OSError as failure:
            raise TrainerError(f"{file} cannot be locked: {failure}; choose another run.dir") from failure
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
