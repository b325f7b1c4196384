"""Days that are added to samples, or rebuilt in them, from the part of the logs that they need.

A day's groups are those that begin on it, so they depend on a few other days alone: behaviours of the window before it,
the last impressions of the day before (a session that continues over midnight is of that day), and the next day, where
sessions continue. The other way round, a new day may lengthen groups of the day before; that day is then rebuilt too.
Each file of a day is, byte for byte, what rebuilding all samples would write; but a day that is made leaves the file
that it has shared with others of its month, and a day that is added shares none.
"""

import contextlib
import dataclasses
import itertools
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from distributed import Client
from pydantic import BaseModel, NonNegativeInt, StringConstraints

from featurestore.console.files import write_json
from featurestore.errors import StorageError
from featurestore.keys import Int64Array
from featurestore.parsing import parse_json
from featurestore.published.versions import open_published
from featurestore.spec import FileName, differing
from featurestore.storage.storage import Storage
from pipeline.cluster.tasks import run_all
from pipeline.errors import SampleError, SampleOptionError
from pipeline.options import SampleOptions
from pipeline.problems import Problem
from pipeline.samples import build, groups
from pipeline.samples.logs import BEHAVIORS, IMPRESSIONS, MICROSECONDS, LogPiece, WantedRows, users_of
from pipeline.samples.publish import MARK, QUARANTINE_FILE, SPLITS, NewFiles, replaced_files
from trainer.schema.fields import IDS_FILE, IMAGES_FILE, days_of_file

_FREE = ("logs", "samples", "partitions", "days", "since", "scratch", "keep_days")
"""Options that may differ from those of the samples."""
_FOREVER = 1 << 62


@dataclasses.dataclass(frozen=True)
class DayGroups:
    """Groups of some days and of those around them; `days` are to be written."""

    grouped: list[groups.GroupedBucket]
    shuffled: list[groups.ShuffledPiece]
    days: set[int]


class _NothingMissingError(Exception):
    """There is nothing to make."""


def add_days(options: SampleOptions, client: Client) -> dict[str, Any]:
    """Make the days of `options` in samples that are there, all at once; return what was made.

    Logs are read as the samples were made: an option that says otherwise raises SampleOptionError. Days without
    impressions raise SampleError; with `since` there may be nothing to do. The other files stay as they are, so a
    trainer that reads them continues; which days are for testing is as ever, so a day may move to train.
    Columns of the logs, schema and settings stay those of the samples.
    """
    with contextlib.suppress(_NothingMissingError):  # the folder that is made aside is not to take its place then
        return _add_days(options, client)
    return {"days": [], "groups": 0, "impressions": 0, "samples": options.samples}


def _add_days(options: SampleOptions, client: Client) -> dict[str, Any]:
    before, asked = open_published(options.samples), _asked(options)
    recorded = _recorded(before)
    options = _as_made(options, recorded["options"])
    known: dict[str, int] = recorded["groups_of_file"]
    there = _files_by_day(before, known)
    with (
        build.open_tables(options) as tables,
        replaced_files(
            options.samples, before=before, spared=tables.spared, scratch=options.scratch, keep_days=options.keep_days
        ) as new,
    ):
        folder, scratch = new.folder, new.folder / build.SHUFFLE_FOLDER
        is_since = isinstance(asked, int)
        wanted = _missing_days(tables, asked, there) if isinstance(asked, int) else asked
        if not wanted or not (made := _made_groups(client, tables, scratch, wanted, set(there), is_since)).days:
            raise _NothingMissingError
        counted = sum((Counter(part.groups_of_hour) for part in made.grouped), Counter[int]())
        groups_of_hour = {hour: n for hour, n in counted.items() if hour // groups.HOURS_PER_DAY in made.days}
        kept = {day: files for day, files in there.items() if day not in made.days}
        of_kept = _groups_of_days(before, kept, known)
        first_test_day = build.find_test_day(options, build.days_of(groups_of_hour) | of_kept)
        plans = groups.plan_files(groups_of_hour, first_test_day, options.groups_per_file)
        build.check_train([*(plan.split for plan in plans), *(groups.split_of(day, first_test_day) for day in kept)])
        for split in SPLITS:
            (folder / split).mkdir()
        groups_of_file = _keep_files(new, kept, known, first_test_day)
        written = build.write(client, made.grouped, plans, folder)
        _check_same_columns(new, plans)
        _keep_the_rest(new, made.shuffled)
        shutil.rmtree(scratch)
        days = sorted(groups.name_of_day(day) for day in made.days)
        added = sorted({*recorded.get("added_days", []), *days})
        groups_of_file |= {part.plan.name: part.num_groups for part in written}
        write_json(folder / MARK, recorded | _counts(new, groups_of_file) | tables.versions | {"added_days": added})
    return {
        "days": days,
        "groups": sum(part.num_groups for part in written),
        "impressions": sum(part.num_impressions for part in written),
        "samples": options.samples,
    }


def _asked(options: SampleOptions) -> "set[int] | int":
    """Return the days that are asked for, or the first of them."""
    if options.days is not None and options.since is not None:
        raise SampleOptionError(Problem.GIVE_ONE, "--days and --since")
    if options.days is not None:
        return {build.day_of(each, "--days") for each in options.days.split(",")}
    return build.day_of(options.since or "", "--since")


class _Recorded(BaseModel):
    """The parts of a summary that name days and files."""

    options: dict[str, Any]
    added_days: list[Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}$")]] = []
    groups_of_file: dict[FileName, NonNegativeInt]


def _recorded(before: Storage) -> dict[str, Any]:
    try:
        recorded: dict[str, Any] = parse_json(before.read_bytes(MARK))
        if "window_days" in _Recorded.model_validate(recorded).options:
            return recorded
    except StorageError:
        if not before.is_local:
            raise
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise SampleOptionError(Problem.NOT_OUR_SAMPLES, before.url)


def options_of(samples: Storage) -> SampleOptions:
    """Return the options that samples were made with. Raises SampleOptionError for those of other programs."""
    return _as_made(SampleOptions(samples=samples.url), _recorded(samples)["options"])


def _as_made(options: SampleOptions, recorded: dict[str, Any]) -> SampleOptions:
    """Complete the options by those that the samples were made with. Raises SampleOptionError where one differs."""
    made: dict[str, Any] = {
        field.name: recorded.get(field.name, field.default) for field in dataclasses.fields(options)
    }
    given = {name: value for name, value in vars(options).items() if value != getattr(SampleOptions, name)}
    for name, its, mine in differing(made, made | given):
        if name not in _FREE:
            raise SampleOptionError(Problem.OTHER_OPTION, name.replace("_", "-"), mine, options.samples, its)
    free = {name: getattr(options, name) for name in _FREE}
    return SampleOptions(**made | free | {"logs": given.get("logs", made["logs"])})


def _name(file: str) -> str:
    """Return the name of a file without its split."""
    return file.rpartition("/")[2]


def _days_in(file: str) -> dict[int, int]:
    """Return the days in a file of samples, and the row group of each where there are several."""
    return {build.day_of(day, "day"): number for number, day in enumerate(days_of_file(_name(file)))}


def _files_by_day(before: Storage, known: Collection[str]) -> dict[int, list[str]]:
    """List the files of each day. Raises SampleOptionError for one that is not among the `known` names."""
    found: dict[int, list[str]] = {}
    for file in [f"{split}/{name}" for split in SPLITS for name in before.list(split)]:
        days = _days_in(file) if _name(file) in known else {}
        if not days:
            raise SampleOptionError(Problem.NOT_OUR_FILE, before.full(file))
        for day in days:
            found.setdefault(day, []).append(file)
    return found


@contextlib.contextmanager
def _opened(before: Storage, file: str) -> Iterator[pq.ParquetFile]:
    try:
        with before.open_input(file) as opened, pq.ParquetFile(opened, page_checksum_verification=True) as parquet:
            yield parquet
    except (pa.ArrowException, OSError, StorageError) as error:
        raise SampleError(Problem.REFUSED, "read", before.full(file), error) from error


def _groups_of_days(before: Storage, kept: Mapping[int, Sequence[str]], known: Mapping[str, int]) -> dict[int, int]:
    """Count the groups of the days that stay; a file that some share is opened once. Raises SampleError."""
    found: Counter[int] = Counter()
    for file in dict.fromkeys(itertools.chain.from_iterable(kept.values())):
        days = _days_in(file)
        if len(days) == 1:
            found[next(iter(days))] += known[_name(file)]
            continue
        with _opened(before, file) as parquet:
            found.update({day: parquet.metadata.row_group(number).num_rows for day, number in days.items()})
    return {day: found[day] for day in kept}


def _keep_files(
    new: NewFiles, kept: Mapping[int, Sequence[str]], known: Mapping[str, int], first_test_day: int
) -> dict[str, int]:
    """Take over the files of the days that stay as they are, and return how many groups each has.

    Of a file that such a day shares with one that is made, or is of the other split, it gets a copy of its own. Raises
    SampleError.
    """
    found: dict[str, int] = {}
    for file in dict.fromkeys(itertools.chain.from_iterable(kept.values())):
        days = _days_in(file)
        split_of = {day: groups.split_of(day, first_test_day) for day in days}
        if days.keys() <= kept.keys() and len(splits := set(split_of.values())) == 1:
            new.kept[f"{splits.pop()}/{_name(file)}"] = file
            found[_name(file)] = known[_name(file)]
            continue
        with _opened(new.before, file) as parquet:
            for day in days.keys() & kept.keys():
                table, plan = parquet.read_row_group(days[day]), groups.FilePlan((groups.name_of_day(day),), 0, "", ())
                groups.write_groups([table], new.folder / split_of[day] / plan.name)
                found[plan.name] = len(table)
    return found


def _missing_days(tables: build.LogTables, since: int, known: Iterable[int]) -> set[int]:
    """List the days from `since` on that the samples do not have, and that the logs may have impressions on.

    What the footers of the logs say; without statistics of times, every day up to the one after the log's end.
    """
    pieces = tables.pieces(IMPRESSIONS, WantedRows(since * groups.DAY, _FOREVER))
    today = int(time.time()) // build.DAY_S + 1
    spans = [
        (piece.times[0] // groups.DAY, piece.times[1] // groups.DAY) if piece.times else (since, today)
        for piece in pieces
    ]
    return {day for low, high in spans for day in range(max(low, since), min(high, today) + 1)} - set(known)


def _made_groups(
    client: Client, tables: build.LogTables, scratch: Path, asked: set[int], known: set[int], may_lack: bool
) -> DayGroups:
    """Make the groups of all days that have to be written, from as little of the logs as will do."""
    first = min(asked)
    low, high = first - 1, max(asked) + 2  # groups may continue over midnight
    reach_us = build.rules_of(tables.options, tables.layouts[IMPRESSIONS]).reach_us
    while True:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        grouped, shuffled = _grouped(client, tables, scratch, (low, first, high))
        latest: dict[int, int] = {}
        for part in grouped:
            for day, moment in part.latest_of_day.items():
                latest[day] = max(moment, latest.get(day, 0))
        days = latest.keys() & asked
        # Groups of an earlier day that continue, or are clicked, in one that is asked for have rows of it.
        reached = {day: asked & set(range(day + 1, moment // groups.DAY + 1)) for day, moment in latest.items()}
        lengthened = {day for day, each in reached.items() if each}
        if not may_lack and (without := asked - days - set().union(*reached.values())):
            names = ", ".join(groups.name_of_day(day) for day in sorted(without))
            raise SampleError(Problem.NO_IMPRESSIONS, tables.options.logs, names)
        days |= lengthened & known
        # Late rows may have taken groups of a later day into theirs.
        days |= {each for day in days for each in range(day + 1, latest[day] // groups.DAY + 1)} & known
        if any(latest.get(day, 0) + reach_us >= high * groups.DAY for day in days):
            high += 1
        elif min(lengthened, default=low) < low:
            low -= 1
        else:
            return DayGroups(grouped, shuffled, days)


def _grouped(
    client: Client, tables: build.LogTables, scratch: Path, span: tuple[int, int, int]
) -> tuple[list[groups.GroupedBucket], list[groups.ShuffledPiece]]:
    """Make the groups of a span of days; return them, and what became of the logs.

    Those of the impressions from day `first` to before day `high` of a span (low, first, high); and, where some of them
    are so early on day `first` that they may be of sessions, or clicks on impressions, of the day before, those from
    day `low` on, and what reaches into it. Behaviours are of the users of these alone.
    """
    options, (low, first, high) = tables.options, span
    rules = build.rules_of(options, tables.layouts[IMPRESSIONS])
    impressions, users = list[LogPiece](), list[Int64Array]()
    for begin_us, end_us in (
        (first * groups.DAY, high * groups.DAY),
        (low * groups.DAY - rules.reach_us, first * groups.DAY),
    ):
        pieces = tables.pieces(IMPRESSIONS, WantedRows(begin_us, end_us))
        calls = [(piece, begin_us + rules.reach_us, build.latest_of(options)) for piece in pieces]
        if sum(piece.num_rows for piece in pieces) <= build.BUCKET_ROWS:  # here, before the cluster has heard of it
            found = [users_of(*call) for call in calls]
        else:
            found = run_all(client, "find users", users_of, calls, build.FEWER_ROWS)
        impressions += pieces
        users += [each for each, _ in found]
        if not any(is_early for _, is_early in found):
            break
    if not impressions:
        return [], []
    path = scratch / "users.npy"
    np.save(path, np.unique(np.concatenate(users)))
    history = WantedRows(low * groups.DAY - rules.window_s * MICROSECONDS, high * groups.DAY)
    behaviors = tables.pieces(BEHAVIORS, history) or tables.pieces(BEHAVIORS)[:1]
    of_users = dataclasses.replace(history, users_path=str(path.absolute()))
    behaviors = [dataclasses.replace(piece, wanted=of_users) for piece in behaviors]
    buckets = build.num_buckets(options.partitions, impressions, client)
    if options.partitions is None:  # few of the behaviours are of these users, but all may be
        buckets = max(buckets, sum(piece.num_rows for piece in behaviors) // (4 * build.BUCKET_ROWS))
    read = build.shuffle(client, [*impressions, *behaviors], scratch, buckets, options)
    shown, done = read[IMPRESSIONS], read[BEHAVIORS]
    grouped = build.group(client, (len(shown), len(done)), scratch, buckets, options, impressions[0].layout)
    return grouped, [*shown, *done]


def _check_same_columns(new: NewFiles, plans: Sequence[groups.FilePlan]) -> None:
    if plans and new.kept:
        file = next(iter(new.kept.values()))
        made = pq.read_schema(new.folder / plans[0].split / plans[0].name)
        with _opened(new.before, file) as parquet:
            old = parquet.schema_arrow
        if not made.equals(old):
            raise SampleError(Problem.OTHER_COLUMNS, ", ".join(made.names), new.before.full(file), ", ".join(old.names))


def _keep_the_rest(new: NewFiles, shuffled: Sequence[groups.ShuffledPiece]) -> None:
    """Take over what else lies in the samples, bad rows too; those of the new days join them."""
    rewritten = {MARK, IMAGES_FILE, IDS_FILE}
    if any(part.quarantine_path is not None for part in shuffled):
        rewritten.add(QUARANTINE_FILE)
    for file in new.before.entries(recursive=False):
        if file.path not in rewritten and not file.path.startswith("."):
            new.kept[file.path] = file.path
    groups.write_names(new.folder, shuffled, new.before)
    if QUARANTINE_FILE in new.kept:
        return
    path = new.folder / QUARANTINE_FILE
    groups.write_quarantine(path, shuffled)
    with contextlib.suppress(FileNotFoundError):
        with new.before.open_input(QUARANTINE_FILE) as opened:
            old = pq.read_table(opened)
        rows = {tuple(row.values()): row for table in (old, pq.read_table(path)) for row in table.to_pylist()}
        pq.write_table(pa.Table.from_pylist(list(rows.values()), schema=groups.QUARANTINE), path)


def _counts(new: NewFiles, groups_of_file: Mapping[str, int]) -> dict[str, Any]:
    """Count the samples of each split; what a file's number of groups does not show is left out."""
    found: dict[str, Any] = {"groups_of_file": dict(sorted(groups_of_file.items()))}
    for split in SPLITS:
        names = [path.name for path in (new.folder / split).iterdir()]
        names += [_name(file) for file in new.kept if file.startswith(f"{split}/")]
        found[split] = build.count_files({name: groups_of_file[name] for name in names})
    return found
