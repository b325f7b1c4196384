"""Rows of logs as the tests of samples write and read them."""

import dataclasses
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from distributed import Client

from featurestore.keys import key_of_uri
from featurestore.published.versions import open_published
from pipeline.options import SampleOptions
from pipeline.problems import Problem
from pipeline.samples.added import add_days
from pipeline.samples.build import build_samples
from tests.raised import told

Row = dict[str, Any]
Files = Sequence[list[Row] | pa.Table]
Call = Callable[..., Any]
"""Of fixtures that are called."""
DAY_S = 86_400
START_S = 1_767_225_600  # 2026-01-01, midnight in UTC
IMPRESSION = {"user": 1, "session": 1, "scene": 0, "item": 5, "image": "5.jpg", "category": 2, "label": 0}
BEHAVIOR = {"user": 1, "item": 6, "image": "6.jpg", "category": 2, "dwell_s": 30.0}
INT_COLUMNS = ("user", "session", "scene", "item", "category", "user_age", "user_gender", "city")


def shown(at_s: float, **changes: Any) -> Row:
    """An impression `at_s` seconds after the log's first midnight."""
    return {"timestamp": START_S + at_s} | IMPRESSION | changes


def done(at_s: float, **changes: Any) -> Row:
    """A behaviour."""
    return {"timestamp": START_S + at_s} | BEHAVIOR | changes


def users_of_days(days: int) -> tuple[list[Row], list[Row]]:
    """Impressions of five users on each day, and behaviours of theirs hours before."""
    impressions = [shown(day * DAY_S + 9_000 + user, user=user) for day in range(days) for user in range(5)]
    return impressions, [done(day * DAY_S + user, user=user, item=day) for day in range(days) for user in range(5)]


def table(rows: list[Row], seconds: bool = False) -> pa.Table:
    """Rows as a log has them, time as a timestamp or as whole seconds."""
    types = dict.fromkeys(INT_COLUMNS, pa.int64()) | {"label": pa.int8(), "dwell_s": pa.float64()}
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name == "timestamp":
            whole = [None if value is None else round(value * (1 if seconds else 1_000_000)) for value in values]
            columns[name] = pa.array(whole, pa.int64())
            if not seconds:
                columns[name] = columns[name].cast(pa.timestamp("us", "UTC"))
        else:
            columns[name] = pa.array(values, types.get(name))
    return pa.table(columns)


def day_of(row: Row) -> int:
    """Days since the first one."""
    return int((row["timestamp"] - START_S) // DAY_S)


def replaced(log: pa.Table, name: str, values: Any) -> pa.Table:
    return log.set_column(log.schema.get_field_index(name), name, values)


def write(folder: Path, impressions: Files, behaviors: Files) -> None:
    """Write the files of both logs."""
    for log, files in (("impressions", impressions), ("behaviors", behaviors)):
        (folder / log).mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(files):
            rows = content if isinstance(content, pa.Table) else table(content)
            pq.write_table(rows, folder / log / f"day={number:02d}.parquet", row_group_size=7)


def read(folder: str | Path, split: str = "*") -> list[Row]:
    return [row for path in sorted(Path(folder).glob(f"{split}/*.parquet")) for row in pq.read_table(path).to_pylist()]


def behavior_items(rows: list[Row]) -> list[list[int]]:
    return [row["behavior_item"] for row in rows]


def random_logs(rng: random.Random) -> tuple[list[Row], list[Row]]:
    """Few users, items and moments (half seconds around some midnights): all ties and repetitions occur."""
    moments = [
        rng.randrange(20) * DAY_S + rng.choice([-1, 1]) * rng.randrange(200) / 2 * rng.choice([1, 60])
        for _ in range(25)
    ]
    age = [rng.randrange(9) for _ in range(6)]

    def row(make: Any, **changes: Any) -> Row:
        image = key_of_uri(f"{rng.randrange(2)}")
        common = {"user": rng.randrange(6), "item": rng.randrange(3), "image": image, "category": rng.randrange(2)}
        return make(rng.choice(moments), **common, **changes)

    impressions = [
        row(shown, session=rng.randrange(2), scene=rng.randrange(2), label=rng.randrange(2)) for _ in range(80)
    ]
    impressions = [row | {"user_age": age[row["user"]]} for row in impressions]
    behaviors = [row(done, dwell_s=rng.choice([0.0, 4.9, 5.0, 60.0])) for _ in range(150)]
    behaviors = [row for row in behaviors if row["user"] != 3]  # one user has none
    return impressions + impressions[:10], behaviors + behaviors[:20]


def in_pieces(rng: random.Random, rows: list[Row]) -> list[list[Row]]:
    rows = rng.sample(rows, len(rows))
    edge = rng.randrange(1, len(rows) - 1)
    return [rows[:edge], rows[edge:]]


def write_in_pieces(folder: Path, rng: random.Random, impressions: list[Row], behaviors: list[Row]) -> None:
    """Write the rows in any order in some files, so that a user's are in many, in the place of all that are there."""
    for file in folder.glob("*/*"):
        file.unlink()
    write(folder, in_pieces(rng, impressions), in_pieces(rng, behaviors))


def all_bytes(place: str | Path) -> dict[str, bytes]:
    """Read every Parquet file of samples, on a disk or S3."""
    storage = open_published(place)
    return {each.path: storage.read_bytes(each.path) for each in storage.entries() if each.path.endswith(".parquet")}


def quarantine(folder: Path) -> list[tuple[str, int, str]]:
    rows = pq.read_table(folder / "samples" / "quarantine.parquet").to_pylist()
    return [(row["file"], row["row"], row["reason"]) for row in rows]


@dataclasses.dataclass
class Shop:
    """Tables in a folder, and samples made of them by a mapping."""

    folder: Path
    client: Client

    @property
    def options(self) -> SampleOptions:
        return SampleOptions(
            logs=str(self.folder / "logs"),
            samples=str(self.folder / "samples"),
            mapping=str(self.folder / "mapping.yaml"),
            test_days=0,
        )

    def put(self, name: str, content: Any) -> None:
        """Write a table: text as it is, columns or an Arrow table as Parquet."""
        path = self.folder / "logs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content)
        else:
            pq.write_table(content if isinstance(content, pa.Table) else pa.table(content), path)

    def build(self, mapping: Mapping[str, Any], **changes: Any) -> tuple[list[Row], dict[str, Any]]:
        (self.folder / "mapping.yaml").write_text(yaml.safe_dump(dict(mapping)))
        summary = build_samples(dataclasses.replace(self.options, **changes), self.client)
        return read(self.folder / "samples"), summary

    def add(self, **changes: Any) -> dict[str, Any]:
        """Add days of the tables to the samples."""
        return add_days(SampleOptions(samples=self.options.samples, **changes), self.client)


def missing(where: str = "", value: str = "", setting: str = "", near: str = "") -> str:
    """A regular expression of the sentence that a column is missing, with the parts that these values have."""
    said, named = re.compile(f".*{where}"), re.compile(rf" \({setting} .*?")
    return told(Problem.COLUMN_MISSING, where=said, value=value, setting=named, near=re.compile(f".*{near}.*?"))
