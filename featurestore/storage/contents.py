"""The bytes of files, distinguished by a digest, and without reading them again by their tags."""

import time
from collections.abc import Iterable

import xxhash

from featurestore.storage.local import StorageEntry
from featurestore.storage.storage import Storage

_BLOCK_BYTES = 8 << 20
_SETTLED_S = 2.0  # a file that changes twice within a tick of the clock may keep its tag


def digest_of(storage: Storage, path: str) -> str:
    """Compute the xxh3-128 of the bytes of a file. Raises OSError, StorageError."""
    digest = xxhash.xxh3_128()
    with storage.open_input(path) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def settled_tags(entries: Iterable[StorageEntry]) -> dict[str, str]:
    """Give the tags of files by path: of those that are old enough that another content has another tag."""
    settled_s = time.time() - _SETTLED_S
    return {entry.path: entry.tag for entry in entries if entry.tag and entry.mtime_s < settled_s}
