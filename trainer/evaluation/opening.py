"""Opens a run to look at it: its config.yaml, a checkpoint, the samples to predict; its folder is left as it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featurestore.errors import FeatureStoreError
from featurestore.partition import MissingPolicy
from featurestore.storage import Storage
from featurestore.store import FeatureStore
from trainer import checkpoint
from trainer.comm import Comm
from trainer.config import Config, load_config
from trainer.data import SampleIndex, SampleReader, open_index
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.run import Run, open_run

TRAIN, TEST = "train", "test"


@dataclass(frozen=True)
class Source:
    """What to open: a run's folder, and what is to be other than in the run. `newest`: a step, its folder, or None."""

    folder: Path
    checkpoint: str | None = None
    samples: str | None = None
    store: str | None = None


@dataclass
class Opened:
    """A run with a checkpoint in its engine, on the ranks of its `comm`; close it."""

    source: Source
    run: Run
    checkpoint: Path
    train: SampleIndex
    test: SampleIndex
    reader: SampleReader
    missing_in_training: MissingPolicy
    """What training did with an image that had no feature; `error` is `zeros` here."""
    notes: list[str]
    """What a reader of the figures should know."""

    def close(self) -> None:
        """Lets go of the store's rows."""
        self.run.close()


def open_source(source: Source, comm: Comm) -> Opened:
    """Opens a run with its newest checkpoint, or another, on as many ranks as there are. Every rank calls it.

    Samples, stores and snapshots are those that the run was trained on; another `store` (or the same one, named) stands
    for data.store, at its newest snapshot. Image keys without a feature are treated as in training, and as zeros where
    they stopped it. Raises, on all ranks together, ConfigError for a folder that holds no run, CheckpointError where
    there is no checkpoint or the store holds other features than those of training, DataError for missing places.
    """
    with comm.agreed():
        config, path, trained_with = _config(source)
    comm.deadline_s = config.run.deadline_s
    try:
        run = open_run(config, comm, reading=True)
    except DataError as failure:
        raise DataError(
            f"{failure}\n(places as in {source.folder / 'config.yaml'}; name others by --samples and --store)"
        ) from failure
    train = open_index(comm, config.data.samples, TRAIN, run.schema, config.data.train_days)
    test_days = None if source.samples else config.data.test_days
    test = open_index(comm, source.samples or config.data.samples, TEST, run.schema, test_days)
    reader = SampleReader(
        test,
        run.schema,
        rank=comm.rank,
        num_ranks=comm.size,
        batch_size=config.train.eval_batch_size,
        by_part=True,
    )
    return Opened(source, run, path, train, test, reader, trained_with, _notes(source, run, path))


def find_checkpoint(folder: Path, name: str | None) -> Path:
    """The newest checkpoint of a run, or the one that `name` says: a step, a folder step-N, a path to one."""
    checkpoints = folder / "checkpoints"
    steps = sorted(path.name for path in checkpoints.glob("step-*") if (path / "state.json").is_file())
    if name is None:
        if not steps:
            raise CheckpointError(
                f"{folder} has no checkpoint in {checkpoints}; train it first: "
                f"python -m trainer.main --config {folder / 'config.yaml'}"
            )
        return checkpoint.find(checkpoints, "latest")
    inside = checkpoints / (f"step-{int(name):08}" if name.isdecimal() else name)
    for path in (inside, Path(name)):
        if (path / "state.json").is_file():
            return path
    raise CheckpointError(
        f"--checkpoint {name}: no such checkpoint; {checkpoints} has {', '.join(steps) or 'none'}, "
        "and a path to a folder step-N will do too"
    )


def _config(source: Source) -> tuple[Config, Path, MissingPolicy]:
    """The run's configuration as `open_run` is to have it, the checkpoint, and the policy of training."""
    file = source.folder / "config.yaml"
    if not file.is_file():
        runs = sorted(each.parent.name for each in source.folder.glob("*/config.yaml"))
        instead = f"; it holds the runs {', '.join(runs[:5])}" if runs else "; give a run's folder, as data/runs/NAME"
        raise ConfigError(f"{source.folder} is not a run's folder: there is no config.yaml in it{instead}")
    config = load_config(file)
    path = find_checkpoint(source.folder, source.checkpoint)
    data: dict[str, Any] = {
        "samples": _training_samples(config, source),
        "missing": "zeros" if config.data.missing == "error" else config.data.missing,
    }
    if source.store is not None and config.model.images != "none":
        data |= {"store": source.store, "store_version": _newest(source.store)}
    run = {"dir": str(source.folder.parent), "name": source.folder.name, "resume": str(path), "overwrite": False}
    sections = {
        "data": config.data.model_copy(update=data),
        "run": config.run.model_copy(update=run),
        "exchange": config.exchange.model_copy(update={"reuse_steps": 0}),  # vectors as the checkpoint has them
    }
    return config.model_copy(update=sections), path, config.data.missing


def _newest(store: str) -> int:
    try:
        return FeatureStore.open(store).snapshot().version
    except FeatureStoreError as failure:
        raise ConfigError(f"--store {store}: {failure}") from failure


def _training_samples(config: Config, source: Source) -> str:
    """Where the training samples are: the run's own place, or --samples where that one has none."""
    if source.samples and not _has_samples(config.data.samples) and _has_samples(source.samples):
        return source.samples
    return config.data.samples


def _has_samples(url: str) -> bool:
    storage = Storage(url)
    return all(any(name.endswith(".parquet") for name in storage.list(split)) for split in (TRAIN, TEST))


def _notes(source: Source, run: Run, path: Path) -> list[str]:
    """What a reader of the figures should know."""
    notes = []
    if source.store is not None and all(record.url != source.store for record in run.stores.values()):
        notes.append(f"the model reads nothing from data.store: --store {source.store} is not used")
    if run.samples_changed:
        notes.append(
            f"the training samples in {run.config.data.samples} are not, or no longer, those of the checkpoint: what "
            "is new, and what was seen how often, is told by the samples that are there now"
        )
    state = checkpoint.read_state(path)
    for name, record in run.stores.items():
        if record.version != state.version_of(name):
            notes.append(
                f"store {name} is at snapshot {record.version} ({record.url}); the run was trained on snapshot "
                f"{state.version_of(name)}"
            )
    return notes
