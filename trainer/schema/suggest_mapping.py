"""A first mapping of raw logs, for jobs/build_samples.py --mapping, suggested by names and values of their columns."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from featurestore.storage.storage import Storage
from featurestore.text import CsvStyle
from trainer.errors import DataError, DataNotFoundError
from trainer.schema.profile import Column, TableProfile, data_files, look, read_tables, style_of
from trainer.schema.suggest_schema import column_note
from trainer.schema.text import table_rows

# What people call our columns; the first that fits wins.
SYNONYMS = {
    "label": r"label|clk|clicks?|clicked|is_click(ed)?|target|y",
    "timestamp": r"timestamp|time_?stamp|ts|time|datetime|date_?time|date|event_time|.*_(at|time|ts)",
    "user": r"user(_?id)?|uid|member(_?id)?|customer(_?id)?|visitor(_?id)?|device(_?id)?",
    "session": r"session(_?id)?|visit(_?id)?",
    "scene": r"scene(_?id)?|pid|placement(_?id)?|position|slot(_?id)?|page(_?id)?",
    "image": r"(ad_|item_)?(image|img|picture|pic|photo|cover)(_?(id|key|url|uri|path|name))?",
    "item": r"item(_?id)?|ad(_?id)?|adgroup(_?id)?|product(_?id)?|sku|goods(_?id)?|article(_?id)?",
    "category": r"(item_)?(category|cate|cat)(_?id)?",
    "dwell_s": r"dwell(_?(s|sec|seconds|time))?|duration(_?(s|sec|seconds))?|stay(_?time)?|seconds",
}
OF_LOG = {
    "impressions": ("timestamp", "user", "session", "scene", "item", "image", "category", "label"),
    "behaviors": ("timestamp", "user", "item", "image", "category", "dwell_s"),
}
REQUIRED = {"timestamp", "user", "item", "image", "label"}
TIME_FORMATS = [
    day + time for day in ("%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%Y/%m/%d") for time in ("", " %H:%M", " %H:%M:%S")
]
MOST_TIMES = 2000  # that are tried
USER_ROWS = 50_000  # rows in which it is looked whether a column is the same in all rows of a user


@dataclass(frozen=True)
class Log:
    """One table: where its files are, and what it is taken for."""

    name: str  # impressions | behaviors
    files: str
    table: TableProfile
    ours: Mapping[str, str]  # our columns, by their names in the files
    of_user: frozenset[str]  # further columns that are the same in all rows of a user
    how: tuple[str, ...]  # lines of the mapping that say how times and texts are written


def inspect_logs(storage: Storage, most_rows: int, file: str | None = None) -> list[Log]:
    """Profile the tables below a place, or one file: one with a label is impressions, the other behaviours.

    Raises DataError.
    """
    folders: dict[str, list[str]] = {}
    for path in data_files(storage) if file is None else [file]:
        folders.setdefault(path.partition("/")[0], []).append(path)
    if not folders:
        raise DataNotFoundError(f"{storage.url}: no .parquet, .csv or .tsv files")
    logs = [_log(storage, place, paths, most_rows) for place, paths in folders.items()]
    names = [log.name for log in logs]
    if len(set(names)) < len(names):
        places = ", ".join(f"{log.files} ({log.name})" for log in logs)
        raise DataError(
            f"{storage.url}: more than one table of a kind: {places}; impressions are known by a label. Put the files "
            "of each table into a folder of its own"
        )
    return sorted(logs, key=lambda log: log.name != "impressions")


def render_mapping(logs: list[Log], where: str) -> str:
    """Write the mapping as YAML, with what was found as comments."""
    lines = [
        f"# First mapping of {where}: look through it, then make samples of it:",
        f"# python jobs/build_samples.py --logs {where} --mapping THIS_FILE --samples SAMPLES",
        "# columns: OURS: THEIRS. user, ad: further columns of the user and of the impression: id (whole numbers,",
        "# text) or dense (real numbers). The job writes a schema and settings next to the samples, tables of IDs with",
        "# them.",
    ]
    missing = {"impressions", "behaviors"} - {log.name for log in logs}
    lines += [f"# There is no table of {name} here, and the job needs both." for name in sorted(missing)]
    if any(log.how for log in logs):
        lines.append("")
    for line in dict.fromkeys(line for log in logs for line in log.how):
        # The job finds these two by itself, in each table: one of a single table would be said of both.
        is_found = line.startswith(("csv:", "time_unit:")) and not all(line in log.how for log in logs)
        lines.append(f"# found in one table, and by the job: {line}" if is_found else line)
    for log in logs:
        lines += [
            "",
            f"{log.name}:  # {'' if log.table.complete else 'the first '}{log.table.rows:,} rows",
            f"  {_line('files', log.files)}",
        ]
        lines += ["  columns:", *_columns(log)]
        if log.name == "impressions":
            for side in ("user", "ad"):
                lines += _extras(log, side)
        elif further := [name for name in log.table.columns if name not in log.ours.values()]:
            lines.append(f"  # not used: {', '.join(further)}")
    return "\n".join(lines) + "\n"


def match_columns(names: list[str], log: str) -> dict[str, str]:
    """Match our columns to the files' names, as far as the names tell."""
    ours: dict[str, str] = {}
    for name in OF_LOG[log]:
        free = [each for each in names if each not in ours.values()]
        exact = [each for each in free if each == name]
        near = [each for each in free if re.fullmatch(SYNONYMS[name], each, re.IGNORECASE)]
        if exact or near:
            ours[name] = (exact or near)[0]
    return ours


def _log(storage: Storage, place: str, paths: list[str], most_rows: int) -> Log:
    table = look(storage, paths, None, most_rows)
    if not table.rows:
        raise DataError(f"{storage.full(place)}: {len(paths)} files and not one row")
    names = list(table.columns)
    label = next((each for each in names if re.fullmatch(SYNONYMS["label"], each, re.IGNORECASE)), None)
    is_shown = label is not None and table.columns[label].is_binary
    log = "impressions" if is_shown else "behaviors"
    ours = match_columns(names, log)
    further = [name for name in names if name not in ours.values()]
    of_user = _of_user(storage, paths, ours.get("user"), further) if is_shown else frozenset[str]()
    return Log(log, place, table, ours, of_user, tuple(_how(storage, paths[0], table, ours.get("timestamp"))))


def _how(storage: Storage, path: str, table: TableProfile, time: str | None) -> Iterator[str]:
    """Write what the mapping has to say of how a table is written, where that is not as usual."""
    style = style_of(storage, path)
    if style not in (None, CsvStyle()):
        yield f"csv: {yaml.safe_dump(asdict(style), default_flow_style=True, width=1 << 30).strip()}"
    if time is None:
        return
    column = table.columns[time]
    smallest = column.smallest or 0
    if column.content == "integer" and smallest >= 10**11:
        yield f"time_unit: {'us' if smallest >= 10**14 else 'ms'}  # of {time}, by its size"
    if column.content == "text":
        times = next(iter(read_tables(storage, path, USER_ROWS))).column(time)
        texts = [str(each) for each in pc.unique(times).drop_null().to_pylist()]
        if texts and not _is_time(texts[0], None):
            fitting = [each for each in TIME_FORMATS if all(_is_time(text, each) for text in texts[:MOST_TIMES])]
            is_sure = len(fitting) == 1
            first = "" if is_sure else "# "
            shown = fitting or ["%d/%m/%Y %H:%M"]
            yield from (f'{first}time_format: "{each}"  # for times such as {texts[0]}' for each in shown)
            if not is_sure:
                yield f"# how {time} is written has to be said: take one of these lines, or write your own"


def _is_time(text: str, time_format: str | None) -> bool:
    try:
        datetime.fromisoformat(text) if time_format is None else datetime.strptime(text.strip(), time_format)
    except ValueError:
        return False
    return True


def _of_user(storage: Storage, paths: list[str], user: str | None, further: list[str]) -> frozenset[str]:
    """Columns with one value in all rows of each user, in the first rows; none where no user comes twice."""
    if user is None or not further:
        return frozenset()
    first = next(iter(read_tables(storage, paths[0], USER_ROWS)))
    flat = [name for name in further if not pa.types.is_nested(first.schema.field(name).type)]
    counts = first.group_by(user).aggregate([([], "count_all"), *((name, "count_distinct") for name in flat)])
    if counts.column("count_all").to_numpy().max() < 2:
        return frozenset()
    return frozenset(name for name in flat if counts.column(f"{name}_count_distinct").to_numpy().max() <= 1)


def _columns(log: Log) -> list[str]:
    lines = []
    for name in OF_LOG[log.name]:
        if name in log.ours:
            lines.append(f"    {_line(name, log.ours[name])}  # {_note(log.table.columns[log.ours[name]], name)}")
        elif name in REQUIRED:
            lines.append(f"    # {name}: which column? it is needed")
        else:
            lines.append(f"    # {name}: none found, and not needed")
    return lines


def _extras(log: Log, side: str) -> list[str]:
    further = [
        column
        for name, column in log.table.columns.items()
        if name not in log.ours.values() and (name in log.of_user) == (side == "user")
    ]
    usable = [column for column in further if column.content in ("integer", "real", "text") and not column.depth]
    lines = [f"  {side}:"] if usable else []
    for column in usable:
        kind = "dense" if column.content == "real" else "id"
        lines.append(f"    {_line(column.name, kind)}  # {_note(column, kind)}")
    return lines + [f"  # not used: {column.name} ({column.type})" for column in further if column not in usable]


def _note(column: Column, kind: str) -> str:
    is_id = kind not in ("timestamp", "label", "dwell_s", "dense")
    return column_note(column) + (f", table of {table_rows(column.distinct.estimate):,} rows" if is_id else "")


def _line(name: str, value: str) -> str:
    return yaml.safe_dump({name: value}, allow_unicode=True, width=1 << 30).strip()
