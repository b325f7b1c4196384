"""Files of this machine for runs on an object store: a folder for what is copied there, and copies of parts."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import xxhash

from featurestore.lookup.cache import RUNS, default_cache_dir, is_cache_file
from featurestore.published.paths import FarPath, RunPath
from featurestore.storage.local import claim
from featurestore.storage.storage import Storage
from trainer.errors import DamagedCheckpointError

_BLOCK_BYTES = 8 << 20


def local_folder(path: RunPath, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return a folder of this machine for what belongs to a run: its own, or of an address one in the cache folder."""
    if not isinstance(path, FarPath):
        return path
    folder = _cache(cache_dir) / f"{path.name}-{xxhash.xxh3_64_hexdigest(path.url.encode())}"
    folder.mkdir(exist_ok=True)
    return folder


def upload_new(folder: Path, names: tuple[str, ...], to: RunPath, known: dict[str, int]) -> None:
    """Copy files of these folders below `folder` to an address, but for those whose size is that in `known`.

    Does nothing where the run is on a disk. Raises OSError, StorageError."""
    if not isinstance(to, FarPath):
        return
    storage = Storage(to.url)
    for file in sorted(each for name in names for each in (folder / name).rglob("*") if each.is_file()):
        name, data = str(file.relative_to(folder)), file.read_bytes()
        if known.get(name) != len(data):
            storage.write_bytes(name, data)
            known[name] = len(data)


@contextlib.contextmanager
def local_copy(path: RunPath, digest: str, cache_dir: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Give a file of this machine with the content of `path`: itself, or a copy in the cache folder for the block.

    `digest`: the xxh3-128 that a copy has to have; a file of a disk is not looked at. Raises DamagedCheckpointError for
    another one, or where the file is gone, OSError, StorageError.
    """
    if not isinstance(path, FarPath):
        yield path
        return
    with tempfile.NamedTemporaryFile(dir=_cache(cache_dir), prefix=".tmp-", suffix=f"-{path.name}") as copy:
        found = xxhash.xxh3_128()
        try:
            with path.open_input() as file:
                while block := file.read(_BLOCK_BYTES):
                    found.update(block)
                    copy.write(block)
        except FileNotFoundError as failure:
            raise DamagedCheckpointError(f"{path} is missing") from failure
        copy.flush()
        if found.hexdigest() != digest:
            raise DamagedCheckpointError(f"{path} is damaged: its digest is not the one in state.json")
        yield Path(copy.name)


def _cache(cache_dir: str | os.PathLike[str] | None) -> Path:
    folder = Path(cache_dir or default_cache_dir())
    claim(folder, is_cache_file)
    claim(folder / RUNS, lambda _: True)
    return folder / RUNS
