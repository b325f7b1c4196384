"""Raw logs: their files, read in pieces, with the columns that joined tables have for them.

The rows of such a table are written once, by key, and looked up by all workers.
Letters of shapes: N rows of a piece of a log, T rows of a joined table.
"""

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurestore.console.output import print_summary
from featurestore.errors import StorageError
from featurestore.format.datafile import check_names, is_text
from featurestore.keys import NO_IMAGE, AnyArray, BoolArray, Float64Array, Int64Array, keys_of_bytes
from featurestore.storage.storage import Storage
from featurestore.text import CsvStyle, near_match
from pipeline.errors import SampleError, SampleOptionError
from pipeline.problems import Problem
from pipeline.samples import mapping
from trainer.schema.profile import CSV_SUFFIXES, SUFFIXES, inner_type, json_hint
from trainer.schema.suggest import OF_LOG

IMPRESSIONS = "impressions"
BEHAVIORS = "behaviors"
MICROSECONDS = 1_000_000
PIECE_ROWS = 1_000_000

USER_COLUMNS = ("user_age", "user_gender")
"""Optional columns of documented impressions."""
WANTED = {
    "time": "a timestamp, or a whole number since 1970",
    "id": "a whole number of at most 64 bits, signed",
    "image": "a string (the image's uri) or its int64 key",
    "label": "a whole number, a boolean or a float that is 0 or 1, or the text yes or no",
    "seconds": "a number of seconds",
    "profile": "a whole number of at most 64 bits, signed",
    "profiles": "a list of whole numbers or of texts; for a text that has several, give split: in the mapping",
    "dense": "a number",
    "event": "a text or a whole number",
}
_CSV_ROW_BYTES = 60  # for a guess at the number of rows
CLICK = 2  # as the label of a row: it is a click alone, which labels an impression
_OF_CLICKS = ("timestamp", "user", "item")  # what such a row has to have
_SHOWN_EVENTS = 10  # values of other events that are told
UNKNOWN = -1  # an id that a row does not have
_ROW_ID = "id of the row"  # of a joined table, next to its own columns


@dataclass(frozen=True)
class WantedRows:
    """The rows of a log that are read: of a time, and of some users where `users_path` names a file (.npy)."""

    low_us: int
    high_us: int
    users_path: str | None = None

    def of(self, time_N: Int64Array, user_N: Int64Array) -> BoolArray:
        """Return which of these rows are wanted, (N,)."""
        wanted_N: BoolArray = (time_N >= self.low_us) & (time_N < self.high_us)
        if self.users_path is not None:
            (of_time,) = np.nonzero(wanted_N)
            is_in = pc.is_in(pa.array(user_N[of_time]), value_set=pa.array(np.load(self.users_path)))
            wanted_N[of_time] = is_in.to_numpy(zero_copy_only=False)
        return wanted_N

    def may_have(self, times: tuple[int, int] | None) -> bool:
        """Return whether rows whose first and last time are these may have a wanted one; None: it is not known."""
        return times is None or (times[0] < self.high_us and times[1] >= self.low_us)


@dataclass(frozen=True)
class LogPiece:
    """Some row groups of one file of a log: what one task reads."""

    log: str
    url: str  # of the folder that has the logs
    path: str  # below it
    row_groups: tuple[int, ...]
    first_row: int  # in the file
    num_rows: int  # of CSV a guess from its size
    layout: mapping.TableLayout
    wanted: WantedRows | None = None  # None: every row
    times: tuple[int, int] | None = None  # µs of its first and last row, where the file says it

    @property
    def is_csv(self) -> bool:
        """Whether the file is text; else it is Parquet."""
        return self.path.endswith(CSV_SUFFIXES)


def find_pieces(url: str, log: str, layout: mapping.TableLayout, wanted: WantedRows | None = None) -> list[LogPiece]:
    """Find the log's pieces, in the order of its files' names; only the files' footers are read.

    Row groups whose statistics say that they have no `wanted` row are left out; then there may be no piece.

    Raises SampleError for a log that is not there or has no row, and for a column that is missing or of a wrong type,
    with the file's name.
    """
    storage = Storage(url)
    files = _files_of(storage, log, layout)
    if log == IMPRESSIONS and not layout.takes_text:
        layout = _with_user_columns(storage, files[0], layout)
    if layout.time_unit is None or (files[0].endswith(CSV_SUFFIXES) and layout.found_style is None):
        layout = _settled(storage, files[0], log, layout)
    if any(join.layout.kinds.keys() == {mapping.KEY} for join in layout.joins):  # nothing is taken from it yet
        layout = _with_joins(storage, files[0], layout)
    pieces = [piece for path in files for piece in _pieces(storage, LogPiece(log, url, path, (), 0, 0, layout, wanted))]
    if not pieces and wanted is None:
        raise SampleError(Problem.EMPTY_FILES, storage.full(layout.files), len(files))
    return pieces


def _files_of(storage: Storage, log: str, layout: mapping.TableLayout) -> list[str]:
    """List the files of a table, at least one. Raises SampleOptionError."""
    files = _files(storage, layout.files, SUFFIXES if layout.takes_text else SUFFIXES[:1])
    if not files:
        if storage.is_local and not Path(storage.url).exists():
            raise SampleOptionError(Problem.NO_FOLDER, storage.url)
        problem = (Problem.NO_MAPPED_FILES, log) if layout.takes_text else (Problem.NO_LOG_FILES, storage.url)
        where, found = storage.full(layout.files), _names_at(storage, layout.files)
        raise SampleOptionError(problem[0], where, problem[1], json_hint(found))
    return files


def documented_layout(log: str) -> mapping.TableLayout:
    """Describe a log as it is documented, of which no mapping says otherwise."""
    return mapping.TableLayout(
        files=log,
        names={name: name for name in OF_LOG[log]},
        kinds={name: mapping.KINDS.get(name, "id") for name in OF_LOG[log]},
        takes_text=False,
    )


def _with_user_columns(storage: Storage, path: str, layout: mapping.TableLayout) -> mapping.TableLayout:
    """Add those of the usual user columns that the first file of documented impressions has."""
    found = tuple(name for name in USER_COLUMNS if name in _names(storage, path, layout))
    names, kinds = {name: name for name in found}, dict.fromkeys(found, "profile")
    return replace(layout, names=layout.names | names, kinds=layout.kinds | kinds, user_columns=found)


def _settled(storage: Storage, path: str, log: str, layout: mapping.TableLayout) -> mapping.TableLayout:
    """Find in the first file what the layout leaves open: how CSV is written, and the unit of times. Say it."""
    told = []
    if path.endswith(CSV_SUFFIXES):
        style, rows = mapping.csv_beginning(storage, path, layout.csv)
        layout = replace(layout, found_style=style)
        if style != CsvStyle(**layout.csv.model_dump(exclude_none=True)):
            told.append(f"read as CSV with {style}")
        name = layout.names.get("timestamp")
        times = [row[rows[0].index(name)] for row in rows[1:] if name in rows[0] and len(row) == len(rows[0])]
    else:
        times = _first_times(storage, path, layout.names["timestamp"])
    if layout.time_unit is None:
        unit = mapping.unit_of(times)
        layout = replace(layout, time_unit=unit)
        if unit != "s":
            told.append(f"times such as {next(each for each in times if each[:1].isdigit())} are in {unit} since 1970")
    if told and layout.is_told:
        told_by = "; csv and time_unit of a mapping override it"
        print_summary(f"{log:<12} {storage.full(path)}: {', '.join(told)}{told_by}")
    return layout


def _with_joins(storage: Storage, path: str, layout: mapping.TableLayout) -> mapping.TableLayout:
    """Take the columns that the first file of a log lacks from the tables that are joined. Raises SampleError."""
    own = _names(storage, path, layout)
    joins, layout = layout.joins, replace(layout, joins=())
    for join in joins:
        place = Storage(join.url or storage.url)
        there = _names(place, _files_of(place, f"join.{join.by}", join.layout)[0], join.layout)
        layout = layout.with_columns_of(replace(join, url=place.url), own, there)
    return layout


def _names(storage: Storage, path: str, layout: mapping.TableLayout) -> list[str]:
    """Read the names of a file's columns."""
    if path.endswith(CSV_SUFFIXES):
        style = layout.found_style or mapping.csv_beginning(storage, path, layout.csv)[0]
        return mapping.csv_names(storage, path, style)
    with open_parquet(storage, path) as file:
        return list(file.schema_arrow.names)


def with_joined_rows(pieces: Sequence[LogPiece], folder: Path) -> list[LogPiece]:
    """Write the rows of the tables that the logs join into `folder`, where `read_piece` looks them up.

    Raises SampleError for a key that has several rows which differ.
    """
    layouts = {piece.log: piece.layout for piece in pieces}
    for log, layout in layouts.items():
        joins = [_written(join, folder / f"{log}-{join.by}.rows") for join in layout.joins]
        layouts[log] = replace(layout, joins=tuple(joins))
    return [replace(piece, layout=layouts[piece.log]) for piece in pieces]


def _written(join: mapping.Join, path: Path) -> mapping.Join:
    """Write the good rows of a joined table as its files have them, by the ids in _ROW_ID, each once."""
    pieces = find_pieces(join.url or "", f"join.{join.by}", join.layout)
    layout, reasons, parts = pieces[0].layout, Counter[str](), []
    for piece in pieces:
        rows = read_piece(piece, latest_s=0)
        reasons.update(rows.bad_reason)
        good = _read_table(piece).table.filter(pa.array(rows.is_good_N))
        parts.append(good.append_column(_ROW_ID, pa.array(rows.good[mapping.KEY])))
    place = Storage(join.url or "").full(layout.files)
    if reasons:
        why = ", ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common(3))
        print_summary(f"{join.by:<12} {place}: {reasons.total():,} rows are left out ({why})")
    table = _without_repetitions(pa.concat_tables(parts).sort_by(_ROW_ID), layout, place)
    columns = [_encoded(column.combine_chunks()) for column in table.columns]
    batch = pa.record_batch(columns, names=table.column_names)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return replace(join, layout=layout, path=str(path.absolute()))


def _without_repetitions(table: pa.Table, layout: mapping.TableLayout, place: str) -> pa.Table:
    """Leave one of equal rows, which are sorted by _ROW_ID. Raises SampleError for an id of several that differ."""
    key, id_T = layout.names[mapping.KEY], table.column(_ROW_ID).to_numpy()
    again = np.flatnonzero(id_T[1:] == id_T[:-1])
    values = table.drop_columns([key])
    mine, theirs = (values.take(rows).to_pylist() for rows in (again, again + 1))
    # As texts, in which NaN is itself.
    differing = [row for row, one, other in zip(again.tolist(), mine, theirs, strict=True) if str(one) != str(other)]
    if differing:
        others = ", ".join(name for ours, name in layout.names.items() if ours != mapping.KEY)
        raise SampleError(Problem.ROWS_DIFFER, place, key, table.column(key)[differing[0]].as_py(), others)
    return table.take(np.delete(np.arange(len(table)), again + 1))


def _encoded(column: Any) -> Any:
    """Make a dictionary of a column of texts, whose rows are quick to take."""
    values = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    return values.dictionary_encode() if is_text(values.type) else values


def _looked_up(join: mapping.Join, id_N: Int64Array) -> tuple[pa.Table, int]:
    """Return the rows of a joined table with these ids, nulls where it lacks one, (N,), and how many it lacks."""
    with pa.memory_map(join.path or "") as mapped:
        table = pa.ipc.open_file(mapped).read_all()
    row_id_T = table.column(_ROW_ID).to_numpy()
    place_N = np.searchsorted(row_id_T, id_N)
    has_N = place_N < len(row_id_T)
    has_N[has_N] = row_id_T[place_N[has_N]] == id_N[has_N]
    places: Any = pa.array(place_N, mask=~has_N)
    return table.take(places), int(np.count_nonzero(~has_N))


def _first_times(storage: Storage, path: str, name: str) -> list[str]:
    """Read the first times of a Parquet file; none of a damaged one, or without such a column: its check says it."""
    with open_parquet(storage, path) as file, contextlib.suppress(pa.ArrowException, OSError, StopIteration, KeyError):
        return [str(value) for value in next(file.iter_batches(1000, columns=[name])).column(name).to_pylist()]
    return []


def _pieces(storage: Storage, empty: LogPiece) -> list[LogPiece]:
    """Cut one file, whose columns are checked, into pieces."""
    if empty.is_csv:
        names = mapping.csv_names(storage, empty.path, empty.layout.style)
        _check_columns(pa.schema([(name, pa.string()) for name in names]), empty)
        return [replace(empty, num_rows=storage.size(empty.path) // _CSV_ROW_BYTES)]
    with open_parquet(storage, empty.path) as file:
        return _cut(file, empty)


def _files(storage: Storage, place: str, endings: tuple[str, ...]) -> list[str]:
    """List the file at `place`, or those below it with these endings, but hidden ones. Raises SampleOptionError."""
    found = _names_at(storage, place)
    if any("/_delta_log/" in f"/{path}" or path.endswith(".metadata.json") for path in found):
        raise SampleOptionError(Problem.TABLE_OF_LAKE, storage.full(place))
    return [
        path
        for path in found
        if path.endswith(endings) and not any(part.startswith((".", "_")) for part in path.split("/"))
    ]


def _names_at(storage: Storage, place: str) -> list[str]:
    """List the file at `place`, or those below it."""
    found = [entry.path for entry in storage.entries(place)]
    if not found:
        with contextlib.suppress(FileNotFoundError):
            found = [storage.entry(place).path]
    return found


def open_parquet(storage: Storage, path: str, encoded: Sequence[str] = ()) -> pq.ParquetFile:
    """Open a file, with page checksums verified where it has them; texts in `encoded` columns stay dictionaries.

    Raises SampleError where it is not Parquet.
    """
    try:
        file = storage.open_input(path)
        parquet = pq.ParquetFile(file, read_dictionary=list(encoded), page_checksum_verification=True)
        check_names(parquet)
        return parquet
    except (pa.ArrowException, OSError, StorageError, UnicodeDecodeError) as error:
        raise SampleError(Problem.UNREADABLE_AS, storage.full(path), "Parquet", error) from error


def _cut(file: pq.ParquetFile, empty: LogPiece) -> list[LogPiece]:
    """Cut a file whose columns are right into pieces of about PIECE_ROWS rows, in whole row groups."""
    _check_columns(file.schema_arrow, empty)
    groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    times = [_times(file, group, empty) if empty.wanted else None for group in range(len(groups))]
    wanted = [empty.wanted is None or empty.wanted.may_have(each) for each in times]
    pieces: list[LogPiece] = []
    held: list[int] = []
    for group in range(len(groups)):
        if wanted[group]:
            held.append(group)
        ends = group == len(groups) - 1 or not wanted[group + 1]
        rows = sum(groups[each] for each in held)
        if rows and (ends or rows >= PIECE_ROWS):
            known = [span for each in held if (span := times[each])]
            span = (min(known)[0], max(end for _, end in known)) if len(known) == len(held) else None
            first_row = sum(groups[: held[0]])
            pieces.append(replace(empty, row_groups=tuple(held), first_row=first_row, num_rows=rows, times=span))
            held = []
    return pieces


def _times(file: pq.ParquetFile, group: int, piece: LogPiece) -> tuple[int, int] | None:
    """Read from a file's footer the first and last time of a row group, µs; None where it does not say it."""
    names = [file.metadata.schema.column(column).path for column in range(file.metadata.num_columns)]
    name = piece.layout.names["timestamp"]
    statistics = file.metadata.row_group(group).column(names.index(name)).statistics
    if statistics is None or not statistics.has_min_max:
        return None
    kind = file.schema_arrow.field(name).type
    if not (pa.types.is_timestamp(kind) or pa.types.is_integer(kind)):
        return None
    unit = kind.unit if pa.types.is_timestamp(kind) else piece.layout.unit
    ends = pa.array([statistics.min, statistics.max], kind).cast(pa.int64()).to_numpy().tolist()
    low_us, high_us = (each * MICROSECONDS // mapping.PER_SECOND[unit] for each in ends)
    return low_us, high_us


def _check_columns(schema: pa.Schema, piece: LogPiece) -> None:
    where, takes_text = Storage(piece.url).full(piece.path), piece.layout.takes_text
    hint = "" if takes_text else Problem.MAPPING_NEEDED.of(piece.url)
    for ours, kind in piece.layout.kinds.items():
        name = piece.layout.names[ours]
        if name not in schema.names:
            near = near_match(name, schema.names)
            raise SampleOptionError(Problem.COLUMN_MISSING, where, name, _key_of(ours, piece), near, hint)
        if schema.names.count(name) > 1:
            raise SampleError(Problem.REPEATED_COLUMN, where, name, schema.names.count(name))
        found = schema.field(name).type
        is_list = kind == "profiles" and ours not in piece.layout.separators
        if not (_is_id_list(found) if is_list else _fits(found, kind, takes_text)):
            or_text = ", or text" if takes_text and kind not in ("image", "profiles") else ""
            raise SampleError(Problem.WRONG_TYPE, where, name, found, WANTED[kind] + or_text, hint)


def _key_of(ours: str, piece: LogPiece) -> str:
    """Say which key of the mapping, if there is one, names this column of the files."""
    if not piece.layout.takes_text:
        return ""
    keys = {mapping.KEY: "column", mapping.EVENT: "where.column"}
    keys |= {name: f"user.{name}" for name in piece.layout.user_columns}
    keys |= {name: f"ad.{name}" for name in piece.layout.ad_columns}
    return f" ({piece.log}.{keys.get(ours, f'columns.{ours}')} of the mapping)"


def _is_id_list(found: pa.DataType) -> bool:
    inner, depth = inner_type(found)
    return depth == 1 and _fits(inner, "profile", takes_text=True)


def _fits(found: pa.DataType, kind: str, takes_text: bool) -> bool:
    if pa.types.is_dictionary(found):
        found = found.value_type
    if is_text(found):
        return takes_text or kind == mapping.IMAGE
    if kind == mapping.IMAGE and (pa.types.is_null(found) or pa.types.is_floating(found)):
        return True  # as pandas writes a column without values; `_images` refuses others
    whole = pa.types.is_integer(found) and found != pa.uint64()
    if kind == "time":
        return whole or pa.types.is_timestamp(found)
    if kind == "label":
        return whole or pa.types.is_boolean(found) or pa.types.is_floating(found)
    if kind in ("seconds", "dense"):
        return whole or pa.types.is_floating(found)
    return whole or (kind == "event" and pa.types.is_boolean(found))


Columns = dict[str, AnyArray]

NAMES = pa.schema({"key": pa.int64(), "uri": pa.string()})  # type: ignore[arg-type]
_SHOWN = 60  # characters of a bad value


@dataclass(frozen=True)
class LogRows:
    """A piece as arrays: its good rows, and number and reason of the others; a bad value by reason, as an example."""

    num_rows: int
    good: Columns  # timestamp in microseconds, image as key, all int64 but dwell_s and dense columns
    bad_row: Int64Array  # in the file
    bad_reason: list[str]
    examples: dict[str, str]
    names: pa.Table  # NAMES of the images of all rows
    texts: Mapping[int, str]
    """The text of each id of these rows that is a hash, and those of joined tables."""
    is_good_N: BoolArray
    """Whether each row that was read is good; torn rows are left out."""
    num_lacking: Counter[str] = field(default_factory=Counter)
    """Good rows whose item (or user) a joined table lacks, by that."""
    other_events: Counter[str] = field(default_factory=Counter)
    """Rows of a table of events that are not of this log, by their first values."""


def read_piece(piece: LogPiece, latest_s: int) -> LogRows:
    """Read and check a piece.

    Rows later than `latest_s` (seconds since 1970) are bad, as one such row would become the last day of the log. A bad
    row has the first reason in the order of the columns."""
    layout = piece.layout
    read = _read_table(piece)
    table, row_N, is_click_N, other_events = _chosen(read, piece, latest_s)
    reasons = sorted(set(read.doubtful.values()))
    reason_N = np.full(table.num_rows, -1)
    for row, reason in read.doubtful.items():
        reason_N[row_N == row] = reasons.index(reason)
    where = Storage(piece.url).full(piece.path)
    examples: dict[str, str] = {}
    names, texts = [NAMES.empty_table()], dict[int, str]()
    good: Columns = {}
    for name, kind in layout.kinds.items():
        if kind == "event":
            continue
        good[name], faults = _column(table, name, layout, latest_s, texts, names, where)
        for fault, is_bad_N in faults.items():
            is_new_N = is_bad_N & (reason_N < 0)
            (new,) = np.nonzero(is_new_N if name in _OF_CLICKS else is_new_N & ~is_click_N)
            reason_N[new] = len(reasons)
            reasons.append(f"{name if name != mapping.KEY else layout.names[name]} {fault}")
            if len(new) and fault != "is null":
                examples[reasons[-1]] = repr(table.column(layout.names[name])[new[0]].as_py())[:_SHOWN]
    for name, value in layout.constants.items():
        good[name] = np.full(table.num_rows, value, np.int64 if isinstance(value, int) else np.float64)
    if layout.only_clicks:
        del good["label"]
    if layout.where is not None and layout.where.clicked:
        good["label"] = np.where(is_click_N, CLICK, 0)
    is_good_N = reason_N < 0
    good = {name: values_N[is_good_N] for name, values_N in good.items()}
    lacking = Counter[str]()
    for join in layout.joins:
        rows, lacking[join.by] = _looked_up(join, good[join.by])
        for name in [each for each in join.layout.kinds if each != mapping.KEY]:
            good[name], _ = _column(rows, name, join.layout, latest_s, texts, names, where)
    (bad_N,) = np.nonzero(~is_good_N)
    bad = [*zip(row_N[bad_N].tolist(), [reasons[code] for code in reason_N[bad_N]], strict=True), *read.torn.items()]
    return LogRows(
        table.num_rows + len(read.torn),
        good,
        piece.first_row + np.array([row for row, _ in sorted(bad)], np.int64),
        [reason for _, reason in sorted(bad)],
        examples,
        pa.concat_tables(names),
        texts,
        is_good_N,
        lacking,
        other_events,
    )


def _chosen(
    read: mapping.CsvRows, piece: LogPiece, latest_s: int
) -> tuple[pa.Table, Int64Array, BoolArray, Counter[str]]:
    """Choose the rows of a piece that are of its log, and wanted.

    Returns them, their numbers in the file, (N,), which are clicks alone, (N,), and counts of other events.
    """
    table, layout = read.table, piece.layout
    row_N = np.arange(table.num_rows + len(read.torn))
    if read.torn:
        row_N = np.delete(row_N, list(read.torn))
    is_click_N, others = np.zeros(table.num_rows, np.bool_), Counter[str]()
    kept_N = ~is_click_N
    if piece.wanted is not None:
        kept_N &= piece.wanted.of(*(_column(table, name, layout, latest_s)[0] for name in ("timestamp", "user")))
    if layout.where is not None:
        is_row_N, is_click_N, others = _events(table.column(layout.names[mapping.EVENT]), layout.where)
        kept_N &= is_row_N
    if layout.only_clicks:
        kept_N &= _column(table, "label", layout, latest_s)[0] == 1
    if kept_N.all():
        return table, row_N, is_click_N, others
    return table.filter(pa.array(kept_N)), row_N[kept_N], is_click_N[kept_N], others


def _events(column: Any, where: mapping.EventRows) -> tuple[BoolArray, BoolArray, Counter[str]]:
    """Return which rows of a table of events are read, (N,), which of them are clicks, and count the others."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    texts = pc.utf8_trim_whitespace(column.cast(pa.string()))
    is_row_N, is_click_N = (
        pc.is_in(texts, value_set=pa.array(values, pa.string())).to_numpy() for values in (where.value, where.clicked)
    )
    others = texts.filter(pa.array(~(is_row_N | is_click_N))).value_counts().to_pylist()
    counts = Counter({str(each["values"]): each["counts"] for each in others})
    return is_row_N | is_click_N, is_click_N, Counter(dict(counts.most_common(_SHOWN_EVENTS)))


def _read_table(piece: LogPiece) -> mapping.CsvRows:
    """Read the columns of a piece as its file has them, with the rows that are torn or doubtful."""
    names = [piece.layout.names[name] for name in piece.layout.kinds]
    storage = Storage(piece.url)
    if piece.is_csv:
        return mapping.read_csv(storage, piece.path, names, piece.layout.style)
    encoded = [piece.layout.names[mapping.IMAGE]] if mapping.IMAGE in piece.layout.names else []
    with open_parquet(storage, piece.path, encoded=encoded) as file:
        try:
            table = file.read_row_groups(list(piece.row_groups), columns=names, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise SampleError(Problem.REFUSED, "read", storage.full(piece.path), error) from error
    return mapping.CsvRows(table, {}, {})


def users_of(piece: LogPiece, early_us: int, latest_s: int) -> tuple[Int64Array, bool]:
    """Read only users and times of a piece; return its users, sorted, and whether a row is before `early_us`."""
    kinds = {name: kind for name, kind in piece.layout.kinds.items() if name in ("timestamp", "user", mapping.EVENT)}
    good = read_piece(replace(piece, layout=replace(piece.layout, kinds=kinds, joins=())), latest_s).good
    return np.unique(good["user"]), bool((good["timestamp"] < early_us).any())


def _column(
    table: pa.Table,
    name: str,
    layout: mapping.TableLayout,
    latest_s: int,
    texts: dict[int, str] | None = None,
    names: list[pa.Table] | None = None,
    where: str = "",
) -> tuple[AnyArray, "Faults"]:
    """Read one of our columns of a table as the file has them.

    `texts` gets the texts of its ids, `names` those of its images; `where` begins the message about these.
    """
    column: Any = table.column(layout.names[name])
    if layout.kinds[name] == "image":
        keys_N, names_of_images = _images(column, where, layout.names[name])
        if names is not None:
            names.append(names_of_images)
        return keys_N, {}
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if layout.kinds[name] == "profiles":
        lists = pc.split_pattern(column, layout.separators[name]) if is_text(column.type) else column
        return mapping.parse_id_lists(lists, texts), {}
    return _arrays(column, layout.kinds[name], latest_s, layout, texts)


Faults = dict[str, BoolArray]  # which rows have each fault


def _arrays(
    column: Any, kind: str, latest_s: int, layout: mapping.TableLayout, texts: dict[int, str] | None = None
) -> tuple[AnyArray, Faults]:
    """Read the values of a chunked Arrow column, anything where they are bad, and their faults."""
    if kind == "time" and layout.time_format is not None and pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    if is_text(column.type):
        return _text_arrays(column, kind, latest_s, layout, texts)
    null = {"is null": column.is_null().to_numpy()}
    if kind == "time":
        value_N, faults = _times_us(column, latest_s, layout.unit)
        return value_N, null | faults
    if kind == "dense":
        return _numbers(column.cast(pa.float64()).fill_null(np.nan).to_numpy(), kind)
    if kind in ("label", "seconds"):
        value_N, faults = _numbers(column.cast(pa.float64()).fill_null(0).to_numpy(), kind)
        return value_N, null | faults
    value_N = column.cast(pa.int64()).fill_null(UNKNOWN).to_numpy()
    return value_N, {} if kind == "profile" else null


def _images(column: Any, where: str, name: str) -> tuple[Int64Array, pa.Table]:
    """Read the key of each image, NO_IMAGE where it is null or has no name, and the names that rows have, each once."""
    is_encoded = pa.types.is_dictionary(column.type)
    if column.null_count == len(column):
        return np.full(len(column), NO_IMAGE), NAMES.empty_table()
    if pa.types.is_floating(column.type):
        raise SampleError(Problem.WRONG_TYPE, where, name, column.type, WANTED[mapping.IMAGE], "")
    if pa.types.is_integer(column.type.value_type if is_encoded else column.type):
        return column.cast(pa.int64()).fill_null(NO_IMAGE).to_numpy(), NAMES.empty_table()
    if not is_encoded:
        is_view = pa.types.is_string_view(column.type)  # of which Arrow cannot measure the lengths
        column = (column.cast(pa.string()) if is_view else column).dictionary_encode()
    encoded = column.unify_dictionaries().combine_chunks()
    uris = encoded.dictionary
    place_N = encoded.indices.cast(pa.int64()).fill_null(len(uris)).to_numpy(zero_copy_only=False)
    is_used_M = np.zeros(len(uris) + 1, np.bool_)
    is_used_M[place_N] = True
    used_U = np.flatnonzero(is_used_M[:-1] & (pc.binary_length(uris).to_numpy(zero_copy_only=False) > 0))
    texts = uris.take(pa.array(used_U))
    keys_M = np.full(len(uris) + 1, NO_IMAGE)
    as_bytes = pa.large_binary() if pa.types.is_large_string(texts.type) else pa.binary()
    keys_M[used_U] = keys_of_bytes(texts.cast(as_bytes).to_pylist())
    return keys_M[place_N], pa.Table.from_arrays([pa.array(keys_M[used_U]), texts.cast(pa.string())], schema=NAMES)


def _text_arrays(
    column: Any, kind: str, latest_s: int, layout: mapping.TableLayout, texts: dict[int, str] | None
) -> tuple[AnyArray, Faults]:
    """Read as `_arrays`, but text that has to be parsed first."""
    null_N = column.is_null().to_numpy()
    null = {"is null": null_N}
    if kind == "time":
        time_N, wrong_N = mapping.parse_times(column, layout.unit, layout.time_format)
        late_N = time_N > latest_s * MICROSECONDS
        return time_N, null | {"is not a time": wrong_N, "is before 1970": time_N < 0, "is in the future": late_N}
    if kind == "id":
        return mapping.parse_ids(column, texts)[0], null
    if kind == "profile":
        return np.where(null_N, UNKNOWN, mapping.parse_ids(column, texts)[0]), {}
    number_N, wrong_N = (
        mapping.parse_labels(column) if kind == "label" else mapping.parse_numbers(column, layout.style.decimal)
    )
    if kind == "dense":
        number_N, null = np.where(null_N, np.nan, number_N), {}
    value_N, faults = _numbers(number_N, kind)
    return value_N, null | {"is not a number": wrong_N} | faults


def _numbers(number_N: Float64Array, kind: str) -> tuple[AnyArray, Faults]:
    if kind == "label":
        is_click_N = number_N == 1
        return is_click_N.astype(np.int64), {"is not 0 or 1": ~is_click_N & (number_N != 0)}
    if kind == "dense":  # NaN: the row has none
        with np.errstate(over="ignore"):
            single_N = number_N.astype(np.float32)
        return single_N, {"is not finite in float32": np.isinf(single_N)}
    return number_N, {"is not finite": ~np.isfinite(number_N), "is negative": number_N < 0}


def _times_us(column: Any, latest_s: int, whole: str) -> tuple[Int64Array, Faults]:
    """Convert times to microseconds since 1970; a whole number is one of unit `whole`.

    Nanoseconds are cut off, a timestamp without a time zone is in UTC."""
    unit = column.type.unit if pa.types.is_timestamp(column.type) else whole
    value_N = column.cast(pa.int64()).fill_null(0).to_numpy()
    is_early_N, is_late_N = value_N < 0, value_N > latest_s * mapping.PER_SECOND[unit]
    if is_early_N.any() or is_late_N.any():
        value_N = np.where(is_early_N | is_late_N, 0, value_N)
    time_N = value_N // 1_000 if unit == "ns" else value_N * (MICROSECONDS // mapping.PER_SECOND[unit])
    return time_N, {"is before 1970": is_early_N, "is in the future": is_late_N}
