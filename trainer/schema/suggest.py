"""A schema or a mapping, suggested from a look at the columns of data."""

import contextlib
import dataclasses
import functools
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurestore.storage.storage import Storage
from featurestore.text import count_text
from trainer.config import read_mapping
from trainer.errors import DataError, DataNotFoundError, SchemaError
from trainer.problems import Problem
from trainer.schema import fields as schema_fields
from trainer.schema.fields import DistinctCount, Field, Schema, Side, schema_text, table_lines, table_rows, yaml_line
from trainer.schema.profile import READ_TYPES, Column, TableProfile, data_files, look, read_tables, table_of

IMAGE_WORDS = "image|img|picture|pic|photo|cover|poster|thumbnail|bild|foto"
# What people call our columns; the first that fits wins.
SYNONYMS = {
    "label": r"label|clk|clicks?|clicked|is_click(ed)?|target|y|klicks?|geklickt|(is_)?liked?",
    "timestamp": r"timestamp|time_?stamp|ts|time|datetime|date_?time|date|event_time|.*_(at|time|ts)|zeit|.*zeitpunkt"
    r"|zeitstempel|datum",
    "user": r"(user|member|customer|visitor|device|kunde|kunden|nutzer|besucher)((_?id)|(_?nr))?|uid",
    "session": r"(session|visit|sitzung)(_?id)?",
    "scene": r"(scene|placement|page|seite|platz)(_?id)?|pid",
    "image": rf"(ad_|item_|product_)?({IMAGE_WORDS})(_?(id|key|url|uri|path|name|datei))?",
    "item": r"(item|ad|adgroup|product|goods|article|movie|film|video|track|artikel|produkt)((_?id)|(_?nr))?|sku",
    "category": r"(item_|product_)?(category|cate|cat|kategorie)(_?id)?",
    "dwell_s": r"(dwell|duration|stay|verweildauer|dauer)(_?(s|sec|seconds|time))?|seconds|sekunden",
}
OF_LOG: Mapping[str, tuple[str, ...]] = {
    "impressions": ("timestamp", "user", "session", "scene", "item", "image", "category", "label"),
    "behaviors": ("timestamp", "user", "item", "image", "category", "dwell_s"),
}
IDS = {"user", "session", "scene", "item", "category"}
NEEDED = {"timestamp", "user", "item", "image", "label"}
TIME_FORMATS = [
    day + time for day in ("%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%Y/%m/%d") for time in ("", " %H:%M", " %H:%M:%S")
]
MOST_ROWS = 200_000  # that are looked at of tables in memory
MOST_TIMES = 2000  # that are tried
IMAGE_ENDING = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?|avif)(\?.*)?", re.IGNORECASE)
WRITTEN_LIST = re.compile(r"\[.*\]|\(.*\)|\{.*[,:].*\}", re.DOTALL)  # as pandas writes lists into CSV
WRITTEN_PRICE = re.compile(r"-?\d{1,3}(\.?\d{3})*,\d\d")
EPOCH_S = (946_684_800, 4_102_444_800)  # from 2000 to 2100
SEPARATORS = ("|", ";", ",")
MOST_TRIED = 100  # values that are looked at
# What rows of a table of events are called that show something, and those that label them: clicks, else what is bought.
EVENTS = {
    "shown": r"((item|product|page|ad)[_ -]?)?(views?|viewed|impressions?|imp|shows?|shown|exposed?|exposure|seen)",
    "clicked": r"((item|product|ad)[_ -]?)?(clicks?|clicked|clk|tap|select)",
    "bought": r"(add[_ -]?)?(to[_ -]?)?(cart|basket|wishlist|fav(ou?rite)?)|purchased?|buy|bought|orders?|transaction",
}
MOST_EVENTS = 20
MOST_FILES = 3  # that are named
LABELS = "0 and 1, or yes and no"
LABEL_NAMES = "label, click, clicked, clk, is_click, liked, target or y"  # of SYNONYMS, for a message
LEAST_FOUND = {True: 0.5, False: 0.05}
"""The share of a log's ids that a joined table has, of one that was read to its end or not."""
USER_ROWS = 50_000  # rows in which it is looked whether a column is the same in all rows of a user


@dataclass(frozen=True)
class JoinedTable:
    """A table with one row for each item or user of the logs: which of its columns they lack."""

    by: str  # item | user
    files: str
    column: str  # of its ids
    more: Mapping[str, Column]
    unused: tuple[str, ...]  # with another value in each row, as titles
    lacked: Mapping[str, Sequence[str]]  # see TableProfile


@dataclass(frozen=True)
class Log:
    """One table: its files, and its assumed role."""

    name: str  # impressions | behaviors
    files: str
    table: TableProfile
    ours: Mapping[str, str]  # our columns, by their names in the files
    of_user: frozenset[str]  # further columns that are the same in all rows of a user
    guessed: str = ""  # what to say of a label that its name does not tell
    others: tuple[str, ...] = ()  # tables next to it that are not logs and join none
    joins: tuple[JoinedTable, ...] = ()
    where: Mapping[str, Any] | None = None  # of a table of events: which rows, and which label them
    other_events: tuple[str, ...] = ()  # values of its column that are neither


def inspect_logs(
    storage: Storage, most_rows: int, file: str | None = None, label: str | None = None, named: str | None = None
) -> list[Log]:
    """Profile the tables below a place, or one file: one with a label is impressions, the other behaviours.

    `label`: the column of labels; by default that with a name for it or, if no table has one, the only column of 0 and
    1. `named`: what errors call the place, by default its address. Raises DataError.
    """
    named = named or storage.url
    folders: dict[str, list[str]] = {}
    for path in data_files(storage) if file is None else data_files(storage, file) or [file]:
        folders.setdefault(path.partition("/")[0], []).append(path)
    if not folders:
        raise DataNotFoundError(Problem.NO_TABLE_FILES, named, "")
    tables = {place: look(storage, paths, None, most_rows).common for place, paths in folders.items()}
    if empty := next((place for place, table in tables.items() if not table.rows), None):
        raise DataError(Problem.TABLE_WITHOUT_ROWS, f"{named}/{empty}", count_text(len(folders[empty]), "file"))
    labels, guessed = _labels_of(named, tables, label)
    events = {place: where for place, table in tables.items() if (where := _events_of(table))}
    if labels and not guessed:
        events = {}
    elif events:
        labels, guessed = {}, ""
    logs = [
        _log(storage, place, folders[place], table, labels.get(place), events.get(place))
        for place, table in tables.items()
    ]
    logs = [dataclasses.replace(log, guessed=guessed) if log.files in labels else log for log in logs]
    others = [log.files for log in logs if not _is_log(log)]
    if 0 < len(others) < len(logs):
        logs = [log for log in logs if log.files not in others]
        found = [join for place in reversed(others) if (join := _join_of(place, tables[place], logs))]
        joins = list({join.by: join for join in found}.values())
        others = [place for place in others if place not in {join.files for join in joins}]
        logs = [_with_joins(dataclasses.replace(log, others=tuple(others)), joins) for log in logs]
    names = [log.name for log in logs]
    if len(set(names)) < len(names):
        places = ", ".join(f"{log.files} ({log.name})" for log in logs)
        raise DataError(Problem.TWO_TABLES_OF_A_KIND, named, places, LABELS, LABEL_NAMES)
    return sorted(logs, key=lambda log: log.name != "impressions")


def _labels_of(named: str, tables: Mapping[str, TableProfile], label: str | None) -> tuple[dict[str, str], str]:
    """Find the column of labels of each table that has one, and a note on a guessed one.

    Raises DataError where no table has the `label` that is asked for.
    """
    known = re.compile(re.escape(label) if label else SYNONYMS["label"], 0 if label else re.IGNORECASE)
    columns = {place: [each for each in table.columns.values() if each.is_binary] for place, table in tables.items()}
    found = {
        place: [name for name, each in table.columns.items() if known.fullmatch(name) and each.is_label]
        for place, table in tables.items()
    }
    labels = {place: min(names, key=lambda name: "like" in name.lower()) for place, names in found.items() if names}
    if label and not labels:
        there = "; ".join(f"{place}: {', '.join(table.columns)}" for place, table in tables.items())
        raise DataError(Problem.NO_SUCH_LABEL, named, label, LABELS, there)
    likely = {place: flat[0].name for place, flat in columns.items() if len(flat) == 1 and flat[0].num_different == 2}
    if labels or len(likely) != 1:
        return labels, ""
    ((place, name),) = likely.items()
    return likely, f"{name} is the only column of 0 and 1 in {place}, so it is taken for the label; else give --label"


def _is_log(log: Log) -> bool:
    """Whether the table has labels, or times and users, but not with one row for each user."""
    if log.name == "impressions" or not {"timestamp", "user"} <= log.ours.keys():
        return log.name == "impressions"
    return "item" in log.ours or log.table.columns[log.ours["user"]].num_different < log.table.rows


def _events_of(table: TableProfile) -> dict[str, Any] | None:
    """Find a small column of texts that says which rows show something, and which label that; None where none does."""
    for column in table.columns.values():
        if column.content != "text" or column.depth or not 2 <= column.num_different <= MOST_EVENTS:
            continue
        values = column.examples(MOST_EVENTS)
        kinds = {
            kind: [each for each in values if re.fullmatch(words, each.strip(), re.IGNORECASE)]
            for kind, words in EVENTS.items()
        }
        clicked = kinds["clicked"] or kinds["bought"]
        if kinds["shown"] and clicked:
            return {"column": column.name, "value": _one_or_all(kinds["shown"]), "clicked": _one_or_all(clicked)}
    return None


def _one_or_all(values: list[str]) -> Any:
    return values[0] if len(values) == 1 else values


def _all(values: str | list[str]) -> list[str]:
    return [values] if isinstance(values, str) else values


def _join_of(place: str, table: TableProfile, logs: Sequence[Log]) -> JoinedTable | None:
    """Find the ids by which a table joins the logs: a column of different values, of which a log has most of its own.

    Where several are, the names of columns and of the table decide. None where there is none.
    """
    found = []
    for log, by in ((log, by) for log in logs for by in ("item", "user") if by in log.ours):
        theirs, fits = log.ours[by], re.compile(SYNONYMS[by], re.IGNORECASE).fullmatch
        ids = log.table.columns[theirs].different.cast(pa.large_string())
        for column in table.columns.values():
            if column.content not in ("integer", "text") or column.nulls or column.num_different < table.rows:
                continue
            share = pc.mean(pc.is_in(ids, value_set=column.different.cast(pa.large_string()))).as_py()
            if share is not None and share >= LEAST_FOUND[table.complete]:
                is_named = fits(re.split(r"[s.]*\.|s$", place)[0]) is not None
                found.append((column.name == theirs, fits(column.name) is not None, is_named, share, by, column.name))
    if not found:
        return None
    *_, by, name = max(found)
    columns = {each.name: each for each in table.columns.values() if each.name != name}
    is_image = re.compile(SYNONYMS["image"], re.IGNORECASE).fullmatch
    unused = tuple(
        each.name
        for each in columns.values()
        if each.content in ("integer", "text") and each.num_different == table.rows > 1
        if not (is_image(each.name) or _has_image_names(each))
    )
    return JoinedTable(
        by, place, name, {key: each for key, each in columns.items() if key not in unused}, unused, table.lacked
    )


def _with_joins(log: Log, joins: Sequence[JoinedTable]) -> Log:
    """Add to a log the columns of joined tables that it lacks."""
    for join in joins if log.name == "impressions" else [join for join in joins if join.by == "item"]:
        more = {name: column for name, column in join.more.items() if name not in log.table.columns}
        matched = _match(TableProfile(more), log.name, None) if join.by == "item" else {}
        ours = {name: column for name, column in matched.items() if name in ("image", "category")} | dict(log.ours)
        table = dataclasses.replace(log.table, columns=log.table.columns | more)
        of_user = frozenset([*log.of_user, *(more if join.by == "user" else ())])
        log = dataclasses.replace(log, table=table, ours=ours, of_user=of_user)
    return dataclasses.replace(log, joins=tuple(joins))


@contextlib.contextmanager
def written_logs(tables: Any, folder: Path, label: str | None = None) -> Iterator[tuple[Path, Path]]:
    """Write a table, or several by name, as the Parquet files of `folder`; give it and the path of their mapping.

    They take the place of those before, which are put back where the block raises. The mapping is guessed where it is
    not there yet, `label` is the column of labels in it. Raises DataError.
    """
    made = {name: table_of(each) for name, each in (tables if isinstance(tables, Mapping) else {"log": tables}).items()}
    mapping, before = folder / "mapping.yaml", folder.with_name(f"{folder.name}-before")
    _check_label(mapping, label)
    for each in (folder, before):
        each.mkdir(parents=True, exist_ok=True)
    _move_files(folder, before)
    try:
        for name, table in made.items():
            pq.write_table(table, folder / f"{name}.parquet")
        if not mapping.exists():
            _guess_mapping(folder, mapping, label)
        yield folder, mapping
    except BaseException:
        if any(before.iterdir()):
            _move_files(before, folder)
        raise
    finally:
        shutil.rmtree(before)


def _move_files(folder: Path, to: Path) -> None:
    """Move the Parquet files of a folder, in the place of those of another one."""
    for file in to.glob("*.parquet"):
        file.unlink()
    for file in folder.glob("*.parquet"):
        file.rename(to / file.name)


def _check_label(mapping: Path, label: str | None) -> None:
    """Raise DataError where a mapping that is there already names another column of labels."""
    if label is None or not mapping.exists():
        return
    found: Any = read_mapping(mapping, "mapping=", DataError)
    for key in ("impressions", "columns", "label"):
        found = found.get(key) if isinstance(found, dict) else None
    if found not in (None, label):
        raise DataError(Problem.MAPPED_LABEL_DIFFERS, label, mapping, found)


def _guess_mapping(folder: Path, mapping: Path, label: str | None) -> None:
    found = inspect_logs(Storage(folder), MOST_ROWS, label=label)
    if found[0].name != "impressions":
        there = "; ".join(f"{log.files}: {', '.join(log.table.columns)}" for log in found)
        raise DataError(Problem.NO_LABEL_KNOWN, there)
    mapping.write_text(render_mapping(found, str(folder), str(folder), str(mapping)), encoding="utf-8")


def render_mapping(logs: list[Log], where: str, folder: str, file: str) -> str:
    """Write the mapping of `where` as YAML into `file`, with the findings as comments; `folder` is the job's --logs."""
    lines = [
        f"# First mapping of {where}: look through it, then make samples of it:",
        f"# crossmedia samples --logs {folder} --mapping {file} --samples data/samples",
        "# columns: OURS: THEIRS. user, ad: further columns of the user and of the impression: id (whole numbers,",
        "# text), multi_id (lists of them) or dense (real numbers). The job writes a schema and settings next to the",
        "# samples, tables of IDs with them.",
        *(f"# {log.guessed}" for log in logs if log.guessed),
        *(
            f"# not used: {place}, which has no times or no users, and no column with a value for each item or user"
            for place in logs[0].others
        ),
    ]
    if logs[0].name == "behaviors":
        lines.append("# There is no table of impressions here: no column is known as their label; name it by --label.")
    times = [log.table.columns[log.ours["timestamp"]] for log in reversed(logs) if "timestamp" in log.ours]
    if formats := {line.partition("  #")[0]: line for each in times for line in _time_formats(each)}:
        lines += ["", *formats.values()]
    if logs[0].joins:
        lines += ["", "join:  # columns that a log lacks are taken from these tables, by its items or users"]
    for join in logs[0].joins:
        unused = f"  # not used: {', '.join(join.unused)}, with another value in each row" if join.unused else ""
        lines.append(f"  {yaml_line(join.by, {'files': join.files, 'column': join.column})}{unused}")
        lines += _lacked(join.lacked)
    for log in logs:
        lines += [
            "",
            f"{log.name}:  # {'' if log.table.complete else 'the first '}{log.table.rows:,} rows",
            f"  {yaml_line('files', log.files)}",
        ]
        if log.where is not None:
            lines.append(f"  {yaml_line('where', log.where)}  # within_s: 1800, from one of these to its click")
        if log.other_events:
            lines.append(f"  # not used: {', '.join(log.other_events)}; they are clicks too if clicked lists them")
        lines += ["  columns:", *_columns(log)]
        if log.name == "impressions":
            for side in ("user", "ad"):
                lines += _extras(log, side)
        else:
            lines += _extras(log, "ad", logs[0])
        lines += _lacked(log.table.lacked)
    if [log.name for log in logs] == ["impressions"]:
        lines += ["", "behaviors: clicks  # the impressions with a click; or a table of its own, as the impressions"]
    return "\n".join(lines) + "\n"


def match_columns(names: Sequence[str], log: str) -> dict[str, str]:
    """Match our columns to the files' names, as far as the names tell."""
    ours: dict[str, str] = {}
    for name in OF_LOG[log]:
        fits = re.compile(SYNONYMS[name], re.IGNORECASE).fullmatch
        free = [each for each in names if each not in ours.values() and (each == name or fits(each))]
        if free:
            ours[name] = name if name in free else free[0]
    return ours


def _match(table: TableProfile, log: str, label: str | None) -> dict[str, str]:
    """Match our columns to those of a table by name, and times and images by their values where no name fits."""
    ours = match_columns([name for name in table.columns if name != label], log)
    ours |= {} if label is None else {"label": label}
    for name, fits in (("timestamp", _has_times), ("image", _has_image_names)):
        free = [each.name for each in table.columns.values() if each.name not in ours.values() and fits(each)]
        if name not in ours and free:
            ours[name] = free[0]
    return ours


def _has_times(column: Column) -> bool:
    """Whether the values are times, of a type or text for them, or whole numbers of this century that mostly differ."""
    if column.content == "integer" and not column.depth and column.limits:
        low, high = column.limits
        in_range = any(EPOCH_S[0] * unit <= low <= high < EPOCH_S[1] * unit for unit in (1, 1e3, 1e6, 1e9))
        return in_range and 2 * column.num_different >= column.rows
    texts = column.examples(MOST_TRIED) if column.content == "text" and not column.depth else []
    is_written = any(all(is_time(text, each) for text in texts) for each in (None, *TIME_FORMATS))
    return column.content == "time" or (bool(texts) and is_written and not texts[0].isdigit())


def _has_image_names(column: Column) -> bool:
    """Whether the values are texts that end as names of image files do."""
    texts = [text for text in column.examples(MOST_TRIED) if text] if column.content == "text" else []
    return not column.depth and bool(texts) and all(IMAGE_ENDING.search(text) for text in texts)


def _separator(column: Column) -> str | None:
    """Find the separator of the ids of a text: parts that come again and again in other texts tell it."""
    texts = column.examples(MOST_TIMES) if column.content == "text" and not column.depth else []
    for sign in SEPARATORS:
        parts = {part.strip() for text in texts for part in text.split(sign)}
        if 3 * sum(sign in text for text in texts) > len(texts) and len(parts) < len(texts):
            return sign
    return None


def _log(
    storage: Storage,
    place: str,
    paths: list[str],
    table: TableProfile,
    label: str | None,
    where: Mapping[str, Any] | None,
) -> Log:
    log = "behaviors" if label is None and where is None else "impressions"
    other_events: tuple[str, ...] = ()
    if where is not None:
        values = table.columns[where["column"]].examples(MOST_EVENTS)
        other_events = tuple(each for each in values if each not in (*_all(where["value"]), *_all(where["clicked"])))
        table = dataclasses.replace(table, columns={k: v for k, v in table.columns.items() if k != where["column"]})
    ours = _match(table, log, label)
    of_user = set()
    if log == "impressions" and "user" in ours:
        first = next(iter(read_tables(storage, paths[0], USER_ROWS)))
        of_user = _of_user(first, ours["user"], {*table.columns} - set(ours.values()))
    return Log(log, place, table, ours, frozenset(of_user), where=where, other_events=other_events)


def _time_formats(column: Column) -> list[str]:
    """Write lines with the formats of a column of times for the mapping; none if they are ISO 8601, or numbers.

    Several formats that fit, or an example if none does, are commented out.
    """
    texts = column.examples(MOST_TIMES) if column.content == "text" else []
    if not texts or is_time(texts[0], None):
        return []
    fitting = [each for each in TIME_FORMATS if all(is_time(text, each) for text in texts)]
    lines = [f'time_format: "{each}"  # for times such as {texts[0]}' for each in fitting or ["%d/%m/%Y %H:%M"]]
    if len(fitting) == 1:
        return lines
    advice = f"# how {column.name} is written has to be said: take one of these lines, or write your own"
    return [*(f"# {line}" for line in lines), advice]


def is_time(text: str, time_format: str | None) -> bool:
    """Whether a text is a time of this form of strptime; None: of ISO 8601."""
    try:
        datetime.fromisoformat(text) if time_format is None else datetime.strptime(text.strip(), time_format)
    except ValueError:
        return False
    return True


def _of_user(first: pa.Table, user: str, further: set[str]) -> set[str]:
    """List columns with one value in all rows of each user, in the first rows; none where no user comes twice."""
    flat = [name for name in further if not pa.types.is_nested(first.schema.field(name).type)]
    counts = first.group_by(user).aggregate([([], "count_all"), *((name, "count_distinct") for name in flat)])
    if counts.column("count_all").to_numpy().max() < 2:
        return set()
    return {name for name in flat if counts.column(f"{name}_count_distinct").to_numpy().max() <= 1}


def _columns(log: Log) -> list[str]:
    lines = []
    for name in OF_LOG[log.name]:
        if name == "label" and log.where is not None:
            continue
        if name in log.ours:
            column = log.table.columns[log.ours[name]]
            lines.append(f"    {yaml_line(name, column.name)}  # {column_note(column)}")
            if name in IDS and column.content == "real":
                how = "write whole numbers (of pandas: astype('Int64')) or text"
                lines.append(f"    {TO_DO}{name}: {column.name} is {column.type}, which no id is; {how}")
        elif name == "image":
            lines.append("    image: null  # no column looks like one; name it where there is one")
            if log.name == "impressions" and "item" in log.ours:
                named = yaml_line("image", log.ours["item"])
                lines += [
                    "    # Pictures named by the item: join a table with a column of their names; or write",
                    f"    # {named}, and extract --images FILE.csv with id,uri (key,uri for int64 of Parquet)",
                ]
        elif name in NEEDED:
            lines.append(f"    # {name}: which column? it is needed")
        else:
            lines.append(f"    # {name}: none found, and not needed")
    return lines


def _extras(log: Log, side: str, shown: Log | None = None) -> list[str]:
    """Write lines for further columns; of behaviours those that the impressions `shown` have too."""
    further = [
        column
        for name, column in log.table.columns.items()
        if name not in log.ours.values() and (name in log.of_user) == (side == "user")
    ]
    later = [column.name for column in further if log.name == "impressions" and KNOWN_LATER.search(column.name)]
    unread = {column.name: why for column in further if (why := _unread(column))}
    further = [column for column in further if column.name not in (*later, *unread)]
    kinds = {column.name: _kind_of(column) for column in further if shown is None or column.name in shown.table.columns}
    if shown is not None:  # fields read ids of behaviours, and no lists or numbers
        kinds = {name: kind for name, kind in kinds.items() if kind == "id"}
    usable = [column for column in further if kinds.get(column.name)]
    lines = [f"  {side}:"] if usable else []
    lines += [f"    {yaml_line(each.name, kinds[each.name])}  # {column_note(each)}" for each in usable]
    lines += [f"  # not used: {column.name} ({column.type})" for column in further if column not in usable]
    lines += [f"  {LEFT_OUT}{name}, which no request can know before its ads are shown" for name in later]
    return lines + [f"  {LEFT_OUT}{name}, {why}" for name, why in unread.items() if name not in later]


def _unread(column: Column) -> str | None:
    """Say of texts that are lists or numbers, in a form that samples do not read, what to do; None of others."""
    texts = [text.strip() for text in column.examples(MOST_TIMES)] if column.content == "text" else []
    texts = [text for text in texts if text and not column.depth]
    such = f"texts such as {texts[0][:40]!r} are" if texts else ""
    if texts and all(map(WRITTEN_LIST.fullmatch, texts)):
        return f"{such} lists: write the table as Parquet, or join the values by one separator, as a|b"
    if texts and 2 * sum(map(bool, map(WRITTEN_PRICE.fullmatch, texts))) > len(texts):
        return f'{such} numbers: write them as 1234.50, or in CSV say csv: {{decimal: ","}}, and dense'
    return None


def _lacked(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Write lines for columns that not all files have, which crossmedia samples would refuse."""
    return [
        f"  {LEFT_OUT}{name}, missing in {count_text(len(files), 'file')}: "
        + ", ".join([*files[:MOST_FILES], *(["…"] if len(files) > MOST_FILES else [])])
        for name, files in columns.items()
    ]


def _kind_of(column: Column) -> Any:
    """Suggest a mapping's entry for a further column; None where it has no kind for it."""
    if column.content not in ("integer", "real", "text") or column.depth > 1:
        return None
    if column.depth:
        return "multi_id" if column.content != "real" else None
    if sign := _separator(column):
        return {"kind": "multi_id", "split": sign}
    return "dense" if column.content == "real" else "id"


IMAGE_NAME = re.compile(rf"(^|_)({IMAGE_WORDS})s?($|_)", re.IGNORECASE)
NO_FIELDS = re.compile(r"(^|_)(session|timestamp|time|ts|day|date|skey|gkey)$", re.IGNORECASE)
CONTEXT_NAME = re.compile(r"(^|_)(scene|slot|position|placement|pid|page|hour)($|_)", re.IGNORECASE)
KNOWN_LATER = re.compile(
    r"(^|_)(position|pos|(?<!time_)slot|rank|dwell|verweildauer|watch_?time|watched"
    r"|conversions?|converted|purchased|revenue)($|_)",
    re.IGNORECASE,
)
"""Names of columns that are known once an impression is shown, or later."""
LEFT_OUT, TO_DO = "# left out: ", "# to do: "
"""How comments begin that are warnings too."""
WEIGHT_SUFFIX = "_weight"
LONG_TAIL = 100
AGES = "behavior_age"
SAME_COUNT = 0.05
"""Two numbers of different values that differ by less are taken as one; estimates of them are off by 1.6 %."""
USER_PREFIXES, AD_PREFIX = ("behavior_", "user_"), "ad_"


@dataclass
class Suggestion:
    """Fields with a comment each, IDs of their tables, why other columns are left out, and the table that was read."""

    table: TableProfile
    fields: list[Field] = dataclasses.field(default_factory=list)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    columns_of_table: dict[str, list[Column]] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def tables(self) -> dict[str, int]:
        """The most rows of each ID table."""
        return {name: table_rows(num_ids(columns)) for name, columns in self.columns_of_table.items()}

    def leave_out_ids_of_images(self, ad: str) -> None:
        """Leave out the ids of images where there are as many images as ads: they would repeat the ad's own id."""
        table_of = {field.name: field.table_name for field in self.fields if field.is_id}
        num_ads = num_ids(self.columns_of_table[table_of[ad]])
        images = {field.name for field in self.fields if field.kind == "content"}
        for field in self.fields[:]:
            if not field.is_id or field.name == ad or field.column_name not in images:
                continue
            if abs(num_ids(self.columns_of_table[field.table_name]) - num_ads) <= SAME_COUNT * num_ads:
                self.fields.remove(field)
                self.left_out[field.name] = f"about as many images as of {ad}, which says the same"
        kept = {field.table_name for field in self.fields if field.is_id}
        self.columns_of_table = {name: columns for name, columns in self.columns_of_table.items() if name in kept}

    def add(self, column: Column, /, **values: Any) -> None:
        """Add a field that reads this column, called as the column unless `values` has a name."""
        field = Field.model_validate({"name": column.name} | values)
        self.fields.append(field)
        self.notes[field.name] = column_note(column)


def num_ids(columns: Sequence[Column]) -> int:
    """Count the different ids of the columns that share a table."""
    counts = [each.counted for each in columns if each.counted is not None]
    if len(counts) == len(columns):
        return functools.reduce(DistinctCount.merged, counts).estimate
    read = [each.different for each in columns if each.different is not None]
    is_mixed = len({each.type for each in read}) > 1
    alike = [each.cast(pa.large_string()) if is_mixed else each for each in read]
    return len(pc.unique(pa.concat_arrays(alike))) if alike else 0


def sample_files(storage: Storage) -> list[str]:
    """List Parquet files of samples below a folder: those of train/ and test/, or all."""
    files = [path for path in data_files(storage) if path.endswith(".parquet")]
    split = [path for path in files if path.startswith(("train/", "test/"))]
    return split or files


def inspect_samples(
    storage: Storage,
    label: str,
    group: str,
    most_rows: int,
    counted: Mapping[str, DistinctCount] | None = None,
    may_lack: Collection[str] = (),
) -> tuple[Schema, Suggestion]:
    """Suggest a schema that fits sample files from at most `most_rows` groups.

    `counted`: by column, the different values of all groups. `may_lack`: columns of numbers of which other rows may
    have none. Raises SchemaError, DataError.
    """
    table = look(storage, sample_files(storage), label, most_rows)
    for name, count in (counted or {}).items():
        table.columns[name].counted = count
    for name in table.columns.keys() & set(may_lack):
        table.columns[name].may_lack = True
    for name, depth, what, contents in (
        (label, 1, "a list of 0 and 1 in each group", {"integer"}),
        (group, 0, "one whole number or text a group", {"integer", "text"}),
    ):
        column = table.columns.get(name)
        if column is None or column.depth != depth or column.content not in contents:
            found = column.type if column else f"not among {', '.join(table.columns)}"
            raise SchemaError(Problem.UNFIT_COLUMN, storage.url, name, found, what)
    suggestion = suggest(table, label)
    ad_ids = [each.name for each in suggestion.fields if each.side == "ad" and each.kind == "id"]
    if not ad_ids:
        raise SchemaError(Problem.NO_ID_OF_ADS, storage.url)
    new_ad = next((name for name in ("ad_item", "ad", "ad_id") if name in ad_ids), ad_ids[0])
    suggestion.leave_out_ids_of_images(new_ad)
    return Schema(fields=tuple(suggestion.fields), label=label, group=group, new_ad_field=new_ad), suggestion


def suggest(table: TableProfile, label: str) -> Suggestion:
    """Suggest fields of every column that a field can read."""
    made = Suggestion(table)
    for column in table.columns.values():
        ids = table.columns.get(column.name.removesuffix(WEIGHT_SUFFIX))
        if column.name == label or (ids is not None and _weights_of(ids, table) == column.name):
            continue
        # Of the ads are lists as long as the labels', unless the name begins as those of users.
        of_ads = column.depth and column.like_label and not column.name.startswith(USER_PREFIXES)
        side: Side = "ad" if of_ads else "user"
        if (reason := _unfit(column, side)) is not None:
            made.left_out[column.name] = reason
        elif column.content == "real":
            width = column.longest if column.depth > (side == "ad") else None
            fill = "mean" if column.missing or column.may_lack else None
            made.add(column, side=side, kind="dense", width=width, transform=_transform(column), fill=fill)
        else:
            _add_ids(made, column, side)
    return made


def render_schema(schema: Schema, made: Suggestion, where: str) -> str:
    """Write the schema as YAML, with comments on findings and on columns left out."""
    header = [
        f"First schema of {where}: look through it, then continue with crossmedia schema check.",
        f"Suggested from {'all' if made.table.complete else 'the first'} {made.table.rows:,} sample groups.",
        "side: user (once a group) | ad (one entry an impression). kind: id | multi_id | dense | content (image keys).",
        "ID tables, for model.tables of the settings:",
        *(f"  {line}" for line in table_lines(made.tables)),
    ]
    if made.left_out:
        header += ["Left out:", *(f"  {name}: {reason}" for name, reason in made.left_out.items())]
    return schema_text(schema, header, made.notes)


def column_note(column: Column) -> str:
    """Describe type, different values, nulls and lengths, in a few words."""
    parts = [column.type] if column.different is None else [column.type, f"{column.num_different:,} different"]
    if column.nulls:
        parts.append(f"{column.nulls:,} of {column.rows:,} null")
    if column.content == "real" and column.limits:
        parts.append("{:g} to {:g}".format(*column.limits))
    if column.depth and column.shortest is not None:
        parts.append(f"lists of {column.shortest} to {column.longest}")
    if column.content == "text":
        parts += [f"as {text[:40]!r}" for text in column.examples(1)]
    return ", ".join(parts)


def _unfit(column: Column, side: Side) -> str | None:
    """Explain why no field of this side can read the column; None where one can."""
    inner, is_real = column.depth - (side == "ad"), column.content == "real"
    several = "one value in all rows" if column.num_different else "no value in any row"
    widths = f"{column.shortest} to {column.longest} numbers"
    problems = {
        f"{column.type}, kept for people; add it by hand if the model should see it": NO_FIELDS.search(column.name),
        f"{column.type}; a field reads numbers and texts": column.content not in READ_TYPES,
        f"{column.nulls:,} of {column.rows:,} rows are null; a field has none": column.nulls
        and (not is_real or column.depth),
        several: column.rows > 1 and column.num_different < 2 and not is_real,
        f"{column.type} is nested too deep for side {side}": inner not in (0, 1),
        f"{column.type} of {widths}; dense needs one width": is_real and inner and column.shortest != column.longest,
    }
    return next((reason for reason, is_so in problems.items() if is_so), None)


def _add_ids(made: Suggestion, column: Column, side: Side) -> None:
    """Add an ID field; of images their content too."""
    name, kind = column.name, "multi_id" if column.depth > (side == "ad") else "id"
    values: dict[str, Any] = {"side": side, "kind": kind, "table": _table_name(name, made.table)}
    values["weights"] = _weights_of(column, made.table)
    if name == AGES and kind == "multi_id":
        beside = next((each.name for each in made.fields if each.name == "behavior_item" and each.kind == kind), None)
        made.add(column, **values | {"table": None, "buckets": schema_fields.LOG2, "beside": beside})
        return
    has_images = IMAGE_NAME.search(name) is not None and column.content != "real"
    if has_images and kind == ("id" if side == "ad" else "multi_id"):
        made.fields.append(Field.model_validate({"name": name, "side": side, "kind": "content", "store": "images"}))
        values |= {"column": name, "name": f"{name}_id"}
    elif side == "ad" and CONTEXT_NAME.search(name):
        values["context"] = True
    made.add(column, **values)
    made.columns_of_table.setdefault(values["table"], []).append(column)


def _transform(column: Column) -> str | None:
    """Choose the scaling of numbers by their range: large non-negative numbers have a long tail."""
    smallest, largest = column.limits or (0.0, 0.0)
    if -1 <= smallest <= largest <= 1:
        return None
    return "log_standardize" if smallest >= 0 and largest >= LONG_TAIL else "standardize"


def _weights_of(column: Column, table: TableProfile) -> str | None:
    """The column of weights of these ids, where there is one: called as they are, and of real numbers."""
    weights = table.columns.get(f"{column.name}{WEIGHT_SUFFIX}")
    if weights is None or column.content == "real" or weights.content != "real" or weights.nulls or weights.missing:
        return None
    return weights.name if weights.depth == column.depth else None


def _table_name(name: str, table: TableProfile) -> str:
    """ad_x and behavior_x share table x."""
    for prefix, other in ((AD_PREFIX, "behavior_"), ("behavior_", AD_PREFIX)):
        if name.startswith(prefix):
            base = name.removeprefix(prefix)
            return base if other + base in table.columns or base == "scene" else name
    return name
