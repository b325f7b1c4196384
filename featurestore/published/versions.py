"""Numbered files, of which the first writer wins: published versions with the parts they name, and channels.

A channel is a name such as `stable`, which points to a snapshot and can be moved to another one.

    channels/stable/00000000000000000003.json      the third move; creating it is the move

A move never changes, so the moves are the history of a channel. The newest one says where it points to.
"""

import contextlib
import itertools
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any, NoReturn, TypeVar

from pydantic import Field

from featurestore import spec
from featurestore.errors import ChannelError, CommitConflictError, CorruptFileError, StorageError
from featurestore.log import CHANNELS, manifest_path, versions, writer_name
from featurestore.problems import Problem
from featurestore.storage.local import StorageEntry
from featurestore.storage.remote import Names
from featurestore.storage.storage import Entries, Storage

VERSIONS, FILES = "versions", "files"


class PublishedFile(spec.Frozen):
    """A file of a version: where it lies, relative to the address."""

    path: spec.StorePath
    size_bytes: Annotated[int, Field(ge=0)]


class PublishedVersion(spec.Sealed):
    """The files of a version, by name."""

    version: spec.Version
    publication: spec.OptionalId
    """Random, so that no other's is the same."""
    writer: str
    time_s: float
    """Time for display; order comes from the version alone."""
    files: dict[spec.StorePath, PublishedFile]


class PublishedFiles(Storage):
    """The files of one version, read like those of a folder; nothing is written here. Pickles with the version."""

    def __init__(self, url: str, published: PublishedVersion) -> None:
        super().__init__(url)
        self.published = published
        self._plain = Storage(url)

    def __reduce__(self) -> tuple[type[Storage], tuple[str, PublishedVersion]]:  # type: ignore[override]
        return PublishedFiles, (self.url, self.published)

    def full(self, path: str) -> str:
        """Return the address at which the file of this name lies."""
        file = self.published.files.get(path)
        return self._plain.full(file.path if file else path)

    def list(self, path: str = "") -> Names:
        """List names of files and folders directly below `path`, sorted."""
        start = f"{path}/" if path else ""
        return sorted({name[len(start) :].split("/")[0] for name in self.published.files if name.startswith(start)})

    def entries(self, path: str = "", recursive: bool = True) -> Entries:
        """List the files below `path`, by name, with sizes, times and tags of the places where they lie."""
        start = f"{path}/" if path else ""
        named = {
            name: file.path
            for name, file in self.published.files.items()
            if name.startswith(start) and (recursive or "/" not in name[len(start) :])
        }
        folders = {place.rpartition("/")[0] for place in named.values()}
        found = {each.path: each for folder in folders for each in self._plain.entries(folder, recursive=False)}
        return sorted(found[place]._replace(path=name) for name, place in named.items() if place in found)

    def entry(self, path: str) -> StorageEntry:
        return self._plain.entry(self._place(path))._replace(path=path)

    def size(self, path: str) -> int:
        self._place(path)
        return self.published.files[path].size_bytes

    def read_bytes(self, path: str) -> bytes:
        return self._plain.read_bytes(self._place(path))

    def read_into(self, path: str, out: memoryview) -> int:
        return self._plain.read_into(self._place(path), out)

    def open_input(self, path: str) -> IO[bytes]:
        return self._plain.open_input(self._place(path))

    def _refuse(self, path: Any, *_: Any) -> NoReturn:
        raise StorageError(Problem.ALREADY_PUBLISHED, self.url, path, self.published.version)

    create_exclusive = write_bytes = open_output = delete = delete_files = _refuse  # type: ignore[assignment]

    def _place(self, path: str) -> str:
        try:
            return self.published.files[path].path
        except KeyError:
            raise FileNotFoundError(Problem.NO_SUCH_FILE.of(self.url, self.published.version, path)) from None


def open_published(url: str | os.PathLike[str]) -> Storage:
    """Open the files of the newest version at an address, or of the plain folder that it is where there is none.

    Several ranks open it on one of them and send the others what it returns, so that all have one version. Raises
    CorruptFileError, StorageError.
    """
    storage = Storage(url)
    if storage.is_local and not Path(storage.url).is_dir():
        return storage  # a file, or nothing: the reader reports it
    for _ in range(_MAX_LISTINGS):
        known = versions(storage, VERSIONS)
        with contextlib.suppress(FileNotFoundError):  # replaced and expired since it was listed
            return PublishedFiles(storage.url, read_version(storage, known[-1])) if known else storage
    raise StorageError(Problem.LISTED_BUT_MISSING, "versions", storage.url, _MAX_LISTINGS)


def read_version(storage: Storage, version: int) -> PublishedVersion:
    """Read the manifest of a version. Raises FileNotFoundError, CorruptFileError."""
    return spec.read_sealed(storage, manifest_path(version, VERSIONS), PublishedVersion)


_MAX_ATTEMPTS = 300
_EXPIRY_S = 300.0
"""Longest time from an expiry's look at a file to its removal; at most half of the time that files are kept."""
_MAX_LISTINGS = 20
_OURS = re.compile(FILES + r"/[^/]*-[0-9a-f]{32}(\.[^/.]*)?")


def upload(storage: Storage, file: Path, name: str) -> PublishedFile:
    """Write a file of this machine to a place of its own, as `write_part`. Holds its bytes in memory on the way."""
    return write_part(storage, name, file.read_bytes())


def write_part(storage: Storage, name: str, data: bytes | bytearray) -> PublishedFile:
    """Write the content of a file to a place of its own, where nobody sees it until a version names it."""
    path = part_path(name)
    storage.write_bytes(path, data)
    return PublishedFile(path=path, size_bytes=len(data))


def part_path(name: str) -> str:
    """Draw a path of its own for the content of a file, relative to the address."""
    last = PurePosixPath(name)
    return f"{FILES}/{last.stem}-{uuid.uuid4().hex}{last.suffix}"


def publish(
    storage: Storage, files: Mapping[str, PublishedFile], after: int | None = None, publication: str | None = None
) -> PublishedVersion:
    """Create the next version, of these files by name, all of which have to be there already.

    `after`: the version that it was made from, 0 where there was none: where another one is the newest by then,
    CommitConflictError is raised. None: it needs none, and becomes the newest. `publication`: by which the caller knows
    it again where an answer is lost; by default one that is drawn. Killed at any moment, it is published
    or not. Raises CommitConflictError also for a file that is gone, StorageError: then it is not known whether it was
    published.
    """
    if gone := missing(storage, files.values()):
        raise CommitConflictError(Problem.REMOVED_BEFORE_PUBLISHED, storage.full(gone[0]))
    writer, now_s, nonce = writer_name(), time.time(), publication or uuid.uuid4().hex
    named = dict(sorted(files.items()))

    def version_of(number: int) -> PublishedVersion:
        return PublishedVersion(version=number, publication=nonce, writer=writer, time_s=now_s, files=named)

    return append_numbered(storage, VERSIONS, version_of, after, names_files=True)


def expire(storage: Storage, keep_s: float, files_at_once: bool = False) -> list[str]:
    """Remove versions that were replaced longer than `keep_s` ago, and files that no version names and that are as old.

    Those that a killed writer left are among these. The newest version stays, and so do files that were at the address
    before there were versions. Ages are by the storage's clock. Returns the paths that were removed.

    `files_at_once`: all files go that the newest version does not name, so that a disk gets their room; who reads an
    earlier version may miss one. Whoever has just published may do so: other writers' files are among them.
    """
    end_s = time.monotonic() + max(_EXPIRY_S, keep_s / 2)
    unnamed = _remove_unnamed(storage, versions(storage, VERSIONS)[-1:], math.inf, end_s) if files_at_once else None
    since_s = storage.now() - keep_s
    known = {manifest_path(version, VERSIONS) for version in versions(storage, VERSIONS)}
    published = [each for each in storage.entries(VERSIONS, recursive=False) if each.path in known]
    old = [each.path for each, after in itertools.pairwise(published) if after.mtime_s < since_s]
    storage.delete_files(old)
    if unnamed is None:
        unnamed = _remove_unnamed(storage, versions(storage, VERSIONS), since_s, end_s)
    return [*old, *unnamed]


def _remove_unnamed(storage: Storage, known: Sequence[int], before_s: float, end_s: float) -> list[str]:
    """Remove files older than that which none of these versions names; returns their paths.

    Removes nothing where a version is gone: another expiry is at work, and later versions may name the same files; nor
    after `end_s` of this machine's monotonic clock: whoever was away since it looked knows nothing of later versions.
    """
    found = storage.entries(FILES, recursive=False)
    named: set[str] = set()
    for version in known:
        try:
            named |= {file.path for file in read_version(storage, version).files.values()}
        except FileNotFoundError:
            return []
    unnamed = [
        each.path for each in found if each.path not in named and each.mtime_s < before_s and _OURS.fullmatch(each.path)
    ]
    for place, path in enumerate(unnamed):
        if time.monotonic() > end_s:
            return unnamed[:place]
        storage.delete_files([path])
    return unnamed


def missing(storage: Storage, files: Iterable[PublishedFile]) -> list[str]:
    """List the places of files that are not there, sorted. Raises StorageError."""
    places = {file.path for file in files}
    folders = {place.rpartition("/")[0] for place in places}
    found = {each.path for folder in folders for each in storage.entries(folder, recursive=False)}
    return sorted(places - found)


SealedT = TypeVar("SealedT", bound=spec.Sealed)


def append_numbered(
    storage: Storage,
    folder: str,
    model_of: Callable[[int], SealedT],
    after: int | None = None,
    *,
    names_files: bool = False,
) -> SealedT:
    """Create the next file of a folder; where another writer was first, the one after it.

    `model_of` makes what the file of a number holds, which must be like no other's. `after`: the number that was the
    highest when the caller looked, 0 for none; where it is another by now, nothing is written. `names_files`: nor is it
    where an expiry has removed the number meanwhile: it may have been this one's, and its files are going. Raises
    CommitConflictError then, and after hundreds of lost races; StorageError: it may have been created or not.
    """
    for _ in range(_MAX_ATTEMPTS):
        highest = max(versions(storage, folder), default=0)
        if after is not None and highest != after:
            raise CommitConflictError(Problem.ANOTHER_PUBLISHED_FIRST, storage.full(folder), highest, after)
        mine = model_of(highest + 1)
        path, data = manifest_path(highest + 1, folder), spec.seal(mine)  # like no other's; a NaN would become null
        if storage.create_or_read(path, data) == data:
            if not _is_late(storage, folder, path):
                return mine
            storage.delete(path)
            if names_files:
                raise CommitConflictError(Problem.REMOVED_MEANWHILE, storage.full(path))
    raise CommitConflictError(Problem.OTHERS_PUBLISHED_FIRST, _MAX_ATTEMPTS, storage.url)


def _is_late(storage: Storage, folder: str, path: str) -> bool:
    """Return whether a file was created behind higher numbers: its own was free only as `expire` had removed it."""
    made_s = {entry.path: entry.mtime_s for entry in storage.entries(folder, recursive=False)}
    return any(other > path and time_s < made_s.get(path, -math.inf) for other, time_s in made_s.items())


VersionName = int | str
"""The number of a snapshot, or the name of a channel that points to one."""

_CHANNEL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
# Words that YAML or a user would take for something else.
_OTHERWISE = {"newest", "latest", "none", "null", "true", "false", "yes", "no", "on", "off", "inf", "nan", "y", "n"}


class ChannelMove(spec.Sealed):
    """One move of a channel; without a version it removed the channel."""

    channel: str
    number: Annotated[int, Field(ge=1, le=spec.MAX_VERSION)]
    version: spec.Version | None
    commit_id: spec.OptionalId  # of the snapshot; empty without one
    reason: str  # for display
    writer: str
    time_s: Annotated[float, Field(ge=0, le=spec.LAST_SECOND)]  # for display
    nonce: spec.RandomId


def is_channel_name(name: str) -> bool:
    """Return whether a channel may have this name."""
    return _CHANNEL_NAME.fullmatch(name) is not None and name.lower() not in _OTHERWISE


def check_channel_name(name: str) -> str:
    """Return the name. Raises ChannelError where no channel may have it."""
    if not is_channel_name(name):
        raise ChannelError(Problem.NOT_A_CHANNEL_NAME, name, ", ".join(sorted(_OTHERWISE)))
    return name


def version_name(text: str) -> VersionName:
    """Read a user's name of a snapshot: its number, or a channel. Raises ValueError."""
    if re.fullmatch(r"[+-]?[0-9]+", text):
        return int(text)
    if not is_channel_name(text):
        raise ValueError(Problem.NOT_A_VERSION.of(text))
    return text


def read_moves(storage: Storage, name: str) -> list[ChannelMove]:
    """Read all moves of a channel, the first one first; none where it never was. Raises CorruptFileError."""
    return [_read_move(storage, name, number) for number in versions(storage, _channel_folder(name))]


def last_move(storage: Storage, name: str) -> ChannelMove | None:
    """Read the newest move of a channel; None if it never existed. Raises CorruptFileError, with the way out."""
    numbers = versions(storage, _channel_folder(name))
    return _read_move(storage, name, numbers[-1]) if numbers else None


def read_channels(storage: Storage) -> list[ChannelMove]:
    """Read where each channel points to, by name. Raises CorruptFileError."""
    last = [last_move(storage, name) for name in storage.list(CHANNELS) if is_channel_name(name)]
    return [move for move in last if move is not None and move.version is not None]


def find_channel(storage: Storage, name: str) -> ChannelMove:
    """Read where a channel points to. Raises ChannelError where there is none, which names those that there are."""
    move = last_move(storage, check_channel_name(name))
    if move is None or move.version is None:
        known = ", ".join(each.channel for each in read_channels(storage)) or "none"
        raise ChannelError(Problem.NO_CHANNEL, storage.url, name, known)
    return move


def add_move(storage: Storage, name: str, version: int | None, commit_id: str, reason: str) -> ChannelMove:
    """Move a channel; without a version, remove it.

    For `featurestore.upkeep.history`, which sees that the snapshot does not expire meanwhile.
    """
    writer, now_s, nonce = writer_name(), time.time(), uuid.uuid4().hex

    def move_of(number: int) -> ChannelMove:
        return ChannelMove(
            channel=name,
            number=number,
            version=version,
            commit_id=commit_id,
            reason=reason,
            writer=writer,
            time_s=now_s,
            nonce=nonce,
        )

    return append_numbered(storage, _channel_folder(name), move_of)


def _channel_folder(name: str) -> str:
    return f"{CHANNELS}/{check_channel_name(name)}"


def _read_move(storage: Storage, name: str, number: int) -> ChannelMove:
    path = manifest_path(number, _channel_folder(name))
    way_out = f"set the channel again: crossmedia store channel {storage.url} {name} N"
    try:
        move = spec.read_sealed(storage, path, ChannelMove)
    except FileNotFoundError as error:
        raise CorruptFileError(Problem.MISSING_UNTIL_MENDED, storage.full(path), way_out) from error
    except CorruptFileError as error:
        raise CorruptFileError(Problem.BROKEN_UNTIL_MENDED, error, way_out) from error
    if (move.channel, move.number) != (name, number):
        raise CorruptFileError(Problem.ANOTHER_MOVE, storage.full(path), move.number, move.channel, way_out)
    return move
