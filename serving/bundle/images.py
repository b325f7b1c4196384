"""Rows of a vectors store: visual vectors, computed from features by E.

An export computes them for all images. A publish computes those of images that are new or changed in a feature store,
as one commit of the vectors store: its manifest names the snapshot of features that its rows are computed from, and a
publish reads only the differences between that snapshot and the newest one.

Letters of shapes: K images of a block, M live rows of a shard, D feature width, V columns of a row.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from featurestore.errors import CommitConflictError, SnapshotNotFoundError, SpecMismatchError
from featurestore.format.datafile import FEATURE, KEY, URI, FeatureRows, matrix_of, numpy_column, text_column
from featurestore.format.shard import ShardReader
from featurestore.keys import Int64Array, power_of_two
from featurestore.lookup.embedding import EmbeddingModel
from featurestore.published.versions import VersionName
from featurestore.spec import ExtractorSpec, FileEntry, StoreInfo
from featurestore.storage.storage import Progress
from featurestore.store import FeatureStore, Snapshot, SnapshotId
from serving.bundle.manifest import IMAGES, VECTORS, Missing, VectorsOf
from serving.bundle.open import ModelVersion
from serving.bundle.rows import Float32
from serving.errors import BrokenBundleError, ServingError
from serving.problems import Problem
from trainer.config import ModelConfig
from trainer.engine.wiring import image_model, widths_of_stores
from trainer.models.layers import used_fields
from trainer.runs.open import StorePlace
from trainer.runs.saved import BATCH_ROWS, SavedRun, load_part, visual_vectors
from trainer.schema.fields import Field

ROUNDING = 1e-6
"""By how much a vector may differ that E computes again: the order of its sums depends on the images beside it."""
_NO_KEYS = np.empty(0, np.int64)
_SHARD_BYTES = 32 << 20
"""Most bytes of vectors in a shard, but where the features have too few shards. Shards are few, as a publish writes a
file for each shard that it changes."""


def network_for(version: ModelVersion, of: VectorsOf) -> Callable[[Snapshot], EmbeddingModel]:
    """Read the E of a feature store from a bundle.

    Returns a function that builds it for the features of a snapshot. Raises BrokenBundleError."""
    path = version.files.path(IMAGES)
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BrokenBundleError(Problem.DAMAGED, path, error) from error
    return lambda snapshot: _network(state, of.store, snapshot, version.fields, version.model)


def _network(
    state: Mapping[str, Tensor], store: str, snapshot: Snapshot, fields: Sequence[Field], config: ModelConfig
) -> EmbeddingModel:
    """Build the E of the store that is named `store` in the schema, for features like the snapshot's.

    `state`: the part `stores.` of a checkpoint. Raises CheckpointError if it belongs to another model."""
    model = image_model(snapshot.info.dim, widths_of_stores(tuple(fields), config)[store], config)
    part = f"{store}.model."
    load_part(model, {name.removeprefix(part): tensor for name, tensor in state.items() if name.startswith(part)})
    return model.eval()


def export_vectors(
    saved: SavedRun,
    place: StorePlace,
    state: Mapping[str, Tensor],
    missing: Missing,
    folder_url: str,
    progress: Progress | None = None,
    version: VersionName | None = None,
) -> VectorsOf:
    """Compute the vectors of all images of a store's snapshot into a vectors store below `folder_url`.

    The snapshot is `version`, by default the newest. `state`: the part `stores.` of the checkpoint. To `publish`, all
    images are new. Raises CheckpointError, AnotherStoreError, TrainerError, FeatureStoreError."""
    snapshot, model = saved.snapshot(place, version), saved.config.model
    network = _network(state, place.name, snapshot, used_fields(saved.schema, model), model)
    learned = state.get(f"{place.name}.no_image") if missing == "learned" else None
    no_image_V = np.zeros(network.out, np.float32) if learned is None else learned.float().numpy()
    size_bytes = snapshot.num_rows * 4 * network.out
    info = StoreInfo(
        num_shards=min(snapshot.info.num_shards, power_of_two(max(1, -(-size_bytes // _SHARD_BYTES)))),
        name="visual vectors",
        dim=network.out,
        dtype="float32",
        extractor=ExtractorSpec(
            backbone=f"E of {saved.folder.name}, {saved.checkpoint.name}",
            layer=place.name,
            weights_digest=saved.digest,
            preprocessing=f"features of kind {snapshot.info.digest}",
            compute_dtype=str(model.compute_dtype),
        ),
    )
    source, folder = SnapshotId.of(snapshot).as_source(), f"{VECTORS}/{quote(place.name, safe='')}"
    store = FeatureStore.create(f"{folder_url}/{folder}", info)
    of = VectorsOf(
        store=place.name,
        folder=folder,
        source=source,
        features=snapshot.info.digest,
        store_id=store.info.store_id,
        no_image=tuple(no_image_V.tolist()),
    )
    here, number = snapshot.storage.url, snapshot.version
    publish(store, of, lambda _: network, source_url=here, source_version=number, progress=progress)
    return of


ImageRows = tuple[Int64Array, list[str], NDArray[Any]]
"""Keys, uris and features of K images, as they are stored."""


@dataclass(frozen=True)
class ChangedImages:
    """Images whose features may differ between two snapshots, found by the files that are not in both."""

    mirrored: Snapshot | None
    """None: all images may have changed."""
    newest: Snapshot

    def of_shard(self, shard: int) -> tuple[Iterator[ImageRows], Int64Array]:
        """Return the images of a shard that are new or may have changed, and the keys of those that may be gone.

        Reads the features of images alone that a file names which only one of the snapshots has."""
        reader = self.newest.shard_reader(shard)
        if self.mirrored is None:
            tables, info = reader.live_tables([KEY, URI, FEATURE]), self.newest.info
            every = ((numpy_column(each, KEY), text_column(each, URI), matrix_of(each, info)) for each in tables)
            return every, _NO_KEYS
        new, old = self.newest.manifest.files(shard), self.mirrored.manifest.files(shard)
        num_same = sum(1 for _ in takewhile(lambda pair: pair[0].path == pair[1].path, zip(old, new, strict=False)))
        differing = [*new[num_same:], *old[num_same:]]
        if not differing:
            return iter(()), _NO_KEYS
        touched = np.unique(ShardReader(self.newest.storage, self.newest.info, shard, differing).all_keys())
        keys, uris = reader.uris(touched)
        blocks = [slice(start, start + BATCH_ROWS) for start in range(0, len(keys), BATCH_ROWS)]
        found = ((keys[here], uris[here], reader.features(keys[here])[0]) for here in blocks)
        return found, np.setdiff1d(touched, reader.keys())


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
    """Images examined whose vectors are the same, but for rounding."""
    num_bytes: int = 0
    """Bytes of the files written."""
    most_files: int = 0
    """Largest number of files of a vectors shard; every publish adds one."""


def publish(
    vectors: FeatureStore,
    of: VectorsOf,
    network_for: Callable[[Snapshot], EmbeddingModel],
    *,
    source_url: str | None = None,
    source_version: VersionName | None = None,
    progress: Progress | None = None,
) -> PublishReport:
    """Update a vectors store to the newest snapshot of its features, or to `source_version`.

    `source_url`: where the features are now. A vector is kept if none of its numbers moved by more than `ROUNDING`.
    Concurrent publishes do not overwrite each other.
    Cost: reads the features of images in files added since, keys and uris of their shards, and the vectors of the
    shards that they change; reads all features if the previous snapshot is unknown or expired. Raises
    AnotherStoreError, SpecMismatchError, TrainerError or FeatureStoreError without publishing anything.
    """
    for _ in range(_MAX_ATTEMPTS):
        now = vectors.snapshot()
        source = FeatureStore.open(source_url or (now.manifest.mirrors or of.source).url)
        newest = source.snapshot(source_version)
        _check_source(of, now, newest)
        mirrored = _mirrored(source, now)
        report = PublishReport(
            store=of.store,
            source=newest.version,
            mirrored=mirrored.version if mirrored else None,
            before=now.version,
            snapshot=now.version,
            committed=False,
        )
        if mirrored is not None and mirrored.version == newest.version:
            return report
        delta = _Delta(vectors, now, network_for(newest), ChangedImages(mirrored, newest), progress)
        for shard in range(now.info.num_shards):
            delta.add(shard)
        try:
            mirrors = SnapshotId.of(newest).as_source()
            made = vectors.commit(delta.entries, "publish", only_after=now.version, mirrors=mirrors)
        except CommitConflictError:
            continue
        return replace(
            report,
            snapshot=made.version,
            committed=True,
            num_bytes=sum(entry.bytes for entry in delta.entries.values()),
            most_files=max(map(len, made.manifest.shards.values()), default=0),
            **dict[str, Any](delta.counts),
        )
    raise ServingError(Problem.OVERTAKEN, vectors.url, _MAX_ATTEMPTS)


@dataclass
class _Delta:
    """The files with the rows that a publish changes, shard by shard of the vectors store, and counts of images."""

    _vectors: FeatureStore
    _now: Snapshot
    _network: EmbeddingModel
    _changes: ChangedImages
    _progress: Progress | None
    entries: dict[int, FileEntry] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, shard: int) -> None:
        """Write the changes of one shard: new vectors, and tombstones of removed images."""
        keys_K, uris, new_KV, gone = self._examine(shard)
        if not len(keys_K) and gone is not None and not len(gone):
            return
        reader = self._now.shard_reader(shard)
        known = reader.keys()
        old_KV, is_known_K = reader.features(keys_K)
        distance_K = np.abs(new_KV - old_KV).max(axis=1, initial=0)
        is_far_K = distance_K > ROUNDING
        place_M = np.flatnonzero(~is_known_K | is_far_K)
        gone = known[~np.isin(known, keys_K)] if gone is None else gone[reader.contains(gone)]
        self.counts["added"] += int((~is_known_K).sum())
        self.counts["changed"] += int((is_known_K & is_far_K).sum())
        self.counts["stayed"] += int((is_known_K & ~is_far_K).sum())
        self.counts["removed"] += len(gone)
        if not len(place_M) and not len(gone):
            return
        keys_M = keys_K[place_M]
        # A store refuses a second uri under one key, and features that users import may have another one by now.
        keys_with_uri, known_uris = reader.uris(keys_M)
        theirs = dict(zip(keys_with_uri.tolist(), known_uris, strict=True))
        rows = FeatureRows.of(
            [*map(theirs.get, keys_M.tolist(), (uris[place] for place in place_M)), *[""] * len(gone)],
            np.concatenate([new_KV[place_M], np.zeros((len(gone), self._network.out), np.float32)]),
            keys=np.concatenate([keys_M, gone]),
        )
        self.entries |= self._vectors.write(replace(rows, deleted_N=np.arange(len(rows)) >= len(keys_M)))

    def _examine(self, shard: int) -> tuple[Int64Array, list[str], Float32, Int64Array | None]:
        """Return keys, uris and new rows of a shard's images that may have changed, and keys of those that may be gone.
        If the last is None, all images that are not among the first are gone. E runs on some thousand images at a
        time."""
        per_shard = self._changes.newest.info.num_shards // self._now.info.num_shards
        keys, rows = [np.empty(0, np.int64)], [np.empty((0, self._network.out), np.float32)]
        uris: list[str] = []
        gone: list[Int64Array] = [np.empty(0, np.int64)]
        waiting: list[NDArray[Any]] = []
        for number in range(shard * per_shard, (shard + 1) * per_shard):
            images, left = self._changes.of_shard(number)
            gone.append(left)
            for keys_K, uris_K, features_KD in images:
                keys.append(keys_K)
                uris += uris_K
                waiting.append(features_KD)
                if sum(map(len, waiting)) >= BATCH_ROWS:
                    rows.append(visual_vectors(self._network, np.concatenate(waiting)))
                    waiting = []
            if self._progress is not None:
                self._progress(number + 1, self._changes.newest.info.num_shards)
        if waiting:
            rows.append(visual_vectors(self._network, np.concatenate(waiting)))
        all_gone = np.concatenate(gone) if self._changes.mirrored else None
        return np.concatenate(keys), uris, np.concatenate(rows), all_gone


def _check_source(of: VectorsOf, now: Snapshot, newest: Snapshot) -> None:
    """Raise AnotherStoreError or SpecMismatchError unless these are the features that the vectors are computed from."""
    SnapshotId.of_source(now.manifest.mirrors or of.source).check(
        SnapshotId.of(newest),
        f"the vectors store {now.storage.url}",
        "name the address of that store by --store, or export the model again",
    )
    if newest.info.digest != of.features:
        raise SpecMismatchError(Problem.OTHER_FEATURES, newest.storage.url)


def _mirrored(source: FeatureStore, now: Snapshot) -> Snapshot | None:
    """Open the snapshot of the features that the vectors match; None if it is unknown or has expired."""
    if (mirrors := now.manifest.mirrors) is not None:
        with suppress(SnapshotNotFoundError):
            found = source.snapshot(mirrors.version)
            return found if found.manifest.commit_id == mirrors.commit_id else None
    return None
