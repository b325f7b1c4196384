"""The feature stores of a run: which ones its content fields need, where they are, and this rank's part of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from featurestore.errors import FeatureStoreError, StoreNotFoundError
from featurestore.partition import FeaturePartition
from featurestore.spec import StoreInfo
from featurestore.store import FeatureStore
from trainer.checkpoint import CheckpointState, StoreRecord
from trainer.comm import Comm
from trainer.config import Config
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.models.fields import used_fields
from trainer.schema import DEFAULT_STORE, Schema


@dataclass(frozen=True)
class StorePlace:
    """Where a store is, the snapshot that is asked for, and the settings that say so."""

    name: str
    url: str
    version: int | None
    setting: str
    version_setting: str

    def make_it(self) -> str:
        """The command that fills it."""
        job = "extract_features" if self.setting == "data.store" else "import_features"
        return f"python jobs/{job}.py --store {self.url}"


def store_places(config: Config, schema: Schema) -> list[StorePlace]:
    """The stores that the model's content fields name, that of data.store first; none where it sees no content.

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
    """One line for each place that holds no store, with the job that makes it."""
    problems = []
    for place in places:
        try:
            FeatureStore.open(place.url)
        except StoreNotFoundError:
            problems.append(f"{place.setting}={place.url} is no feature store; make it with: {place.make_it()}")
    return problems


def snapshot_of(place: StorePlace, resumed: CheckpointState | None) -> tuple[int, Any]:
    """Version and statistics of the snapshot to train on: the one asked for, else the checkpoint's, else the newest."""
    recorded = resumed.version_of(place.name) if resumed and place.version is None else None
    try:
        snapshot = FeatureStore.open(place.url).snapshot(place.version if recorded is None else recorded)
    except FeatureStoreError as failure:
        if recorded is None:
            raise
        raise CheckpointError(
            f"the checkpoint was trained on snapshot {recorded} of {place.url}: {failure}; "
            f"{place.version_setting}=N goes on with another one"
        ) from failure
    if snapshot.num_rows == 0:
        raise DataError(
            f"{place.setting}={place.url} has no features in snapshot {snapshot.version}; "
            f"add them with: {place.make_it()}"
        )
    return snapshot.version, snapshot.statistics()


def open_partition(config: Config, comm: Comm, place: StorePlace, version: int) -> FeaturePartition:
    """This rank's part of a snapshot."""
    return FeaturePartition.load(
        place.url,
        rank=comm.rank,
        num_ranks=comm.size,
        cache_dir=config.data.cache_dir,
        missing=config.data.missing,
        threads=torch.get_num_threads(),
        version=version,
    )


def kind_of_features(info: StoreInfo) -> dict[str, Any]:
    """What E must not see change: ExtractorSpec, dimension, dtype and codec."""
    codec = {"codec": info.codec.sha256} if info.codec else {}
    return {"dim": info.dim, "dtype": info.dtype, "extractor": info.extractor.model_dump(), **codec}


def kinds_by_store(partitions: Mapping[str, FeaturePartition]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """`kind_of_features` of the first store, and of the others by name: as a checkpoint's origin keeps them."""
    first, *others = partitions or [None]
    return (
        kind_of_features(partitions[first].info) if first else {},
        {name: kind_of_features(partitions[name].info) for name in others if name},
    )


def records(places: list[StorePlace], partitions: Mapping[str, FeaturePartition]) -> dict[str, StoreRecord]:
    """What a checkpoint keeps of the stores that it was trained on."""
    return {p.name: StoreRecord(url=p.url, version=partitions[p.name].snapshot_version) for p in places}
