"""One supervisor for one run: on a disk a lock that ends with its process, on an object store a lease."""

import fcntl
import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from featurestore.console.commandline import say_error
from featurestore.errors import StorageError
from featurestore.parsing import parse_json
from featurestore.published.paths import FarPath, RunPath
from featurestore.storage.storage import Storage
from trainer.errors import ConfigError, TrainerError

LEASE_S = 60.0
"""After so long without a renewal, a supervisor of another machine counts as gone."""
_HOLDER = re.compile(r"process (\d{1,10}) on ([\w.-]{1,255})")
_SETTLE_S = 1.0
"""Between writing a lease and looking whether it stayed: two that begin at once see the same one."""


@contextmanager
def claimed(folder: RunPath, lease_s: float = LEASE_S) -> Iterator[None]:
    """Hold the run in `folder` for this process. Raises ConfigError where another supervisor has it, else TrainerError.

    On an object store, SIGTERM comes to this process where another one has taken the run over.
    """
    file = folder.parent / f".{folder.name}.supervised"
    with _lease(file, lease_s) if isinstance(file, FarPath) else _lock(file):
        yield


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as failure:
        raise TrainerError(f"{file} cannot be written: {failure}; choose another run.dir") from failure
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as failure:
            raise _held(file, os.pread(descriptor, 200, 0).decode(errors="replace").strip()) from failure
        except OSError as failure:
            raise TrainerError(f"{file} cannot be locked: {failure}; choose another run.dir") from failure
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{_me()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _lease(file: FarPath, lease_s: float) -> Iterator[None]:
    storage, name = Storage(file.parent.url), file.name
    holder = _holder(storage, name, lease_s)
    if holder is not None and holder != _me() and not _is_gone(holder):
        raise _held(file, f"{holder}, or was until less than {lease_s:g} s ago")
    _write(storage, name)
    time.sleep(_SETTLE_S)
    if (other := _holder(storage, name, math.inf)) != _me():  # of any age: the store may be slow
        raise _held(file, other or "nobody any more")
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(storage, name, lease_s, ended), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        with suppress(TrainerError):  # not a lease: somebody else's file
            if _holder(storage, name, lease_s) == _me():
                storage.delete_files([name])


def _renew(storage: Storage, name: str, lease_s: float, ended: threading.Event) -> None:
    while not ended.wait(lease_s / 4):
        try:
            holder = _holder(storage, name, lease_s)
            if holder in (None, _me()):
                _write(storage, name)
                continue
        except (OSError, StorageError, TrainerError):
            continue  # the store is away, or nobody's lease is there: nobody else can take the run either
        say_error(f"the run is supervised by {holder} now: this supervisor stops")
        os.kill(os.getpid(), signal.SIGTERM)
        return


def _write(storage: Storage, name: str) -> None:
    storage.write_bytes(name, json.dumps({"holder": _me()}).encode())


def _holder(storage: Storage, name: str, lease_s: float) -> str | None:
    """Return who holds the lease; None where nobody does, or has not renewed it for so long, by the store's clock.

    Raises TrainerError where the file is not a lease.
    """
    try:
        age_s = storage.now() - storage.entry(name).mtime_s
        if age_s >= lease_s:
            return None
        holder = parse_json(storage.read_bytes(name))["holder"]
        if isinstance(holder, str) and _HOLDER.fullmatch(holder):
            return holder
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    raise TrainerError(f"{storage.full(name)} is not the lease of a supervisor: remove it if no supervisor runs")


def _me() -> str:
    return f"process {os.getpid()} on {os.uname().nodename}"


def _is_gone(holder: str) -> bool:
    """Return whether the holder was a process of this machine that has ended."""
    match = _HOLDER.fullmatch(holder)
    return match is not None and match[2] == os.uname().nodename and not Path(f"/proc/{match[1]}").exists()


def _held(file: RunPath, holder: str) -> ConfigError:
    run = file.parent / file.name.removeprefix(".").removesuffix(".supervised")
    return ConfigError(f"{run} is supervised already, by {holder}; end that first")
