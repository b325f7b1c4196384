"""Sample groups as Parquet: groups of a bucket of users by hour, then all groups of some hours in one sorted file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurestore.errors import StorageError
from featurestore.storage.storage import Storage
from pipeline.errors import SampleError
from pipeline.samples.groups import BEHAVIOR_ORDER, DAY, GroupRules, LogGroups, make_groups
from pipeline.samples.mapping import TableLayout
from pipeline.samples.pieces import BEHAVIORS, IMPRESSIONS, MICROSECONDS
from pipeline.samples.shuffle import read_batch, read_bucket, write_batches

HOUR_S = 3_600
HOURS_PER_DAY = 24
ROW_GROUP_SIZE = 2_048
FORMAT = "crossmedia samples 1"
SORT: list[tuple[str, Literal["ascending", "descending"]]] = [
    ("timestamp", "ascending"),
    ("user", "ascending"),
    ("session", "ascending"),
]
AD_LISTS = ("item", "image", "category", "scene")


@dataclass(frozen=True)
class GroupedBucket:
    """The groups of one bucket: where those of each hour (since 1970) are, and counts."""

    path: str
    batch_of_hour: dict[int, int]
    groups_of_hour: dict[int, int]
    num_users: int
    num_impressions: int  # distinct ones
    num_behaviors: int  # distinct ones
    num_used: int  # behaviours in at least one group
    num_references: int  # behaviours in groups
    num_over_limit: int  # behaviours that did not fit into their group
    num_without: int  # groups without behaviours
    latest_of_day: dict[int, int]  # by day since 1970: the last impression (µs) of groups that begin then


def get_groups(get: Callable[[], GroupedBucket]) -> GroupedBucket:
    """Run one of the functions below, whose arguments are bound, so that both kinds are tasks of one stage."""
    return get()


def group_bucket(
    bucket: int,
    folder: str,
    num_pieces: tuple[int, int],
    rules: GroupRules,
    user_columns: Sequence[str],
    ad_columns: Sequence[str] = (),
    compress: bool = True,
) -> GroupedBucket:
    """Make the groups of one bucket of users from the shuffled logs in `folder`, and write them there by hour.

    `num_pieces` is how many pieces the impressions and the behaviours have. `user_columns` are once in a group,
    `ad_columns` once for each impression, with `ad_` before their names.
    """
    impressions = read_bucket(folder, IMPRESSIONS, num_pieces[0], bucket)
    groups = make_groups(impressions, read_bucket(folder, BEHAVIORS, num_pieces[1], bucket), rules)
    table = _table(groups, user_columns, ad_columns).sort_by(SORT)
    path = Path(folder, f"groups-{bucket:06d}.arrow")
    batch_of_hour, groups_of_hour = _write_hours(path, table, compress)
    return GroupedBucket(
        str(path),
        batch_of_hour,
        groups_of_hour,
        len(np.unique(groups.impressions["user"])),
        len(groups.impressions["user"]),
        groups.num_behaviors,
        groups.num_used,
        int(groups.take_G.sum()),
        int(groups.over_limit_G.sum()),
        int(np.count_nonzero(groups.take_G == 0)),
        _latest_of_day(groups),
    )


def columns_of_groups(layout: TableLayout, rules: GroupRules) -> pa.Schema:
    """Describe what `group_bucket` writes of impressions that are read so."""
    nobody = {name: np.empty(0, np.float32 if kind == "dense" else np.int64) for name, kind in layout.kinds.items()}
    nobody |= {name: np.empty(0, np.int64) for name in layout.constants}
    nothing = {name: np.empty(0, np.int64) for name in BEHAVIOR_ORDER}
    schema: pa.Schema = _table(make_groups(nobody, nothing, rules), layout.user_columns, layout.ad_columns).schema
    return schema


def take_groups(
    before: Storage, name: str, share: tuple[int, int], users_path: str, schema: pa.Schema, folder: str
) -> GroupedBucket:
    """Write the groups of one file of samples to `folder` by hour, but those of the users in a .npy file.

    `share`: which of how many parts of its row groups. `schema`: the columns of `group_bucket`, which they have to
    have. Raises SampleError.
    """
    part, parts = share
    try:
        with pq.ParquetFile(before.open_input(name), page_checksum_verification=True) as file:
            count = file.num_row_groups
            mine = range(part * count // parts, (part + 1) * count // parts)
            table = file.read_row_groups(list(mine), use_threads=False)
        table = table.replace_schema_metadata(None).select(schema.names).cast(schema)
    except (pa.ArrowException, KeyError, OSError, StorageError) as error:
        raise SampleError(
            f"{before.full(name)} cannot be read, or does not have the columns of the new days: {error}; make all days"
            " anew"
        ) from error
    is_gone = pc.is_in(table.column("user"), value_set=pa.array(np.load(users_path)))
    path = Path(folder, f"others-{Path(name).stem}-{part}.arrow")
    batch_of_hour, groups_of_hour = _write_hours(path, table.filter(pc.invert(is_gone)), compress=False)
    return GroupedBucket(str(path), batch_of_hour, groups_of_hour, 0, 0, 0, 0, 0, 0, 0, {})


def _write_hours(path: Path, table: pa.Table, compress: bool) -> tuple[dict[int, int], dict[int, int]]:
    """Write sorted groups with a batch for each hour; return the place and the size of each hour's batch."""
    hour_G = table.column("timestamp").to_numpy() // HOUR_S
    hours, starts = np.unique(hour_G, return_index=True)
    sizes = np.diff(starts, append=len(hour_G))
    batches = [
        table.slice(start, size).combine_chunks().to_batches()[0] for start, size in zip(starts, sizes, strict=True)
    ]
    write_batches(path, batches or [pa.RecordBatch.from_pylist([], schema=table.schema)], compress)
    return {int(h): n for n, h in enumerate(hours)}, {int(h): int(n) for h, n in zip(hours, sizes, strict=True)}


def _latest_of_day(groups: LogGroups) -> dict[int, int]:
    time_N = groups.impressions["timestamp"]
    day_G, last_G = time_N[groups.start_G] // DAY, time_N[groups.start_G + groups.size_G - 1]
    return {int(day): int(last_G[day_G == day].max()) for day in np.unique(day_G)}


def _table(groups: LogGroups, user_columns: Sequence[str], ad_columns: Sequence[str]) -> pa.Table:
    """Make one row per group, in the order of the samples' columns; timestamp in seconds, day in UTC."""
    impressions, first_G = groups.impressions, groups.start_G
    columns: dict[str, Any] = {name: impressions[name][first_G] for name in ("user", "session")}
    columns["timestamp"] = impressions["timestamp"][first_G] // MICROSECONDS
    columns["day"] = pc.strftime(pa.array(columns["timestamp"]).cast(pa.timestamp("s")), format="%Y-%m-%d")
    columns |= {name: impressions[name][first_G] for name in user_columns}
    columns |= {f"behavior_{name}": _lists(groups.behaviors[name], groups.take_G) for name in groups.behaviors}
    columns |= {f"ad_{name}": _lists(impressions[name], groups.size_G) for name in (*AD_LISTS, *ad_columns)}
    columns["label"] = _lists(impressions["label"].astype(np.int8), groups.size_G)
    return pa.table(columns)


def _lists(values_N: npt.NDArray[Any], sizes_G: npt.NDArray[np.int64]) -> Any:
    """Make lists of the given sizes, one per group, as an Arrow array."""
    offsets: Any = pa.array(np.concatenate([[0], np.cumsum(sizes_G)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values_N))


@dataclass(frozen=True)
class FilePlan:
    """A file of samples to write: its day, its number in it, its hours."""

    day: str  # as 2026-01-31
    number: int  # of the file in the day
    split: str
    hours: tuple[int, ...]  # since 1970

    @property
    def name(self) -> str:
        return f"day={self.day}-{self.number:03d}.parquet"


@dataclass(frozen=True)
class WrittenFile:
    """A file of samples that was written, and counts of it."""

    plan: FilePlan
    num_groups: int
    num_impressions: int
    num_clicks: int
    items: npt.NDArray[np.int64]  # ads' items, distinct
    impressions_of_item: npt.NDArray[np.int64]


def plan_files(
    groups_of_hour: Mapping[int, int], test_days: int, groups_per_file: int, last_day: int | None = None
) -> list[FilePlan]:
    """Plan files by day, a long day in several of whole hours; the last `test_days` days are for testing.

    The plan hangs on the hours' counts alone, so not on the number of buckets. `last_day`: of all samples (since 1970),
    where these are not the last ones.
    """
    days: dict[int, list[list[int]]] = {}
    room = 0
    for hour in sorted(groups_of_hour):
        files = days.setdefault(hour // HOURS_PER_DAY, [])
        if not files or groups_of_hour[hour] > room:
            files.append([])
            room = groups_per_file
        files[-1].append(hour)
        room -= groups_of_hour[hour]
    first_test_day = (max(days) if last_day is None else last_day) - test_days + 1
    return [
        FilePlan(
            name_of_day(day),
            number,
            "test" if day >= first_test_day else "train",
            tuple(hours),
        )
        for day, files in days.items()
        for number, hours in enumerate(files)
    ]


def name_of_day(day: int) -> str:
    """Write a day since 1970 as 2026-01-31."""
    return f"{datetime.fromtimestamp(day * HOURS_PER_DAY * HOUR_S, UTC):%Y-%m-%d}"


def write_file(plan: FilePlan, parts: Sequence[tuple[str, int]], folder: str) -> WrittenFile:
    """Write one file of samples from (file, batch) `parts` of group_bucket, sorted by time, user and session."""
    table = pa.Table.from_batches([read_batch(path, batch) for path, batch in parts]).combine_chunks().sort_by(SORT)
    table = table.replace_schema_metadata({"format": FORMAT})
    pq.write_table(
        table,
        Path(folder, plan.split, plan.name),
        row_group_size=ROW_GROUP_SIZE,
        compression="zstd",
        write_page_checksum=True,
    )
    items, counts = np.unique(pc.list_flatten(table.column("ad_item")).to_numpy(), return_counts=True)
    clicks = pc.list_flatten(table.column("label")).to_numpy()
    return WrittenFile(plan, len(table), len(clicks), int(clicks.sum()), items, counts)
