"""Samples built from logs: the whole run, its schema and its summary.

Three steps, each a task per part: the logs are shuffled by user into buckets (shuffle), each bucket's groups are made
(groups), and the groups of some hours of all buckets become one sorted file (files). All of it happens in a folder
next to the samples, which takes their place in the end (publish).
"""

import contextlib
import dataclasses
import itertools
import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distributed import Client

from featurestore.console.files import write_json
from featurestore.console.output import print_summary
from featurestore.errors import naming
from featurestore.storage.storage import Storage
from pipeline.cluster.tasks import Part, neighbours, num_threads, run_all
from pipeline.errors import SampleError, SampleOptionError
from pipeline.options import SampleOptions
from pipeline.problems import Problem
from pipeline.samples import groups, logs
from pipeline.samples.mapping import TableLayout, load_mapping
from pipeline.samples.publish import MARK, QUARANTINE_FILE, replaced_files
from trainer.schema import lakes
from trainer.schema.fields import SCHEMA_FILE, SETTINGS_FILE, DistinctCount, days_of_file, settings_text
from trainer.schema.suggest import OF_LOG, TIME_FORMATS, inspect_samples, is_time, render_schema

DAY_S = 86_400
BUCKET_ROWS = 250_000  # of both logs; some hundred MB with long lists of behaviours
LEAST_BUCKET_ROWS = 10_000  # below that a bucket's task and its parts of files cost more than its rows
TASKS_PER_THREAD = 2  # that read logs: few, but one slow file keeps nobody waiting for long
SHUFFLE_FOLDER = "shuffle"
FEWER_ROWS = "raise --partitions, or give workers more memory"


def build_samples(options: SampleOptions, client: Client) -> dict[str, Any]:
    """Build or rebuild `options.samples` and return its summary, which is its summary.json too.

    Reads `impressions/*.parquet` and `behaviors/*.parquet` below `options.logs`, a folder or an address. The samples'
    folder must be on a disk that all workers see; where the samples are at an address, `options.scratch`. A row per
    group of pipeline.samples.groups.make_groups, in the files `train/day=*.parquet` and `test/day=*.parquet` by the day
    (UTC) of the group's first impression, sorted by timestamp, user and session; equal logs give equal files, whatever
    the cluster and `partitions`. Bad rows are counted and kept in quarantine.parquet. With a mapping the logs are a
    user's own tables, CSV or Parquet, and a schema and settings for the trainer are written to their folder. Raises
    SampleError when there is nothing to make samples from; SchemaError.
    """
    check_test_options(options)
    with open_tables(options) as tables:
        return _build(options, client, tables)


def _build(options: SampleOptions, client: Client, tables: "LogTables") -> dict[str, Any]:
    impressions, behaviors = tables.pieces(logs.IMPRESSIONS), tables.pieces(logs.BEHAVIORS)
    buckets = num_buckets(options.partitions, impressions + behaviors, client)
    layout = impressions[0].layout
    with replaced_files(
        options.samples, spared=tables.spared, scratch=options.scratch, keep_days=options.keep_days
    ) as new:
        folder, scratch = new.folder, new.folder / SHUFFLE_FOLDER
        for made in (scratch, folder / "train", folder / "test"):
            made.mkdir()
        read = shuffle(client, [*impressions, *behaviors], scratch, buckets, options)
        shown, done = read[logs.IMPRESSIONS], read[logs.BEHAVIORS]
        groups.write_quarantine(folder / QUARANTINE_FILE, (*shown, *done))
        groups.write_names(folder, (*shown, *done))
        if not sum(part.num_rows - part.quarantined.total() for part in shown):  # before the cluster makes groups
            raise _no_rows(options.logs, shown)
        grouped = group(client, (len(shown), len(done)), scratch, buckets, options, layout)
        groups_of_hour = sum((Counter(part.groups_of_hour) for part in grouped), Counter[int]())
        if not groups_of_hour:
            raise _no_rows(options.logs, shown)
        first_test_day = find_test_day(options, days_of(groups_of_hour))
        plans = groups.plan_files(groups_of_hour, first_test_day, options.groups_per_file)
        check_train([plan.split for plan in plans])
        written = write(client, grouped, plans, folder)
        shutil.rmtree(scratch)
        if options.mapping:
            write_suggested(folder, options.samples, written, tables.may_lack)
        summary = summarise(dataclasses.asdict(options), shown, done, grouped, written) | tables.versions
        write_json(folder / MARK, summary)
    return summary


@dataclass(frozen=True)
class LogTables:
    """The places of both logs, and the names of their columns."""

    options: SampleOptions
    layouts: dict[str, TableLayout]
    copied: Mapping[str, str] = field(default_factory=dict)
    """The version read of each Delta, Iceberg or Lance table, by the place of its files."""
    room: str = ""
    """Folder with the rows of these tables as Parquet, at the same places."""

    @property
    def versions(self) -> dict[str, Any]:
        """Return the entries of a summary on these tables; nothing where there is none."""
        return {lakes.TABLES: dict(self.copied)} if self.copied else {}

    @property
    def spared(self) -> dict[str, str]:
        """Return the places, by option, that samples must not replace."""
        mapping = {"--mapping": self.options.mapping} if self.options.mapping else {}
        return {"--logs": self.options.logs, **mapping}

    def pieces(self, log: str, wanted: logs.WantedRows | None = None) -> list[logs.LogPiece]:
        """Find the pieces of one log; see `find_pieces`."""
        layout = self.layouts[log]
        place = self.room if layout.files in self.copied else self.options.logs
        pieces = logs.find_pieces(place, log, layout, wanted)
        if pieces:  # what was found in the first file is not looked for again, nor for behaviours of the same times
            found, done = pieces[0].layout, self.layouts[logs.BEHAVIORS]
            self.layouts[log] = found
            times = [(layout.files, layout.names.get("timestamp")) for layout in (found, done)]
            if log == logs.IMPRESSIONS and times[0] == times[1]:
                self.layouts[logs.BEHAVIORS] = dataclasses.replace(
                    done, found_style=found.found_style, time_unit=found.time_unit
                )
        return pieces

    @property
    def may_lack(self) -> set[str]:
        """Name the further columns of numbers: tables may lack a row's item or user, requests a candidate's number."""
        names = set()
        for log, layout in self.layouts.items():
            of_ads = "ad_" if log == logs.IMPRESSIONS else "behavior_"
            numbers = {name for name, kind in layout.read_kinds.items() if kind == "dense"}
            names |= {name if name in layout.user_columns else of_ads + name for name in numbers}
        return names


@contextlib.contextmanager
def open_tables(options: SampleOptions, joined: str | None = None) -> Iterator[LogTables]:
    """Open the logs of these options, until the end of the block. Raises SampleOptionError, DataError.

    Rows of tables of Delta, Iceberg and Lance are copied as Parquet first, next to the samples, or into the scratch
    folder. `joined`: where the tables lie that the mapping joins, by default with the logs.
    """
    mapping = load_mapping(Path(options.mapping)) if options.mapping else None
    if mapping is None:
        yield LogTables(options, {log: logs.documented_layout(log) for log in OF_LOG})
        return
    layouts = {log: mapping.layout(log) for log in OF_LOG}
    joins = layouts[logs.IMPRESSIONS].joins
    own, others = Storage(options.logs), Storage(joined or options.logs)
    wanted = {layout.files: own for layout in layouts.values()}
    wanted |= {join.layout.files: others for join in joins}
    kinds = {place: kind for place, storage in wanted.items() if (kind := lakes.kind_of(storage, place))}
    if not kinds:
        yield LogTables(options, {log: _joined(layout, others.url, "", ()) for log, layout in layouts.items()})
        return
    parent = Path(options.samples).absolute().parent  # which all workers see
    is_there = "://" not in options.samples and parent.is_dir()
    with tempfile.TemporaryDirectory(prefix=".crossmedia-tables-", dir=parent if is_there else options.scratch) as room:
        copied = {
            place: f"{kind}, {lakes.copy_rows(wanted[place], place, kind, Path(room, place))}"
            for place, kind in kinds.items()
        }
        for place, version in copied.items():
            print_summary(f"table        {wanted[place].full(place)}: {version}")
        layouts = {log: _joined(layout, others.url, room, copied) for log, layout in layouts.items()}
        yield LogTables(options, layouts, copied, room)


def _joined(layout: TableLayout, url: str, room: str, copied: Collection[str]) -> TableLayout:
    """Return the places of the joined tables: at `url`, or copied in `room`."""
    joins = (dataclasses.replace(join, url=room if join.layout.files in copied else url) for join in layout.joins)
    return dataclasses.replace(layout, joins=tuple(joins))


def _no_rows(place: str, shown: Sequence[groups.ShuffledPiece]) -> SampleError:
    """Explain why the impressions have not one good row, clicks of a table of events aside."""
    reasons = sum((part.quarantined for part in shown), Counter[str]())
    events = sum((part.other_events for part in shown), Counter[str]())
    if not events and not reasons:
        return SampleError(Problem.NO_ROWS, f"{place}, {logs.IMPRESSIONS}")
    listed = bad_reasons(dict(reasons.most_common(3)), examples := examples_of(shown))
    time = next((reason for reason in reasons if reason.startswith("timestamp")), None)
    hint = how_times(examples.get(time, "")) if time else ""
    if not events:
        return SampleError(Problem.ALL_ROWS_BAD, place, reasons.total(), listed, hint)
    bad = f"; {reasons.total():,} rows are bad ({listed}){hint}" if reasons else ""
    return SampleError(Problem.NO_ROW_OF_WHERE, place, ", ".join(events), bad)


def how_times(example: str) -> str:
    """Say how a mapping tells the form of times such as the example, which is in quotes."""
    fitting = [f'"{form}"' for form in TIME_FORMATS if is_time(example.strip("'"), form)]
    return Problem.TIME_FORM_NEEDED.of(" or ".join(fitting) or '"%d/%m/%Y %H:%M:%S"')


def num_buckets(asked: int | None, pieces: Sequence[logs.LogPiece], client: Client) -> int:
    """Return the number asked for, else buckets of about BUCKET_ROWS rows, and of many rows work for all threads."""
    rows = sum(piece.num_rows for piece in pieces)
    return asked or max(1, math.ceil(rows / BUCKET_ROWS), min(num_threads(client), rows // LEAST_BUCKET_ROWS))


def shuffle(
    client: Client, pieces: Sequence[logs.LogPiece], scratch: Path, num_buckets: int, options: SampleOptions
) -> dict[str, list[groups.ShuffledPiece]]:
    """Write the rows of logs by bucket of users into `scratch`; return each log's pieces, in their order."""
    folder, threads, latest_s = str(scratch.absolute()), num_threads(client), latest_of(options)
    pieces = logs.with_joined_rows(pieces, scratch)
    of_logs = {log: [piece for piece in pieces if piece.log == log] for log in dict.fromkeys(p.log for p in pieces)}
    tasks = []
    for of_log in of_logs.values():
        sizes = [piece.num_rows for piece in of_log]
        calls = [
            (piece, index, folder, num_buckets, options.min_dwell_s, latest_s) for index, piece in enumerate(of_log)
        ]
        tasks += [(groups.shuffle_piece, some) for some in _together(calls, sizes, threads, logs.PIECE_ROWS)]
    done = itertools.chain.from_iterable(run_all(client, "read logs", _in_turn, tasks, FEWER_ROWS))
    return {log: list(itertools.islice(done, len(of_log))) for log, of_log in of_logs.items()}


def _in_turn(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Do some small calls one after the other, as one task."""
    return [function(*call) for call in calls]


def latest_of(options: SampleOptions) -> int:
    """Return the time from which rows are in the future, in seconds since 1970."""
    return int(time.time()) + DAY_S if options.latest_s is None else options.latest_s


def _together(parts: Sequence[Part], sizes: Sequence[int], threads: int, most: int) -> list[list[Part]]:
    """Put neighbouring small parts into tasks, up to `most` rows: a task costs what tens of thousands of rows do.

    Every thread gets `TASKS_PER_THREAD` or so, if there are as many parts."""
    return neighbours(parts, sizes, min(most, sum(sizes) // (TASKS_PER_THREAD * threads)))


def group(
    client: Client,
    num_pieces: tuple[int, int],
    scratch: Path,
    num_buckets: int,
    options: SampleOptions,
    layout: TableLayout,
) -> list[groups.GroupedBucket]:
    """Make the groups of every bucket."""
    folder, rules = str(scratch.absolute()), rules_of(options, layout)
    calls = [
        (bucket, folder, num_pieces, rules, layout.user_columns, layout.ad_columns) for bucket in range(num_buckets)
    ]
    return run_all(client, "make groups", groups.group_bucket, calls, FEWER_ROWS)


def rules_of(options: SampleOptions, impressions: TableLayout | None) -> groups.GroupRules:
    """Return the rules of groups for impressions that are read so."""
    where = impressions.where if impressions else None
    return groups.GroupRules(
        round(options.window_days * DAY_S),
        options.max_behaviors,
        options.midnight_pause_s,
        options.behavior_age,
        where.within_s if where and where.clicked else 0,
    )


def day_of(text: str, option: str) -> int:
    """Parse a day as 2026-03-20 into days since 1970. Raises SampleOptionError."""
    try:
        moment = datetime.strptime(text.strip(), "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise SampleOptionError(Problem.NOT_A_DAY, option, text) from None
    return int(moment.timestamp()) // DAY_S


def days_of(groups_of_hour: Mapping[int, int]) -> Counter[int]:
    """Count the groups of each day, from those of each hour since 1970."""
    groups_of_day: Counter[int] = Counter()
    for hour, count in groups_of_hour.items():
        groups_of_day[hour // groups.HOURS_PER_DAY] += count
    return groups_of_day


def check_test_options(options: SampleOptions) -> None:
    """Raise SampleOptionError where options name the days for testing in two ways, or a day that is none."""
    asked = {"test_days": options.test_days, "test_from": options.test_from, "test_share": options.test_share}
    given = [f"--{name.replace('_', '-')}" for name, value in asked.items() if value != getattr(SampleOptions, name)]
    if len(given) > 1:
        raise SampleOptionError(Problem.GIVE_ONE, " and ".join(given))
    if options.test_from is not None:
        day_of(options.test_from, "--test-from")


def find_test_day(options: SampleOptions, groups_of_day: Mapping[int, int]) -> int:
    """Find the first day for testing, in days since 1970, by the options: a day, or a number or share of the last."""
    if options.test_from is not None:
        return day_of(options.test_from, "--test-from")
    if options.test_share is None:
        return max(groups_of_day) - options.test_days + 1
    left = options.test_share * sum(groups_of_day.values())
    newest_first = sorted(groups_of_day, reverse=True)
    sums = itertools.accumulate(groups_of_day[day] for day in newest_first)
    return next(day for day, count in zip(newest_first, sums, strict=True) if count >= left)


def check_train(splits: Collection[str]) -> None:
    """Raise SampleError where nothing is left to train on."""
    if "train" not in splits:
        raise SampleError(Problem.NOTHING_TO_TRAIN_ON)


def write(
    client: Client, grouped: Sequence[groups.GroupedBucket], plans: Sequence[groups.FilePlan], folder: Path
) -> list[groups.WrittenFile]:
    """Write the planned files of samples below `folder`."""
    batch_of_hour = {part.path: groups.batch_of_hours(part.groups_of_hour) for part in grouped}
    calls, sizes = [], []
    for plan in plans:
        hours = set(plan.hours)
        found = {
            path: sorted({batches[hour] for hour in hours & batches.keys()}) for path, batches in batch_of_hour.items()
        }
        calls.append((plan, {path: batches for path, batches in found.items() if batches}, str(folder.absolute())))
        sizes.append(sum(part.groups_of_hour.get(hour, 0) for part in grouped for hour in hours))
    tasks = [(groups.write_file, some) for some in _together(calls, sizes, num_threads(client), LEAST_BUCKET_ROWS)]
    return list(itertools.chain.from_iterable(run_all(client, "write samples", _in_turn, tasks, FEWER_ROWS)))


def summarise(
    options: Mapping[str, Any],
    shown: Sequence[groups.ShuffledPiece],
    done: Sequence[groups.ShuffledPiece],
    grouped: Sequence[groups.GroupedBucket],
    written: Sequence[groups.WrittenFile],
) -> dict[str, Any]:
    """Count the outcomes of all rows of the impressions (`shown`) and behaviours (`done`), and the samples.

    `rows` is the sum of the counts of its log from `kept` or `used` to `quarantined`; `examples` has a bad value for
    each reason, `without_image` counts good rows that name no image, `lacking` those whose item (or user) a joined
    table lacks, and `other_events` rows of a table of events that are not of the log. `used` behaviours are in at least
    one group; one can be in many, so `behaviors_in_groups` counts it again.
    """
    rows_shown, bad_shown = _rows(shown)
    rows_done, bad_done = _rows(done)
    num_short = sum(part.num_short for part in done)
    counts = sum((part.counts for part in grouped), Counter[str]())
    return {
        "format": groups.FORMAT,
        "options": dict(options),
        "impressions": {
            "rows": rows_shown,
            "kept": counts["impressions"],
            "clicks": counts["clicks"],
            "duplicates": rows_shown - bad_shown.total() - counts["impressions"] - counts["clicks"],
            "quarantined": dict(sorted(bad_shown.items())),
            **_further_counts(shown),
            "clicks_without_impression": counts["unmatched"],
        },
        "behaviors": {
            "rows": rows_done,
            "used": counts["used"],
            "unused": counts["behaviors"] - counts["used"],
            "short_dwell": num_short,
            "duplicates": rows_done - bad_done.total() - num_short - counts["behaviors"],
            "quarantined": dict(sorted(bad_done.items())),
            **_further_counts(done),
        },
        "users": counts["users"],
        "groups": sum(part.num_groups for part in written),
        "groups_without_behaviors": counts["without"],
        "behaviors_in_groups": counts["references"],
        **{split: _split(written, split) for split in ("train", "test")},
        "groups_of_file": {part.plan.name: part.num_groups for part in written},
    }


def bad_reasons(counts: Mapping[str, int], examples: Mapping[str, str]) -> str:
    """List reasons of bad rows, the most frequent first, with counts and a value as an example."""
    ordered = sorted(counts.items(), key=lambda each: -each[1])
    return ", ".join(f"{why}: {count:,}{f', as {examples[why]}' if why in examples else ''}" for why, count in ordered)


def _rows(parts: Sequence[groups.ShuffledPiece]) -> tuple[int, Counter[str]]:
    bad = sum((part.quarantined for part in parts), Counter[str]())
    return sum(part.num_rows for part in parts), bad


def examples_of(parts: Sequence[groups.ShuffledPiece]) -> dict[str, str]:
    """Return a bad value for each reason: that of the first piece which has one."""
    found: dict[str, str] = {}
    for part in parts:
        found = {**part.examples, **found}
    return dict(sorted(found.items()))


def _further_counts(parts: Sequence[groups.ShuffledPiece]) -> dict[str, Any]:
    return {
        "examples": examples_of(parts),
        "without_image": sum(part.num_without_image for part in parts),
        "lacking": dict(sum((part.num_lacking for part in parts), Counter[str]())),
        "other_events": dict(sum((part.other_events for part in parts), Counter[str]())),
    }


def _split(written: Sequence[groups.WrittenFile], split: str) -> dict[str, Any]:
    files = [part for part in written if part.plan.split == split]
    impressions = sum(part.num_impressions for part in files)
    return count_files({part.plan.name: part.num_groups for part in files}) | {
        "impressions": impressions,
        "positive_rate": sum(part.num_clicks for part in files) / impressions if impressions else None,
    }


def count_files(groups_of_file: Mapping[str, int]) -> dict[str, Any]:
    """Count days and groups of some files of samples, whose names have their days."""
    days = sorted({day for name in groups_of_file for day in days_of_file(name)})
    return {
        "first_day": days[0] if days else None,
        "last_day": days[-1] if days else None,
        "days": len(days),
        "files": len(groups_of_file),
        "groups": sum(groups_of_file.values()),
    }


LOOKED_AT = 200_000  # groups from which a schema is suggested


def write_suggested(
    folder: Path, samples: str, written: Sequence[groups.WrittenFile] = (), may_lack: Collection[str] = ()
) -> None:
    """Suggest a schema from the samples in `folder`, which will be at `samples`, and write it there.

    `written`: files whose ids were all counted. `may_lack`: columns of numbers that later days may lack. Raises
    SchemaError.
    """
    ids: dict[str, DistinctCount] = {}
    for part in written:
        ids |= {name: ids.get(name, DistinctCount()).merged(count) for name, count in part.ids.items()}
    with naming(str(folder), samples):
        schema, made = inspect_samples(Storage(folder), "label", "user", LOOKED_AT, ids, may_lack)
    address = Storage(samples).full(SCHEMA_FILE) if "://" in samples else str(Path(samples) / SCHEMA_FILE)
    settings = settings_text(samples, address, schema, made.tables)
    for name, content in {SCHEMA_FILE: render_schema(schema, made, samples), SETTINGS_FILE: settings}.items():
        (folder / name).write_text(content, encoding="utf-8")
