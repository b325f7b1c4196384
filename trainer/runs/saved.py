"""Trained runs, opened to be asked and not to be trained on: what their folders say, and a model out of a checkpoint.

Every command that looks at runs reads their folders by `read_run`, so a checkpoint is chosen, and an image without a
feature treated, in one way. `open_trained` opens no samples and looks images up in the newest snapshot.
"""

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from featurestore.identity import SnapshotId
from featurestore.lookup.partition import FeaturePartition, MissingPolicy
from featurestore.snapshot import Snapshot
from featurestore.storage.regular import read_regular
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from trainer.comm import Comm
from trainer.config.config import Config, load_saved
from trainer.engine.engine import Engine
from trainer.engine.machine import share_machine
from trainer.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    DataNotFoundError,
    TrainerError,
)
from trainer.runs import checkpoint
from trainer.runs.checkpoint import CheckpointState
from trainer.runs.open import engine_of, model_of
from trainer.runs.stores import (
    StorePlace,
    check_identity,
    kind_of_features,
    open_partition,
    recorded_kind,
    store_places,
)
from trainer.samples.days import sample_files
from trainer.samples.reader import SampleIndex, open_index
from trainer.samples.statistics import fill_in
from trainer.schema import Schema, load_schema

Vectors = NDArray[np.float32]
TRAIN, TEST = "train", "test"
RUNS = Path("data/runs")


@dataclass
class SavedRun:
    """What a run's folder says. `config` is as in training, but for what looking at a run takes: images without a
    feature stop nothing, they are zeros at least, and no visual vector is an earlier step's."""

    folder: Path
    config: Config
    path: Path
    """Of the checkpoint."""
    state: CheckpointState
    missing_in_training: MissingPolicy
    """What training did with an image that had no feature; `error` is `zeros` here."""

    @property
    def digest(self) -> str:
        """Tells the checkpoint from every other one: sha256 of its state.json, which has the digest of each file."""
        return hashlib.sha256(read_regular(self.path / "state.json")).hexdigest()

    def checked_schema(self) -> Schema:
        """That of the run. Raises SchemaError, and CheckpointError where model or fields are not the checkpoint's."""
        schema = load_schema(Path(self.config.data.schema_file) if self.config.data.schema_file else None)
        recorded = self.state.origin
        schema = fill_in(schema, recorded.model.get("fields", {}))
        recorded.model_copy(update={"model": model_of(self.config, schema)}).check_same(recorded, self.path)
        return schema

    def snapshot(self, place: StorePlace, version: int | None = None) -> Snapshot:
        """A snapshot to look images up in: the newest of the store, or the one that is asked for.

        Raises CheckpointError where it has other features than those that the run's E was trained on, and
        AnotherStoreError where it is of another store.
        """
        snapshot = FeatureStore.open(place.url).snapshot(version)
        recorded, found = recorded_kind(self.state, place.name), kind_of_features(snapshot.info)
        if found != recorded:
            raise CheckpointError(
                f"{self.path} was trained on features of another kind than {place.url} has now: "
                f"{recorded} there, {found} here; take a store of the former"
            )
        check_identity(place, snapshot, self.path, self.state)
        return snapshot

    def notes_on_missing(self, num_lookups: int, hides: bool = False) -> list[str]:
        """What a reader of figures should know where lookups found no feature; `hides`: some were hidden as well."""
        if self.missing_in_training != "error" or not (num_lookups or hides):
            return []
        return [
            "the run was trained with data.missing=error, so its model has never met an image without a feature; here "
            f"such images get zeros ({num_lookups:,} lookups{', and those hidden at random' if hides else ''})"
        ]

    def named(self) -> dict[str, str]:
        """Of which run and checkpoint an exported file is, for its metadata."""
        return {"run": str(self.folder), "checkpoint": self.path.name, "checkpoint_digest": self.digest}

    def notes_on_samples(self, changed: bool) -> list[str]:
        """The same where the training samples that are there now are not those of the checkpoint."""
        if not changed:
            return []
        return [
            f"the training samples in {self.config.data.samples} are not, or no longer, those of the checkpoint: what "
            "is new, and what was seen how often, is told by the samples that are there now"
        ]


@dataclass
class TrainedRun(SavedRun):
    """A run's engine as `path`, one of its checkpoints, has it; close it."""

    comm: Comm
    schema: Schema
    engine: Engine
    partitions: dict[str, FeaturePartition]

    @property
    def partition(self) -> FeaturePartition | None:
        """Of the first store; None where the model has no images."""
        return next(iter(self.partitions.values()), None)

    @property
    def store_version(self) -> int | None:
        """The snapshot that images are looked up in; None where the model has no images."""
        return self.partition.snapshot_version if self.partition else None

    def close(self) -> None:
        """Lets go of the stores' rows."""
        for partition in self.partitions.values():
            partition.close()


def read_run(folder: Path, which: str | None = None, samples: str | None = None) -> SavedRun:
    """The run in `folder`, with the checkpoint that `which` says; see `find_checkpoint`.

    `samples` are other ones to ask about: those of training are looked for there where the run's own are gone. Raises
    ConfigError for a folder that holds no run, CheckpointError where there is no such checkpoint.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        runs = sorted(each.parent.name for each in folder.glob("*/config.yaml"))
        instead = f"; it holds the runs {', '.join(runs[:5])}" if runs else "; give a run's folder, as data/runs/NAME"
        raise ConfigError(f"{folder} is not a run's folder: there is no config.yaml in it{instead}")
    config = load_saved(file)
    path = find_checkpoint(folder, which)
    data: dict[str, Any] = {"missing": "zeros" if config.data.missing == "error" else config.data.missing}
    if samples and not _has_training_samples(config):
        data["samples"] = samples
    sections = {
        "data": config.data.model_copy(update=data),
        "exchange": config.exchange.model_copy(update={"reuse_steps": 0}),
    }
    looking = config.model_copy(update=sections)
    return SavedRun(folder, looking, path, checkpoint.read_state(path), config.data.missing)


def newest_run(folder: Path = RUNS) -> Path:
    """The run in `folder`, or in a folder of it (those of trainer.daily), that wrote the last checkpoint. Raises
    ConfigError where there is none."""
    states = list(folder.glob("**/checkpoints/step-*/state.json"))
    if not states:
        raise ConfigError(
            f"{folder} has no run with a checkpoint; train one: python -m trainer.main, or name it by --run"
        )
    return max(states, key=lambda state: state.stat().st_mtime_ns).parents[2]


def find_checkpoint(folder: Path, name: str | None = None) -> Path:
    """The newest checkpoint of a run, or the one that `name` says: latest, a step, a folder step-N, a path to one."""
    checkpoints = folder / "checkpoints"
    steps = sorted(path.name for path in checkpoints.glob("step-*") if (path / "state.json").is_file())
    if name in (None, "latest"):
        if not steps:
            raise CheckpointNotFoundError(
                f"{folder} has no checkpoint in {checkpoints}; train it first: "
                f"python -m trainer.main --config {folder / 'config.yaml'}"
            )
        return checkpoint.find(checkpoints, "latest")
    inside = checkpoints / (f"step-{int(name):08}" if name.isdecimal() else name)
    for path in (inside, Path(name)):
        if (path / "state.json").is_file():
            return path
    raise CheckpointNotFoundError(
        f"--checkpoint {name}: no such checkpoint; {checkpoints} has {', '.join(steps) or 'none'}, "
        "and a path to a folder step-N will do too"
    )


def open_trained(
    folder: Path, comm: Comm, *, which: str | None = None, samples: str | None = None, store_version: int | None = None
) -> TrainedRun:
    """The run in `folder`; `which` and `samples` as in `read_run`. Every rank calls it.

    `store_version`: the snapshot of the (first) feature store to look images up in, by default the newest, so that
    images that came after the training are known; further stores are opened at their newest. Raises TrainerError,
    FeatureStoreError, on all ranks together.
    """
    saved = comm.on_all(lambda: read_run(folder, which, samples))
    schema = comm.on_all(saved.checked_schema)
    config, comm.deadline_s = saved.config, saved.config.run.deadline_s
    device = share_machine(config, comm)
    with contextlib.ExitStack() as opened:
        partitions: dict[str, FeaturePartition] = {}
        for number, place in enumerate(store_places(config, schema)):
            asked = store_version if number == 0 else None
            chosen = comm.on_rank_0(partial(_snapshot_id, saved, place, asked))
            partition = comm.on_all(partial(open_partition, config, comm, place, chosen))
            partitions[place.name] = opened.enter_context(partition)
        engine = engine_of(config, comm, schema, partitions, device, reading=True)
        checkpoint.load(comm, saved.path, saved.state, engine)
        opened.pop_all()
    return TrainedRun(**vars(saved), comm=comm, schema=schema, engine=engine, partitions=partitions)


def _snapshot_id(saved: SavedRun, place: StorePlace, version: int | None) -> SnapshotId:
    return SnapshotId.of(saved.snapshot(place, version))


def open_test(comm: Comm, config: Config, schema: Schema, samples: str | None) -> SampleIndex:
    """The impressions to ask about: test/ of `samples`, else the test split or test days of the run. Every rank calls
    it. Raises DataError, SchemaError."""
    if samples is None and config.data.test_days == []:
        raise DataNotFoundError("the run has no test samples of its own (data.test_days=[]); name some by --samples")
    days = None if samples else config.data.test_days
    return open_index(comm, samples or config.data.samples, TEST, schema, days)


def missing_lookups(comm: Comm, partitions: Mapping[str, FeaturePartition]) -> int:
    """Lookups since the opening of images without a feature, hidden ones too, of all ranks; every rank calls it."""
    own = torch.tensor([sum(partition.missing_count for partition in partitions.values())])
    return int(comm.allreduce_sum_(own, "missing_lookups"))


def finite(vectors_NW: Vectors) -> Vectors:
    """The same vectors. Raises TrainerError where one is not finite: an index of such numbers would lie."""
    if not np.isfinite(vectors_NW).all():
        raise TrainerError("the run's vectors are not finite numbers; its training went wrong, try a lower optim.lr")
    return vectors_NW


def _has_training_samples(config: Config) -> bool:
    splits = (TRAIN, TEST) if config.data.train_days else (TRAIN,)  # a day's file may be in either
    return any(sample_files(Storage(config.data.samples), split) for split in splits)
