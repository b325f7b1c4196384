"""An import of XDL's text samples over Dask: look through all files, decide on the fields, write, publish at once.

A file is one task, so a group never spans two files: write the lines of a group one after the other.
"""

import dataclasses
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from distributed import Client

from featurestore.console.files import write_json
from featurestore.keys import key_of_uri, splitmix64
from pipeline.cluster.tasks import run_all
from pipeline.errors import SampleError
from pipeline.options import XdlOptions
from pipeline.samples.files import FORMAT
from pipeline.samples.mapping import names_in
from pipeline.samples.publish import MARK, QUARANTINE_FILE, replaced_files
from pipeline.vectors.source import find_files
from pipeline.xdl.fields import SeenFields, XdlField, decide, merged, scan, seen_table
from pipeline.xdl.groups import ReadRules, XdlGroup, group_samples, read_sample, schema_of, table_of
from pipeline.xdl.imported import (
    SEEN_FILE,
    SEEN_FOLDER,
    SPLITS,
    TextFile,
    as_made,
    check_fields,
    earlier_import,
    in_order_of_files,
    keep_parts,
    kept_import,
    new_files_of,
    part_name,
    total,
)
from pipeline.xdl.line import BadLineError, XdlLine, parse_line
from pipeline.xdl.schema import write_field_schema

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
    """Make `options.samples` anew, with schema and settings; return the summary that is its summary.json too.

    A row is a group: neighbouring lines of one file with equal group key and equal user part. Bad lines are counted and
    kept, text and all, in quarantine.parquet. Every line is read twice. With `options.add`, files that were imported
    are kept as they are, the others are added, and those that have changed take the place of their samples: what
    importing all of them would make, where new ones come last by name. Raises SampleError where there is nothing to
    train on, where the fields of all files would be others than before, and for changed files of an earlier version.
    """
    earlier = earlier_import(options) if options.add else None
    options = as_made(options, earlier.summary["options"]) if earlier else options
    new_files = new_files_of(_files(options), earlier.files if earlier else [])
    if earlier and not new_files:
        return earlier.summary | {"added": 0, "options": earlier.summary["options"] | {"add": True}}
    kept = kept_import(earlier, new_files) if earlier else None
    with replaced_files(
        options.samples,
        before=earlier.storage if earlier else None,
        scratch=options.scratch,
        keep_days=options.keep_days,
    ) as new:
        for name in (*SPLITS, SEEN_FOLDER):
            (new.folder / name).mkdir()
        text_files = [TextFile(each.url, each.path, each.split) for each in new_files]
        scanned = run_all(client, "looking through lines", scan_file, [(file,) for file in text_files], SMALLER)
        seen_of_new = {each.place: seen for each, (_, seen) in zip(new_files, scanned, strict=True)}
        files = sorted([*(kept.files.values() if kept else []), *new_files], key=lambda each: each.place)
        seen_of_file = (kept.seen if kept else {}) | seen_of_new
        seen = merged(seen_of_file[place] for place in (None, *(each.place for each in files)) if place in seen_of_file)
        num_good = sum(count for count, _ in scanned) + (kept.counts["good_lines"] if kept else 0)
        if not num_good:
            raise SampleError(f"{options.source}: not one line of the form skey|gkey|user part|ad part|label|ts")
        names = _images(options, seen), names_in(options.sparse), names_in(options.dense)
        fields = decide(seen, num_good, *names)
        if earlier:
            check_fields(options, fields, earlier.summary["fields"])
        numbers = {each.place: number for number, each in enumerate(files)}
        numbered = [(file, numbers[each.place]) for file, each in zip(text_files, new_files, strict=True)]
        written = _write_samples(options, client, new.folder, tuple(fields), numbered)
        counts_of_new = {
            each.place: _counts(count, groups)
            for each, (count, _), groups in zip(new_files, scanned, written, strict=True)
        }
        summary = _summary(options, fields, [*([kept.counts] if kept else []), *counts_of_new.values()])
        sources = [replace(each, counts=counts_of_new.get(each.place, each.counts)) for each in files]
        summary |= {"sources": [asdict(each) for each in sources], "added": len(new_files)}
        _check(options, summary)
        bad = pa.Table.from_pylist([row for each in written for row in each.bad], schema=QUARANTINE)
        if kept:
            bad = in_order_of_files(pa.concat_tables([kept.bad, bad]), files)
            keep_parts(new, kept.files, numbers)
        pq.write_table(bad, new.folder / QUARANTINE_FILE)
        _write_seen(new.folder, seen, {numbers[place]: each for place, each in seen_of_new.items()})
        write_field_schema(new.folder, options.samples, fields, options.weights == "keep")
        write_json(new.folder / MARK, summary)
    return summary


def _write_samples(
    options: XdlOptions,
    client: Client,
    folder: Path,
    fields: tuple[XdlField, ...],
    files: list[tuple[TextFile, int]],
) -> list[WrittenGroups]:
    """Write the samples of files, each with its number, as Dask tasks."""
    rules = ReadRules(fields, options.weights, options.label_threshold, options.label_index, options.fill_dense)
    calls = [(*each, rules, options.test_share, str(folder.absolute())) for each in files]
    return run_all(client, "writing samples", write_file, calls, SMALLER)


def _write_seen(folder: Path, seen: SeenFields, seen_of_file: dict[int, SeenFields]) -> None:
    """Write what all files have of every field, and each new file by its number: a later import begins with that."""
    pq.write_table(seen_table(seen), folder / SEEN_FILE)
    for number, each in seen_of_file.items():
        pq.write_table(seen_table(each), folder / SEEN_FOLDER / part_name(number))


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
        files += [TextFile(storage.url, entry.path, split) for entry in entries if entry.size_bytes]
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


def _counts(num_good: int, written: WrittenGroups) -> dict[str, Any]:
    """Count what one file has, as `total` sums it up."""
    by_split = {"groups": written.groups, "samples": written.samples, "clicks": written.clicks}
    return {
        "lines": written.num_lines,
        "good_lines": num_good,
        "quarantined": dict(Counter(row["reason"] for row in written.bad)),
        **{split: {name: counts[split] for name, counts in by_split.items()} for split in SPLITS},
    }


def _summary(
    options: XdlOptions, fields: Sequence[XdlField], counts_of_files: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Count what was written, and what is there already."""
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
