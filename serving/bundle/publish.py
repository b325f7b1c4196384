"""Delta publish: vectors of images that are new or changed in a feature store, as one commit of the vectors store.

The vectors store's manifest names the snapshot of features that its rows are computed from. A publish reads only the
differences between that snapshot and the newest one. Letters of shapes: K images examined.
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
    """The snapshot of the features that the vectors now match."""
    mirrored: int | None
    """The snapshot that they matched before; None if unknown or expired: then all images were examined."""
    before: int
    """The newest snapshot of the vectors store before."""
    snapshot: int
    """The newest snapshot of the vectors store now."""
    committed: bool = True
    """False if the vectors already matched the newest snapshot."""
    added: int = 0
    changed: int = 0
    removed: int = 0
    stayed: int = 0
    """Images examined whose vectors moved by less than eps."""
    num_bytes: int = 0
    """Bytes of the files written."""
    most_files: int = 0
    """Largest number of files of a vectors shard; every publish adds one."""
    moved_keys: Int64Array = field(default_factory=lambda: np.empty(0, np.int64), repr=False)
    """Keys of images added, changed and removed."""

    def summary(self) -> dict[str, Any]:
        """Return all fields but the keys, for a JSON file."""
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

    `source_url`: where the features are now. A vector is kept if none of its numbers moved by `eps` or more, nor that
    share of its signature's bits; with eps=0, if it is identical. Concurrent publishes do not overwrite each other.
    Cost: reads the files of features added since, and the vectors of the shards that they change; reads all features if
    the previous snapshot is unknown or expired. Raises AnotherStoreError, SpecMismatchError, TrainerError or
    FeatureStoreError without publishing anything.
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
        f"other writers committed to {vectors.url} at the same time, {_MAX_ATTEMPTS} times in a row: run it again"
    )


class _Delta:
    """The files with the rows that a publish changes, shard by shard of the vectors store, and counts."""

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
        """Write the changes of one shard: new vectors, and tombstones of removed images."""
        keys_K, uris, new_KV, gone = self._examine(shard)
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
        """Return the report; its snapshot is the one before the commit."""
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

    def _examine(self, shard: int) -> tuple[Int64Array, list[str], Float32, Int64Array | None]:
        """Return keys, uris and new rows of a shard's images that may have changed, and keys of those that may be gone.
        If the last is None, all images that are not among the first are gone. Networks run on some thousand images at a
        time."""
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
        """Return the uris of images, preferring those that the vectors store already has.

        A store refuses a second uri under one key, but features that users import may have another uri for a key."""
        keys_K, theirs = reader.uris(keys_M)
        known = dict(zip(keys_K.tolist(), theirs, strict=True))
        return [known.get(key, uri) for key, uri in zip(keys_M.tolist(), uris, strict=True)]


def _check_source(of: VectorsOf, now: Snapshot, newest: Snapshot) -> None:
    """Raise AnotherStoreError or SpecMismatchError unless these are the features that the vectors are computed from."""
    SnapshotId.of_source(now.manifest.mirrors or of.source).check(
        SnapshotId.of(newest),
        f"the vectors store {now.storage.url}",
        "name the address of that store by --store, or export the model again",
    )
    if newest.info.digest != of.features:
        raise SpecMismatchError(
            f"{newest.storage.url} has features of another kind than the model's networks were trained on; "
            "name a store with features of that kind by --store"
        )


def _mirrored(source: FeatureStore, now: Snapshot) -> Snapshot | None:
    """Open the snapshot of the features that the vectors match; None if it is unknown or has expired."""
    mirrors = now.manifest.mirrors
    if mirrors is None:
        return None
    try:
        found = source.snapshot(mirrors.version)
    except SnapshotNotFoundError:
        return None
    return found if found.manifest.commit_id == mirrors.commit_id else None


def row_distances(old_KV: Float32, new_KV: Float32, signature_columns: int) -> NDArray[np.float32]:
    """Return how far rows have moved, (K,): the largest change of a number, or the share of changed signature bits.

    The last `signature_columns` of the V numbers are a signature, 16 bits in each.
    """
    end = old_KV.shape[1] - signature_columns
    distance_K: NDArray[np.float32] = np.abs(new_KV[:, :end] - old_KV[:, :end]).max(axis=1, initial=0)
    if signature_columns:
        old_bits, new_bits = (each[:, end:].astype(np.uint16) for each in (old_KV, new_KV))
        share_K = np.bitwise_count(old_bits ^ new_bits).sum(axis=1, dtype=np.int64) / BITS
        distance_K = np.maximum(distance_K, share_K.astype(np.float32))
    return distance_K
