"""Read the files of one published version by the names that they have in it, as if they lay in a folder."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Annotated, NoReturn

from pydantic import Field

from featurestore.errors import StorageError
from featurestore.log import manifest_path, versions
from featurestore.spec import Frozen, OptionalId, Sealed, StorePath, Version, read_sealed
from featurestore.storage.local import StorageEntry
from featurestore.storage.remote import Names
from featurestore.storage.storage import Entries, Storage

VERSIONS, FILES = "versions", "files"


class PublishedFile(Frozen):
    """A file of a version: where it lies, relative to the address."""

    path: StorePath
    size_bytes: Annotated[int, Field(ge=0)]


class PublishedVersion(Sealed):
    """The files of a version, by name."""

    version: Version
    publication: OptionalId
    """Random, so that no other's is the same."""
    writer: str
    time_s: float
    """For people; order comes from the version alone."""
    files: dict[StorePath, PublishedFile]


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

    def create_exclusive(self, path: str, data: bytes) -> NoReturn:
        raise self._refusal(path)

    def write_bytes(self, path: str, data: bytes | bytearray) -> NoReturn:
        raise self._refusal(path)

    def open_output(self, path: str) -> NoReturn:
        raise self._refusal(path)

    def delete(self, path: str) -> NoReturn:
        raise self._refusal(path)

    def delete_files(self, paths: Iterable[str]) -> NoReturn:
        raise self._refusal("")

    def _refusal(self, path: str) -> StorageError:
        return StorageError(f"{self.full(path)}: version {self.published.version} is published and never changes")

    def _place(self, path: str) -> str:
        try:
            return self.published.files[path].path
        except KeyError:
            raise FileNotFoundError(f"{self.url}, version {self.published.version}, has no file {path}") from None


def open_published(url: str | os.PathLike[str]) -> Storage:
    """Open the files of the newest version at an address, or of the plain folder that it is where there is none.

    Several ranks open it on one of them and send the others what it returns, so that all have one version. Raises
    CorruptFileError, StorageError.
    """
    storage = Storage(url)
    if storage.is_local and not Path(storage.url).is_dir():
        return storage  # a file, or nothing: who reads it says so
    known = versions(storage, VERSIONS)
    return PublishedFiles(storage.url, read_version(storage, known[-1])) if known else storage


def read_version(storage: Storage, version: int) -> PublishedVersion:
    """Read what a version has. Raises FileNotFoundError, CorruptFileError."""
    return read_sealed(storage, manifest_path(version, VERSIONS), PublishedVersion)
