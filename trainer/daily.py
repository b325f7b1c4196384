"""Daily training: crossmedia daily trains on the days that are new.

`crossmedia daily` is one rank; `horovodrun -np P crossmedia daily` is P of them. All progress is in the runs' folders,
so a job that was killed at any time continues where it stopped.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurestore.console import commandline, output
from featurestore.errors import AnotherStoreError, StorageError
from featurestore.parsing import parse_json
from featurestore.published.paths import RunPath, read_file, run_path, write_json_file
from trainer.cli import MoreSettings, Settings, SettingsFile
from trainer.config import Config, differences, load_config, load_saved, refuse_given, save_config
from trainer.errors import CheckpointError, ConfigError, DataNotFoundError, TakenOverError, TrainerError
from trainer.evaluation.bootstrap import shown
from trainer.main import on_ranks, train
from trainer.problems import Problem
from trainer.runs.folder import DAYS_FILE, TENSORBOARD, finished, report_of

if TYPE_CHECKING:
    from trainer.comm import Comm


DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
_SAME_PLACES = {"data.samples", "data.schema_file", "data.store", "data.stores"}
"""Settings that all days of a table share; which snapshots of the stores, is chosen day by day."""
_CHOSEN = ("run.resume", "run.overwrite", "run.warm_parts", "data.train_days", "data.test_days", "data.validation_days",
           "train.early_stopping")  # fmt: skip
"""Settings that each day has its own of; a day is trained before the next one is there, so it cannot stop early."""
TABLE_FILE = "days.json"
_METRICS = ("impressions", "logloss", "auc", "gauc", "new_ad_auc", "new_ad_gauc")
_COUNTS = ("users", "gauc_users", "new_ad_users", "new_ad_gauc_users")
"""Users of the metrics: those of few users are not printed."""


def trained_days(folder: RunPath) -> dict[RunPath, dict[str, Any]]:
    """Read the reports of the days that were trained to the end, by their folders, oldest first."""
    found = {each: report_of(each) for each in day_folders(folder)}
    return {each: report for each, report in found.items() if report is not None}


def day_folders(folder: RunPath) -> list[RunPath]:
    """List the folders of the days that have begun, oldest first; none where there is no such folder."""
    below: list[RunPath] = sorted(folder.iterdir(), key=str) if folder.is_dir() else []
    return [each for each in below if DAY.fullmatch(each.name)]


def run_of_days(folder: RunPath) -> RunPath:
    """Return the newest evaluated run of a daily job's folder, or the folder itself if it is not a daily job's.

    Raises ConfigError if no day is evaluated yet.
    """
    if not (folder / DAYS_FILE).is_file():
        return folder
    evaluated = [run for run, report in trained_days(folder).items() if report["metrics"]]
    if not evaluated:
        raise ConfigError(Problem.NO_DAY_EVALUATED, folder)
    return evaluated[-1]


def write(folder: RunPath) -> list[dict[str, Any]]:
    """Write `folder`/days.json, replaced as a whole, and return its rows: the trained days, oldest first.

    The metrics of a day that is not evaluated yet are None. `samples_changed`: between training and evaluation; this
    only affects the metrics of new ads. Raises TrainerError where the disk refuses.
    """
    found = [_row(run, report) for run, report in trained_days(folder).items()]
    try:
        write_json_file(folder / TABLE_FILE, found)
    except (OSError, StorageError) as failure:
        raise TrainerError(Problem.REFUSED, "write", folder / TABLE_FILE, failure) from failure
    return found


def show(folder: RunPath, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table."""
    console = output.text_console()
    names = [each.replace("_", " ") for each in ("day", "from", "snapshot", "steps", "test day", *_METRICS)]
    lines = []
    for row in rows:
        before = run_path(row["warm_start"]).name if row["warm_start"] else None
        cells = [row["day"], before, row["store_version"], row["steps"], row["test_day"]]
        cells += [f"{each:.4f}" if isinstance(each := shown(row, name), float) else each for name in _METRICS]
        lines.append([*map(output.figure, cells)])
    output.print_line(console, str(folder), style="bold")
    output.print_rows(names, lines, numbers=names)
    for row in rows:
        if row["samples_changed"]:
            console.print(f"{row['day']}: its training samples had changed before it was evaluated")
    console.print(f"written to {folder / TABLE_FILE}")


def _row(run: RunPath, report: Mapping[str, Any]) -> dict[str, Any]:
    config = load_saved(run / "config.yaml")
    first_store: dict[str, Any] = next(iter(report.get("stores", {}).values()), {})
    return {
        "day": run.name,
        "train_days": config.data.train_days,
        "steps": report["global_step"],
        "warm_start": config.run.warm_start,
        "store_version": report["store_version"],
        **{name: first_store.get(name) or None for name in ("store_id", "commit_id")},
        "samples_changed": report.get("samples_changed", False),
        "test_day": config.data.test_days[0] if config.data.test_days and report["metrics"] else None,
        **{name: report["metrics"].get(name) for name in (*_METRICS, *_COUNTS)},
    }


EXAMPLES = """Examples:
  crossmedia daily
  horovodrun -np 8 crossmedia daily data.samples=data/samples run.name=daily
  horovodrun -np 8 crossmedia daily --first-day 2026-01-18
  horovodrun -np 8 crossmedia daily --continue --set run.warm_start=data/runs/both

Every day is one run, RUN.DIR/RUN.NAME/DAY (data/runs/daily/2026-01-31), which trains on all days up to its own. The
first one is that of the newest day that has a next one. With --continue each later run takes all that the one before
has learned, and goes once through the days that have come since, at 0.3 of the learning rate (0.15 for ID rows). The
table of all days is next to the runs, as days.json. Start it again when another day's samples are there, or after a
kill: it continues where it stopped. The newest day is trained at once, and evaluated when the samples of the day after
it have come; where its own have changed by then, by late logs, it stays as it was trained, and is marked
samples_changed. Exit codes are those of crossmedia train.
"""

LATER_LR, LATER_IDS_LR = 0.3, 0.15
"""Factors of optim.lr and optim.ids_lr in a run that continues another one (docs/RESULTS.md)."""
app = commandline.CommandApp(rich_markup_mode="markdown")


@app.command(epilog=EXAMPLES)
def main(
    first_day: Annotated[
        datetime | None,
        typer.Option(
            metavar="DAY",
            formats=["%Y-%m-%d"],
            help="Day of the first run.",
            show_default="the newest day that has a next one; with run.warm_start the newest",
        ),
    ] = None,
    last_day: Annotated[
        datetime | None, typer.Option(metavar="DAY", formats=["%Y-%m-%d"], help="Leave out the days after.")
    ] = None,
    continues: Annotated[
        bool,
        typer.Option(
            "--continue/--all-days",
            help="Go once through each new day, from all that the run before has learned: cheaper, and a little worse "
            "in GAUC. Else each run trains on all days up to its own.",
        ),
    ] = False,
    file: SettingsFile = None,
    settings: Settings = None,
    more: MoreSettings = None,
) -> None:
    """Train day after day, on all days up to each, on the newest snapshot of the store, and evaluate on the next."""
    first, last = (None if day is None else f"{day:%Y-%m-%d}" for day in (first_day, last_day))
    work = partial(follow, first=first, last=last, continues=continues)
    raise typer.Exit(on_ranks(partial(load_config, file, [*(settings or []), *(more or [])]), work))


@dataclass(frozen=True)
class Day:
    """The run of one day: its training days, the day that it is evaluated on if that is there, and its folder."""

    name: str
    train_days: tuple[str, ...]
    test_day: str | None
    folder: RunPath

    def config(self, base: Config, before: RunPath | None) -> Config:
        """Make the settings of the run, which continues what the one in folder `before` has learned, or its own."""
        run: dict[str, Any] = {
            "dir": str(self.folder.parent),
            "name": self.name,
            "resume": "auto",
            "warm_start": str(before) if before else base.run.warm_start,
            "warm_parts": "all",
        }
        data: dict[str, Any] = {"train_days": list(self.train_days), "validation_days": 0}
        data["test_days"] = [self.test_day] if self.test_day else []
        if run["warm_start"] is None:
            return base.changed(run=run, data=data)
        rates = {"lr": LATER_LR * base.optim.lr, "ids_lr": LATER_IDS_LR * base.optim.alpha}
        return base.changed(run=run, data=data, train={"epochs": 1}, optim=rates)


def plan(
    days: Sequence[str],
    folder: RunPath,
    first: str | None = None,
    last: str | None = None,
    *,
    warm: bool = False,
    continues: bool = False,
) -> list[Day]:
    """Plan the runs of `days`, ascending, up to `last`; those that `folder` has train on what they have begun with.

    The first run is that of day `first`, by default of the newest day that has a next one. It trains on all days up to
    its own; where it begins with another run (`warm`) on its own alone, which by default is the newest. Each later one
    trains on all days up to its own too, or where it `continues` the run before on its own and those that came too late
    for that run. Raises ConfigError where the first run is of another day already.
    """
    begun = {each.name: _train_days_of(each) for each in day_folders(folder)}
    if begun and first not in (None, min(begun)):
        raise ConfigError(Problem.FIRST_DAY_AGAIN, first, folder, min(begun))
    may_begin = [day for day in days if day <= (last or day) and (warm or day < days[-1])]
    start = min(begun, default=first or max(may_begin, default=days[0]))
    trained = {day for own in begun.values() for day in own}
    since, planned = min(trained, default=start if warm else days[0]), list[Day]()
    for at, day in enumerate(days):
        own = begun.get(day, ())
        if not own and day >= max(begun, default=start):
            own = tuple(each for each in days[: at + 1] if not continues or (each >= since and each not in trained))
            trained |= set(own)
        if own and day <= (last or day):
            planned.append(Day(day, own, days[at + 1] if at + 1 < len(days) else None, folder / day))
    return planned


def _train_days_of(run: RunPath) -> tuple[str, ...]:
    """Read the days that a run trains on; empty before it has begun."""
    file = run / "config.yaml"
    return tuple(load_saved(file).data.train_days or ()) if file.is_file() else ()


def folder_of(base: Config) -> RunPath:
    """Return the folder of the days' runs and their table."""
    return run_path(base.run.dir) / (base.run.name or "daily")


def follow(
    base: Config, comm: "Comm", first: str | None = None, last: str | None = None, *, continues: bool = False
) -> None:
    """Train all days that are not done yet, one after the other, and write the table. Every rank calls it.

    `continues`: each run begins with the one before; else each trains on all days up to its own. Raises
    TrainerError and FeatureStoreError, on all ranks together.
    """

    folder = folder_of(base)

    def opened() -> list[Day]:
        refuse_given(base, _CHOSEN, "crossmedia daily chooses it for each day")
        _claim(folder, base)
        days = _days_of(base.data.samples)
        warm = base.run.warm_start is not None
        if warm and not continues:
            raise ConfigError(Problem.WARM_START_ON_ALL_DAYS, base.run.warm_start)
        chosen = plan(days, folder, first, last, warm=warm, continues=continues)
        if not chosen:
            raise ConfigError(Problem.NO_DAY_CHOSEN, days[0], days[-1])
        return chosen

    for day in comm.on_rank_0(opened):
        config, report = comm.on_rank_0(partial(_work_on, day, base, continues=continues))
        try:
            if config is not None:
                train(config, comm)
            elif report is not None:
                evaluate_trained(day, report, comm)
            else:
                continue
        except (CheckpointError, AnotherStoreError) as failure:
            if not isinstance(failure, TakenOverError):
                failure.add_note(f"To train {day.name} again, remove {day.folder}")
            raise
        comm.on_rank_0(lambda: write(folder))
    # Once more, as a start that was killed after its last day has not written it.
    comm.on_rank_0(lambda: show(folder, write(folder)))


def _work_on(day: Day, base: Config, *, continues: bool) -> tuple[Config | None, dict[str, Any] | None]:
    """Return the settings to train the day with, or the report of a trained day that is to be evaluated, or neither."""
    report = report_of(day.folder)
    if report is not None:
        return None, None if report["metrics"] or day.test_day is None else report
    earlier = [each for each in trained_days(day.folder.parent) if each.name < day.name]
    before = earlier[-1] if earlier else None  # even if its samples were removed
    if before:
        _check_stores(before, base)
    return day.config(base, before if continues else None), None


def evaluate_trained(day: Day, report: Mapping[str, Any], comm: "Comm") -> None:
    """Evaluate a trained day on the next one, and add the metrics to its `report`. Every rank calls it.

    The trained model stays unchanged; if samples of its days have changed since, the report says so. Raises
    TrainerError, FeatureStoreError.
    """
    from trainer.evaluation.predict import measure_test
    from trainer.loop.summary import ProgressLog, write_report
    from trainer.runs.saved import RunSource, open_source

    comm.on_rank_0(partial(_set_test_day, day))
    step = report["global_step"]
    place = day.folder / TENSORBOARD if comm.rank == 0 else None
    with (
        contextlib.closing(open_source(RunSource(day.folder), comm)) as opened,
        ProgressLog(place, step, step) as progress,
    ):
        progress.say(f"{day.folder}: {opened.test.num_samples:,} test samples of {day.test_day}, trained before")
        metrics = measure_test(opened)
        progress.metrics(step, metrics)
        missing = opened.missing_by_store()
        for note in (*opened.notes, *opened.saved.notes_on_missing(sum(missing.values()))):
            progress.say(note)
    missing = {name: count + missing[name] for name, count in report["missing_by_store"].items()}
    added = {
        "metrics": metrics,
        "history": [*report["history"], {"step": step, **metrics}],
        "missing_by_store": missing,
        "missing_lookups": sum(missing.values()),
        "samples_changed": opened.samples_changed,
    }
    progress.flush()
    comm.on_rank_0(lambda: write_report(day.folder / "report.json", {**report, **added}))


def _set_test_day(day: Day) -> None:
    """Write to the run's settings which day it is evaluated on; the report, written last, marks it as done."""
    file = day.folder / "config.yaml"
    try:
        save_config(load_saved(file).changed(data={"test_days": [day.test_day]}), file)
    except (OSError, StorageError) as failure:
        raise TrainerError(Problem.REFUSED, "write", file, failure) from failure


def _days_of(samples: str) -> list[str]:
    from featurestore.published.versions import open_published
    from trainer.samples.columns import files_by_day

    days = list(files_by_day(open_published(samples)))
    if not days:
        raise DataNotFoundError(Problem.NO_FILE_OF_A_DAY, samples)
    return days


def _claim(folder: RunPath, base: Config) -> None:
    """Write the shared settings of all days to `folder`/daily.json, or refuse to continue with other ones.

    Until a first day has a folder, which is made when its run has opened all it needs, the settings may be wrong, and
    new ones replace them.
    """
    mine = base.model_dump(mode="json", exclude={"run"})
    file = folder / DAYS_FILE
    try:
        if not (file.is_file() and day_folders(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            write_json_file(file, mine)
            return
        theirs = parse_json(read_file(file))
    except (OSError, StorageError, ValueError) as failure:
        raise TrainerError(Problem.DAYS_FILE_UNUSABLE, file, failure) from failure
    found = [each for each in differences(mine, theirs) if each.decides != "nothing" or each.setting in _SAME_PLACES]
    if found:
        lines = "\n  ".join(each.text("there") for each in found)
        raise ConfigError(Problem.DAYS_OF_OTHER_SETTINGS, file, lines)


def _check_stores(before: RunPath, base: Config) -> None:
    """Raise AnotherStoreError if the previous day was trained on another store: a table of days has one store.

    A single run may change it by a warm start, see trainer.runs.checkpoint; a table of days would not show the
    change."""
    from featurestore.store import FeatureStore
    from trainer.runs.checkpoint import read_state
    from trainer.runs.open import check_identity, missing_places, store_places
    from trainer.schema.fields import load_schema

    schema = load_schema(base.data.schema_file)
    places, checkpoints = store_places(base, schema), finished(before)
    if not checkpoints or missing_places(places):
        return  # reported when the run is opened
    before_it = checkpoints[-1], read_state(checkpoints[-1])
    for place in places:
        check_identity(place, FeatureStore.open(place.url).snapshot(place.version), before_it)


if __name__ == "__main__":
    commandline.run_app(app)
