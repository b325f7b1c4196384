"""What is known of the samples' files: the digest of their contents, and what was measured on them, kept in a cache.

Names and counts of rows do not tell: labels can be turned round in place. Nor does a checksum in a file's metadata:
tools that read, change and write a table copy it. So each file is read once, by one of the ranks, and read again only
when its tag (inode, size and times; an ETag on an object store) is another one.
"""

import contextlib
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from featurestore.console.output import text_console
from featurestore.errors import StorageError
from featurestore.lookup.cache import SAMPLES, default_cache_dir
from featurestore.storage.local import StorageEntry, claim, is_private
from featurestore.storage.storage import Storage, digest_of, settled_tags
from trainer.comm import Comm
from trainer.errors import DataError
from trainer.samples.columns import SPLITS, in_either_split
from trainer.samples.reader import SampleIndex

_REMEMBERED = 16  # measurements of one folder of samples: other days, other snapshots
_THREADS = 4  # waiting for the disk or the network; xxh3 takes 18 GB/s on one core
_REPORTED_BYTES = 1 << 30


def samples_digest(comm: Comm, index: SampleIndex, cache_dir: str | Path | None = None) -> str:
    """Compute the digest of the samples' names, counts and contents, which checkpoints keep.

    The files of `index` that are not known yet are read, by each rank its share; every rank calls it.

    What is known is kept in `cache_dir`/samples on rank 0's machine. Raises DataError on all ranks together.
    """
    files = list(dict.fromkeys(each.file for each in index.row_groups))  # by name, whichever split they are in
    memory = _Memory(index.storage, Path(cache_dir or default_cache_dir()) / SAMPLES)
    known, unknown = comm.on_rank_0(lambda: memory.split(files))
    size_bytes = sum(unknown.values())
    if size_bytes > _REPORTED_BYTES:
        console = text_console(quiet=comm.rank != 0)
        console.print(f"reading {size_bytes / 1e9:.1f} GB of samples in {index.storage.url} to tell them from others")
    with comm.agreed():
        by_size = sorted(unknown, key=lambda file: (-unknown[file], file))  # so that no rank has much more to read
        found = _digests(index.storage, by_size[comm.rank :: comm.size])
    for share in comm.allgather_object(found, name="samples_digest"):
        known |= share
    comm.on_rank_0(lambda: memory.keep(known))
    return xxhash.xxh3_128_hexdigest("\n".join([index.layout_digest, *(known[file] for file in files)]).encode())


def _digests(storage: Storage, files: Sequence[str]) -> dict[str, str]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(files, pool.map(lambda file: _digest(storage, file), files), strict=True))


def _digest(storage: Storage, file: str) -> str:
    try:
        return in_either_split(partial(digest_of, storage), file)
    except (OSError, StorageError) as failure:
        raise DataError(f"{storage.full(file)} cannot be read: {failure}") from failure


class _Memory:
    """Digests of earlier starts by the files' tags.

    Where it cannot be read or kept, or other users may write to it, it is empty."""

    def __init__(self, storage: Storage, folder: Path) -> None:
        self._storage = storage
        self._file = folder / f"{xxhash.xxh3_64_hexdigest(storage.url.encode())}.json"
        self._entries: dict[str, StorageEntry] = {}
        self._tags: dict[str, str] = {}
        """Of the files whose digests may be kept."""

    def split(self, files: Sequence[str]) -> tuple[dict[str, str], dict[str, int]]:
        """Digests of the files that are known, and sizes in bytes of the others."""
        listed = [each for split in SPLITS for each in self._storage.entries(split, recursive=False)]
        self._entries = {each.path: each for each in listed}
        kept, settled = self._read(), settled_tags(listed)
        known: dict[str, str] = {}
        for file in files:
            if file in settled:
                self._tags[file] = settled[file]
                tag, digest = kept.get(file, ("", ""))
                if tag == settled[file]:
                    known[file] = digest
        sizes = {file: entry.size_bytes for file, entry in self._entries.items()}
        return known, {file: sizes.get(file, 0) for file in files if file not in known}

    def keep(self, digests: Mapping[str, str]) -> None:
        """Writes what is new, and forgets files that are gone."""
        kept = {file: value for file, value in self._read().items() if file in self._entries}
        mine = {file: [tag, digests[file]] for file, tag in self._tags.items()}
        if all(kept.get(file) == (tag, digest) for file, (tag, digest) in mine.items()):
            return
        _remember(self._file, kept | mine)

    def _read(self) -> dict[str, tuple[str, str]]:
        try:
            return {str(file): (str(tag), str(digest)) for file, (tag, digest) in _remembered(self._file).items()}
        except (ValueError, TypeError):
            return {}


def measured_once(
    comm: Comm, index: SampleIndex, what: str, asked: object, cache_dir: str | None, measured: Callable[[], Any]
) -> Any:
    """Return what `measured` returns for `asked`, or what the cache folder of rank 0's machine has kept of it.

    The folder keeps the last ones of each address of samples. Every rank calls it.
    """
    key = xxhash.xxh3_128_hexdigest(json.dumps(asked, sort_keys=True).encode())
    name = f"{xxhash.xxh3_64_hexdigest(index.storage.url.encode())}-{what}.json"
    file = Path(cache_dir or default_cache_dir()) / SAMPLES / name
    found = comm.on_rank_0(lambda: _remembered(file).get(key))
    if found is None:
        found = measured()
        kept = {**_remembered(file), key: found}
        comm.on_rank_0(lambda: _remember(file, dict(list(kept.items())[-_REMEMBERED:])))
    return found


def _remembered(file: Path) -> dict[str, Any]:
    """Read what `_remember` wrote; nothing where it cannot be read, or where other users may write to it."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if is_private(file.lstat()) else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(file: Path, values: Mapping[str, Any]) -> None:
    """Keep `values` as JSON in a file of the cache folder for samples; do nothing where it cannot be written."""
    part = file.with_name(f".tmp-{uuid.uuid4().hex}")
    with contextlib.suppress(OSError, StorageError):
        claim(file.parent.parent)
        claim(file.parent)
        part.touch(mode=0o600)
        part.write_text(json.dumps(values), encoding="utf-8")
        part.replace(file)
