"""A trained run, opened to be asked and not to be trained on: its model with the numbers of one of its checkpoints."""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from featurestore.partition import FeaturePartition
from featurestore.store import FeatureStore
from trainer import checkpoint
from trainer.checkpoint import CheckpointState
from trainer.comm import Comm
from trainer.config import Config, load_config
from trainer.errors import CheckpointError, ConfigError
from trainer.run import engine_of, model_of, share_machine
from trainer.schema import Schema, load_schema
from trainer.step import Engine
from trainer.stores import StorePlace, kind_of_features, open_partition, store_places


@dataclass
class TrainedRun:
    """A run's engine as `path`, one of its checkpoints, has it."""

    comm: Comm
    folder: Path
    config: Config
    schema: Schema
    engine: Engine
    partitions: dict[str, FeaturePartition]
    path: Path
    state: CheckpointState

    @property
    def partition(self) -> FeaturePartition | None:
        """Of the first store; None where the model has no images."""
        return next(iter(self.partitions.values()), None)

    @property
    def store_version(self) -> int | None:
        """The snapshot that images are looked up in; None where the model has no images."""
        return self.partition.snapshot_version if self.partition else None

    @property
    def digest(self) -> str:
        """Tells the checkpoint from every other one: sha256 of its state.json, which has the digest of each file."""
        return hashlib.sha256((self.path / "state.json").read_bytes()).hexdigest()

    def close(self) -> None:
        """Lets go of the stores' rows."""
        for partition in self.partitions.values():
            partition.close()


def open_trained(folder: Path, comm: Comm, *, which: str = "latest", store_version: int | None = None) -> TrainedRun:
    """The run in `folder`. `which`: latest, or the path of a checkpoint. Every rank calls it.

    `store_version`: the snapshot of the (first) feature store to look images up in, by default the newest, so that
    images that came after the training are known; further stores are opened at their newest. Raises TrainerError,
    FeatureStoreError, on all ranks together.
    """
    config, schema, path, state = comm.on_all(lambda: _read(folder, which))
    comm.deadline_s = config.run.deadline_s
    device = share_machine(config, comm)
    places, partitions = store_places(config, schema), {}
    for number, place in enumerate(places):
        asked = store_version if number == 0 else None
        version = comm.broadcast_object(comm.on_all(partial(_version, place, asked)))
        opened = partial(_partition, config, state, path, comm, place, version)
        partitions[place.name] = comm.on_all(opened)
    engine = engine_of(config, comm, schema, partitions, device)
    checkpoint.load(comm, path, state, engine)
    return TrainedRun(comm, folder, config, schema, engine, partitions, path, state)


def _read(folder: Path, which: str) -> tuple[Config, Schema, Path, CheckpointState]:
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is no run: there is no config.yaml in it; give a folder as data/runs/NAME")
    config = load_config(folder / "config.yaml")
    schema = load_schema(Path(config.data.schema_file) if config.data.schema_file else None)
    if which == "latest" and not any((folder / "checkpoints").glob("step-*")):
        raise CheckpointError(f"{folder} has no checkpoint; train it first")
    path = checkpoint.find(folder / "checkpoints", which)
    state = checkpoint.read_state(path)
    for name, value in model_of(config, schema).items():
        if state.origin.model.get(name) != value:
            raise CheckpointError(
                f"{path}: model.{name} is {state.origin.model.get(name)!r} in the checkpoint and {value!r} in "
                "the run's configuration and schema; set it back"
            )
    return config, schema, path, state


def _version(place: StorePlace, asked: int | None) -> int:
    return asked or FeatureStore.open(place.url).snapshot().version


def _partition(
    config: Config, state: CheckpointState, path: Path, comm: Comm, place: StorePlace, version: int
) -> FeaturePartition:
    partition = open_partition(config, comm, place, version)
    recorded = state.origin.stores.get(place.name, state.origin.store)
    if kind_of_features(partition.info) != recorded:
        partition.close()
        raise CheckpointError(
            f"{path} was trained on features of another kind than {place.url} has now: "
            f"{recorded} there, {kind_of_features(partition.info)} here; take a store of the former"
        )
    return partition
