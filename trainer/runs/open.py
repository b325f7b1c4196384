"""A run, claimed by one start of it, and opened: model, tables, samples, and the stores with the images that they lack.

Every rank calls the same functions; what can go wrong on one of them is agreed on, so that all raise together.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import torch

from featurestore.console.memory import keep_freed_memory
from featurestore.errors import AnotherStoreError, FeatureStoreError, MissingKeysError, StoreNotFoundError
from featurestore.format.codec import FeatureStatistics
from featurestore.keys import Int64Array
from featurestore.lookup.partition import FeaturePartition
from featurestore.published.paths import RunPath, remove_all, run_path
from featurestore.published.versions import VersionName, open_published
from featurestore.spec import StoreInfo
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore, Snapshot, SnapshotId
from featurestore.text import count_text
from trainer.comm import Comm
from trainer.config import Config, TrainConfig, differences, save_config, settings_that_decide
from trainer.engine.engine import Engine
from trainer.engine.machine import share_machine, with_compute_dtype
from trainer.engine.wiring import check_tables
from trainer.errors import CheckpointError, ConfigError, DataError, DataNotFoundError
from trainer.models.layers import used_fields
from trainer.problems import Problem
from trainer.runs import checkpoint as checkpoints
from trainer.runs.checkpoint import SkippedCheckpoint
from trainer.runs.folder import TENSORBOARD, Checkpoint, check_folder, conflicting_checkpoints, finished, run_dir_errors
from trainer.runs.saving import CheckpointPlace
from trainer.samples import survey
from trainer.samples.columns import files_by_day, rules_of, sample_files
from trainer.samples.index import SampleIndex, known_ads, open_index, streams_of
from trainer.samples.reader import BatchPosition, SampleReader, Span
from trainer.schema.fields import DEFAULT_STORE, IDS_FILE, SCHEMA_FILE, Field, Schema, load_schema

_LEAST_DAYS = 4
"""Training days of which some are held out where nothing is said."""
_INSTEAD = {"learned": 'get a trained "no image" vector', "zeros": "are zeros"}


@dataclass(frozen=True)
class StorePlace:
    """Address of a store, the snapshot asked for, and the setting that says so."""

    name: str
    url: str
    version: VersionName | None
    setting: str

    def make_it(self) -> str:
        """Name the command that fills it."""
        command = "extract" if self.setting == "data.store" else "import"
        return f"crossmedia {command} --store {self.url}"


Choose = Callable[[StorePlace], Snapshot]
"""Gives the snapshot of a store to look images up in."""


def store_places(config: Config, schema: Schema) -> list[StorePlace]:
    """List the stores that the model's content fields name, that of data.store first; none where it sees no content.

    data.store is the one named images, or the only one that is named; the others are in data.stores. Raises
    ConfigError.
    """
    names = list(dict.fromkeys(f.store_name for f in used_fields(schema, config.model) if f.kind == "content"))
    elsewhere = [name for name in names if name in config.data.stores]
    here = [name for name in names if name not in elsewhere]
    if len(here) > 1 or (here and elsewhere and here != [DEFAULT_STORE]):
        without = next(name for name in here if name != DEFAULT_STORE)
        raise ConfigError(Problem.STORE_WITHOUT_ADDRESS, ", ".join(names), config.data.store, DEFAULT_STORE, without)
    known = {field.store_name for field in schema.of_kind("content")}
    for name in config.data.stores.keys() | config.data.store_versions.keys():
        if name not in known:
            raise ConfigError(Problem.UNUSED_STORE, name, ", ".join(sorted(known)) or "none")
    data = config.data
    return [StorePlace(name, data.store, data.store_version, "data.store") for name in here] + [
        StorePlace(name, data.stores[name], data.store_versions.get(name), f"data.stores.{name}") for name in elsewhere
    ]


def missing_places(places: list[StorePlace]) -> list[str]:
    """Describe each place that holds no store in one line, with the job that makes it."""
    problems = []
    for place in places:
        try:
            FeatureStore.open(place.url)
        except StoreNotFoundError:
            problems.append(Problem.NO_STORE_AT_SETTING.of(place.setting, place.url, place.make_it()))
    return problems


def snapshot_of(place: StorePlace, resumed: checkpoints.Resumed | None) -> Snapshot:
    """Choose the snapshot to train on: the one asked for, else the checkpoint's, else the newest.

    A channel is asked for once, when the run begins: it may have been moved since.

    Raises AnotherStoreError where it is not of the store that the checkpoint was trained on.
    """
    recorded = resumed[1].version_of(place.name) if resumed and not isinstance(place.version, int) else None
    store = FeatureStore.open(place.url)
    try:
        snapshot = store.snapshot(place.version if recorded is None else recorded)
    except FeatureStoreError as failure:
        if recorded is None:
            raise
        check_identity(place, store.snapshot(), resumed)
        setting = place.setting.replace("store", "store_version", 1)
        raise CheckpointError(Problem.TRAINED_SNAPSHOT_GONE, recorded, place.url, failure, setting) from failure
    check_identity(place, snapshot, resumed)
    if snapshot.num_rows == 0:
        raise DataError(Problem.SNAPSHOT_EMPTY, f"{place.setting}={place.url}", snapshot.version, place.make_it())
    return snapshot


def check_identity(place: StorePlace, snapshot: Snapshot, resumed: checkpoints.Resumed | None) -> None:
    """Raise AnotherStoreError where the snapshot is not of the store that the checkpoint was trained on.

    Features of another kind are found by RunFingerprint.check_store, which has a better message.
    """
    if resumed is None:
        return
    checkpoint, state = resumed
    recorded = state.stores.get(place.name)
    if recorded is None or other_features(snapshot.info, state, place.name):
        return
    name = "" if place.setting == "data.store" else f" --name {place.name}"
    recorded.check(
        SnapshotId.of(snapshot),
        f"the checkpoint {checkpoint}",
        f"set {place.setting} to the address of that store, or see whether this one will do, and accept it: "
        f"crossmedia compat {checkpoint.run} {place.url}{name}",
    )


def other_features(info: StoreInfo, state: checkpoints.CheckpointState, name: str) -> list[str]:
    """List how a store's features differ from those that the checkpoint's E was trained on; `name` is the store's."""
    recorded = state.origin.stores.get(name, {})
    return [each.text("in the checkpoint") for each in differences(kind_of_features(info), recorded)]


def open_partition(config: Config, comm: Comm, place: StorePlace, chosen: SnapshotId) -> FeaturePartition:
    """Open this rank's part of the snapshot that rank 0 chose.

    Raises AnotherStoreError where this rank finds another one under the same address: each machine has its own disk, or
    the store was rebuilt meanwhile."""
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
        found = chosen.described(), partition.snapshot_id.described()
        raise AnotherStoreError(Problem.OTHER_STORE_THAN_RANK_0, place.setting, place.url, *found)
    return partition


def kind_of_features(info: StoreInfo) -> dict[str, Any]:
    """Describe the properties of a store that E relies on: ExtractorSpec, dimension, dtype and basis."""
    basis = {"basis": info.reduction.sha256} if info.reduction else {}
    return {"dim": info.dim, "dtype": info.dtype, "extractor": info.extractor.model_dump(mode="json"), **basis}


def records(places: list[StorePlace], partitions: Mapping[str, FeaturePartition]) -> dict[str, SnapshotId]:
    """Return the entries of a checkpoint on the stores that it was trained on; addresses as they were set."""
    return {p.name: partitions[p.name].snapshot_id.model_copy(update={"url": p.url}) for p in places}


def lacking_images(
    config: Config,
    comm: Comm,
    schema: Schema,
    places: Sequence[StorePlace],
    partitions: Mapping[str, FeaturePartition],
    indexes: Sequence[SampleIndex],
    *,
    is_new: bool,
) -> list[str]:
    """Report in a line for each store how many images the run's samples name and the store lacks; every rank calls it.

    All samples are counted, once for each snapshot: the cache folder of rank 0's machine keeps the counts. Raises, on
    all ranks together, DataError, also where a new run would train on not one image, and MissingKeysError where
    data.missing=error.
    """
    lines, cache, listing = [], config.data.cache_dir, f"crossmedia schema missing {config.data.samples}"
    own = config.data.schema_file
    options = f" --schema {own}" if own not in (None, f"{config.data.samples.rstrip('/')}/{SCHEMA_FILE}") else ""
    digests = [survey.samples_digest(comm, each, cache) for each in indexes] if places else []
    for place in places:
        partition, used = partitions[place.name], used_fields(schema, config.model)
        fields = [field for field in used if field.kind == "content" and field.store_name == place.name]
        columns = sorted({(field.column_name, field.side) for field in fields})
        asked = [digests, columns, partition.snapshot_id.commit_id]
        count = partial(survey.lacking, comm, indexes, schema, fields, partition)
        known = survey.measured_once(comm, indexes[0], "images", asked, cache, lambda: asdict(count()))  # noqa: B023
        found = survey.LackingImages(**known)
        if is_new and found.named and not found.found:
            images = comm.on_rank_0(partial(_two_images, place, partition, indexes[0], schema, fields))
            raise DataError(Problem.NO_TRAINING_IMAGE, place.setting, place.url, *images)
        if not found.impressions and not found.behaviors:
            continue
        share = f"{found.impressions:,} of {found.of:,} impressions, {found.behaviors:,} behaviours"
        share += f", {found.without:,} of the impressions without any image" if found.images and found.without else ""
        lacks = f"{place.url} lacks {count_text(found.images, 'image')} that the samples name ({share})"
        lacks = lacks if found.images else f"the samples name no image in {share}"
        named = "" if place.name == DEFAULT_STORE else f" --name {place.name}"
        missing, listed = config.data.missing, f"list them: {listing} {place.url}{options}{named}"
        if missing == "error":
            add = f"add them: {place.make_it()}; " if found.images else ""
            raise MissingKeysError(Problem.IMAGES_LACKED, lacks, listed, add)
        lines.append(f"{lacks}: they {_INSTEAD[missing]} (data.missing={missing}); {listed}")
    return lines


def _two_images(
    place: StorePlace, partition: FeaturePartition, train: SampleIndex, schema: Schema, fields: Sequence[Field]
) -> tuple[Any, Any]:
    """Return the name of an image of the training samples, and of one of the store, which has none of those."""
    rows = FeatureStore.open(place.url).snapshot(partition.snapshot_version).arrow_reader(["key", "uri"])
    batch = next((batch for batch in rows if len(batch)), None)
    stored = "nothing" if batch is None else batch["uri"][0].as_py() or batch["key"][0].as_py()
    return survey.example_image(train, schema, fields), stored


@dataclass(kw_only=True)
class OpenRun:
    """A run's engine and this rank's rows of its stores, by their names; close it."""

    config: Config
    comm: Comm
    schema: Schema
    engine: Engine
    partitions: dict[str, FeaturePartition]
    stores: dict[str, SnapshotId]

    @property
    def store_version(self) -> int | None:
        """The snapshot of the first store, that of data.store where the model has it; None without content."""
        return next((partition.snapshot_version for partition in self.partitions.values()), None)

    def missing_by_store(self) -> dict[str, int]:
        """Count the lookups, of all ranks, of images without a feature, hidden ones too; every rank calls it."""
        own = {name: partition.missing_count for name, partition in self.partitions.items()}
        everyone = self.comm.allgather_object(own, name="missing")
        return {name: sum(each[name] for each in everyone) for name in own}

    def missing_lookups(self) -> int:
        """Count those of all stores; every rank calls it."""
        return sum(self.missing_by_store().values())

    def close(self) -> None:
        """Release the stores' rows."""
        for partition in self.partitions.values():
            partition.close()


@dataclass(kw_only=True)
class Run(OpenRun):
    """All state of a run that is trained; `position` is the batch that comes next."""

    folder: RunPath
    device: torch.device
    train_reader: SampleReader
    test_reader: SampleReader
    validation_reader: SampleReader | None
    """Reader of the days on which the best epoch is chosen."""
    known_ads: Int64Array
    origin: checkpoints.RunFingerprint
    position: BatchPosition
    history: list[dict[str, Any]]
    resumed: Checkpoint | None
    """The checkpoint that the run continues from."""
    skipped: Sequence[SkippedCheckpoint]
    """Newer ones, newest first, which are damaged."""
    warm_start: checkpoints.WarmStart | None
    lacked: Sequence[str]
    """Warnings on images that the samples name and a store lacks."""

    @cached_property
    def place(self) -> CheckpointPlace:
        """Return the place of the run's published checkpoints."""
        return CheckpointPlace(self.folder)


def open_run(config: Config, comm: Comm) -> Run:
    """Open everything but the folder's content, which `claim_folder` writes. Raises TrainerError, FeatureStoreError."""
    name = comm.broadcast_object(config.run.name or time.strftime("run-%Y%m%d-%H%M%S"))
    config = config.changed(run={"name": name})  # so that the run's own config.yaml resumes it
    folder = run_path(config.run.dir) / name
    return checkpoints.continued(comm, config, folder, partial(_open_run, config, comm, folder))


def _open_run(
    config: Config, comm: Comm, folder: RunPath, at: checkpoints.Resumed | None, passed: list[SkippedCheckpoint]
) -> Run:
    """Open the run at this checkpoint, or at its first step."""
    schema = load_schema(config.data.schema_file)
    places = store_places(config, schema)
    comm.on_all(lambda: check_folder(config, folder, at[0] if at else None, [each.checkpoint for each in passed]))
    samples = comm.on_rank_0(lambda: open_samples(config, places))
    recorded = at[1].origin if at else None
    comm.on_all(lambda: check_tables(schema, config.model))
    warm = None if at else comm.on_all(lambda: checkpoints.find_warm_start(config.run))
    keep_freed_memory()
    device = share_machine(config, comm)
    dtype = recorded.model.get("compute_dtype") if recorded else None
    config = config.model_copy(update={"model": with_compute_dtype(config.model, comm, device, dtype)})
    held = recorded.data.get("validation_days") if recorded else None
    config = comm.on_rank_0(lambda: with_validation(config, samples, held))
    train = open_index(comm, samples, "train", schema, config.data.train_days)
    test = open_index(comm, samples, "test", schema, config.data.test_days)
    partitions, statistics = open_stores(config, comm, places, partial(snapshot_of, resumed=at), measured=not at)
    digest = survey.samples_digest(comm, train, config.data.cache_dir)
    schema = _with_statistics(config, comm, schema, train, digest, recorded, warm)
    reader = train_reader(config, train, schema, comm.rank, comm.size)
    origin = _origin(config, schema, digest, reader.num_streams, partitions)
    if at:
        origin.check_same(at[1].origin, at[0])
    engine = Engine(comm, schema, partitions, config, statistics=statistics, device=device)
    if at:
        try:
            checkpoints.load(comm, *at, engine, config.data.cache_dir)
        except BaseException:  # an earlier checkpoint may be tried
            for partition in partitions.values():
                partition.close()
            raise
    elif warm:
        checkpoints.warm_start(comm, warm, origin, engine, config.data.cache_dir)
    engine.expire_rows(train.newest_day)
    position = at[1].position if at else BatchPosition(0, 0)
    engine.first_step = engine.num_steps - (position.epoch * reader.steps_per_epoch + position.step)  # of earlier runs
    return Run(
        config=config,
        comm=comm,
        schema=schema,
        folder=folder,
        engine=engine,
        device=device,
        partitions=partitions,
        stores=records(places, partitions),
        train_reader=reader,
        test_reader=test_reader(config, comm, test, schema),
        validation_reader=_validation_reader(config, comm, samples, schema),
        known_ads=known_ads(comm, train, schema),
        origin=origin,
        position=position,
        history=at[1].history if at else [],
        resumed=at[0] if at else None,
        skipped=passed,
        warm_start=warm,
        lacked=lacking_images(config, comm, schema, places, partitions, [train, test], is_new=not (at or warm)),
    )


def with_validation(config: Config, samples: Storage, recorded: list[str] | int | None = None) -> Config:
    """Name the days that are trained on, and those that choose the best epoch, where there are any.

    `recorded`: those of the checkpoint that is resumed. Raises ConfigError where no day would be left to train on.
    Lists the samples only where days may be held out.
    """
    held, train = recorded if config.data.validation_days is None else config.data.validation_days, config.train
    is_long = train.early_stopping is not None or (train.epochs > TrainConfig().epochs and train.max_steps is None)
    is_chosen = held is None and train.eval_every is None and is_long  # which epoch is best differs by log
    if not held and not is_chosen:
        return config.changed(data={"validation_days": 0})
    days = config.data.train_days or [
        day for day, files in files_by_day(samples).items() if any(file.startswith("train/") for file in files)
    ]
    if is_chosen:  # a tenth, but one at least; none of few days, unless the training may stop early
        if len(days) < _LEAST_DAYS and train.early_stopping is None:
            return config.changed(data={"validation_days": 0})
        held = max(1, len(days) // 10)
    held = sorted(days)[-held:] if isinstance(held, int) else held or []
    kept = sorted(set(days) - set(held))
    if not kept:
        chosen = config.data.validation_days or f"{len(held)} (for train.early_stopping)"
        raise ConfigError(Problem.NO_TRAINING_DAYS_LEFT, chosen, len(days), samples.url)
    return config.changed(data={"train_days": kept, "validation_days": held})


def _validation_reader(config: Config, comm: Comm, samples: Storage, schema: Schema) -> SampleReader | None:
    days = config.data.validation_days
    if not isinstance(days, list):
        return None
    return test_reader(config, comm, open_index(comm, samples, "train", schema, days), schema)


def open_stores(
    config: Config, comm: Comm, places: list[StorePlace], choose: Choose, *, measured: bool
) -> tuple[dict[str, FeaturePartition], dict[str, FeatureStatistics | None]]:
    """Open this rank's rows of the snapshots that rank 0 chooses.

    `measured`: with their statistics; a checkpoint that is loaded next has them already. Every rank calls it. Raises
    FeatureStoreError or what `choose` raises, on all ranks together; what was opened before is closed then.
    """

    def chosen_at(place: StorePlace) -> tuple[SnapshotId, FeatureStatistics | None]:
        snapshot = choose(place)
        return SnapshotId.of(snapshot), snapshot.statistics() if measured else None

    partitions: dict[str, FeaturePartition] = {}
    statistics: dict[str, FeatureStatistics | None] = {}
    with contextlib.ExitStack() as opened:
        for place in places:
            chosen, statistics[place.name] = comm.on_rank_0(partial(chosen_at, place))
            partition = comm.on_all(partial(open_partition, config, comm, place, chosen))
            partitions[place.name] = opened.enter_context(partition)
        opened.pop_all()
    return partitions, statistics


def _with_statistics(
    config: Config,
    comm: Comm,
    schema: Schema,
    train: SampleIndex,
    samples: str,
    recorded: checkpoints.RunFingerprint | None,
    warm: checkpoints.WarmStart | None,
) -> Schema:
    """Fill in the statistics of the schema's numbers.

    They are those of the checkpoint that the run continues from or begins with, as its layers have learned numbers on
    that scale; else those of the training samples.
    """
    if earlier := recorded or (warm.state.origin if warm else None):
        schema = survey.fill_in(schema, earlier.model.get("fields", {}))
    if recorded:  # what is not there differs from the checkpoint, and is refused
        return schema
    return survey.with_statistics(comm, train, schema, samples, config.data.cache_dir)


def open_samples(config: Config, places: list[StorePlace]) -> Storage:
    """Open the samples that all indexes of the run are of; name the jobs to run for all places that are empty."""
    samples, problems = open_published(config.data.samples), missing_places(places)
    without_store, splits = bool(problems), {"train": config.data.train_days, "test": config.data.test_days}
    empty = [split for split, days in splits.items() if days is None and not sample_files(samples, split)]
    if empty:
        samples.check_bucket()
        hint = "; without images and logs of your own, draw some first: crossmedia demo-data" if without_store else ""
        problems.append(Problem.NO_SAMPLES_AT_SETTING.of(config.data.samples, " and no ".join(empty), hint))
    if problems:
        raise DataNotFoundError("\n".join(problems))
    return samples


def _origin(
    config: Config, schema: Schema, samples: str, streams: int, partitions: Mapping[str, FeaturePartition]
) -> checkpoints.RunFingerprint:
    positions = settings_that_decide("positions")
    data = config.data.model_dump(include=positions["data"] - {"train_days"})  # the samples tell
    return checkpoints.RunFingerprint(
        data={**data, "shuffle_streams": streams, "samples_digest": samples},
        train=config.train.model_dump(include=positions["train"]),
        optim=config.optim.model_dump(include=settings_that_decide("parameters", "rows")["optim"]),
        model=model_of(config, schema),
        stores={name: kind_of_features(partition.info) for name, partition in partitions.items()},
    )


def model_of(config: Config, schema: Schema) -> dict[str, Any]:
    """List the settings that decide on a run's parameters: those of the model and the fields, as an origin has them."""
    fields = {field.name: field.model_dump(mode="json", exclude={"name"}, exclude_none=True) for field in schema.fields}
    return {**config.model.model_dump(), "fields": fields, "label": schema.label}


def train_reader(config: Config, index: SampleIndex, schema: Schema, rank: int = 0, num_ranks: int = 1) -> SampleReader:
    """Make the reader of samples to train on, of rank `rank` of `num_ranks`."""
    data = config.data
    seed, window = (config.train.seed, data.shuffle_window) if data.shuffle else (None, 1)
    return SampleReader(
        index,
        schema,
        rank=rank,
        num_ranks=num_ranks,
        batch_size=data.global_batch_size,
        seed=seed,
        window=window,
        streams=streams_of(data, len(index.row_groups), index.num_samples),
    )


def test_reader(config: Config, comm: Comm, index: SampleIndex, schema: Schema) -> SampleReader:
    """Make the reader of samples to evaluate on: of one part of them for each rank."""
    return PartReader(index, schema, rank=comm.rank, num_ranks=comm.size, batch_size=config.train.eval_batch_size)


class PartReader(SampleReader):
    """One contiguous part of a split for each rank, cut into equally many batches, in the files' order.

    Evaluation needs no order, so a rank decodes its own part alone. Parts do not belong to one global batch: places of
    their samples are those in the part.
    """

    @property
    def steps_per_epoch(self) -> int:
        return -(-max(len(self._part(rank)) for rank in range(self._num_ranks)) // self._part_size)

    def _steps(self, lengths_S: Sequence[int]) -> Iterator[tuple[list[Span], int]]:
        """Yield this rank's part of each step, and the samples of all ranks' parts."""
        for step in range(self.steps_per_epoch):
            here = slice(step * self._part_size, (step + 1) * self._part_size)
            together = sum(len(self._part(rank)[here]) for rank in range(self._num_ranks))
            yield [Span(0, self._part(self._rank)[here], 0)], together

    @property
    def _part_size(self) -> int:
        return -(-self._batch_size // self._num_ranks)

    def _part(self, rank: int) -> range:
        return range(self.num_samples * rank // self._num_ranks, self.num_samples * (rank + 1) // self._num_ranks)


def claim_folder(run: Run) -> list[Checkpoint]:
    """Make the run's folder and write config.yaml and, where the samples have texts, ids.parquet.

    Returns the checkpoints that run.overwrite removed before that. Every rank calls it, when all else is open. Killed
    at any point, it leaves the earlier run at one of its steps, or this one at its first. Raises ConfigError where the
    folder cannot be written to.
    """

    def claim() -> list[Checkpoint]:
        with run_dir_errors(run.config):
            run.place.claim([each.checkpoint for each in run.skipped])
            removed = conflicting_checkpoints(run.folder, run.resumed)
            if removed and not run.config.run.overwrite:  # since this one looked
                raise CheckpointError(Problem.STARTED_TWICE, run.folder)
            if run.config.run.overwrite:
                (run.folder / "report.json").unlink(missing_ok=True)
                run.place.remove(removed)
                if not finished(run.folder):
                    remove_all(run.folder / TENSORBOARD)
                    (run.folder / checkpoints.ACCEPTED_FILE).unlink(missing_ok=True)
            run.folder.mkdir(parents=True, exist_ok=True)
            if resumed_folder(run) != run.folder:
                (run.folder / IDS_FILE).unlink(missing_ok=True)  # of a run that this one does not continue
            save_config(run.config, run.folder / "config.yaml")
        return removed

    removed_paths = run.comm.on_rank_0(claim)
    _keep_dictionary(run)
    return removed_paths


def _keep_dictionary(run: Run) -> None:
    """Write ids.parquet, unless the run is continued and has it.

    It begins with the entries of the run whose ID rows this one continues, or begins with, in another folder. Raises
    DataError, ConfigError on all ranks together.
    """
    if run.comm.on_rank_0((run.folder / IDS_FILE).is_file):
        return  # `claim_folder` removes another run's
    warm = run.warm_start
    before = run.comm.on_rank_0(lambda: resumed_folder(run))
    if before is None and warm is not None and warm.parts == "all":
        before = warm.checkpoint.run
    earlier = before / IDS_FILE if before is not None else None
    with run_dir_errors(run.config):
        survey.write_dictionary(run.comm, run.folder, run.train_reader.index, rules_of(run.schema), earlier)


def resumed_folder(run: Run) -> RunPath | None:
    """Return the folder of the run that wrote the checkpoint which this one continues: its own, or another one's."""
    if run.resumed is None:
        return None
    return run.folder if run.resumed.is_of(run.folder) else run.resumed.run
