"""The import of text samples in the format of XDL's example as sample groups.

A line is `skey|gkey|user part|ad part|label|ts`, a part `name@value,value;name@value`. A value is `id:weight`, or a
plain number: an id of weight 1 in the user part, which XDL takes for sparse, and a number of a dense field in the ad
part. Neighbouring lines of a file with equal group key and equal user part are one group, a row of the samples: user
fields once, ad fields as lists with one entry for each line. A file is a task, so a group never spans two files.
"""

import contextlib
import dataclasses
import math
import shutil
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from distributed import Client

from featurestore.console.files import write_json
from featurestore.keys import key_of_uri, splitmix64
from featurestore.storage.storage import Storage
from pipeline.cluster.tasks import run_all
from pipeline.errors import SampleError
from pipeline.formats import find_files
from pipeline.options import XdlOptions
from pipeline.problems import Problem
from pipeline.samples.build import bad_reasons, write_suggested
from pipeline.samples.groups import FORMAT, ROW_GROUP_SIZE
from pipeline.samples.publish import MARK, QUARANTINE_FILE, SPLITS, replaced_files
from trainer.schema.suggest import IMAGE_NAME, WEIGHT_SUFFIX

RESERVED = ("user", "label", "gkey", "timestamp")
_TYPES: dict[str, pa.DataType] = {"file": pa.string(), "line": pa.int64(), "reason": pa.string(), "text": pa.binary()}
QUARANTINE = pa.schema(_TYPES)
SMALLER = "give them more memory, or cut the files"  # a file is a task

PartName = Literal["user", "ad"]
XdlKind = Literal["id", "multi_id", "dense"]
Tokens = list[str]
Key = tuple[PartName, str]
"""Part and name of a field."""


class BadLineError(Exception):
    """A line that cannot be used; its text is the reason that goes into quarantine."""


@dataclass(frozen=True)
class XdlLine:
    """One sample as text."""

    gkey: str
    parts: dict[PartName, dict[str, Tokens]]
    label: str
    ts: str


def parse_line(data: bytes) -> XdlLine:
    """Take a line apart. Raises BadLineError."""
    try:
        text = data.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise BadLineError("no UTF-8") from error
    if not text.strip():
        raise BadLineError("empty line")
    segments = text.split("|")
    if len(segments) != 6:
        raise BadLineError(f"{len(segments)} segments instead of 6")
    _, gkey, user, ad, label, ts = segments
    if not gkey:
        raise BadLineError("no group key")
    return XdlLine(gkey, {"user": _part("user", user), "ad": _part("ad", ad)}, label, ts.strip())


def _part(side: PartName, text: str) -> dict[str, Tokens]:
    part: dict[str, Tokens] = {}
    for field in text.split(";") if text else []:
        name, separator, values = field.partition("@")
        if not separator or not name:
            raise BadLineError(f"{side} part: a field without a name")
        if name in part:
            raise BadLineError(f"{side} part: {name} is there twice")
        part[name] = values.split(",") if values else []
    return part


def read_ids(name: str, tokens: Sequence[str]) -> tuple[list[int], list[float]]:
    """Read the ids of a sparse field and their weights. Raises BadLineError."""
    ids, weights = [], []
    for token in tokens:
        number, separator, weight = token.partition(":")
        ids.append(read_int(name, number))
        weights.append(read_number(f"a weight of {name}", weight) if separator else 1.0)
    return ids, weights


def read_int(name: str, text: str) -> int:
    """Read a whole number of 64 bits. Raises BadLineError."""
    try:
        value = int(text)
    except ValueError as error:
        raise BadLineError(f"{name} is not a whole number") from error
    if not -(1 << 63) <= value < 1 << 63:
        raise BadLineError(f"{name} does not fit into 64 bits")
    return value


def read_number(name: str, text: str) -> float:
    """Read a number that is finite as float32, as XDL stores it. Raises BadLineError."""
    try:
        with np.errstate(over="ignore"):
            value = float(np.float32(text))
    except ValueError as error:
        raise BadLineError(f"{name} is not a number") from error
    if not math.isfinite(value):
        raise BadLineError(f"{name} is not finite")
    return value


@dataclass(frozen=True)
class XdlField:
    """A field, and the column of the samples that it becomes."""

    part: PartName
    name: str
    kind: XdlKind
    width: int  # numbers a line, of dense
    column: str
    is_weighted: bool = False  # some id has another weight than 1

    @property
    def is_single(self) -> bool:
        """Whether each line has one value."""
        return self.kind == "id" or (self.kind == "dense" and self.width == 1)

    @property
    def columns(self) -> list[str]:
        """Its column, and that of its weights."""
        return [self.column, *([self.column + WEIGHT_SUFFIX] if self.is_weighted else [])]

    def type_of(self, number: pa.DataType) -> pa.DataType:
        """Choose the type of a column of such numbers: lists for several numbers a line, and for the lines of ads."""
        for _ in range((not self.is_single) + (self.part == "ad")):
            number = pa.list_(number)
        return number


Seen = Counter[tuple[Key, int, bool, bool]]
"""Good lines by field, number of its values, whether these are id:weight, and whether some weight is not 1."""


def _lines(url: str, path: str) -> Iterator[bytes]:
    with Storage(url).open_input(path) as file:
        yield from file


def scan_file(url: str, path: str) -> tuple[int, Seen]:
    """Count the good lines of a file, and those of each field in the order in which the fields come."""
    num_lines, seen = 0, Seen()
    for data in _lines(url, path):
        with contextlib.suppress(BadLineError):  # reported when the file is read again
            line = parse_line(data)
            num_lines += 1
            for part, fields in line.parts.items():
                for name, tokens in fields.items():
                    has_weights, is_weighted = any(":" in token for token in tokens), False
                    with contextlib.suppress(BadLineError):
                        is_weighted = has_weights and any(weight != 1 for weight in read_ids("", tokens)[1])
                    seen[(part, name), len(tokens), has_weights, is_weighted] += 1
    return num_lines, seen


def decide(num_lines: int, seen: Seen) -> list[XdlField]:
    """Decide the kind of every field, and its column.

    Fields of the user part are sparse, as XDL takes them; those of the ad part are where most lines have weights. One
    that is called as an image, as ad_img, has one id.
    """
    lengths: defaultdict[Key, Counter[int]] = defaultdict(Counter)
    with_weights, weighted = Counter[Key](), set[Key]()
    for (key, length, has_weights, is_weighted), count in seen.items():
        lengths[key][length] += count
        with_weights[key] += has_weights * count
        weighted |= {key} if is_weighted else set()
    fields = []
    for (key, counts), column in zip(lengths.items(), _columns(list(lengths)), strict=True):
        part, name = key
        kind: XdlKind = "dense"
        if part == "user" or 2 * with_weights[key] > counts.total() or not max(counts):
            is_one = counts == {1: num_lines} or (part == "ad" and IMAGE_NAME.search(name) is not None)
            kind = "id" if is_one else "multi_id"
        width = max(counts, key=lambda length: (length > 0, counts[length]))
        fields.append(XdlField(part, name, kind, width, column, kind != "dense" and key in weighted))
    return fields


def _columns(keys: Sequence[Key]) -> list[str]:
    """Name a column for each field: its own name, with the part before it where that is taken."""
    count = Counter(name for _, name in keys)
    taken = {*RESERVED, *(f"{name}{WEIGHT_SUFFIX}" for _, name in keys)}
    columns = [f"{part}_{name}" if count[name] > 1 or name in taken else name for part, name in keys]
    if len(set(columns)) < len(columns):
        raise SampleError(Problem.SAME_COLUMN_NAMES, ", ".join(sorted(name for _, name in keys)))
    return columns


def schema_of(fields: Iterable[XdlField]) -> pa.Schema:
    """List the columns of the samples."""
    types: dict[str, pa.DataType] = {"user": pa.int64(), "gkey": pa.string(), "timestamp": pa.int64()}
    for each in fields:
        types[each.column] = each.type_of(pa.float32() if each.kind == "dense" else pa.int64())
    types |= {each.column + WEIGHT_SUFFIX: each.type_of(pa.float32()) for each in fields if each.is_weighted}
    return pa.schema(types | {"label": pa.list_(pa.int8())}, metadata={"format": FORMAT})


Sample = dict[str, Any]
"""One line, read: gkey, label and timestamp, and values by column."""


def read_sample(line: XdlLine, fields: Iterable[XdlField], threshold: float | None) -> Sample:
    """Read the line's values as the columns want them; labels from the threshold on are clicks. Raises BadLineError."""
    sample: Sample = {"gkey": line.gkey}
    for each in fields:
        tokens = line.parts[each.part].get(each.name)
        sample |= (_dense if each.kind == "dense" else _sparse)(each, tokens)
    label = read_number("label", line.label)
    if threshold is None and label not in (0, 1):
        raise BadLineError("label is not 0 or 1; --label-threshold makes it so")
    is_click = label >= (1 if threshold is None else threshold)
    return {**sample, "label": int(is_click), "timestamp": read_int("ts", line.ts)}


def _sparse(each: XdlField, tokens: Tokens | None) -> Sample:
    ids, weights = read_ids(each.name, tokens or [])
    if each.is_single and len(ids) != 1:
        raise BadLineError(f"{each.name} has not one id")
    values: Sample = {each.column: ids[0] if each.is_single else ids}
    if each.is_weighted:
        values[each.column + WEIGHT_SUFFIX] = weights[0] if each.is_single else weights
    return values


def _dense(each: XdlField, tokens: Tokens | None) -> Sample:
    """Read the numbers of a field; a line without the field has zeros there, as in XDL."""
    numbers = [0.0] * each.width if tokens is None else [read_number(each.name, token) for token in tokens]
    if len(numbers) != each.width:
        raise BadLineError(f"{each.name} has not {each.width} numbers")
    return {each.column: numbers[0] if each.is_single else numbers}


def row_of(group: Sequence[Sample], ad_columns: Sequence[str]) -> Sample:
    """Make the row of a group; `user` is the hash of its key, `timestamp` that of the first line."""
    first = group[0]
    lists = {column: [sample[column] for sample in group] for column in (*ad_columns, "label")}
    return {**first, **lists, "user": key_of_uri(first["gkey"])}


@dataclass
class WrittenGroups:
    """The outcome for one file's lines, and for their groups in each split."""

    num_lines: int = 0
    bad: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    counts: dict[str, Counter[str]] = dataclasses.field(default_factory=lambda: {name: Counter() for name in SPLITS})


def write_file(
    url: str, path: str, number: int, fields: Sequence[XdlField], options: XdlOptions, folder: str
) -> WrittenGroups:
    """Write the groups of one file as SPLIT/part-NUMBER.parquet, where there are any."""
    result, schema = WrittenGroups(), schema_of(fields)
    user, ad = ([name for each in fields if each.part == part for name in each.columns] for part in ("user", "ad"))
    samples = _read(url, path, fields, options.label_threshold, result)
    groups = (list(group) for _, group in groupby(samples, lambda sample: [sample[name] for name in ("gkey", *user)]))
    scratch = Path(folder, f".part-{number}-{uuid.uuid4().hex}")  # a task may run twice
    scratch.mkdir()
    writers: dict[str, pq.ParquetWriter] = {}
    try:
        with contextlib.ExitStack() as stack:
            for split in SPLITS:
                writer = pq.ParquetWriter(scratch / split, schema, compression="zstd", write_page_checksum=True)
                writers[split] = stack.enter_context(writer)
            while batch := list(islice(groups, ROW_GROUP_SIZE)):
                for split in SPLITS:
                    here = [group for group in batch if split_of(group[0]["gkey"], options.test_share) == split]
                    if here:
                        writers[split].write_table(pa.Table.from_pylist([row_of(group, ad) for group in here], schema))
                    labels = [sample["label"] for group in here for sample in group]
                    result.counts[split].update(groups=len(here), samples=len(labels), clicks=sum(labels))
        for split in [split for split in SPLITS if result.counts[split]["groups"]]:
            (scratch / split).replace(Path(folder, split, f"part-{number:05d}.parquet"))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return result


def split_of(gkey: str, test_share: float) -> str:
    """Choose the split of a group by the hash of its key: all of a user's samples are in one."""
    place = int(splitmix64([key_of_uri(gkey)])[0]) >> 32
    return "test" if place < test_share * (1 << 32) else "train"


def _read(
    url: str, path: str, fields: Sequence[XdlField], threshold: float | None, result: WrittenGroups
) -> Iterator[Sample]:
    for data in _lines(url, path):
        result.num_lines += 1
        try:
            yield read_sample(parse_line(data), fields, threshold)
        except BadLineError as error:
            result.bad.append(
                {"file": path, "line": result.num_lines, "reason": str(error), "text": data.rstrip(b"\r\n")}
            )


def import_samples(options: XdlOptions, client: Client) -> dict[str, Any]:
    """Make `options.samples`, with schema and settings; return the summary that is its summary.json too.

    Bad lines are counted and kept, text and all, in quarantine.parquet. Every line is read twice: once for the kinds of
    the fields, and once for the samples. Raises SampleError where there is nothing to train on, SchemaError where no
    field of the ad has one id in each line.
    """
    storage, entries = find_files(options.source, what="samples")
    paths = sorted(entry.path for entry in entries if entry.size_bytes)
    if not paths:
        raise SampleError(Problem.ONLY_EMPTY_FILES, options.source)
    with replaced_files(options.samples) as new:
        for name in SPLITS:
            (new.folder / name).mkdir()
        num_lines, seen = 0, Seen()
        places = [(storage.url, path) for path in paths]
        for count, found in run_all(client, "looking through lines", scan_file, places, SMALLER):
            num_lines += count
            seen.update(found)
        if not num_lines:
            raise SampleError(Problem.NO_XDL_LINE, options.source)
        fields = decide(num_lines, seen)
        folder = str(new.folder.absolute())
        calls = [(storage.url, path, number, fields, options, folder) for number, path in enumerate(paths)]
        written = run_all(client, "writing samples", write_file, calls, SMALLER)
        summary = _summary(options, fields, written)
        if not summary["train"]["samples"]:
            reasons = bad_reasons(summary["quarantined"], {})
            raise SampleError(Problem.NO_GOOD_LINE, options.source, summary["lines"], reasons)
        bad = [row for each in written for row in each.bad]
        pq.write_table(pa.Table.from_pylist(bad, schema=QUARANTINE), new.folder / QUARANTINE_FILE)
        write_suggested(new.folder, options.samples)
        write_json(new.folder / MARK, summary)
    return summary


def _summary(options: XdlOptions, fields: Sequence[XdlField], written: Sequence[WrittenGroups]) -> dict[str, Any]:
    counts = {split: sum((each.counts[split] for each in written), Counter[str]()) for split in SPLITS}
    return {
        "format": FORMAT,
        "options": asdict(options),
        "lines": sum(each.num_lines for each in written),
        "quarantined": dict(sorted(Counter(row["reason"] for each in written for row in each.bad).items())),
        **{split: {name: counts[split][name] for name in ("groups", "samples", "clicks")} for split in SPLITS},
        "fields": [asdict(each) for each in fields],
    }
