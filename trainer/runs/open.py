"""Opening a run: samples, feature store, engine and, on resumption, a checkpoint; each checked before the next one.

Every rank calls the same functions; what can go wrong on one of them is agreed on, so that all raise together.
"""

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from featurestore.format.statistics import FeatureStatistics
from featurestore.identity import SnapshotId
from featurestore.lookup.partition import FeaturePartition
from featurestore.storage.storage import Storage
from trainer.comm import Comm
from trainer.config.config import Config, save_config
from trainer.config.options import OptimConfig
from trainer.engine.engine import Engine
from trainer.engine.machine import share_machine
from trainer.engine.precision import with_compute_dtype
from trainer.errors import ConfigError, DataNotFoundError
from trainer.runs import accepted, checkpoint, warmstart
from trainer.runs.checkpoint import CheckpointState, Origin
from trainer.runs.known_statistics import with_statistics, write_statistics
from trainer.runs.samples_digest import samples_digest
from trainer.runs.stores import (
    StorePlace,
    kinds_by_store,
    missing_places,
    open_partition,
    records,
    snapshot_of,
    store_places,
)
from trainer.runs.warmstart import WarmStart
from trainer.samples import dictionary
from trainer.samples.batch import BatchPosition
from trainer.samples.columns import Index, rules_of
from trainer.samples.days import newest_day, sample_files
from trainer.samples.reader import SampleIndex, SampleReader, distinct_values, open_index
from trainer.samples.statistics import fill_in
from trainer.schema import Schema, load_schema


@dataclass
class Run:
    """All state of a run; `position` is the batch that comes next."""

    config: Config
    comm: Comm
    schema: Schema
    folder: Path
    engine: Engine
    device: torch.device
    partitions: dict[str, FeaturePartition]
    stores: dict[str, SnapshotId]
    train_reader: SampleReader
    test_reader: SampleReader
    known_ads: Index
    origin: Origin
    position: BatchPosition
    history: list[dict[str, Any]]
    warm_start: WarmStart | None
    samples_changed: bool
    """Whether the training samples are not, or no longer, those of the checkpoint; only where the run is just read."""

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    @property
    def partition(self) -> FeaturePartition | None:
        """Of the first store, that of data.store where the model has it; None where it sees no content."""
        return next(iter(self.partitions.values()), None)

    def close(self) -> None:
        """Lets go of the stores' rows."""
        for partition in self.partitions.values():
            partition.close()


def open_run(config: Config, comm: Comm, *, reading: bool = False) -> Run:
    """Everything but the folder's content, which `claim_folder` writes. Raises TrainerError or FeatureStoreError.

    `reading`: the run is looked at and not gone on with, so its folder may be read-only, and its training samples may
    have changed; the model and the kind of features still have to be the checkpoint's.
    """
    schema = load_schema(Path(config.data.schema_file) if config.data.schema_file else None)
    places = store_places(config, schema)
    folder = Path(config.run.dir) / comm.broadcast_object(config.run.name or time.strftime("run-%Y%m%d-%H%M%S"))
    if not reading:
        comm.on_all(lambda: _check_folder(config, folder))
    comm.on_rank_0(lambda: _check_places(config, places))
    resumed = comm.on_all(lambda: _resumed(config, folder))
    warm = None if resumed else comm.on_all(lambda: _warm_start(config))
    device = share_machine(config, comm)
    recorded_dtype = resumed[1].origin.model.get("compute_dtype") if resumed else None
    model = with_compute_dtype(config.model, comm, device, recorded_dtype)
    config = config.model_copy(update={"model": model})
    train = open_index(comm, config.data.samples, "train", schema, config.data.train_days)
    test = open_index(comm, config.data.samples, "test", schema, config.data.test_days)
    partitions, statistics = {}, {}
    for place in places:
        chosen, statistics[place.name] = comm.on_rank_0(partial(snapshot_of, place, resumed))
        partitions[place.name] = comm.on_all(partial(open_partition, config, comm, place, chosen))
    digest = samples_digest(comm, train, config.data.cache_dir)
    schema = _with_statistics(config, comm, schema, train, digest.content, resumed[1] if resumed else None, warm)
    origin = _origin(config, schema, digest.content, partitions)
    samples_changed = False
    if resumed:
        recorded = resumed[1].origin
        samples_changed = not digest.is_of(recorded)
        if reading:
            recorded = recorded.model_copy(update={name: getattr(origin, name) for name in ("data", "train", "optim")})
        origin.model_copy(update={"data": origin.data | digest.as_recorded(recorded)}).check_same(recorded, resumed[0])
    engine = engine_of(config, comm, schema, partitions, device, statistics, reading=reading)
    if resumed:
        checkpoint.load(comm, *resumed, engine)
    elif warm:
        warmstart.load(comm, warm, origin, engine)
    if not reading:
        engine.begin_day(newest_day(each.file for each in train.row_groups))
    new_ad_column = next(field.column_name for field in schema.fields if field.name == schema.new_ad_field)
    return Run(
        config=config,
        comm=comm,
        schema=schema,
        folder=folder,
        engine=engine,
        device=device,
        partitions=partitions,
        stores=records(places, partitions),
        train_reader=_train_reader(config, comm, train, schema),
        test_reader=test_reader(config, comm, test, schema),
        known_ads=distinct_values(comm, train, new_ad_column, rules_of(schema)[new_ad_column]),
        origin=origin,
        position=resumed[1].position if resumed else BatchPosition(0, 0),
        history=resumed[1].history if resumed else [],
        warm_start=warm,
        samples_changed=samples_changed,
    )


def _with_statistics(
    config: Config,
    comm: Comm,
    schema: Schema,
    train: SampleIndex,
    samples: str,
    resumed: CheckpointState | None,
    warm: WarmStart | None,
) -> Schema:
    """The schema with the statistics of its numbers: of the checkpoint that the run goes on from, or whose layers or
    rows it begins with, as these have learned numbers on that scale; else of the training samples."""
    if resumed is not None:  # what is not there differs from the checkpoint, and is refused
        return fill_in(schema, resumed.origin.model.get("fields", {}))
    if warm is not None and {"model", "ids"} & set(warm.parts):
        schema = fill_in(schema, warm.state.origin.model.get("fields", {}))
    return with_statistics(comm, train, schema, samples, config.data.cache_dir)


def engine_of(
    config: Config,
    comm: Comm,
    schema: Schema,
    partitions: Mapping[str, FeaturePartition],
    device: torch.device,
    statistics: Mapping[str, FeatureStatistics] | None = None,
    *,
    reading: bool = False,
) -> Engine:
    """The engine of a run. Without `statistics`, a checkpoint that is loaded next has the standardisation; `reading`:
    the run is looked at and not trained."""
    return Engine(
        comm,
        schema,
        partitions,
        config.model,
        config.optim,
        config.exchange,
        seed=config.train.seed,
        missing=config.data.missing,
        statistics=statistics,
        device=device,
        dtype=torch.float64 if config.model.compute_dtype == "float64" else torch.float32,
        reading=reading,
    )


def claim_folder(run: Run) -> list[Path]:
    """Makes the run's folder and writes config.yaml and, where the samples have texts, ids.parquet. Returns the
    checkpoints that run.overwrite removed before that. Every rank calls it.

    Called when all else is open. Killed at any point, it leaves the earlier run at one of its steps, or
    this one at its first. Raises ConfigError where the folder cannot be written to.
    """

    def claim() -> list[Path]:
        with _disk_errors_told(run.config):
            removed = _overwrite(run) if run.config.run.overwrite else []
            run.folder.mkdir(parents=True, exist_ok=True)
            if _resumed_folder(run) != run.folder:
                (run.folder / dictionary.FILE).unlink(missing_ok=True)  # of a run that this one does not go on with
            save_config(run.config, run.folder / "config.yaml")
            write_statistics(run.folder, run.schema, run.origin.data)
        return removed

    removed_paths = run.comm.on_rank_0(claim)
    _keep_dictionary(run)
    return removed_paths


def _keep_dictionary(run: Run) -> None:
    """Writes ids.parquet, unless the run goes on and has it; with the entries of the run whose ID rows it goes on from,
    or begins with, in another folder. Raises DataError, ConfigError on all ranks together."""
    if run.comm.on_rank_0((run.folder / dictionary.FILE).is_file):
        return  # `claim_folder` removes another run's
    warm = run.warm_start
    before = run.comm.on_rank_0(lambda: _resumed_folder(run))
    if before is None and warm is not None and "ids" in warm.parts:
        before = warm.path.absolute().parents[1]
    earlier = before / dictionary.FILE if before is not None else None
    with _disk_errors_told(run.config):
        dictionary.write_dictionary(run.comm, run.folder, run.train_reader.index, rules_of(run.schema), earlier)


def _resumed_folder(run: Run) -> Path | None:
    """The folder of the run that wrote the checkpoint which this one goes on from: its own, or another one's."""
    if run.config.run.resume is None:
        return None
    path = checkpoint.find(run.checkpoints, run.config.run.resume).absolute()
    is_own = run.checkpoints.is_dir() and path.parent.samefile(run.checkpoints)
    return run.folder if is_own else path.parents[1]


def _overwrite(run: Run) -> list[Path]:
    """Removes what this run does not go on with of the one in its folder; returns the checkpoints among that."""
    removed = _in_the_way(run.folder, run.config.run.resume)
    (run.folder / "report.json").unlink(missing_ok=True)
    checkpoint.remove(removed)
    if not checkpoint.finished(run.checkpoints):
        shutil.rmtree(run.folder / "tensorboard", ignore_errors=True)
        (run.folder / accepted.FILE).unlink(missing_ok=True)
    return removed


def _in_the_way(folder: Path, resume: str | None) -> list[Path]:
    """Checkpoints of the run in `folder` that one which starts afresh, or from `resume`, would take for its own."""
    checkpoints = folder / "checkpoints"
    if resume is None:
        return checkpoint.finished(checkpoints)
    return checkpoint.unrelated(checkpoints, checkpoint.find(checkpoints, resume))


def _check_folder(config: Config, folder: Path) -> None:
    """Refuses a folder that cannot be written to, and one that holds a checkpoint or a report of another run."""
    resume = config.run.resume
    with _disk_errors_told(config):
        place = next(each for each in (folder, *folder.parents) if each.exists())
        writable = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
        in_the_way = _in_the_way(folder, resume) if writable else []
        taken = bool(in_the_way) or (resume is None and (folder / "report.json").exists())
    if not writable:
        raise ConfigError(
            f"run.dir={config.run.dir}: {place} is not a folder that this user can write to; choose another"
        )
    if not taken or config.run.overwrite:
        return
    if resume is None:
        raise ConfigError(
            f"{folder} holds a run already; go on with it by run.resume=latest, choose another run.name, "
            "or replace it by run.overwrite=true"
        )
    names = ", ".join(path.name for path in in_the_way)
    raise ConfigError(
        f"run.resume={resume}: {folder} holds checkpoints that do not lead to this one, and would be taken for this "
        f"run's: {names}; go on from the newest by run.resume=latest, choose another run.name, or remove them by "
        "run.overwrite=true"
    )


@contextmanager
def _disk_errors_told(config: Config) -> Iterator[None]:
    """Makes an OSError of the block a ConfigError that names run.dir."""
    try:
        yield
    except OSError as failure:
        raise ConfigError(f"run.dir={config.run.dir} cannot be used: {failure}; choose another") from failure


def _check_places(config: Config, places: list[StorePlace]) -> None:
    """Says which job to run where a place is empty, for all of them at once."""
    samples, problems = Storage(config.data.samples), missing_places(places)
    without_store = bool(problems)
    splits = {"train": config.data.train_days, "test": config.data.test_days}
    empty = [split for split, days in splits.items() if days is None and not sample_files(samples, split)]
    if empty:
        job = f"python jobs/build_samples.py --samples {config.data.samples}"
        problems.append(
            f"data.samples={config.data.samples} has no {' and no '.join(empty)} samples; make them with: {job}"
        )
    if problems:
        if without_store and empty:
            problems.append("without images and logs of your own, draw some first with: python jobs/make_demo_data.py")
        raise DataNotFoundError("\n".join(problems))


def _resumed(config: Config, folder: Path) -> tuple[Path, CheckpointState] | None:
    if config.run.resume is None:
        return None
    path = checkpoint.find(folder / "checkpoints", config.run.resume)
    return path, checkpoint.read_state(path)


def _warm_start(config: Config) -> WarmStart | None:
    return warmstart.find(config.run.warm_start, config.run.warm_parts) if config.run.warm_start else None


def _origin(config: Config, schema: Schema, samples: str, partitions: Mapping[str, FeaturePartition]) -> Origin:
    store, stores = kinds_by_store(partitions)
    return Origin(
        data={
            "samples_digest": samples,
            "global_batch_size": config.data.global_batch_size,
            "shuffle": config.data.shuffle,
            "shuffle_window_groups": config.data.shuffle_window_groups,
        },
        train={"seed": config.train.seed},
        optim=_optim_of(config.optim),
        model=model_of(config, schema),
        store=store,
        stores=stores,
    )


def _optim_of(optim: OptimConfig) -> dict[str, Any]:
    """What must stay the same for ID rows to go on: Adam moves them by its betas between the steps that touch them."""
    betas = {"beta1": optim.beta1, "beta2": optim.beta2, "eps": optim.eps} if optim.ids == "adam" else {}
    return {"ids": optim.ids, **betas}


def model_of(config: Config, schema: Schema) -> dict[str, Any]:
    """What of a run decides on its parameters: the model's settings and the fields, as a checkpoint's origin has it."""
    fields = {field.name: field.model_dump(mode="json", exclude={"name"}, exclude_none=True) for field in schema.fields}
    return {**config.model.model_dump(), "fields": fields, "label": schema.label}


def _train_reader(config: Config, comm: Comm, index: SampleIndex, schema: Schema) -> SampleReader:
    data = config.data
    seed, window_groups = (config.train.seed, data.shuffle_window_groups) if data.shuffle else (None, 1)
    return SampleReader(
        index,
        schema,
        rank=comm.rank,
        num_ranks=comm.size,
        batch_size=data.global_batch_size,
        seed=seed,
        window_groups=window_groups,
    )


def test_reader(config: Config, comm: Comm, index: SampleIndex, schema: Schema) -> SampleReader:
    """This rank's batches of samples to evaluate on: one part of them for each rank."""
    batch_size = config.train.eval_batch_size
    return SampleReader(index, schema, rank=comm.rank, num_ranks=comm.size, batch_size=batch_size, by_part=True)
