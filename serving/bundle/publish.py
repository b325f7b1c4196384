"""Delta publish: vectors of images that are new or changed in a feature store, as one commit of the vectors store.

The vectors store's own manifest says of which snapshot of the features its rows are, so a publish begins there: what
differs between that snapshot and the newest one is looked at, and nothing else. Letters of shapes: K images looked at.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import CommitConflictError, SnapshotNotFoundError, SpecMismatchError
from featurestore.format.rows import FeatureRows
from featurestore.format.shard import ShardReader
from featurestore.keys import Int64Array
from featurestore.published.channels import VersionName
from featurestore.snapshot import Snapshot, SnapshotId
from featurestore.spec import FileEntry
from featurestore.storage.threads import Progress
from featurestore.store import FeatureStore
from serving.bundle import EPS
from serving.bundle.images import BATCH_ROWS, ChangedImages, StoreNetworks
from serving.bundle.manifest import VectorsOf
from serving.bundle.vectors import SIGNATURE_COLUMNS, Float32
from serving.errors import ServingError
from trainer.engine.similarity import BITS

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
    most_files: int = 0
    """Files of the shard of the vectors that has most; every publish adds one."""
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
    source_version: VersionName | None = None,
    eps: float = EPS,
    progress: Progress | None = None,
) -> PublishReport:
    """Update a vectors store to the newest snapshot of its features, or to `source_version`.

    The features are at `source_url` by now. A vector stays where no number of it moved by `eps`, nor that share of its
    signature's bits; with 0, where it is the same. Another publish at the same time is waited for, not written over.
    Cost: reading the files of features that were added since, and the vectors of shards that they change; all features
    where the snapshot of the last time is not known any more. Raises AnotherStoreError, SpecMismatchError,
    TrainerError, FeatureStoreError; nothing is published then.
    """
    for _ in range(_MAX_ATTEMPTS):
        now = vectors.snapshot()
        source = FeatureStore.open(source_url or (now.manifest.mirrors or of.source).url)
        newest = source.snapshot(source_version)
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
        delta = _Delta(vectors, of, now, networks_for(newest), ChangedImages(mirrored, newest), eps)
        for shard in range(now.info.num_shards):
            delta.add(shard)
            if progress is not None:
                progress(shard + 1, now.info.num_shards)
        try:
            made = vectors.commit(
                delta.entries, "publish", only_after=now.version, mirrors=SnapshotId.of(newest).as_source()
            )
        except CommitConflictError:
            continue
        most_files = max(map(len, made.manifest.shards.values()), default=0)
        return replace(delta.report(mirrored), snapshot=made.version, most_files=most_files)
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
        networks: StoreNetworks,
        changes: ChangedImages,
        eps: float,
    ) -> None:
        self._vectors, self._of, self._now = vectors, of, now
        self._networks, self._changes, self._eps = networks, changes, eps
        self.entries: dict[int, FileEntry] = {}
        self._added = self._changed = self._removed = self._stayed = 0
        self._moved: list[Int64Array] = [np.empty(0, np.int64)]

    def add(self, shard: int) -> None:
        """Write what changes in one shard: new vectors, and tombstones of images that are gone."""
        keys_K, uris, new_KV, gone = self._looked_at(shard)
        if not len(keys_K) and gone is not None and not len(gone):
            return
        reader = self._now.shard_reader(shard)
        known = reader.keys()
        old_KV, is_known_K = reader.features(keys_K)
        distance_K = row_distances(old_KV, new_KV, SIGNATURE_COLUMNS if self._of.signatures else 0)
        is_far_K = distance_K >= self._eps if self._eps else distance_K > 0
        place_M = np.flatnonzero(~is_known_K | is_far_K)
        gone = known[~np.isin(known, keys_K)] if gone is None else gone[reader.contains(gone)]
        self._added += int((~is_known_K).sum())
        self._changed += int((is_known_K & is_far_K).sum())
        self._stayed += int((is_known_K & ~is_far_K).sum())
        self._removed += len(gone)
        if not len(place_M) and not len(gone):
            return
        keys_M = keys_K[place_M]
        rows = FeatureRows.of(
            [*self._uris(reader, keys_M, [uris[place] for place in place_M]), *[""] * len(gone)],
            np.concatenate([new_KV[place_M], np.zeros((len(gone), self._networks.width), np.float32)]),
            keys=np.concatenate([keys_M, gone]),
        )
        self.entries |= self._vectors.write(replace(rows, deleted_N=np.arange(len(rows)) >= len(keys_M)))
        self._moved += [keys_M, gone]

    def report(self, mirrored: Snapshot | None) -> PublishReport:
        """Sum up; the snapshot is that before the commit."""
        return PublishReport(
            store=self._of.store,
            source=self._changes.newest.version,
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

    def _looked_at(self, shard: int) -> tuple[Int64Array, list[str], Float32, Int64Array | None]:
        """Return keys, uris and new rows of a shard's images that may have changed, and keys of those that may be gone.

        None as the last: all that are not among the first. Networks run on some thousand images at a time."""
        per_shard = self._changes.newest.info.num_shards // self._now.info.num_shards
        keys, rows = [np.empty(0, np.int64)], [np.empty((0, self._networks.width), np.float32)]
        uris: list[str] = []
        gone: list[Int64Array] = [np.empty(0, np.int64)]
        waiting: list[NDArray[Any]] = []
        for number in range(shard * per_shard, (shard + 1) * per_shard):
            images, left = self._changes.of_shard(number)
            gone.append(left)
            for block in images:
                keys.append(block.keys_K)
                uris += block.uris
                waiting.append(block.features_KD)
                if sum(map(len, waiting)) >= BATCH_ROWS:
                    rows.append(self._networks.rows(np.concatenate(waiting)))
                    waiting = []
        if waiting:
            rows.append(self._networks.rows(np.concatenate(waiting)))
        all_gone = np.concatenate(gone) if self._changes.mirrored else None
        return np.concatenate(keys), uris, np.concatenate(rows), all_gone

    def _uris(self, reader: ShardReader, keys_M: Int64Array, uris: list[str]) -> list[str]:
        """Return the uris of images: where the vectors store knows an image, the uri that is there.

        No store takes another uri under a key, and features that people bring may give a key another."""
        keys_K, theirs = reader.uris(keys_M)
        known = dict(zip(keys_K.tolist(), theirs, strict=True))
        return [known.get(key, uri) for key, uri in zip(keys_M.tolist(), uris, strict=True)]


def _check_source(of: VectorsOf, now: Snapshot, newest: Snapshot) -> None:
    """Raise AnotherStoreError or SpecMismatchError where the features are not those that the vectors are made of."""
    SnapshotId.of_source(now.manifest.mirrors or of.source).check(
        SnapshotId.of(newest),
        f"the vectors store {now.storage.url}",
        "name the address of that store by --store, or export the model again",
    )
    if newest.info.digest != of.features:
        raise SpecMismatchError(
            f"{newest.storage.url} has features of another kind than the model's networks were trained on; "
            "name by --store one with features of that kind"
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


def row_distances(old_KV: Float32, new_KV: Float32, signature_columns: int) -> NDArray[np.float32]:
    """Return how far rows have moved, (K,): the farthest number, or the share of a signature's bits that are others.

    The last `signature_columns` of the V numbers are a signature, 16 bits in each.
    """
    end = old_KV.shape[1] - signature_columns
    distance_K: NDArray[np.float32] = np.abs(new_KV[:, :end] - old_KV[:, :end]).max(axis=1, initial=0)
    if signature_columns:
        old_bits, new_bits = (each[:, end:].astype(np.uint16) for each in (old_KV, new_KV))
        share_K = np.bitwise_count(old_bits ^ new_bits).sum(axis=1, dtype=np.int64) / BITS
        distance_K = np.maximum(distance_K, share_K.astype(np.float32))
    return distance_K
