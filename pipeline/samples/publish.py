"""A folder that is made aside and takes its place as a whole."""

import contextlib
import ctypes
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipeline.errors import SampleError, SampleOptionError

MARK = "summary.json"  # a folder without it was not made here, and is not replaced
LOCK = ".lock"
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE


@contextlib.contextmanager
def replaced_folder(
    target: str | Path, what: str = "samples", spared: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """Give an empty folder next to `target` that takes its place when the block ends, and goes when it raises.

    The block writes MARK into it. `what` it holds is named in messages. What killed runs left next to `target` goes as
    well. Raises SampleError when `target` is there and is not ours, and
    in place of an OSError, the block's too: a full disk, a place that cannot be written. Raises SampleOptionError where
    `target` names no folder, or the place that the program runs in or one of `spared` (by options) would go with it.
    """
    _check_named(str(target), what, spared or {})
    try:
        with _replaced_folder(Path(target), what) as building:
            yield building
    except OSError as error:
        raise SampleError(f"cannot make the {what} in {target}: {error or type(error).__name__}") from error


@contextlib.contextmanager
def _replaced_folder(target: Path, what: str) -> Iterator[Path]:
    _check_replaceable(target, what)
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.building-"
    for left in target.parent.glob(f"{prefix}*"):
        _remove_unless_in_use(left)
    building = target.with_name(f"{prefix}{uuid.uuid4().hex}")
    building.mkdir()
    try:
        with (building / LOCK).open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield building
            (building / LOCK).unlink()
            _check_replaceable(target, what)
            _swap(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _check_named(target: str, what: str, spared: Mapping[str, str]) -> None:
    if not target.strip() or "\0" in target:
        raise SampleOptionError(f"{target!r} is no name of a folder for the {what}; give one")
    place = Path(os.path.realpath(target))  # not Path.resolve, which raises for a circle on Python 3.11
    if Path.cwd().is_relative_to(place):
        raise SampleOptionError(
            f"{target} is the folder that this command runs in, or one above it, and would be replaced by the {what}; "
            "name another"
        )
    for option, path in spared.items():
        if "://" not in path and Path(os.path.realpath(path)).is_relative_to(place):
            raise SampleOptionError(
                f"{target} would be replaced by the {what}, with {option} {path} in it; name another"
            )


def _check_replaceable(target: Path, what: str) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise SampleError(f"{target} is a file; name a folder for the {what}")
    if any(target.iterdir()) and not (target / MARK).is_file():
        raise SampleError(
            f"{target} has files that are no {what} (it has no {MARK}), and its content would be replaced; "
            "name another folder or empty it"
        )


def _swap(building: Path, target: Path) -> None:
    """Exchange both in one step, so that who reads finds all of the old or of the new files.

    Where the system cannot do that, rename twice; should the second fail, the old folder goes back.
    """
    old = target.with_name(f".{target.name}.building-{uuid.uuid4().hex}")
    if not target.exists():
        building.rename(target)
        return
    if _exchange(building, target):
        return  # the old one goes with what was made aside
    target.rename(old)
    try:
        building.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders by renameat2, which Linux has; tell whether that was done."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(_HERE, bytes(one), _HERE, bytes(other), _EXCHANGE) == 0


def _remove_unless_in_use(folder: Path) -> None:
    with contextlib.suppress(OSError):
        with (folder / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
