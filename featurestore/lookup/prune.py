"""Remove cache files that no run opens any more, so that a store that is refreshed daily does not fill the disk.

A cache file is named `shard-SHARD-STORE-DIGEST`, and its seal's time is that of its last opening (to the hour). Whoever
opens a partition removes from the folder

- files of the same store and shard with another digest (another snapshot's) that nobody has opened for a day;
- files of any store that nobody has opened for 30 days;
- what a build that was killed has left, after a day.

Runs that have the files open keep them: on Linux a mapped file lives on without its name. A run that still needs them
later builds them again.
"""

import contextlib
import os
import time
import uuid
from collections.abc import Collection
from pathlib import Path

SUFFIXES = (".keys.npy", ".rows.bin", ".json")
SEAL = ".json"
SAMPLES = "samples"
TEMPORARY = ".tmp-"
_DAY_S = 24 * 3600.0
_UNUSED_S = 30 * _DAY_S
_TOUCH_S = 3600.0


def is_cache_file(name: str) -> bool:
    """Whether a name in a cache folder is one that we give; what the trainer knows of samples is in a folder of it."""
    is_shard = name.startswith("shard-") and name.endswith(SUFFIXES)
    return is_shard or name.startswith(TEMPORARY) or name == SAMPLES


def touch(seal: Path) -> None:
    """Note that the files of a seal are opened. Raises FileNotFoundError where it is gone."""
    if time.time() - seal.stat().st_mtime > _TOUCH_S:
        try:
            os.utime(seal)
        except FileNotFoundError:
            raise
        except OSError:  # a disk that may only be read
            return


def prune(folder: Path, opened: Collection[str]) -> None:
    """Remove what is old, but for the stems that were just `opened`. One listing; what cannot be removed stays."""
    slots = {_slot(stem) for stem in opened}
    now_s = time.time()
    with contextlib.suppress(OSError):
        ages = {}
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):  # another rank has removed it meanwhile
                ages[entry.name] = now_s - entry.stat().st_mtime
        for name, age_s in ages.items():
            stem = next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), "")
            if name.startswith(TEMPORARY) or (stem and f"{stem}{SEAL}" not in ages):
                if age_s > _DAY_S and stem not in opened:
                    _unlink(folder / name)
            elif name.endswith(SEAL) and stem not in opened:
                limit_s = _DAY_S if _slot(stem) in slots else _UNUSED_S
                if age_s > limit_s:
                    _remove(folder, stem, limit_s)


def _slot(stem: str) -> str:
    """Shard and store."""
    return stem.rpartition("-")[0]


def _remove(folder: Path, stem: str, limit_s: float) -> None:
    """The seal goes first: without it the others are not there for anybody."""
    seal, aside = folder / f"{stem}{SEAL}", folder / f"{TEMPORARY}{uuid.uuid4().hex}"
    with contextlib.suppress(OSError):
        seal.rename(aside)
        if time.time() - aside.stat().st_mtime < limit_s:  # opened since the listing
            aside.rename(seal)
            return
        for suffix in SUFFIXES[:-1]:
            _unlink(folder / f"{stem}{suffix}")
        _unlink(aside)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
