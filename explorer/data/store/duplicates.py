"""Duplicates: images with the same bytes under several keys, found by their digests in bounded memory.

The digests are read in as many passes as the memory limit needs: one for a million images. Letters of shapes: N rows of
a pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from explorer.data.store.snapshots import NamedImage
from featurestore.format.datafile import KEY, digest_column, numpy_column
from featurestore.keys import Int64Array, shard_of
from featurestore.snapshot import Snapshot
from featurestore.storage.threads import in_threads

PASS_ROWS = 4_000_000
"""Rows in memory at once: 24 bytes each, and as much again for sorting."""
MOST_GROUPS, MOST_KEYS = 1_000, 60
_THREADS = 2
_DIGEST = "content_digest"


@dataclass(frozen=True)
class DuplicateGroup:
    """Keys whose images have equal bytes; `keys` are at most MOST_KEYS of the `count`."""

    digest: str
    count: int
    keys: tuple[int, ...]


@dataclass(frozen=True)
class Duplicates:
    """All groups counted; the largest MOST_GROUPS of them, largest first."""

    num_groups: int
    num_images: int
    """Number of images in all groups."""
    num_without: int
    """Images without a digest, such as imported vectors, which are not compared."""
    groups: tuple[DuplicateGroup, ...]

    @property
    def num_spare(self) -> int:
        """Number of images that are a copy of another one."""
        return self.num_images - self.num_groups


def find_duplicates(snapshot: Snapshot) -> Duplicates:
    """Find all groups. Reads keys and digests, once for every PASS_ROWS rows. Raises CorruptFileError."""
    num_passes = max(1, -(-snapshot.manifest.file_rows // PASS_ROWS))
    parts = np.uint64(num_passes)
    num_groups, num_images, num_without = 0, 0, 0
    groups: list[DuplicateGroup] = []
    for number in range(num_passes):
        keys, digests = [np.empty(0, np.int64)], [np.empty((0, 2), np.uint64)]
        for keys_N, digest_N2 in _digests(snapshot):
            is_blank = ~digest_N2.any(axis=1)
            num_without += int(is_blank.sum()) if number == 0 else 0
            mine = ~is_blank & (digest_N2[:, 0] % parts == number)
            keys.append(keys_N[mine])
            digests.append(digest_N2[mine])
        counted, images, found = _groups(np.concatenate(keys), np.concatenate(digests))
        num_groups, num_images = num_groups + counted, num_images + images
        groups = sorted([*groups, *found], key=lambda group: (-group.count, group.digest))[:MOST_GROUPS]
    return Duplicates(num_groups, num_images, num_without, tuple(groups))


def named(snapshot: Snapshot, keys: tuple[int, ...] | list[int]) -> list[NamedImage]:
    """Find the uris of keys, in the order asked, without missing keys. Reads the uris of their shards."""
    keys_U = np.asarray(keys, np.int64)
    shard_U = shard_of(keys_U, snapshot.info.num_shards)

    def uris(shard: int) -> list[NamedImage]:
        found_K, names = snapshot.shard_reader(shard).uris(keys_U[shard_U == shard])
        return list(map(NamedImage, found_K.tolist(), names))

    known = {image.key: image for part in in_threads(uris, np.unique(shard_U).tolist(), _THREADS) for image in part}
    return [known[key] for key in keys if key in known]


def _digests(snapshot: Snapshot) -> Iterator[tuple[Int64Array, np.ndarray]]:
    """Read keys and digests of all live rows, the digests as two numbers each, (N, 2)."""
    for shard in sorted(snapshot.manifest.shards):
        for table in snapshot.shard_reader(shard).live_tables([KEY, _DIGEST]):
            if len(table):
                yield numpy_column(table, KEY), digest_column(table).view(np.uint64).reshape(-1, 2)


def _groups(keys_N: Int64Array, digest_N2: np.ndarray) -> tuple[int, int, list[DuplicateGroup]]:
    """Count the groups of one pass and their images, and return the largest groups."""
    order_N = np.lexsort((keys_N, digest_N2[:, 1], digest_N2[:, 0]))
    keys_N, digest_N2 = keys_N[order_N], digest_N2[order_N]
    is_first_N = np.ones(len(keys_N), np.bool_)
    is_first_N[1:] = (digest_N2[1:] != digest_N2[:-1]).any(axis=1)
    start_G = np.flatnonzero(is_first_N)
    count_G = np.diff([*start_G, len(keys_N)]) if len(start_G) else np.empty(0, np.int64)
    several_G = np.flatnonzero(count_G > 1)
    largest_G = several_G[np.argsort(-count_G[several_G], kind="stable")[:MOST_GROUPS]]
    groups = [
        DuplicateGroup(
            digest=digest_N2[start].tobytes().hex(),
            count=count,
            keys=tuple(keys_N[start : start + min(count, MOST_KEYS)].tolist()),
        )
        for start, count in zip(start_G[largest_G].tolist(), count_G[largest_G].tolist(), strict=True)
    ]
    return len(several_G), int(count_G[several_G].sum()), groups
