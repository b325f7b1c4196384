"""The feature stores of a run: which ones its content fields need, where they are, and this rank's part of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from featurestore.errors import AnotherStoreError, FeatureStoreError, StoreNotFoundError
from featurestore.identity import SnapshotId
from featurestore.lookup.partition import FeaturePartition
from featurestore.published.channels import VersionName
from featurestore.published.paths import RunPath, run_path
from featurestore.snapshot import Snapshot
from featurestore.spec import StoreInfo
from featurestore.store import FeatureStore
from trainer.comm import Comm
from trainer.config.config import Config
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.models.fields import used_fields
from trainer.runs.checkpoint import CheckpointState
from trainer.schema import DEFAULT_STORE, Schema


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
        job = "extract_features" if self.setting == "data.store" else "import_features"
        return f"python jobs/{job}.py --store {self.url}"


def store_places(config: Config, schema: Schema) -> list[StorePlace]:
    """List the stores that the model's content fields name, that of data.store first; none where it sees no content.

    data.store is the one named images, or the only one that is named; the others stand in data.stores. Raises
    ConfigError.
    """
    names = list(dict.fromkeys(f.store_name for f in used_fields(schema, config.model) if f.kind == "content"))
    elsewhere = [name for name in names if name in config.data.stores]
    here = [name for name in names if name not in elsewhere]
    if len(here) > 1 or (here and elsewhere and here != [DEFAULT_STORE]):
        lacking = next(name for name in here if name != DEFAULT_STORE)
        raise ConfigError(
            f"the schema's content fields name the stores {', '.join(names)}; data.store={config.data.store} is "
            f"{DEFAULT_STORE} where there are several, and {lacking} has no address: set data.stores.{lacking}"
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


def snapshot_of(place: StorePlace, resumed: tuple[RunPath, CheckpointState] | None) -> Snapshot:
    """Choose the snapshot to train on: the one asked for, else the checkpoint's, else the newest.

    A channel is asked for once, when the run begins: it may have been moved since.

    Raises AnotherStoreError where it is not of the store that the checkpoint was trained on.
    """
    path, state = resumed or (run_path("."), None)
    recorded = state.version_of(place.name) if state and not isinstance(place.version, int) else None
    store = FeatureStore.open(place.url)
    try:
        snapshot = store.snapshot(place.version if recorded is None else recorded)
    except FeatureStoreError as failure:
        if recorded is None:
            raise
        check_identity(place, store.snapshot(), path, state)
        raise CheckpointError(
            f"the checkpoint was trained on snapshot {recorded} of {place.url}: {failure}; "
            f"{place.version_setting}=N continues with another one"
        ) from failure
    check_identity(place, snapshot, path, state)
    if snapshot.num_rows == 0:
        raise DataError(
            f"{place.setting}={place.url} has no features in snapshot {snapshot.version}; "
            f"add them with: {place.make_it()}"
        )
    return snapshot


def check_identity(place: StorePlace, snapshot: Snapshot, path: RunPath, state: CheckpointState | None) -> None:
    """Raise AnotherStoreError where the snapshot is not of the store that the checkpoint at `path` was trained on.

    Features of another kind are found by Origin.check_store, which has better words; a checkpoint from before ids were
    kept passes.
    """
    recorded = state.stores.get(place.name) if state else None
    if state is None or recorded is None or kind_of_features(snapshot.info) != recorded_kind(state, place.name):
        return
    name = "" if place.setting == "data.store" else f" --name {place.name}"
    recorded.check(
        SnapshotId.of(snapshot),
        f"the checkpoint {path}",
        f"set {place.setting} to the address of that store, or see whether this one will do, and accept it: "
        f"python -m trainer.compat {path.resolve().parent.parent} {place.url}{name}",
    )


def recorded_kind(state: CheckpointState, name: str) -> dict[str, Any]:
    """Return `kind_of_features` of the store of that name, as the checkpoint has it."""
    return state.origin.stores.get(name, state.origin.store)


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
    """Describe what E must not see change: ExtractorSpec, dimension, dtype, codec and basis."""
    codec = {"codec": info.codec.sha256} if info.codec else {}
    basis = {"basis": info.reduction.sha256} if info.reduction else {}
    return {"dim": info.dim, "dtype": info.dtype, "extractor": info.extractor.model_dump(), **codec, **basis}


def kinds_by_store(partitions: Mapping[str, FeaturePartition]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return `kind_of_features` of the first store, and of the others by name: as a checkpoint's origin keeps them."""
    first, *others = partitions or [None]
    return (
        kind_of_features(partitions[first].info) if first else {},
        {name: kind_of_features(partitions[name].info) for name in others if name},
    )


def records(places: list[StorePlace], partitions: Mapping[str, FeaturePartition]) -> dict[str, SnapshotId]:
    """Return what a checkpoint keeps of the stores that it was trained on; addresses as they were set."""
    return {p.name: partitions[p.name].snapshot_id.model_copy(update={"url": p.url}) for p in places}
