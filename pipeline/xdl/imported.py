"""The files of an import of text samples: what is there of an earlier one, and which files are new or have changed."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurestore.errors import StorageError
from featurestore.published import open_published
from featurestore.storage.storage import Storage, settled_tags
from featurestore.text import parse_json
from pipeline.errors import SampleError, SampleOptionError
from pipeline.options import XdlOptions
from pipeline.samples.publish import MARK, QUARANTINE_FILE, NewFiles, digest_of
from pipeline.xdl.fields import SeenFields, XdlField, seen_of_table

SPLITS = ("train", "test")
SEEN_FILE = "fields.parquet"
SEEN_FOLDER = "seen"
"""Of each file what SEEN_FILE has of all together, under its number."""
Place = tuple[bool, str, str]
_FREE = ("source", "samples", "test_source", "add", "scratch", "keep_days")
"""Options that may differ from those of the samples that files are added to."""


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


@dataclass(frozen=True)
class ImportedFile:
    """A file of lines that was imported, and what shows whether it is the same; its place in a list is its number."""

    split: str | None
    url: str
    path: str
    tag: str
    digest: str
    counts: dict[str, Any] | None = None
    """Of its lines, as `total` sums them up; None where an earlier version imported it."""

    @property
    def place(self) -> Place:
        """What files are sorted by: those of test samples last, then by name."""
        return self.split == "test", self.url, self.path


@dataclass(frozen=True)
class EarlierImport:
    """Samples that are there, to which files are added."""

    storage: Storage
    summary: dict[str, Any]
    seen: SeenFields

    @property
    def files(self) -> list[ImportedFile]:
        """List what was imported."""
        return [ImportedFile(**each) for each in self.summary["sources"]]


@dataclass(frozen=True)
class KeptImport:
    """What stays of an earlier import when some of its files have changed since, or when none has."""

    storage: Storage
    files: dict[int, ImportedFile]
    """By their numbers."""
    counts: dict[str, Any]
    seen: dict[Place | None, SeenFields]
    """Of each file; where none has changed, of all together, under None."""
    bad: pa.Table


def earlier_import(options: XdlOptions) -> EarlierImport:
    """Open the samples that files are added to. Raises SampleOptionError where there are none, SampleError."""
    storage = open_published(options.samples)
    try:
        summary = parse_json(storage.read_bytes(MARK))
        if "good_lines" in summary:
            return EarlierImport(storage, summary, seen_of_table(read_table(storage, SEEN_FILE)))
    except StorageError:
        if not storage.is_local:
            raise
    except (FileNotFoundError, ValueError, TypeError):
        pass
    raise SampleOptionError(
        f"{options.samples} has no samples of this job that files can be added to; import them without --add first"
    )


def as_made(options: XdlOptions, recorded: Mapping[str, Any]) -> XdlOptions:
    """Complete the options by those of the import that is there. Raises SampleOptionError where one differs."""
    made = {name: ",".join(value) if isinstance(value, list) else value for name, value in recorded.items()}
    changes: dict[str, Any] = {}
    for each in dataclass_fields(options):
        mine = getattr(options, each.name)
        if each.name in _FREE or mine == made.get(each.name, each.default):
            continue
        if mine != each.default:
            raise SampleOptionError(
                f"--{each.name.replace('_', '-')} {mine}: {options.samples} was made with {made[each.name]}; leave the "
                "option out, or import all files anew, without --add"
            )
        changes[each.name] = made[each.name]
    return replace(options, **changes)


def new_files_of(files: Sequence[TextFile], imported: Sequence[ImportedFile]) -> list[ImportedFile]:
    """List the files that are not imported yet, or were with another content."""
    known = {each.place: each for each in imported}
    tags: dict[str, dict[str, str]] = {}
    found = []
    for file in files:
        storage = Storage(file.url)
        if file.url not in tags:
            tags[file.url] = settled_tags([storage.entry(each.path) for each in files if each.url == file.url])
        tag = tags[file.url].get(file.path, "")
        before = known.get(ImportedFile(file.split, file.url, file.path, "", "").place)
        if before is None or not before.tag == tag != "":
            found.append(ImportedFile(file.split, file.url, file.path, tag, digest_of(storage, file.path)))
    changed = {each.place for each in found if each.place in known and known[each.place].digest != each.digest}
    # The same file of a folder that was moved is there already.
    digests = {each.digest for each in imported if each.place not in changed}
    return [each for each in found if each.place in changed or each.digest not in digests]


def kept_import(earlier: EarlierImport, new_files: Sequence[ImportedFile]) -> KeptImport:
    """Take what stays of an earlier import where `new_files` are imported, some of them perhaps again.

    Raises SampleError where one has changed, and what was counted of each file is not there, or does not show
    which bad lines were its own.
    """
    storage, imported = earlier.storage, dict(enumerate(earlier.files))
    places, bad = {each.place for each in new_files}, read_table(storage, QUARANTINE_FILE)
    changed = [each for each in imported.values() if each.place in places]
    if not changed:
        return KeptImport(storage, imported, total([earlier.summary]), {None: earlier.seen}, bad)
    count_of_path = Counter(each.path for each in imported.values())
    if any(each.counts is None for each in imported.values()) or any(count_of_path[each.path] > 1 for each in changed):
        raise SampleError(
            f"{Storage(changed[0].url).full(changed[0].path)} has changed since it was imported; "
            "import all files anew, without --add"
        )
    kept = {number: each for number, each in imported.items() if each.place not in places}
    seen: dict[Place | None, SeenFields] = {
        each.place: seen_of_table(read_table(storage, f"{SEEN_FOLDER}/{part_name(number)}"))
        for number, each in kept.items()
    }
    paths = pa.array([each.path for each in changed], pa.string())
    bad = bad.filter(pc.invert(pc.is_in(bad["file"], paths)))
    return KeptImport(storage, kept, total(each.counts or {} for each in kept.values()), seen, bad)


def total(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum up the counts of lines, of good ones, of bad ones by reason, and of groups, samples and clicks by split."""
    lines, nested = Counter[str](), {name: Counter[str]() for name in ("quarantined", *SPLITS)}
    for part in parts:
        lines.update({name: part[name] for name in ("lines", "good_lines")})
        for name, counts in nested.items():
            counts.update(part[name])
    return {**dict.fromkeys(("lines", "good_lines"), 0), **lines, **{name: dict(each) for name, each in nested.items()}}


def in_order_of_files(bad: pa.Table, files: Collection[ImportedFile]) -> pa.Table:
    """Sort bad lines as importing all files at once has them."""
    number = {each.path: number for number, each in reversed(list(enumerate(files)))}
    order = pa.array([number[str(path)] for path in bad["file"].to_pylist()], pa.int64())
    return bad.take(pc.array_sort_indices(order)) if len(bad) else bad


def check_fields(options: XdlOptions, fields: Sequence[XdlField], recorded: Sequence[Mapping[str, Any]]) -> None:
    """Refuse fields that all files together would have, where those that are there have others."""
    now, before = [_shown(asdict(each)) for each in fields], [_shown(each) for each in recorded]
    if now != before:
        shown = ", ".join([each for each in now if each not in before] or now)
        raise SampleError(
            f"with the new files of {options.source}, fields would be others than in {options.samples}: {shown}; "
            "import all files anew, without --add"
        )


def _shown(field: Mapping[str, Any]) -> str:
    """Format what samples need to be the same of a field."""
    width = f", {field['width']} numbers" if field["kind"] == "dense" else ""
    column = f" in column {field['column']}" if field["column"] != field["name"] else ""
    weighted = ", weighted" if field["is_weighted"] else ""
    return f"{field['part']} {field['name']}{column} ({field['kind']}{width}{weighted})"


def keep_parts(new: NewFiles, imported: Mapping[int, ImportedFile], numbers: Mapping[Place, int]) -> None:
    """Keep the samples of files that were imported, under the numbers that these have now."""
    for folder in (*SPLITS, SEEN_FOLDER):
        names = set(new.before.list(folder))
        for number, each in imported.items():
            if (name := part_name(number)) in names:
                new.keep(f"{folder}/{part_name(numbers[each.place])}", f"{folder}/{name}")


def read_table(storage: Storage, name: str) -> pa.Table:
    """Read a table of an earlier import. Raises SampleError."""
    try:
        with storage.open_input(name) as file:
            return pq.read_table(file)
    except (pa.ArrowException, FileNotFoundError) as error:
        raise SampleError(f"{storage.full(name)} cannot be read: {error}; import all files anew") from error


def part_name(number: int) -> str:
    """Name the samples of the file of this number."""
    return f"part-{number:05d}.parquet"
