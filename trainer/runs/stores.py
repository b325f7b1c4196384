"""A run's stores: where they are, the snapshots to read, and the images that they lack."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from featurestore.errors import AnotherStoreError, FeatureStoreError, MissingKeysError, StoreNotFoundError
from featurestore.lookup.partition import FeaturePartition
from featurestore.published.versions import VersionName
from featurestore.snapshot import Snapshot, SnapshotId
from featurestore.spec import StoreInfo
from featurestore.store import FeatureStore
from trainer.comm import Comm
from trainer.config.config import Config, differences
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.models.layers import used_fields
from trainer.runs.checkpoint import CheckpointState, Resumed
from trainer.runs.folder import Checkpoint
from trainer.samples.columns import rules_of
from trainer.samples.index import SampleIndex
from trainer.samples.survey import LackingImages, lacking, measured_once, names_of, samples_digest
from trainer.schema import DEFAULT_STORE, Field, Schema
from trainer.schema.fields import SCHEMA_FILE

_INSTEAD = {"learned": 'get a trained "no image" vector', "zeros": "are zeros"}


@dataclass(frozen=True)
class StorePlace:
    """Where a store is, the snapshot that is asked for, and the settings that say so."""

    name: str
    url: str
    version: VersionName | None
    setting: str
    version_setting: str

    def make_it(self) -> str:
        """Name the command that fills it."""
        command = "extract" if self.setting == "data.store" else "import"
        return f"crossmedia {command} --store {self.url}"


def store_places(config: Config, schema: Schema) -> list[StorePlace]:
    """List the stores that the model's content fields name, that of data.store first; none where it sees no content.

    data.store is the one named images, or the only one that is named; the others stand in data.stores. Raises
    ConfigError.
    """
    names = list(dict.fromkeys(f.store_name for f in used_fields(schema, config.model) if f.kind == "content"))
    elsewhere = [name for name in names if name in config.data.stores]
    here = [name for name in names if name not in elsewhere]
    if len(here) > 1 or (here and elsewhere and here != [DEFAULT_STORE]):
        without = next(name for name in here if name != DEFAULT_STORE)
        raise ConfigError(
            f"the schema's content fields name the stores {', '.join(names)}; data.store={config.data.store} is "
            f"{DEFAULT_STORE} where there are several, and {without} has no address: set data.stores.{without}"
        )
    known = {field.store_name for field in schema.of_kind("content")}
    for name in config.data.stores.keys() | config.data.store_versions.keys():
        if name not in known:
            raise ConfigError(
                f"data.stores.{name}: no content field of the schema names store {name}, only "
                f"{', '.join(sorted(known)) or 'none'}; give a field store: {name}, or leave the setting out"
            )
    data = config.data
    places = [StorePlace(name, data.store, data.store_version, "data.store", "data.store_version") for name in here]
    return places + [
        StorePlace(
            name,
            data.stores[name],
            data.store_versions.get(name),
            f"data.stores.{name}",
            f"data.store_versions.{name}",
        )
        for name in elsewhere
    ]


def missing_places(places: list[StorePlace]) -> list[str]:
    """Describe each place that holds no store in one line, with the job that makes it."""
    problems = []
    for place in places:
        try:
            FeatureStore.open(place.url)
        except StoreNotFoundError:
            problems.append(f"{place.setting}={place.url} is no feature store; make it with: {place.make_it()}")
    return problems


def snapshot_of(place: StorePlace, resumed: Resumed | None) -> Snapshot:
    """Choose the snapshot to train on: the one asked for, else the checkpoint's, else the newest.

    A channel is asked for once, when the run begins: it may have been moved since.

    Raises AnotherStoreError where it is not of the store that the checkpoint was trained on.
    """
    checkpoint, state = resumed or (None, None)
    recorded = state.version_of(place.name) if state and not isinstance(place.version, int) else None
    store = FeatureStore.open(place.url)
    try:
        snapshot = store.snapshot(place.version if recorded is None else recorded)
    except FeatureStoreError as failure:
        if recorded is None:
            raise
        check_identity(place, store.snapshot(), checkpoint, state)
        raise CheckpointError(
            f"the checkpoint was trained on snapshot {recorded} of {place.url}: {failure}; "
            f"{place.version_setting}=N continues with another one"
        ) from failure
    check_identity(place, snapshot, checkpoint, state)
    if snapshot.num_rows == 0:
        raise DataError(
            f"{place.setting}={place.url} has no features in snapshot {snapshot.version}; "
            f"add them with: {place.make_it()}"
        )
    return snapshot


def check_identity(
    place: StorePlace, snapshot: Snapshot, checkpoint: Checkpoint | None, state: CheckpointState | None
) -> None:
    """Raise AnotherStoreError where the snapshot is not of the store that the checkpoint was trained on.

    Features of another kind are found by Origin.check_store, which has better words.
    """
    recorded = state.stores.get(place.name) if state else None
    if checkpoint is None or state is None or recorded is None or other_features(snapshot.info, state, place.name):
        return
    name = "" if place.setting == "data.store" else f" --name {place.name}"
    recorded.check(
        SnapshotId.of(snapshot),
        f"the checkpoint {checkpoint}",
        f"set {place.setting} to the address of that store, or see whether this one will do, and accept it: "
        f"crossmedia compat {checkpoint.run} {place.url}{name}",
    )


def other_features(info: StoreInfo, state: CheckpointState, name: str) -> list[str]:
    """List how a store's features differ from those that the checkpoint's E was trained on; `name` is the store's."""
    recorded = state.origin.stores.get(name, {})
    return [each.text("in the checkpoint") for each in differences(kind_of_features(info), recorded)]


def open_partition(config: Config, comm: Comm, place: StorePlace, chosen: SnapshotId) -> FeaturePartition:
    """Open this rank's part of the snapshot that rank 0 chose.

    Raises AnotherStoreError where this rank finds another one under the same address: each machine has its own disk, or
    the store was made anew meanwhile."""
    partition = FeaturePartition.load(
        place.url,
        rank=comm.rank,
        num_ranks=comm.size,
        cache_dir=config.data.cache_dir,
        missing=config.data.missing,
        threads=torch.get_num_threads(),
        version=chosen.version,
    )
    if partition.snapshot_id.commit_id != chosen.commit_id:
        partition.close()
        raise AnotherStoreError(
            f"{place.setting}={place.url}: rank 0 found {chosen.described()}, this rank "
            f"{partition.snapshot_id.described()}; all machines need the same store, on a shared disk or S3"
        )
    return partition


def kind_of_features(info: StoreInfo) -> dict[str, Any]:
    """Describe what E must not see change: ExtractorSpec, dimension, dtype and basis."""
    basis = {"basis": info.reduction.sha256} if info.reduction else {}
    return {"dim": info.dim, "dtype": info.dtype, "extractor": info.extractor.model_dump(), **basis}


def records(places: list[StorePlace], partitions: Mapping[str, FeaturePartition]) -> dict[str, SnapshotId]:
    """Return what a checkpoint keeps of the stores that it was trained on; addresses as they were set."""
    return {p.name: partitions[p.name].snapshot_id.model_copy(update={"url": p.url}) for p in places}


def lacking_images(
    config: Config,
    comm: Comm,
    schema: Schema,
    places: Sequence[StorePlace],
    partitions: Mapping[str, FeaturePartition],
    indexes: Sequence[SampleIndex],
) -> list[str]:
    """Say in a line for each store how many images the run's samples name and the store lacks; every rank calls it.

    All samples are counted, once for each snapshot: the cache folder of rank 0's machine keeps the counts. Raises, on
    all ranks together, DataError, and MissingKeysError where data.missing=error.
    """
    lines = []
    for place in places:
        found = _counted(config, comm, schema, place, partitions[place.name], indexes)
        if not found.impressions and not found.behaviors:
            continue
        if config.data.missing == "error":
            fields = _fields_of(config, schema, place)
            keys = np.array(found.examples, np.int64)
            names = comm.on_rank_0(partial(names_of, indexes, rules_of(schema), fields, keys))
            shown = ", ".join(names.get(key, f"key {key}") for key in found.examples)
            raise MissingKeysError(
                f"{_described(found, place)}{f', as {shown}' if shown else ''}; list them: "
                f"{_list_command(config, place)}; add them: {place.make_it()}; or set data.missing=learned, for a "
                'trained "no image" vector'
            )
        lines.append(
            f"{_described(found, place)}: they {_INSTEAD[config.data.missing]} (data.missing={config.data.missing}); "
            f"list them: {_list_command(config, place)}"
        )
    return lines


def _described(found: LackingImages, place: StorePlace) -> str:
    share = f"{found.impressions:,} of {found.of:,} impressions, {found.behaviors:,} behaviours"
    without = f", {found.without:,} of the impressions without any image" if found.without else ""
    images = f"{found.images:,} image{'' if found.images == 1 else 's'}"
    return f"{place.url} lacks {images} that the samples name ({share}{without})"


def _list_command(config: Config, place: StorePlace) -> str:
    """Name the command that lists them."""
    schema = config.data.schema_file
    is_usual = schema is None or schema == f"{config.data.samples.rstrip('/')}/{SCHEMA_FILE}"
    options = "" if is_usual else f" --schema {schema}"
    options += "" if place.name == DEFAULT_STORE else f" --name {place.name}"
    return f"crossmedia schema missing {config.data.samples} {place.url}{options}"


def _fields_of(config: Config, schema: Schema, place: StorePlace) -> list[Field]:
    fields = used_fields(schema, config.model)
    return [field for field in fields if field.kind == "content" and field.store_name == place.name]


def _counted(
    config: Config,
    comm: Comm,
    schema: Schema,
    place: StorePlace,
    partition: FeaturePartition,
    indexes: Sequence[SampleIndex],
) -> LackingImages:
    """Count what one store lacks, or remember it."""
    fields = _fields_of(config, schema, place)
    digests = [samples_digest(comm, each, config.data.cache_dir) for each in indexes]
    columns = sorted({(field.column_name, field.side) for field in fields})
    known = measured_once(
        comm,
        indexes[0],
        "images",
        [digests, columns, partition.snapshot_id.commit_id],
        config.data.cache_dir,
        lambda: asdict(lacking(comm, indexes, schema, fields, partition)),
    )
    return LackingImages(**known | {"examples": tuple(known["examples"])})
