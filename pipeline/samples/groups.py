"""Sessions and their impressions: grouped, shuffled and written.

Letters of shapes: N impressions, H behaviours (the history of all users at hand), G groups, K behaviours in groups.

The files are Arrow IPC files in a folder that all workers see; batch b is bucket b, so a bucket is read without the
rest.
"""

import contextlib
import itertools
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurestore.keys import NO_IMAGE, AnyArray, Int64Array, splitmix64
from featurestore.storage.storage import Storage
from pipeline.cluster.tasks import neighbours
from pipeline.errors import SampleError
from pipeline.problems import Problem
from pipeline.samples import logs
from pipeline.samples.mapping import CLICKED_AT, TableLayout
from trainer.schema.fields import IDS_FILE, IMAGES_FILE, DistinctCount, file_of_month
from trainer.schema.names import BUCKETS, TEXTS, by_bucket, in_buckets, merged_names, table_of_texts, write_buckets
from trainer.schema.profile import is_list

DAY = 86_400 * logs.MICROSECONDS
BEHAVIOR_ORDER = ("user", "timestamp", "item", "image", "category")
IMPRESSION_ORDER = ("user", "session", "timestamp", "scene", "item", "image", "category")


@dataclass(frozen=True)
class GroupRules:
    """Rules of groups; see build_samples of pipeline.samples."""

    window_s: int
    max_behaviors: int
    midnight_pause_s: int
    behavior_age: bool = False
    clicked_within_s: float = 0
    """The longest time to the row that labels an impression, where labels are rows."""

    @property
    def reach_us(self) -> int:
        """Return how far (µs) rows of the next day may reach into a day: by a session, or a click."""
        return round(max(self.midnight_pause_s, self.clicked_within_s) * logs.MICROSECONDS)


@dataclass(frozen=True)
class LogGroups:
    """Groups in any order: `first_N` and `size_G` cut the impressions, `take_G` the behaviours."""

    impressions: logs.Columns  # sorted and distinct, (N,)
    behaviors: logs.Columns  # in groups, newest first, (K,); age: seconds before the group's first impression
    start_G: Int64Array  # first impression of each group
    size_G: Int64Array  # impressions
    take_G: Int64Array  # behaviours
    counts: Counter[str]
    """behaviors: distinct ones; used: of them, in some group; clicks: rows that are clicks alone; unmatched: of them,
    without an impression before."""


def make_groups(impressions: logs.Columns, behaviors: logs.Columns, rules: GroupRules) -> LogGroups:
    """Make groups of all impressions of some users, with those users' behaviours, all rows in any order.

    A group is a user's session on one day; one that continues over midnight without a pause longer than
    `midnight_pause_s` stays one, on the day of its first impression. Its behaviours are strictly before its first
    impression and at most `window_s` back, newest first, ties by larger item, image, category; at most
    `max_behaviors`. Rows that are equal (but for label and further columns) count once, as a click if one of them is.
    """
    num_clicks = int(np.count_nonzero(impressions["label"] == logs.CLICK))
    impressions, num_unmatched = label_impressions(impressions, rules.clicked_within_s)
    impressions = distinct_impressions(impressions)
    further = tuple(sorted(behaviors.keys() - {*BEHAVIOR_ORDER}))
    behaviors = _distinct(behaviors, BEHAVIOR_ORDER, further)
    start_G = _group_starts(impressions, rules.midnight_pause_s)
    num_impressions = len(impressions["user"])
    size_G = np.diff(start_G, append=num_impressions)
    user_G, first_G = impressions["user"][start_G], impressions["timestamp"][start_G]
    low_G = _count_before(
        behaviors["user"], behaviors["timestamp"], user_G, first_G - rules.window_s * logs.MICROSECONDS
    )
    high_G = _count_before(behaviors["user"], behaviors["timestamp"], user_G, first_G)
    take_G = np.minimum(high_G - low_G, rules.max_behaviors)
    chosen_K = _descending_runs(high_G, take_G)
    num_behaviors = len(behaviors["user"])
    chosen = {name: behaviors[name][chosen_K] for name in ("item", "image", "category", *further)}
    if rules.behavior_age:
        chosen["age"] = (np.repeat(first_G, take_G) - behaviors["timestamp"][chosen_K]) // logs.MICROSECONDS
    opened, closed = (np.bincount(edge_G, minlength=num_behaviors + 1) for edge_G in (high_G - take_G, high_G))
    used = int(np.count_nonzero(np.cumsum(opened - closed) > 0))  # behaviours within one group's range, or several
    counts = Counter(behaviors=num_behaviors, used=used, clicks=num_clicks, unmatched=num_unmatched)
    return LogGroups(impressions, chosen, start_G, size_G, take_G, counts)


def label_impressions(rows: logs.Columns, within_s: float) -> tuple[logs.Columns, int]:
    """Label impressions by the rows that are clicks alone, which go; count the clicks that label none.

    A click labels the newest impressions of its user and item at or before it, at most `within_s` before it. CLICKED_AT
    is the time of the last click of an impression, or its own. Rows whose labels are columns stay as they are.
    """
    if not within_s:
        return rows, 0
    keys = ("user", "item", "timestamp")
    order_N = np.lexsort([rows["label"], *(rows[name] for name in reversed(keys))])  # clicks after what is shown then
    is_click_N = rows["label"][order_N] == logs.CLICK
    # The moments of a user and an item that have impressions, from 0 on, and each row's newest: -1 before the first.
    is_new_N = np.ones(len(order_N), np.bool_)
    is_new_N[1:] = np.any([rows[name][order_N][1:] != rows[name][order_N][:-1] for name in keys], axis=0)
    moment_N = np.cumsum(is_new_N & ~is_click_N) - 1
    first_M = order_N[is_new_N & ~is_click_N]
    clicks, newest_C = order_N[is_click_N], moment_N[is_click_N]
    of_C = first_M[np.maximum(newest_C, 0)] if len(first_M) else clicks
    waited_us_C = rows["timestamp"][clicks] - rows["timestamp"][of_C]
    labels_C = (newest_C >= 0) & (waited_us_C <= within_s * logs.MICROSECONDS)
    for name in ("user", "item"):
        labels_C &= rows[name][clicks] == rows[name][of_C]
    clicked_us_M = np.full(len(first_M), -1)
    np.maximum.at(clicked_us_M, newest_C[labels_C], rows["timestamp"][clicks][labels_C])
    shown, moment_S = order_N[~is_click_N], moment_N[~is_click_N]
    impressions = {name: values_N[shown] for name, values_N in rows.items()}
    impressions["label"] = (clicked_us_M[moment_S] >= 0).astype(np.int64)
    impressions[CLICKED_AT] = np.maximum(clicked_us_M[moment_S], impressions["timestamp"])
    return impressions, int(np.count_nonzero(~labels_C))


def distinct_impressions(impressions: logs.Columns) -> logs.Columns:
    """Sort impressions by user, session and time, and leave out repetitions.

    Of equal rows that differ in label or user columns the click stays, then the smallest user columns: any rule will do
    that does not depend on the order of the files."""
    profile = tuple(sorted(name for name in impressions if name not in (*IMPRESSION_ORDER, "label")))
    return _distinct(impressions | {"no_click": 1 - impressions["label"]}, IMPRESSION_ORDER, ("no_click", *profile))


def _distinct(columns: logs.Columns, order: tuple[str, ...], preference: tuple[str, ...]) -> logs.Columns:
    """Sort rows by `order`; of those equal in it, keep the first by `preference`."""
    sorted_N = _sorted(columns, order[: order.index("timestamp") + 1], (*order, *preference))
    columns = {name: values_N[sorted_N] for name, values_N in columns.items()}
    is_new_N = np.zeros(len(sorted_N), dtype=bool)
    is_new_N[:1] = True
    for name in order:
        is_new_N[1:] |= columns[name][1:] != columns[name][:-1]
    return {name: values_N[is_new_N] for name, values_N in columns.items()}


def _sorted(columns: logs.Columns, first: tuple[str, ...], order: tuple[str, ...]) -> Int64Array:
    """Sort rows by `order`, which begins with `first`; return their numbers, (N,).

    All are sorted by `first`, and only the few that are equal there by the others, which takes half of the time."""
    sorted_N: Int64Array = np.lexsort([columns[name] for name in reversed(first)])
    is_tied_N = np.ones(max(0, len(sorted_N) - 1), dtype=bool)  # a row with the one after it
    for name in first:
        is_tied_N &= np.diff(columns[name][sorted_N]) == 0
    is_tied_N = np.append(is_tied_N, False) | np.append(False, is_tied_N)
    tied = sorted_N[is_tied_N[: len(sorted_N)]]
    sorted_N[is_tied_N[: len(sorted_N)]] = tied[np.lexsort([columns[name][tied] for name in reversed(order)])]
    return sorted_N


def _group_starts(impressions: logs.Columns, midnight_pause_s: int) -> Int64Array:
    """Find the positions where a group starts in sorted impressions, (G,)."""
    time_N = impressions["timestamp"]
    is_start_N = np.zeros(len(time_N), dtype=bool)
    is_start_N[:1] = True
    for name in ("user", "session"):
        is_start_N[1:] |= np.diff(impressions[name]) != 0
    has_paused_N = np.diff(time_N) > midnight_pause_s * logs.MICROSECONDS
    is_start_N[1:] |= has_paused_N & (np.diff(time_N // DAY) != 0)
    start_G: Int64Array = np.flatnonzero(is_start_N)
    return start_G


def _count_before(user_H: Int64Array, time_H: Int64Array, user_G: Int64Array, time_G: Int64Array) -> Int64Array:
    """Count the (user, time) pairs H, sorted, that are smaller than each pair G: searchsorted on pairs, (G,)."""
    low_G: Int64Array = np.searchsorted(user_H, user_G)
    high_G: Int64Array = np.searchsorted(user_H, user_G, side="right")
    while (is_open_G := low_G < high_G).any():  # by halves of each user's rows
        middle_G = np.where(is_open_G, (low_G + high_G) // 2, 0)
        is_smaller_G = time_H[middle_G] < time_G
        low_G = np.where(is_open_G & is_smaller_G, middle_G + 1, low_G)
        high_G = np.where(is_open_G & ~is_smaller_G, middle_G, high_G)
    return low_G


def _descending_runs(high_G: Int64Array, take_G: Int64Array) -> Int64Array:
    """Count down: high - 1, high - 2, ... (`take` numbers) of each group, one after the other, (K,)."""
    end_G = np.cumsum(take_G)
    rank_K = np.arange(end_G[-1] if len(end_G) else 0) - np.repeat(end_G - take_G, take_G)
    run_K: Int64Array = np.repeat(high_G - 1, take_G) - rank_K
    return run_K


_QUARANTINE_TYPES: dict[str, pa.DataType] = {
    "log": pa.string(),
    "file": pa.string(),
    "row": pa.int64(),  # in the file, the first is 0
    "reason": pa.string(),
}
QUARANTINE = pa.schema(_QUARANTINE_TYPES)


@dataclass(frozen=True)
class ShuffledPiece:
    """The outcome of shuffling one piece."""

    num_rows: int
    num_short: int  # behaviours below the least dwell time
    quarantined: Counter[str]  # rows for each reason
    quarantine_path: str | None
    examples: Mapping[str, str]  # a bad value by reason
    num_without_image: int  # good rows
    names_path: str | None  # what its images are called
    texts_path: str | None  # the texts of its ids
    num_lacking: Counter[str]  # good rows whose item (or user) a joined table lacks, by that
    other_events: Counter[str]  # rows of a table of events that are not of this log, by their first values


def shuffle_piece(
    piece: logs.LogPiece, index: int, folder: str, num_buckets: int, min_dwell_s: float, latest_s: int
) -> ShuffledPiece:
    """Read one piece and write its good rows by bucket, and the bad ones to a file. Raises SampleError."""
    rows = logs.read_piece(piece, latest_s)
    columns = rows.good
    num_short = 0
    if piece.log == logs.BEHAVIORS:
        is_long_N = columns.pop("dwell_s") >= min_dwell_s
        num_short = int(np.count_nonzero(~is_long_N))
        columns = {name: values_N[is_long_N] for name, values_N in columns.items()}
    path = _path(folder, piece.log, index)
    write_batches(path, _buckets(columns, num_buckets))
    quarantine_path = None
    if rows.bad_reason:
        quarantine_path = path.with_suffix(".bad")
        bad = [
            {"log": piece.log, "file": piece.path, "row": row, "reason": reason}
            for row, reason in zip(rows.bad_row.tolist(), rows.bad_reason, strict=True)
        ]
        write_batches(quarantine_path, [pa.RecordBatch.from_pylist(bad, schema=QUARANTINE)])
    return ShuffledPiece(
        rows.num_rows,
        num_short,
        Counter(rows.bad_reason),
        None if quarantine_path is None else str(quarantine_path),
        rows.examples,
        int(np.count_nonzero((columns["image"] == NO_IMAGE) & (columns.get("label", 0) != logs.CLICK))),
        _write_names(path.with_suffix(".names"), rows.names),
        _write_names(path.with_suffix(".texts"), table_of_texts(rows.texts)),
        rows.num_lacking,
        rows.other_events,
    )


def read_bucket(folder: str, log: str, num_pieces: int, bucket: int) -> logs.Columns:
    """Read all rows of a bucket from the pieces 0 to `num_pieces` of a log, in no order."""
    batches = [read_batches(str(_path(folder, log, index)), [bucket])[0] for index in range(num_pieces)]
    return {
        name: np.concatenate([batch.column(name).to_numpy(zero_copy_only=False) for batch in batches])
        for name in batches[0].schema.names
    }


def write_quarantine(path: Path, parts: Sequence[ShuffledPiece]) -> None:
    """Write all bad rows of the logs as one Parquet file, in the order of the parts; empty where none is."""
    with pq.ParquetWriter(path, QUARANTINE) as writer:
        for part in parts:
            if part.quarantine_path is not None:
                writer.write_batch(read_batches(part.quarantine_path, [0])[0])


def _write_names(path: Path, names: pa.Table) -> str | None:
    if not len(names):
        return None
    write_batches(path, by_bucket(names.combine_chunks().to_batches()[0]))
    return str(path)


def write_names(folder: Path, parts: Sequence[ShuffledPiece], before: Storage | None = None) -> None:
    """Write the names of the images and ids of all pieces, and of the samples `before`.

    A file of images, and one of ids, if any of them has a name. By key, in a row group for each of 256 ranges of keys;
    in memory are the names of as many ranges as have 32 MiB of files. Raises SampleError for two texts of one id.
    """
    images = [part.names_path for part in parts if part.names_path is not None]
    _merge_names(folder / IMAGES_FILE, images, logs.NAMES, before)
    ids = [part.texts_path for part in parts if part.texts_path is not None]
    _merge_names(folder / IDS_FILE, ids, TEXTS, before)


def _merge_names(path: Path, paths: Sequence[str], schema: pa.Schema, before: Storage | None) -> None:
    with contextlib.ExitStack() as opened:
        old = None
        if before is not None:
            with contextlib.suppress(FileNotFoundError):
                file = opened.enter_context(before.open_input(path.name))
                old = opened.enter_context(pq.ParquetFile(file, page_checksum_verification=True))
        if not paths and old is None:
            return

        size = sum(Path(each).stat().st_size for each in paths)
        at_once = min(BUCKETS, max(1, BUCKETS * NAMES_AT_ONCE // max(1, size)))

        def of_buckets() -> Iterator[list[pa.Table]]:
            for first in range(0, BUCKETS, at_once):
                several = range(first, min(first + at_once, BUCKETS))
                read = [read_batches(each, several) for each in paths]
                for bucket, *batches in zip(several, *read, strict=True):
                    known = [] if old is None else [old.read_row_group(bucket).cast(schema)]
                    yield [*known, *(pa.Table.from_batches([each]) for each in batches)]

        error = None if schema is logs.NAMES else partial(SampleError, Problem.ID_OF_TWO_TEXTS)
        write_buckets(path, schema, (merged_names(tables, error) for tables in of_buckets()))


def _path(folder: str, log: str, index: int) -> Path:
    return Path(folder, f"{log}-{index:06d}.arrow")


def _buckets(columns: logs.Columns, num_buckets: int) -> list[pa.RecordBatch]:
    arrays = {
        name: pa.array(values_N, pa.binary() if values_N.dtype == np.object_ else None)
        for name, values_N in columns.items()
    }
    bucket_N = (splitmix64(columns["user"]) % np.uint64(num_buckets)).astype(np.int64)
    return in_buckets(pa.record_batch(arrays), bucket_N, num_buckets)


def write_batches(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Write one Arrow file of `batches` (at least one), named only once it is whole: a task may run twice."""
    iterator = iter(batches)
    first = next(iterator)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
    with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, first.schema, options=options) as writer:
        writer.write_batch(first)
        for batch in iterator:
            writer.write_batch(batch)
    temporary.replace(path)


def read_batches(path: str, indices: Sequence[int]) -> list[pa.RecordBatch]:
    """Read some batches of a file of write_batches, whose list of batches, maybe tens of thousands, is read once."""
    with pa.memory_map(path) as mapped:
        file = pa.ipc.open_file(mapped, options=pa.ipc.IpcReadOptions(use_threads=False))
        return [file.get_batch(index) for index in indices]


HOUR_S = 3_600
HOURS_PER_DAY = 24
ROW_GROUP_SIZE = 2_048
MANY_DAYS = 100
"""Number of days above which those of a month may share a file: thousands of small ones take longer than their rows."""
BATCH_ROWS = 256
NAMES_AT_ONCE = 32 << 20
"""Bytes of files of names, of which names are merged at once: at each opening a list of 256 ranges is read."""
FORMAT = "crossmedia samples 1"
SORT: list[tuple[str, Literal["ascending", "descending"]]] = [
    ("timestamp", "ascending"),
    ("user", "ascending"),
    ("session", "ascending"),
]
AD_LISTS = ("item", "image", "category", "scene")


@dataclass(frozen=True)
class GroupedBucket:
    """The groups of one bucket in a file of batches by `batch_of_hours`, and counts of those that were made here."""

    path: str
    groups_of_hour: dict[int, int]
    """Number of groups by hour since 1970, in the order of the file."""
    counts: Counter[str] = field(default_factory=Counter)
    """The counts of `LogGroups`, and users, distinct impressions, references (behaviours in groups) and without (groups
    without behaviours)."""
    latest_of_day: dict[int, int] = field(default_factory=dict)
    """Time (µs) of the last impression, or of a row that labels one, of the groups of each day since 1970."""


def group_bucket(
    bucket: int,
    folder: str,
    num_pieces: tuple[int, int],
    rules: GroupRules,
    user_columns: Sequence[str],
    ad_columns: Sequence[str] = (),
) -> GroupedBucket:
    """Make the groups of one bucket of users from the shuffled logs in `folder`, and write them there by hour.

    `num_pieces` is how many pieces the impressions and the behaviours have. `user_columns` are once in a group,
    `ad_columns` once for each impression, with `ad_` before their names.
    """
    impressions = read_bucket(folder, logs.IMPRESSIONS, num_pieces[0], bucket)
    groups = make_groups(impressions, read_bucket(folder, logs.BEHAVIORS, num_pieces[1], bucket), rules)
    table = table_of_groups(groups, user_columns, ad_columns).sort_by(SORT)
    path = Path(folder, f"groups-{bucket:06d}.arrow")
    groups_of_hour = _write_hours(path, table)
    counts = groups.counts + Counter(
        users=len(np.unique(groups.impressions["user"])),
        impressions=len(groups.impressions["user"]),
        references=int(groups.take_G.sum()),
        without=int(np.count_nonzero(groups.take_G == 0)),
    )
    return GroupedBucket(str(path), groups_of_hour, counts, _latest_of_day(groups))


def no_rows(layout: TableLayout) -> logs.Columns:
    """Make the columns of a log that is read so, without a row."""
    types = {"dense": np.float32, "profiles": np.object_}
    columns: logs.Columns = {name: np.empty(0, types.get(kind, np.int64)) for name, kind in layout.read_kinds.items()}
    columns |= {name: np.empty(0, np.int64) for name in layout.constants}
    return {name: values for name, values in columns.items() if name != "dwell_s"}


def _write_hours(path: Path, table: pa.Table) -> dict[int, int]:
    """Write sorted groups in the batches of `batch_of_hours`; return the number of each hour, in their order."""
    hours, sizes = np.unique(table.column("timestamp").to_numpy() // HOUR_S, return_counts=True)
    groups_of_hour = dict(zip(hours.tolist(), sizes.tolist(), strict=True))
    is_first = np.diff(np.array([*batch_of_hours(groups_of_hour).values()], np.int64), prepend=-1) > 0
    edges = [*(np.cumsum(sizes) - sizes)[is_first].tolist(), len(table)]
    batches = [
        table.slice(start, end - start).combine_chunks().to_batches()[0] for start, end in itertools.pairwise(edges)
    ]
    write_batches(path, batches or [pa.RecordBatch.from_pylist([], schema=table.schema)])
    return groups_of_hour


def batch_of_hours(groups_of_hour: Mapping[int, int]) -> dict[int, int]:
    """Number the batch that each hour is in: neighbours share one until it would have more than BATCH_ROWS groups.

    A file of days with a few groups each would have a batch for every hour of years: a read of one reads their list.
    """
    batches = neighbours(groups_of_hour, groups_of_hour.values(), BATCH_ROWS)
    return {hour: number for number, hours in enumerate(batches) for hour in hours}


def _latest_of_day(groups: LogGroups) -> dict[int, int]:
    time_N = groups.impressions["timestamp"]
    day_G, last_G = time_N[groups.start_G] // DAY, time_N[groups.start_G + groups.size_G - 1]
    if CLICKED_AT in groups.impressions and len(time_N):
        last_G = np.maximum.reduceat(groups.impressions[CLICKED_AT], groups.start_G)
    return {int(day): int(last_G[day_G == day].max()) for day in np.unique(day_G)}


def table_of_groups(groups: LogGroups, user_columns: Sequence[str], ad_columns: Sequence[str]) -> pa.Table:
    """Make one row per group, in the order of the samples' columns; timestamp in seconds, day in UTC."""
    impressions, first_G = groups.impressions, groups.start_G
    columns: dict[str, Any] = {name: impressions[name][first_G] for name in ("user", "session")}
    columns["timestamp"] = impressions["timestamp"][first_G] // logs.MICROSECONDS
    columns["day"] = pc.strftime(pa.array(columns["timestamp"]).cast(pa.timestamp("s")), format="%Y-%m-%d")
    columns |= {name: _values(impressions[name][first_G]) for name in user_columns}
    columns |= {f"behavior_{name}": _lists(groups.behaviors[name], groups.take_G) for name in groups.behaviors}
    columns |= {f"ad_{name}": _lists(impressions[name], groups.size_G) for name in (*AD_LISTS, *ad_columns)}
    columns["label"] = _lists(impressions["label"].astype(np.int8), groups.size_G)
    return pa.table(columns)


def _lists(values_N: AnyArray, sizes_G: Int64Array) -> Any:
    """Make lists of the given sizes, one per group, as an Arrow array."""
    offsets: Any = pa.array(np.concatenate([[0], np.cumsum(sizes_G)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, _values(values_N))


def _values(values_N: AnyArray) -> Any:
    """Make an Arrow array of a column; of lists of ids, see `parse_id_lists`, an array of lists."""
    if values_N.dtype != np.object_:
        return pa.array(values_N)
    sizes_N = np.array([len(each) // 8 for each in values_N], np.int64)
    return _lists(np.frombuffer(b"".join(values_N), np.int64), sizes_N)


@dataclass(frozen=True)
class FilePlan:
    """A file of samples to write: its day, or the days of a month that share it, and their hours."""

    days: tuple[str, ...]  # as 2026-01-31
    number: int  # of the file in its day, where it has one
    split: str
    hours: tuple[int, ...]  # since 1970

    @property
    def name(self) -> str:
        return file_of_month(self.days) if self.days[1:] else f"day={self.days[0]}-{self.number:03d}.parquet"


@dataclass(frozen=True)
class WrittenFile:
    """A file of samples that was written, and counts of it."""

    plan: FilePlan
    num_groups: int
    num_impressions: int
    num_clicks: int
    ids: Mapping[str, DistinctCount]
    """The different values of each column of whole numbers, in lists or not."""


def plan_files(groups_of_hour: Mapping[int, int], first_test_day: int, groups_per_file: int) -> list[FilePlan]:
    """Plan files by day, a long day in several of whole hours; those from `first_test_day` on are for testing.

    Of more than MANY_DAYS days some share one. The plan hangs on the hours' counts alone, not on the number of buckets.
    """
    days: dict[int, list[int]] = {}
    for hour in sorted(groups_of_hour):
        days.setdefault(hour // HOURS_PER_DAY, []).append(hour)
    plans = [
        FilePlan((name_of_day(day),), number, split_of(day, first_test_day), tuple(some))
        for day, hours in days.items()
        for number, some in enumerate(neighbours(hours, map(groups_of_hour.__getitem__, hours), groups_per_file))
    ]
    return plans if len(days) <= MANY_DAYS else _by_month(plans, groups_of_hour)


def _by_month(plans: Sequence[FilePlan], groups_of_hour: Mapping[int, int]) -> list[FilePlan]:
    """Let the days for training of a month share a file where a row group has room for all of them.

    Days for testing have one each, as they move to train/ one by one.
    """
    months: dict[tuple[str, str], list[FilePlan]] = {}
    for plan in plans:
        months.setdefault((plan.split, plan.days[0][:7]), []).append(plan)
    found: list[FilePlan] = []
    for (split, _), files in months.items():
        days, hours = dict.fromkeys(plan.days[0] for plan in files), [hour for plan in files for hour in plan.hours]
        if split == "train" and len(days) > 1 and sum(map(groups_of_hour.__getitem__, hours)) <= ROW_GROUP_SIZE:
            found.append(FilePlan(tuple(days), 0, split, tuple(hours)))
        else:
            found += files
    return found


def split_of(day: int, first_test_day: int) -> str:
    """Return the split that a day is in."""
    return "test" if day >= first_test_day else "train"


def name_of_day(day: int) -> str:
    """Write a day since 1970 as 2026-01-31."""
    return f"{datetime.fromtimestamp(day * HOURS_PER_DAY * HOUR_S, UTC):%Y-%m-%d}"


def write_file(plan: FilePlan, parts: Mapping[str, Sequence[int]], folder: str) -> WrittenFile:
    """Write one file of samples from batches of the files of group_bucket, sorted by time, user and session.

    The batches have all of its hours, and maybe more.
    """
    batches = [batch for path, indices in parts.items() for batch in read_batches(path, indices)]
    table = pa.Table.from_batches(batches)
    is_here_G = np.isin(table.column("timestamp").to_numpy() // HOUR_S, plan.hours)
    table = table.filter(pa.array(is_here_G)).combine_chunks().sort_by(SORT)
    table = table.replace_schema_metadata({"format": FORMAT})
    days = [table.filter(pc.equal(table["day"], pa.scalar(day))) for day in plan.days] if plan.days[1:] else [table]
    write_groups(days, Path(folder, plan.split, plan.name))
    clicks = pc.list_flatten(table.column("label")).to_numpy()
    return WrittenFile(plan, len(table), len(clicks), int(clicks.sum()), _ids(table))


def write_groups(days: Sequence[pa.Table], path: Path) -> None:
    """Write a file of samples, each table in row groups of its own."""
    with pq.ParquetWriter(path, days[0].schema, compression="zstd", write_page_checksum=True) as writer:
        for table in days:
            writer.write_table(table, row_group_size=ROW_GROUP_SIZE)


def _ids(table: pa.Table) -> dict[str, DistinctCount]:
    counts = {}
    for name in table.schema.names:
        values: Any = table.column(name)
        while is_list(values.type):
            values = pc.list_flatten(values)
        if pa.types.is_integer(values.type):
            counts[name] = DistinctCount().with_values(values.to_numpy())
    return counts
