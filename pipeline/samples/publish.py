"""Files that are made aside and take the place of others as a whole: a folder, or a version of an address."""

import contextlib
import ctypes
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from featurestore.console.output import progress_bar
from featurestore.errors import CommitConflictError
from featurestore.published import versions
from featurestore.storage.safety import refuse_unsafe
from featurestore.storage.storage import Storage, in_threads
from pipeline.errors import SampleError, SampleOptionError
from pipeline.problems import Problem

SPLITS = ("train", "test")
MARK = "summary.json"
QUARANTINE_FILE = "quarantine.parquet"
LOCK = ".lock"
KEEP_DAYS = 7
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
_UPLOADS = 4  # at once, each with its file in memory
_DAY_S = 86_400


@dataclass(frozen=True)
class NewFiles:
    """Files in the making: `folder` is where they are written; `kept` are taken over from those that are there."""

    folder: Path
    before: Storage
    kept: dict[str, str] = field(default_factory=dict)
    """Names in `before` of kept files, by their new names: their bytes are neither read nor written."""


@contextlib.contextmanager
def replaced_files(
    target: str,
    *,
    before: Storage | None = None,
    spared: Mapping[str, str] | None = None,
    scratch: str | None = None,
    keep_days: float = KEEP_DAYS,
) -> Iterator[NewFiles]:
    """Yield an empty folder whose files, with those that are kept, take the place of all at `target` after the block.

    On a disk it lies next to `target`, and takes its place in one step. At another address the files become its next
    version (see featurestore.published): the folder is in `scratch` then, and each file is uploaded, which holds
    `_UPLOADS` of them in memory; versions that were replaced more than `keep_days` ago go. Files next to the splits are
    put at the address as well, for people. Leftovers of killed runs are removed, and so is the folder when the block
    raises. `before`: the files that the new ones were made from.

    Raises SampleOptionError where `target` names no folder or holds something else, or the place that the program runs
    in or one of `spared` (by options) would go with it; SampleError in place of an OSError, the block's too: a full
    disk, a place that cannot be written; StorageError; CommitConflictError where another command has replaced `before`
    by the end of the block.
    """
    place = Storage(target) if target.strip() else None
    if place is None or place.is_local:
        with _next_to(place.url if place and "://" in target else target, before, spared or {}) as new:
            yield new
        return
    new_before = before or versions.open_published(target)
    of_a_killed_build = {versions.FILES, versions.VERSIONS}
    _check_samples(new_before.url, set(new_before.list()) - of_a_killed_build)
    if not isinstance(new_before, versions.PublishedFiles):
        refuse_unsafe(place)
    try:
        with _building(Path(scratch or tempfile.gettempdir()), f".crossmedia-{os.getuid()}.building-") as folder:
            new = NewFiles(folder, new_before)
            yield new
            _publish(place, new, before is not None)
    except OSError as error:
        raise SampleError(Problem.REFUSED, "make the samples in", target, str(error) or type(error).__name__) from error
    versions.expire(place, keep_days * _DAY_S)


@contextlib.contextmanager
def _next_to(name: str, before: Storage | None, spared: Mapping[str, str]) -> Iterator[NewFiles]:
    _check_named(name, spared)
    target = Path(name)
    try:
        _check_replaceable(target)
        with _building(target.parent, f".{target.name}.building-") as folder:
            new = NewFiles(folder, before or Storage(target))
            folder_before = _inode(new.before)
            yield new
            for kept, kept_before in new.kept.items():
                _link(Path(new.before.url, kept_before), folder / kept)
            if before is not None and _inode(before) != folder_before:
                raise CommitConflictError(Problem.REPLACED_MEANWHILE, target)
            (folder / LOCK).unlink()
            _check_replaceable(target)
            _swap(folder, target)
    except OSError as error:
        raise SampleError(Problem.REFUSED, "make the samples in", target, str(error) or type(error).__name__) from error


def _inode(folder: Storage) -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return Path(folder.url).stat().st_ino
    return None


def _publish(place: Storage, new: NewFiles, is_made_from_before: bool) -> None:
    names = sorted(str(path.relative_to(new.folder)) for path in new.folder.rglob("*") if path.is_file())
    names.remove(LOCK)
    with progress_bar("uploading", len(names)) as bar:
        uploads = in_threads(
            lambda name: versions.upload(place, new.folder / name, name), names, _UPLOADS, lambda *_: bar.advance(1)
        )
        files = dict(zip(names, uploads, strict=True))
    files |= {name: _published(new.before, name_before) for name, name_before in new.kept.items()}
    version_before = new.before.published.version if isinstance(new.before, versions.PublishedFiles) else 0
    versions.publish(place, files, version_before if is_made_from_before else None)
    for name in names:
        if "/" not in name:
            place.write_bytes(name, (new.folder / name).read_bytes())


def _published(before: Storage, name: str) -> versions.PublishedFile:
    """Name a file that is there, of a version or of a plain folder."""
    if isinstance(before, versions.PublishedFiles):
        return before.published.files[name]
    return versions.PublishedFile(path=name, size_bytes=before.size(name))


@contextlib.contextmanager
def _building(parent: Path, prefix: str) -> Iterator[Path]:
    """Make a folder for the time of the block; those of killed runs go."""
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{prefix}*"):
        _remove_unless_in_use(left)
    building = parent / f"{prefix}{uuid.uuid4().hex}"
    building.mkdir()
    try:
        with (building / LOCK).open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield building
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _check_named(target: str, spared: Mapping[str, str]) -> None:
    if not target.strip() or "\0" in target:
        raise SampleOptionError(Problem.NOT_A_FOLDER, target)
    place = Path(os.path.realpath(target))  # not Path.resolve, which raises for a circle on Python 3.11
    if Path.cwd().is_relative_to(place):
        raise SampleOptionError(Problem.OWN_FOLDER, target)
    for option, path in spared.items():
        if "://" not in path and Path(os.path.realpath(path)).is_relative_to(place):
            raise SampleOptionError(Problem.OPTION_INSIDE, target, option, path)


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise SampleOptionError(Problem.NOT_A_FOLDER, str(target))
    _check_samples(str(target), {path.name for path in target.iterdir()})


def _check_samples(place: str, names: Collection[str]) -> None:
    """Raise SampleOptionError where the names at a place show that it holds something else."""
    lacking = next((name for name in (MARK, "train") if name not in names), None)
    if names and lacking:
        raise SampleOptionError(Problem.NOT_SAMPLES, place, lacking)


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
    """Exchange the names of two folders by renameat2, which Linux has; return whether that was done."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(_HERE, bytes(one), _HERE, bytes(other), _EXCHANGE) == 0


def _link(file: Path, to: Path) -> None:
    """Link a file under a second name; a copy, where the disk has no links."""
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, to)
    except OSError:
        shutil.copy2(file, to)


def _remove_unless_in_use(folder: Path) -> None:
    with contextlib.suppress(OSError):
        with (folder / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
