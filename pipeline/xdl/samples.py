"""XDL's packed samples: groups, and the samples made of them.

The columns are those of DESIGN's sample groups: user fields once, ad fields a list with one entry for each line.

A file is one task, so a group never spans two files: write the lines of a group one after the other.
"""

import dataclasses
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from distributed import Client

from featurestore.console.files import write_json
from featurestore.keys import key_of_uri, splitmix64
from featurestore.storage.storage import Storage
from pipeline.cluster.tasks import run_all
from pipeline.errors import SampleError
from pipeline.options import XdlOptions, XdlWeights
from pipeline.samples.groups import FORMAT
from pipeline.samples.mapping import names_in
from pipeline.samples.publish import MARK, QUARANTINE_FILE, replaced_files
from pipeline.vectors.formats import find_files
from pipeline.xdl.line import (
    WEIGHT_SUFFIX,
    BadLineError,
    Part,
    SeenFields,
    Tokens,
    XdlField,
    XdlLine,
    decide,
    merged,
    parse_line,
    read_ids,
    read_int,
    read_number,
    read_numbers,
    scan,
    write_field_schema,
)


@dataclass(frozen=True)
class ReadRules:
    """The rules by which lines are read.

    `weights`: of sparse ids, other than 1: keep them in columns of their own, drop them, or refuse such lines.
    """

    fields: tuple[XdlField, ...]
    weights: XdlWeights = "keep"
    label_threshold: float | None = None  # None: labels are 0 or 1
    label_index: int | None = None  # None: a line has one label
    fill_dense: float | None = None  # for dense fields that a line lacks; None: such a line is bad

    @cached_property
    def known(self) -> frozenset[tuple[str, str]]:
        """Part and name of every field."""
        return frozenset((each.part, each.name) for each in self.fields)

    @property
    def weighted(self) -> tuple[XdlField, ...]:
        """Fields whose weights get a column."""
        return tuple(each for each in self.fields if each.is_weighted) if self.weights == "keep" else ()


@dataclass(frozen=True)
class XdlSample:
    """One line, read: values by column."""

    skey: str
    gkey: str
    label: int
    ts: int
    user: dict[str, Any]
    ad: dict[str, Any]


@dataclass
class XdlGroup:
    """Neighbouring lines with one group key and equal user fields."""

    gkey: str
    user: dict[str, Any]
    samples: list[XdlSample] = dataclasses.field(default_factory=list)


def read_sample(line: XdlLine, rules: ReadRules) -> XdlSample:
    """Read the line's values as the columns want them. Raises BadLineError."""
    user: dict[str, Any] = {}
    ad: dict[str, Any] = {}
    if unknown := [name for part in ("user", "ad") for name in _part(line, part) if (part, name) not in rules.known]:
        raise BadLineError(f"{unknown[0]} was not there when the files were looked through")
    for each in rules.fields:
        _read_field(each, _part(line, each.part).get(each.name), rules, user if each.part == "user" else ad)
    return XdlSample(line.skey, line.gkey, _label(line.label, rules), read_int("ts", line.ts), user, ad)


def group_samples(samples: Iterable[XdlSample]) -> Iterator[XdlGroup]:
    """Group samples in the order of the lines; a group ends where the key or a value of the user part changes."""
    group: XdlGroup | None = None
    for sample in samples:
        if group is None or group.gkey != sample.gkey or group.user != sample.user:
            if group is not None:
                yield group
            group = XdlGroup(sample.gkey, sample.user)
        group.samples.append(sample)
    if group is not None:
        yield group


def schema_of(rules: ReadRules) -> pa.Schema:
    """List the columns of the samples."""
    types: dict[str, pa.DataType] = {"user": pa.int64(), "gkey": pa.string(), "timestamp": pa.int64()}
    types |= {each.column: _type(each) for each in rules.fields}
    types |= {each.column + WEIGHT_SUFFIX: _weight_type(each) for each in rules.weighted}
    types |= {"skey": pa.list_(pa.string()), "ad_timestamp": pa.list_(pa.int64()), "label": pa.list_(pa.int8())}
    return pa.schema(types)


def table_of(groups: Sequence[XdlGroup], rules: ReadRules) -> pa.Table:
    """Make one row for each group; `user` is the hash of its key, `timestamp` that of the first line."""
    values: dict[str, list[Any]] = {
        "user": [key_of_uri(group.gkey) for group in groups],
        "gkey": [group.gkey for group in groups],
        "timestamp": [group.samples[0].ts for group in groups],
        "skey": [[sample.skey for sample in group.samples] for group in groups],
        "ad_timestamp": [[sample.ts for sample in group.samples] for group in groups],
        "label": [[sample.label for sample in group.samples] for group in groups],
    }
    columns = [(each.part, each.column) for each in rules.fields]
    columns += [(each.part, each.column + WEIGHT_SUFFIX) for each in rules.weighted]
    for part, column in columns:
        if part == "user":
            values[column] = [group.user[column] for group in groups]
        else:
            values[column] = [[sample.ad[column] for sample in group.samples] for group in groups]
    return pa.table(values, schema=schema_of(rules))


def _part(line: XdlLine, part: str) -> Part:
    return line.user if part == "user" else line.ad


def _read_field(each: XdlField, tokens: Tokens | None, rules: ReadRules, into: dict[str, Any]) -> None:
    if each.is_dense:
        into[each.column] = _dense(each, tokens, rules)
        return
    ids, weights = read_ids(each.name, tokens or [])
    if rules.weights == "refuse" and any(weight != 1 for weight in weights):
        raise BadLineError(f"{each.name} has weights other than 1; give --weights keep or drop")
    one = _is_one(each)
    if one and len(ids) != 1:
        raise BadLineError(f"{each.name} has not one id")
    into[each.column] = ids[0] if one else ids
    if rules.weights == "keep" and each.is_weighted:
        into[each.column + WEIGHT_SUFFIX] = weights[0] if one else weights


def _dense(each: XdlField, tokens: Tokens | None, rules: ReadRules) -> float | list[float]:
    if tokens is None:
        if rules.fill_dense is None:
            raise BadLineError(f"{each.name} is missing; --fill-dense 0 does as XDL does")
        numbers = [rules.fill_dense] * each.width
    else:
        numbers = read_numbers(each.name, tokens)
    if len(numbers) != each.width:
        raise BadLineError(f"{each.name} has not {each.width} numbers")
    return numbers[0] if each.width == 1 else numbers


def _label(tokens: Tokens, rules: ReadRules) -> int:
    if rules.label_index is None and len(tokens) != 1:
        raise BadLineError("several labels; --label-index says which")
    index = rules.label_index or 0
    if index >= len(tokens):
        raise BadLineError(f"no label {index}")
    value = read_number("label", tokens[index])
    if rules.label_threshold is not None:
        return int(value >= rules.label_threshold)
    if value not in (0, 1):
        raise BadLineError("label is not 0 or 1; --label-threshold makes it so")
    return int(value)


def _is_one(each: XdlField) -> bool:
    return each.kind == "id" or (each.kind == "content" and each.part == "ad")


def _type(each: XdlField) -> pa.DataType:
    number = pa.float32() if each.is_dense else pa.int64()
    one = each.width == 1 if each.is_dense else _is_one(each)
    return _listed(number, int(not one) + (each.part == "ad"))


def _weight_type(each: XdlField) -> pa.DataType:
    return _listed(pa.float32(), int(not _is_one(each)) + (each.part == "ad"))


def _listed(kind: pa.DataType, depth: int) -> pa.DataType:
    for _ in range(depth):
        kind = pa.list_(kind)
    return kind


SPLITS = ("train", "test")


@dataclass(frozen=True)
class TextFile:
    """One file of lines."""

    url: str
    path: str
    split: str | None  # None: by the hash of the group key

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Read number, from 1, and bytes of each line."""
        with Storage(self.url).open_input(self.path) as file:
            yield from enumerate(file, 1)


def total(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum up the counts of lines, of bad ones by reason, and of groups, samples and clicks by split."""
    lines, nested = Counter[str](), {name: Counter[str]() for name in ("quarantined", *SPLITS)}
    for part in parts:
        lines["lines"] += part["lines"]
        for name, counts in nested.items():
            counts.update(part[name])
    return {"lines": lines["lines"], **{name: dict(each) for name, each in nested.items()}}


def part_name(number: int) -> str:
    """Name the samples of the file of this number."""
    return f"part-{number:05d}.parquet"


_QUARANTINE_TYPES: dict[str, pa.DataType] = {
    "file": pa.string(),
    "line": pa.int64(),  # in the file, the first is 1
    "reason": pa.string(),
    "text": pa.binary(),
}
QUARANTINE = pa.schema(_QUARANTINE_TYPES)
ROW_GROUP_SIZE = 2_048
_SHARE_STEPS = 1 << 32
SMALLER = "give them more memory, or cut the files"  # a file is a task


@dataclass
class WrittenGroups:
    """The outcome for one file's lines, and for their groups in each split."""

    num_lines: int = 0
    bad: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    groups: Counter[str] = dataclasses.field(default_factory=Counter)
    samples: Counter[str] = dataclasses.field(default_factory=Counter)
    clicks: Counter[str] = dataclasses.field(default_factory=Counter)


def import_samples(options: XdlOptions, client: Client) -> dict[str, Any]:
    """Make `options.samples`, with schema and settings; return the summary that is its summary.json too.

    A row is a group: neighbouring lines of one file with equal group key and equal user part. Bad lines are counted and
    kept, text and all, in quarantine.parquet. Every line is read twice. Raises SampleError where there is nothing to
    train on.
    """
    files = _files(options)
    with replaced_files(options.samples, scratch=options.scratch, keep_days=options.keep_days) as new:
        for name in SPLITS:
            (new.folder / name).mkdir()
        scanned = run_all(client, "looking through lines", scan_file, [(file,) for file in files], SMALLER)
        seen, num_good = merged(seen for _, seen in scanned), sum(count for count, _ in scanned)
        if not num_good:
            raise SampleError(f"{options.source}: not one line of the form skey|gkey|user part|ad part|label|ts")
        names = _images(options, seen), names_in(options.sparse), names_in(options.dense)
        fields = decide(seen, num_good, *names)
        written = _write_samples(options, client, new.folder, tuple(fields), files)
        summary = _summary(options, fields, [_counts(each) for each in written])
        _check(options, summary)
        bad = pa.Table.from_pylist([row for each in written for row in each.bad], schema=QUARANTINE)
        pq.write_table(bad, new.folder / QUARANTINE_FILE)
        write_field_schema(new.folder, options.samples, fields, options.weights == "keep")
        write_json(new.folder / MARK, summary)
    return summary


def _write_samples(
    options: XdlOptions, client: Client, folder: Path, fields: tuple[XdlField, ...], files: Sequence[TextFile]
) -> list[WrittenGroups]:
    """Write the samples of files, each under its number, as Dask tasks."""
    rules = ReadRules(fields, options.weights, options.label_threshold, options.label_index, options.fill_dense)
    where = options.test_share, str(folder.absolute())
    calls = [(file, number, rules, *where) for number, file in enumerate(files)]
    return run_all(client, "writing samples", write_file, calls, SMALLER)


def scan_file(file: TextFile) -> tuple[int, SeenFields]:
    """Count the good lines of a file, and what they have of every field."""
    return scan(_parsed(file))


def write_file(file: TextFile, number: int, rules: ReadRules, test_share: float, folder: str) -> WrittenGroups:
    """Write the groups of one file as SPLIT/part-NUMBER.parquet, where there are any."""
    result = WrittenGroups()
    scratch = Path(folder, f".part-{number}-{uuid.uuid4().hex}")  # a task may run twice
    scratch.mkdir()
    writers: dict[str, pq.ParquetWriter] = {}
    try:
        groups = group_samples(_read(file, rules, result))
        while batch := list(islice(groups, ROW_GROUP_SIZE)):
            for split in SPLITS:
                here = [group for group in batch if (file.split or split_of(group.gkey, test_share)) == split]
                if here:
                    _write(here, rules, split, scratch, writers, result)
        for writer in writers.values():
            writer.close()
        for split in writers:
            (scratch / f"{split}.parquet").replace(Path(folder, split, part_name(number)))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return result


def split_of(gkey: str, test_share: float) -> str:
    """Choose the split of a group by the hash of its key: all of a user's samples are in one."""
    place = int(splitmix64([key_of_uri(gkey)])[0]) >> 32
    return "test" if place < test_share * _SHARE_STEPS else "train"


def _files(options: XdlOptions) -> list[TextFile]:
    files = []
    sources = [(options.source, "train" if options.test_source else None)]
    sources += [(options.test_source, "test")] if options.test_source else []
    for address, split in sources:
        storage, entries = find_files(address, what="samples")
        paths = sorted(entry.path for entry in entries if entry.size_bytes)
        files += [TextFile(storage.url, path, split) for path in paths]
    if not files:
        raise SampleError(f"{options.source}: only empty files")
    return files


def _images(options: XdlOptions, seen: SeenFields) -> tuple[str, ...]:
    """Name the image fields; of the default names those that are there."""
    asked = names_in(options.images)
    if options.images != XdlOptions.images:
        return asked
    names = {name for _, name in seen}
    return tuple(name for name in asked if name in names)


def _parsed(file: TextFile) -> Iterator[XdlLine]:
    for _, data in file.lines():
        try:
            yield parse_line(data)
        except BadLineError:
            continue  # reported when the file is read again


def _read(file: TextFile, rules: ReadRules, result: WrittenGroups) -> Iterator[Any]:
    for number, data in file.lines():
        result.num_lines += 1
        try:
            yield read_sample(parse_line(data), rules)
        except BadLineError as error:
            result.bad.append({"file": file.path, "line": number, "reason": str(error), "text": data.rstrip(b"\r\n")})


def _write(
    groups: Sequence[XdlGroup],
    rules: ReadRules,
    split: str,
    scratch: Path,
    writers: dict[str, pq.ParquetWriter],
    result: WrittenGroups,
) -> None:
    if split not in writers:
        schema = schema_of(rules).with_metadata({"format": FORMAT})
        path = scratch / f"{split}.parquet"
        writers[split] = pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)
    writers[split].write_table(table_of(groups, rules).replace_schema_metadata({"format": FORMAT}))
    labels = [sample.label for group in groups for sample in group.samples]
    result.groups[split] += len(groups)
    result.samples[split] += len(labels)
    result.clicks[split] += sum(labels)


def _counts(written: WrittenGroups) -> dict[str, Any]:
    """Count what one file has, as `total` sums it up."""
    by_split = {"groups": written.groups, "samples": written.samples, "clicks": written.clicks}
    return {
        "lines": written.num_lines,
        "quarantined": dict(Counter(row["reason"] for row in written.bad)),
        **{split: {name: counts[split] for name, counts in by_split.items()} for split in SPLITS},
    }


def _summary(
    options: XdlOptions, fields: Sequence[XdlField], counts_of_files: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Count what was written."""
    counts = total(counts_of_files)
    return {
        "format": FORMAT,
        "options": asdict(options) | {name: names_in(getattr(options, name)) for name in ("images", "sparse", "dense")},
        **counts,
        "quarantined": dict(sorted(counts["quarantined"].items())),
        "fields": [asdict(each) for each in fields],
    }


def _check(options: XdlOptions, summary: Mapping[str, Any]) -> None:
    if not any(summary[split]["samples"] for split in SPLITS):
        listed = ", ".join(f"{reason}: {count:,}" for reason, count in Counter(summary["quarantined"]).most_common(3))
        raise SampleError(f"{options.source}: all {summary['lines']:,} lines are bad ({listed})")
    if not summary["train"]["samples"]:
        raise SampleError(
            f"{options.source}: no good line is left to train on; give more lines or a smaller --test-share"
        )
