"""Delta publish: vectors of images that are new or changed in a feature store, as one commit of the vectors store.

The vectors store's own manifest says of which snapshot of the features its rows are, so a publish begins there: what
differs between that snapshot and the newest one is looked at, and nothing else. Letters of shapes: K images looked at.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import CommitConflictError, SnapshotNotFoundError, SpecMismatchError
from featurestore.format.datafile import KEY, URI, numpy_column, text_column
from featurestore.format.rows import FeatureRows
from featurestore.identity import SnapshotId
from featurestore.keys import Int64Array, shard_of
from featurestore.lookup.signatures import BITS
from featurestore.snapshot import Snapshot
from featurestore.spec import FileEntry
from featurestore.storage.threads import Progress
from featurestore.store import FeatureStore
from featurestore.upkeep.history import NamedRows, diff
from serving.bundle import EPS
from serving.bundle.images import StoreNetworks
from serving.bundle.manifest import VectorsOf
from serving.bundle.vectors import SIGNATURE_COLUMNS, Float32
from serving.errors import ServingError

_BLOCK_ROWS = 4096
_MAX_ATTEMPTS = 5


@dataclass(frozen=True, kw_only=True)
class PublishReport:
    """What a publish did to one vectors store."""

    store: str
    source: int
    """The snapshot of the features that the vectors are of now."""
    mirrored: int | None
    """Of which they were before; None where nobody knew, or it has expired: then all images were looked at."""
    before: int
    """Snapshot of the vectors store that was the newest before."""
    snapshot: int
    """The newest one now."""
    committed: bool = True
    """Not so where the vectors were of the newest snapshot already."""
    added: int = 0
    changed: int = 0
    removed: int = 0
    stayed: int = 0
    """Images looked at whose vectors moved less than eps."""
    num_bytes: int = 0
    """Of the files written."""
    moved_keys: Int64Array = field(default_factory=lambda: np.empty(0, np.int64), repr=False)
    """Of images added, changed and removed."""

    def figures(self) -> dict[str, Any]:
        """Return all but the keys, for a file of figures."""
        return {name: value for name, value in vars(self).items() if name != "moved_keys"}


def publish(
    vectors: FeatureStore,
    of: VectorsOf,
    networks_for: Callable[[Snapshot], StoreNetworks],
    *,
    source_url: str | None = None,
    eps: float = EPS,
    progress: Progress | None = None,
) -> PublishReport:
    """Bring a vectors store up to the newest snapshot of its features, which are at `source_url` by now.

    A vector stays where no number of it moved by `eps`, nor that share of its signature's bits; with 0, where it is the
    same. Another publish at the same time is waited for, not written over. Cost: that of what differs between the two
    snapshots, and of the keys in shards that differ. Raises AnotherStoreError, SpecMismatchError, TrainerError,
    FeatureStoreError; nothing is published then.
    """
    for _ in range(_MAX_ATTEMPTS):
        now = vectors.snapshot()
        source = FeatureStore.open(source_url or (now.manifest.mirrors or of.source).url)
        newest = source.snapshot()
        _check_source(of, now, newest)
        mirrored = _mirrored(source, now)
        if mirrored is not None and mirrored.version == newest.version:
            return PublishReport(
                store=of.store,
                source=newest.version,
                mirrored=newest.version,
                before=now.version,
                snapshot=now.version,
                committed=False,
            )
        delta = _Delta(vectors, of, now, newest, networks_for(newest), eps)
        for shard, looked, removed in _differences(source, mirrored, newest, now, progress):
            delta.add(shard, looked, removed)
        try:
            made = vectors.commit(
                delta.entries, "publish", only_after=now.version, mirrors=SnapshotId.of(newest).as_source()
            )
        except CommitConflictError:
            continue
        return replace(delta.report(mirrored), snapshot=made.version)
    raise ServingError(
        f"other writers committed to {vectors.url} meanwhile, {_MAX_ATTEMPTS} times in a row: run it again"
    )


class _Delta:
    """Files of the rows that a publish changes, shard by shard of the vectors store, and what is counted."""

    def __init__(
        self,
        vectors: FeatureStore,
        of: VectorsOf,
        now: Snapshot,
        newest: Snapshot,
        networks: StoreNetworks,
        eps: float,
    ) -> None:
        self._vectors, self._of, self._now, self._newest = vectors, of, now, newest
        self._networks, self._eps = networks, eps
        self.entries: dict[int, FileEntry] = {}
        self._added = self._changed = self._removed = self._stayed = 0
        self._moved: list[Int64Array] = [np.empty(0, np.int64)]

    def add(self, shard: int, looked: NamedRows, removed: Int64Array) -> None:
        """Write what changes in one shard: new vectors, and tombstones of images that are gone."""
        reader = self._now.shard_reader(shard)
        known = reader.keys()
        old_KV, is_known_K = reader.features(looked.keys_N)
        new_KV = self._rows(looked.keys_N)
        distance_K = _distances(old_KV, new_KV, SIGNATURE_COLUMNS if self._of.signatures else 0)
        is_far_K = distance_K >= self._eps if self._eps else distance_K > 0
        place_M = np.flatnonzero(~is_known_K | is_far_K)
        gone = removed[np.isin(removed, known)]
        self._added += int((~is_known_K).sum())
        self._changed += int((is_known_K & is_far_K).sum())
        self._stayed += int((is_known_K & ~is_far_K).sum())
        self._removed += len(gone)
        if not len(place_M) and not len(gone):
            return
        uri_of = self._uris(shard, looked.keys_N[is_known_K & is_far_K])
        keys_M = looked.keys_N[place_M]
        uris = [uri_of.get(key, looked.uris[place]) for key, place in zip(keys_M.tolist(), place_M, strict=True)]
        blank_KV = np.zeros((len(gone), self._networks.width), np.float32)
        rows = FeatureRows.of(
            [*uris, *[""] * len(gone)],
            np.concatenate([new_KV[place_M], blank_KV]),
            keys=np.concatenate([keys_M, gone]),
        )
        is_gone = np.arange(len(rows)) >= len(keys_M)
        self.entries |= self._vectors.write(replace(rows, deleted_N=is_gone))
        self._moved += [keys_M, gone]

    def report(self, mirrored: Snapshot | None) -> PublishReport:
        """Sum up; the snapshot is that before the commit."""
        return PublishReport(
            store=self._of.store,
            source=self._newest.version,
            mirrored=mirrored.version if mirrored else None,
            before=self._now.version,
            snapshot=self._now.version,
            num_bytes=sum(entry.bytes for entry in self.entries.values()),
            moved_keys=np.concatenate(self._moved),
            added=self._added,
            changed=self._changed,
            removed=self._removed,
            stayed=self._stayed,
        )

    def _rows(self, keys_K: Int64Array) -> Float32:
        """Compute the rows of images, in the order asked; features are read some thousand at a time."""
        shard_K = shard_of(keys_K, self._newest.info.num_shards)
        rows_KV = np.empty((len(keys_K), self._networks.width), np.float32)
        for shard in np.unique(shard_K).tolist():
            reader, place_M = self._newest.shard_reader(shard), np.flatnonzero(shard_K == shard)
            for start in range(0, len(place_M), _BLOCK_ROWS):
                block = place_M[start : start + _BLOCK_ROWS]
                features, is_there = reader.features(keys_K[block])
                assert is_there.all()
                rows_KV[block] = self._networks.rows(features)
        return rows_KV

    def _uris(self, shard: int, keys: Int64Array) -> dict[int, str]:
        """The uris that images have in the vectors store. A key keeps the one that it has, as no store takes another
        under one key; features that people bring may give a key another."""
        if not len(keys):
            return {}
        table = self._now.shard_reader(shard).read([KEY, URI])
        return dict(zip(numpy_column(table, KEY).tolist(), text_column(table, URI), strict=True))


def _check_source(of: VectorsOf, now: Snapshot, newest: Snapshot) -> None:
    """Raise AnotherStoreError or SpecMismatchError where the features are not those that the vectors are made of."""
    SnapshotId.of_source(now.manifest.mirrors or of.source).check(
        SnapshotId.of(newest),
        f"the vectors store {now.storage.url}",
        "name the address of that store by --store, or export the model again",
    )
    if newest.info.digest != of.features:
        raise SpecMismatchError(
            f"{newest.storage.url} has features of another kind than those that the model's networks were trained on; "
            "name a store of the former by --store"
        )


def _mirrored(source: FeatureStore, now: Snapshot) -> Snapshot | None:
    """Open the snapshot of the features that the vectors are of; None where nobody knows, or it has expired."""
    mirrors = now.manifest.mirrors
    if mirrors is None:
        return None
    try:
        found = source.snapshot(mirrors.version)
    except SnapshotNotFoundError:
        return None
    return found if found.manifest.commit_id == mirrors.commit_id else None


def _differences(
    source: FeatureStore, mirrored: Snapshot | None, newest: Snapshot, now: Snapshot, progress: Progress | None
) -> Iterator[tuple[int, NamedRows, Int64Array]]:
    """Give for each shard of the vectors store the images to look at, and those that may be gone."""
    num_shards = now.info.num_shards
    if mirrored is None:
        per_shard = newest.info.num_shards // num_shards
        for shard in range(num_shards):
            numbers = range(shard * per_shard, (shard + 1) * per_shard)
            yield shard, *_all_rows(newest, numbers, now.shard_reader(shard).keys())
            if progress is not None:
                progress(shard + 1, num_shards)
        return
    found = diff(source, mirrored.version, newest.version, progress)
    looked = NamedRows(
        np.concatenate([found.added.keys_N, found.changed.keys_N]), [*found.added.uris, *found.changed.uris]
    )
    looked_shard, gone_shard = shard_of(looked.keys_N, num_shards), shard_of(found.removed.keys_N, num_shards)
    for shard in np.unique(np.concatenate([looked_shard, gone_shard])).tolist():
        place = np.flatnonzero(looked_shard == shard)
        here = NamedRows(looked.keys_N[place], [looked.uris[each] for each in place])
        yield shard, here, found.removed.keys_N[gone_shard == shard]


def _all_rows(newest: Snapshot, numbers: range, known: Int64Array) -> tuple[NamedRows, Int64Array]:
    """All images of some shards of the features, and the known ones that are not among them."""
    tables = [newest.shard_reader(n).read([KEY, URI]) for n in numbers if newest.manifest.files(n)]
    keys = np.concatenate([np.empty(0, np.int64), *(numpy_column(table, KEY) for table in tables)])
    uris = [uri for table in tables for uri in text_column(table, URI)]
    return NamedRows(keys, uris), known[~np.isin(known, keys)]


def _distances(old_KV: Float32, new_KV: Float32, signature_columns: int) -> NDArray[np.float32]:
    """How far rows have moved, (K,): the farthest number, or the share of a signature's bits that are others."""
    end = old_KV.shape[1] - signature_columns
    distance_K: NDArray[np.float32] = np.abs(new_KV[:, :end] - old_KV[:, :end]).max(axis=1, initial=0)
    if signature_columns:
        old_bits, new_bits = (each[:, end:].astype(np.uint16) for each in (old_KV, new_KV))
        share_K = np.bitwise_count(old_bits ^ new_bits).sum(axis=1, dtype=np.int64) / BITS
        distance_K = np.maximum(distance_K, share_K.astype(np.float32))
    return distance_K
