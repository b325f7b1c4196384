"""Opens a run to look at it: its config.yaml, a checkpoint, the samples to predict; its folder is left as it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featurestore.errors import FeatureStoreError
from featurestore.store import FeatureStore
from trainer.comm import Comm
from trainer.config.config import Config
from trainer.errors import ConfigError, DataError
from trainer.runs import checkpoint
from trainer.runs.open import Run, open_run, test_reader
from trainer.runs.saved import TRAIN, SavedRun, open_test, read_run
from trainer.samples.reader import SampleIndex, SampleReader, open_index


@dataclass(frozen=True)
class Source:
    """What to open: a run's folder, and what is to be other than in the run. `checkpoint`: see `find_checkpoint`."""

    folder: Path
    checkpoint: str | None = None
    samples: str | None = None
    store: str | None = None


@dataclass
class Opened:
    """A run with a checkpoint in its engine, on the ranks of its `comm`; close it."""

    source: Source
    saved: SavedRun
    run: Run
    train: SampleIndex
    test: SampleIndex
    reader: SampleReader
    notes: list[str]
    """What a reader of the figures should know."""

    def close(self) -> None:
        """Lets go of the store's rows."""
        self.run.close()


def open_source(source: Source, comm: Comm) -> Opened:
    """Opens a run with its newest checkpoint, or another, on as many ranks as there are. Every rank calls it.

    Samples, stores and snapshots are those that the run was trained on; `store`, where that one is now, stands for
    data.store, at its newest snapshot. Image keys without a feature are treated as in training, and as zeros where
    they stopped it. Raises, on all ranks together, ConfigError for a folder that holds no run, CheckpointError where
    there is no checkpoint or the store holds other features than those of training, DataError for missing places.
    """
    with comm.agreed():
        saved = read_run(source.folder, source.checkpoint, source.samples)
        config = _config(saved, source)
    comm.deadline_s = config.run.deadline_s
    try:
        run = open_run(config, comm, reading=True)
    except DataError as failure:
        failure.add_note(f"(places as in {source.folder / 'config.yaml'}; name others by --samples and --store)")
        raise
    train = open_index(comm, config.data.samples, TRAIN, run.schema, config.data.train_days)
    test = open_test(comm, config, run.schema, source.samples)
    reader = test_reader(run.config, comm, test, run.schema)
    return Opened(source, saved, run, train, test, reader, _notes(source, saved, run))


def _config(saved: SavedRun, source: Source) -> Config:
    """The run's configuration as `open_run` is to have it."""
    config = saved.config
    data: dict[str, Any] = {}
    if source.samples is not None:
        data["test_days"] = []  # the run's own test samples are not needed
    if source.store is not None and config.model.images != "none":
        data |= {"store": source.store, "store_version": _newest(source.store)}
    run = {"dir": str(saved.folder.parent), "name": saved.folder.name, "resume": str(saved.path), "overwrite": False}
    sections = {"data": config.data.model_copy(update=data), "run": config.run.model_copy(update=run)}
    return config.model_copy(update=sections)


def _newest(store: str) -> int:
    try:
        return FeatureStore.open(store).snapshot().version
    except FeatureStoreError as failure:
        raise ConfigError(f"--store {store}: {failure}") from failure


def _notes(source: Source, saved: SavedRun, run: Run) -> list[str]:
    """What a reader of the figures should know."""
    notes = []
    if source.store is not None and all(record.url != source.store for record in run.stores.values()):
        notes.append(f"the model reads nothing from data.store: --store {source.store} is not used")
    notes += saved.notes_on_samples(run.samples_changed)
    recorded = checkpoint.read_recorded(saved.path).stores
    for name, record in saved.state.stores.items():
        if record != recorded[name]:
            trained_on = recorded[name].told()
            notes.append(
                f"store {name}: the run was trained on {trained_on}; {record.told()} was accepted in its place"
            )
    for name, record in run.stores.items():
        if record.version != saved.state.version_of(name):
            notes.append(
                f"store {name} is at snapshot {record.version} ({record.url}); the run was trained on snapshot "
                f"{saved.state.version_of(name)}"
            )
    return notes
