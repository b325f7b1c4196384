"""Trained runs, opened to be asked and not to be trained: their folders, and a model out of a checkpoint.

Every command that looks at runs reads their folders by `read_run`, so a checkpoint is chosen, and an image without a
feature treated, in one way; their engines are opened by `open_at`. `open_trained` opens no samples and looks images up
in the newest snapshot; `open_source` opens the samples too, and looks images up where training did.

The visual vectors of all images of a snapshot, as a run's E makes them, need no engine, no samples and no partition of
a store: images are read shard by shard, in the memory of the largest data file.

Letters of shapes: K rows of a block, D feature width, V visual width.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from featurestore.errors import FeatureStoreError
from featurestore.format.datafile import KEY, URI
from featurestore.keys import AnyArray, Float32Array, Int64Array
from featurestore.lookup.embedding import EmbeddingModel
from featurestore.lookup.ondevice import as_tensor
from featurestore.published.paths import RunPath
from featurestore.published.versions import VersionName, open_published
from featurestore.spec import MissingPolicy
from featurestore.storage.storage import Storage, cached_property, file_at
from featurestore.store import VECTORS_OF, FeatureStore, Snapshot, SnapshotId
from trainer.comm import Comm, SoloComm
from trainer.config import Config, Device, load_saved
from trainer.engine.engine import Engine
from trainer.engine.machine import share_machine
from trainer.engine.wiring import image_model, widths_of_stores
from trainer.errors import CheckpointError, ConfigError, DataError, DataNotFoundError, TrainerError
from trainer.ids.shards import check_names
from trainer.models.layers import used_fields
from trainer.problems import Problem
from trainer.runs import checkpoint as checkpoints
from trainer.runs import open as opening
from trainer.runs.checkpoint import read_dense
from trainer.runs.folder import STATE, Checkpoint, find_checkpoint, report_of
from trainer.samples.columns import sample_files
from trainer.samples.index import SampleIndex, open_index
from trainer.samples.survey import IdDictionary, fill_in, samples_digest, texts_of_ids
from trainer.schema.fields import Schema, load_schema

Vectors = Float32Array
TRAIN, TEST = "train", "test"
VECTOR = "vector"
BATCH_ROWS = 4096
Progress = Callable[[int, int], None]


@dataclass
class SavedRun:
    """A run as its folder and one of its checkpoints describe it.

    `config` is as in training, but for what asking a run takes: images without a feature stop nothing, they are zeros
    at least, and no visual vector is an earlier step's.
    """

    folder: RunPath
    config: Config
    checkpoint: Checkpoint
    state: checkpoints.CheckpointState
    missing_in_training: MissingPolicy
    """Policy of the training for images without a feature; `error` is `zeros` here."""

    @property
    def digest(self) -> str:
        """The sha256 of the checkpoint's state.json, which has the digest of each file: no other one has the same."""
        return hashlib.sha256(self.checkpoint.read_bytes(STATE)).hexdigest()

    @cached_property
    def schema(self) -> Schema:
        """The run's schema. Raises SchemaError, and CheckpointError where model or fields are not the checkpoint's."""
        recorded = self.state.origin
        schema = fill_in(load_schema(self.config.data.schema_file), recorded.model.get("fields", {}))
        mine = recorded.model_copy(update={"model": opening.model_of(self.config, schema)})
        mine.check_same(recorded, self.checkpoint, checkpoints.TO_READ)
        return schema

    def texts_of(self, ids: Iterable[int], samples: Storage) -> dict[int, str]:
        """Find the texts of IDs that are hashes: in the run's dictionary, else in that next to these samples.

        Raises DataError."""
        return texts_of_ids(ids, self.dictionaries(samples))

    def dictionaries(self, samples: Storage) -> tuple[IdDictionary, ...]:
        """Open the run's dictionary of IDs, and then that next to these samples, as far as they are there."""
        both = (IdDictionary.of_run(self.folder), IdDictionary.of_samples(samples))
        return tuple(each for each in both if each is not None)

    @cached_property
    def places(self) -> list[opening.StorePlace]:
        """Return the places of the stores that the model's content fields name. Raises as `schema`, and ConfigError."""
        return opening.store_places(self.config, self.schema)

    def snapshot(self, place: opening.StorePlace, version: VersionName | None = None) -> Snapshot:
        """Choose a snapshot to look images up in: the newest of the store, or the requested one.

        Raises CheckpointError where it has other features than those that the run's E was trained on, and
        AnotherStoreError where it is of another store.
        """
        snapshot = FeatureStore.open(place.url).snapshot(version)
        if differing := opening.other_features(snapshot.info, self.state, place.name):
            values = str(self.checkpoint), place.url, "; ".join(differing)
            raise CheckpointError(Problem.STORE_OF_OTHER_FEATURES, *values)
        opening.check_identity(place, snapshot, (self.checkpoint, self.state))
        return snapshot

    def trained_on(self, place: opening.StorePlace) -> Snapshot:
        """Choose the snapshot that the run was trained on, or that of its settings. Raises as `snapshot`."""
        return self.snapshot(place, opening.snapshot_of(place, (self.checkpoint, self.state)).version)

    def notes_on_missing(self, num_lookups: int) -> list[str]:
        """Return a warning for figures where lookups found no feature."""
        never_met = self.missing_in_training == "error" or self.missing_met == 0
        if not never_met or not num_lookups:
            return []
        return [
            f"the run was trained with data.missing={self.missing_in_training}, and its model has never met an image "
            f"without a feature; here such images get zeros ({num_lookups:,} lookups)"
        ]

    @cached_property
    def missing_met(self) -> int | None:
        """Count lookups of images without a feature in the training; None: it did not report them."""
        count = (report_of(self.folder) or {}).get("missing_lookups")
        return count if isinstance(count, int) else None

    @property
    def met_missing_often(self) -> bool:
        """Whether it looked up such an image at least once in 100 samples: of fewer a model learns next to nothing."""
        met, samples = self.missing_met, (report_of(self.folder) or {}).get("samples")
        return met is not None and isinstance(samples, int) and 0 < samples <= 100 * met

    def named(self) -> dict[str, str]:
        """Describe the run and checkpoint of an exported file, for its metadata."""
        return {"run": str(self.folder), "checkpoint": self.checkpoint.name, "checkpoint_digest": self.digest}


@dataclass(kw_only=True)
class TrainedRun(opening.OpenRun):
    """A run's engine as one of its checkpoints has it; close it."""

    saved: SavedRun

    def close(self) -> None:
        """Release the stores' rows, and the ID tables, which refer to each other, with the last use of the engine."""
        super().close()
        for source in self.engine.id_sources:
            source.key_sources.clear()


def read_run(folder: RunPath, which: str | None = None, samples: str | None = None) -> SavedRun:
    """Read the run in `folder`, with the checkpoint that `which` says; see `find_checkpoint`.

    `samples` are other ones to ask about: those of training are looked for there where the run's own are gone. Raises
    ConfigError for a folder that holds no run, CheckpointError where there is no such checkpoint.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        below = folder.iterdir() if folder.is_dir() else ()
        runs = sorted(each.name for each in below if (each / "config.yaml").is_file())
        instead = f"; it holds the runs {', '.join(runs[:5])}" if runs else "; give a run's folder, as data/runs/NAME"
        raise ConfigError(Problem.NOT_A_RUN, folder, instead)
    config = load_saved(file)
    found = find_checkpoint(folder, which)
    data: dict[str, Any] = {"missing": "zeros" if config.data.missing == "error" else config.data.missing}
    splits, own = (TRAIN, TEST) if config.data.train_days else (TRAIN,), config.data.samples  # a day may be in either
    if samples and not any(sample_files(open_published(own), split) for split in splits):
        data["samples"] = samples
    asked = config.changed(data=data)
    return SavedRun(folder, asked, found, checkpoints.read_state(found), config.data.missing)


def open_trained(
    folder: RunPath,
    comm: Comm,
    *,
    which: str | None = None,
    samples: str | None = None,
    store_version: VersionName | None = None,
    as_trained: bool = False,
    store: str | None = None,
    device: Device | None = None,
) -> TrainedRun:
    """Open the run in `folder`; `which` and `samples` as in `read_run`. Every rank calls it.

    `store_version`: the snapshot of the (first) feature store to look images up in, by default the newest, so that
    images that came after the training are known; further stores are opened at their newest. `as_trained`: images are
    looked up where training did, in every store, as `open_source` does. `store`: where the first store is now.
    `device`: in the place of the run's run.device. Raises TrainerError, FeatureStoreError, on all ranks together.
    """
    saved = comm.on_rank_0(partial(read_run, folder, which, samples))
    data, run = {} if store is None else {"store": store}, {} if device is None else {"device": device}
    saved = replace(saved, config=saved.config.changed(data=data, run=run))
    places = comm.on_all(lambda: saved.places)
    if as_trained:
        return open_at(saved, comm, places, saved.trained_on)
    return open_at(saved, comm, places, lambda each: saved.snapshot(each, store_version if each is places[0] else None))


def open_at(saved: SavedRun, comm: Comm, places: list[opening.StorePlace], choose: opening.Choose) -> TrainedRun:
    """Open a run's engine, with its checkpoint and its rows of the snapshots that rank 0 chooses. Every rank calls it.

    `places` are the run's, or have other addresses. Raises TrainerError, FeatureStoreError.
    """
    config = saved.config
    comm.deadline_s = config.run.deadline_s
    device = share_machine(config, comm)
    partitions, _ = opening.open_stores(config, comm, places, choose, measured=False)
    engine = Engine(comm, saved.schema, partitions, config, device=device, reading=True)
    checkpoints.load(comm, saved.checkpoint, saved.state, engine, config.data.cache_dir)
    return TrainedRun(
        saved=saved,
        config=config,
        comm=comm,
        schema=saved.schema,
        engine=engine,
        partitions=partitions,
        stores=opening.records(places, partitions),
    )


@dataclass(frozen=True)
class RunSource:
    """A run to open: its folder, and the settings that differ from it.

    `checkpoint`: see `find_checkpoint`; `store_version` is of `store`, by default its newest snapshot.
    """

    folder: RunPath
    checkpoint: str | None = None
    samples: str | None = None
    store: str | None = None
    store_version: VersionName | None = None


@dataclass(kw_only=True)
class PredictingRun(TrainedRun):
    """A run's engine, and the samples to predict, on the ranks of its `comm`; close it."""

    test: SampleIndex
    notes: list[str]
    """Notes for a reader of the figures."""


@dataclass(kw_only=True)
class EvaluatedRun(PredictingRun):
    """A run that predicts, and its training samples."""

    train: SampleIndex
    samples_changed: bool
    """Whether the training samples are not, or no longer, those of the checkpoint."""


def open_source(source: RunSource, comm: Comm) -> EvaluatedRun:
    """Open a run as `open_predicting` does, and its training samples. Every rank calls it.

    Raises DataError too for missing places, on all ranks together.
    """
    saved = _saved(source, comm)
    try:
        samples = comm.on_rank_0(lambda: opening.open_samples(saved.config, saved.places))
    except DataError as failure:
        failure.add_note(f"(places as in {source.folder / 'config.yaml'}; name others by --samples and --store)")
        raise
    data = saved.config.data
    train = open_index(comm, samples, TRAIN, saved.schema, data.train_days)
    changed = samples_digest(comm, train, data.cache_dir) != saved.state.origin.data["samples_digest"]
    opened = _predicting(source, saved, comm)
    if changed:
        note = (
            f"the training samples in {data.samples} are not, or no longer, those of the checkpoint: what is new, and "
        )
        opened.notes.insert(0, f"{note}what was seen how often, is counted in the samples that are there now")
    return EvaluatedRun(**vars(opened), train=train, samples_changed=changed)


def open_predicting(source: RunSource, comm: Comm) -> PredictingRun:
    """Open a run with its newest checkpoint, or another, on as many ranks as there are. Every rank calls it.

    Samples, stores and snapshots are those that the run was trained on; `store`, where that one is now, replaces
    data.store, at `store_version`, by default its newest snapshot. Image keys without a feature are treated as in
    training, and as zeros where they stopped it. Raises, on all ranks together, ConfigError for a folder that holds no
    run, CheckpointError where there is no checkpoint or the store holds other features than those of training,
    DataError.
    """
    return _predicting(source, _saved(source, comm), comm)


def _saved(source: RunSource, comm: Comm) -> SavedRun:
    """Read the run with the places of `source`, whose store is at one snapshot, as rank 0 finds them.

    Raises as `open_predicting`."""

    def read() -> SavedRun:
        saved, data = read_run(source.folder, source.checkpoint, source.samples), dict[str, Any]()
        if source.samples is not None:
            data["test_days"] = []  # the run's own test samples are not needed
        if source.store is not None and saved.config.model.images != "none":
            try:
                version = FeatureStore.open(source.store).snapshot(source.store_version).version
            except FeatureStoreError as failure:
                raise ConfigError(Problem.STORE_OPTION_WRONG, source.store, failure) from failure
            data |= {"store": source.store, "store_version": version}
        return replace(saved, config=saved.config.changed(data=data))

    saved = comm.on_rank_0(read)
    comm.on_all(lambda: saved.places)  # reads the schema, too
    return saved


def _predicting(source: RunSource, saved: SavedRun, comm: Comm) -> PredictingRun:
    test = open_test(comm, saved.config, saved.schema, source.samples)
    opened = open_at(saved, comm, saved.places, saved.trained_on)
    return PredictingRun(**vars(opened), test=test, notes=_notes(source, saved, opened.stores))


def _notes(source: RunSource, saved: SavedRun, stores: Mapping[str, SnapshotId]) -> list[str]:
    """List notes for a reader of the figures."""
    notes = []
    if source.store is not None and all(record.url != source.store for record in stores.values()):
        notes.append(f"the model reads nothing from data.store: --store {source.store} is not used")
    recorded = checkpoints.read_recorded(saved.checkpoint).stores
    for name, record in stores.items():
        trained_on, accepted = recorded[name], saved.state.stores[name]
        if accepted != trained_on:
            trained, instead = trained_on.described(), accepted.described()
            notes.append(f"store {name}: the run was trained on {trained}; {instead} was accepted in its place")
        if record.version != accepted.version:
            now = f"store {name} is at snapshot {record.version} ({record.url})"
            notes.append(f"{now}; the run was trained on snapshot {accepted.version}")
    return notes


def open_test(comm: Comm, config: Config, schema: Schema, samples: str | None) -> SampleIndex:
    """Index the impressions to ask about: test/ of `samples`, else the test split or test days of the run.

    Every rank calls it. Raises DataError, SchemaError.
    """
    if samples is None and config.data.test_days == []:
        raise DataNotFoundError(Problem.RUN_WITHOUT_TEST)
    days = None if samples else config.data.test_days
    return open_index(comm, samples or config.data.samples, TEST, schema, days)


def finite(vectors_NW: Vectors) -> Vectors:
    """Return the vectors. Raises TrainerError where one is not finite: an index of such numbers would lie."""
    if not np.isfinite(vectors_NW).all():
        raise TrainerError(Problem.VECTORS_NOT_FINITE)
    return vectors_NW


# Also rows of a row group. E takes .3 to .6 of the time an image that it takes in the store's blocks of 256.


@dataclass(frozen=True, kw_only=True)
class ImageNetwork:
    """The E of a run for one store, and the images that it is to look at: what is exported of a store."""

    saved: SavedRun
    store: str
    width: int
    """Numbers of a visual vector."""
    snapshot: Snapshot

    @cached_property
    def model(self) -> EmbeddingModel:
        """E with its weights, which are read when they are first asked for. Raises CheckpointError."""
        saved, config = self.saved, self.saved.config
        model = image_model(self.snapshot.info.dim, self.width, config.model)
        part = f"stores.{self.store}.model."
        load_part(model, read_dense(saved.checkpoint, saved.state, config.data.cache_dir, part))
        return model.to(share_machine(config, SoloComm()))

    def describe(self) -> dict[str, Any]:
        """Describe the origin of its vectors."""
        return {
            **self.saved.named(),
            "network": self.store,
            "dim": self.width,
            **SnapshotId.of(self.snapshot).named(),
        }

    def schema(self) -> pa.Schema:
        """Describe the columns of the file: key, uri and vector."""
        fields: list[Any] = [
            pa.field(KEY, pa.int64(), nullable=False),
            pa.field(URI, pa.string(), nullable=False),
            pa.field(VECTOR, pa.list_(pa.float32(), self.width), nullable=False),
        ]
        return pa.schema(fields, metadata={VECTORS_OF: json.dumps(self.describe())})

    def tables(self) -> Iterator[pa.Table]:
        """Compute key, uri and visual vector of all images, some thousands at a time.

        Raises TrainerError for a number that is not finite.
        """
        keys, uris, features = list[Int64Array](), list[Any](), list[AnyArray]()
        for shard in sorted(self.snapshot.manifest.shards):
            reader = self.snapshot.shard_reader(shard)
            uris_of_shard = reader.read([URI])[URI]
            for block in reader.verified_blocks():
                keys.append(block.keys_K)
                uris += uris_of_shard.take(block.place_K).to_pylist()
                features.append(block.features_KD.copy())
                if len(uris) >= BATCH_ROWS:
                    yield self._table(np.concatenate(keys), uris, np.concatenate(features))
                    keys, uris, features = [], [], []
        if uris:
            yield self._table(np.concatenate(keys), uris, np.concatenate(features))

    def _table(self, keys_K: Int64Array, uris: list[Any], features_KD: AnyArray) -> pa.Table:
        """Compute the vectors of some images; features are in the store's dtype."""
        visual_KV = visual_vectors(self.model, features_KD)
        columns: list[Any] = [pa.array(keys_K), pa.array(uris, pa.string()), vector_lists(visual_KV)]
        return pa.Table.from_arrays(columns, [KEY, URI, VECTOR])


def visual_vectors(model: EmbeddingModel, features_KD: AnyArray) -> Float32Array:
    """Compute the visual vectors (K, V) of features in a store's dtype. Raises TrainerError if one is not finite."""
    with torch.inference_mode():
        return finite(model(as_tensor(features_KD).to(model.mean_D.device)).float().cpu().numpy())


def open_network(
    folder: RunPath,
    *,
    which: str | None = None,
    network: str | None = None,
    store_version: VersionName | None = None,
    store: str | None = None,
) -> ImageNetwork:
    """Find an E of the run in `folder`, as the checkpoint `which` has it (see `find_checkpoint`), and open a snapshot.

    The snapshot is the newest one by default, whichever the run was trained on. `network`: which E, by its store's name
    in the schema, where there are several. `store`: where data.store is now, if elsewhere. A few small files are read.
    Raises ConfigError, CheckpointError, SchemaError, DataError, FeatureStoreError.
    """
    saved = read_run(folder, which)
    if store is not None:
        saved = replace(saved, config=saved.config.changed(data={"store": store}))
    widths = widths_of_stores(used_fields(saved.schema, saved.config.model), saved.config.model)
    if not widths:
        raise ConfigError(Problem.RUN_WITHOUT_IMAGES, folder)
    at = next(iter(widths)) if network is None and len(widths) == 1 else network
    if at not in widths:
        wrong = "" if network is None else f"--network {network}: "
        raise ConfigError(Problem.WHICH_NETWORK, wrong, folder, ", ".join(widths))
    place = next(place for place in saved.places if place.name == at)
    snapshot = saved.snapshot(place, store_version)
    if snapshot.num_rows == 0:
        raise DataError(Problem.SNAPSHOT_EMPTY, place.url, snapshot.version, place.make_it())
    return ImageNetwork(saved=saved, store=at, width=widths[at], snapshot=snapshot)


def load_part(part: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill a part of a run's networks, which gets the type of the checkpoint's numbers. Raises CheckpointError."""
    check_names(part.state_dict(), state)
    part.to(next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32))
    part.load_state_dict(dict(state))


def export_vectors(network: ImageNetwork, out: str, progress: Progress = lambda done, total: None) -> None:
    """Write the vectors of all images to `out`, NAME.parquet, and report images done and all of them.

    On an object store the file is put in one piece, out of memory. Raises TrainerError, FeatureStoreError.
    """
    done = 0
    with parquet_file(out, network.schema()) as write:
        for table in network.tables():
            write(table)
            done += len(table)
            progress(done, network.snapshot.num_rows)


def vector_lists(vectors_NV: Float32Array) -> Any:
    """Turn the rows of a matrix into lists of one width."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors_NV.reshape(-1)), vectors_NV.shape[1])


@contextlib.contextmanager
def parquet_file(address: str, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """Yield a function that adds rows to the Parquet file at an address, which gets its name at the end of the block.

    Raises, before the block if there is no such object store, AddressError, BucketNotFoundError, StorageError."""
    storage, name = file_at(address)
    storage.check_bucket()
    with (
        storage.open_output(name) as output,
        pq.ParquetWriter(output, schema, compression="lz4", write_page_checksum=True) as writer,
    ):
        yield lambda table: writer.write_table(table.cast(schema))
