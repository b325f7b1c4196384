"""Mutations of valid inputs: of their bytes, and of the values that their text or table holds.

A form says how values are read from an input and written again, and how an input with other bytes gets digests or
checksums that fit it: without that a parser would refuse nearly everything at its first check.
"""

import ast
import contextlib
import copy
import functools
import hashlib
import io
import json
import random
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

MOST_BYTES = 64 << 10
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 7, 65_536, 10**6, 2**31, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1, -(2**63), 2**64,
    10**12, 10**30, 10**4200, 0.5, -0.0, 1e20, -1e308, float("nan"), float("inf"), "", " ", "0", "-1", "1e5", "NaN",
    "null", "a", "a" * 3_000, "ä", "\0", "\ud800", "x\udcff", "\udfff", "😀", "../../etc/passwd", "/", "a/b", "a/../..",
    "../x", "9" * 25, "%d", "%", "2026-02-30", "@[29@", "@[900@", "@[3000@", "@[9999@", [], {}, [[]], [None], [0],
    [1, 2], [[1, 2], [3]], {"": 0}, {"a": [{}]}, [1.5, None],
]  # fmt: skip
"""Values that take the place of others; @[29@ is written as 29 lists inside each other."""
PIECES = [
    b"\0", b"\xff", b"\x80", b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\0", b"NaN", b"]", b"{", b'"', b"[", b"1e999",
    b"9" * 20, b"\n", b"\r\n", b",", b";", b"\t", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"- ", b": ", b"&a ",
    b"*a", b"<<: ", b"!!int ", b"!!bool ", b"!!float ", b"!!timestamp ", b"!!binary ", b"!!set ", b"? ", b"|", b"> ",
    b'"\\UFFFFFFFF"', b"1:1:1:1.5", b"0x", b"%YAML 1.1\n", b"---\n", b"#", b"~", b".inf", b"PAR1",
]  # fmt: skip
_DEEP = re.compile(r'"@\[(\d+)@"')
_SEALED = re.compile(rb',\n "digest": "[^"]*"\n}\Z')


@dataclass(frozen=True)
class Form:
    """How the values of an input are read and written: `dump` takes JSON, which may repeat names and nest deep."""

    load: Callable[[bytes], Any] | None = None
    dump: Callable[[str, bytes], bytes] = lambda text, whole: text.encode("utf-8", "surrogatepass")
    repair: Callable[[bytes], bytes] = lambda data: data


def sealed(data: bytes) -> bytes:
    """Give a JSON object the digest that `featurestore.spec.seal` writes."""
    content = _SEALED.sub(b"\n}", data).rstrip()
    if not content.endswith(b"}"):
        return content
    fields = content[:-1].rstrip()
    digest = hashlib.sha256(fields + b"\n}").hexdigest()
    return fields + f',\n "digest": "{digest}"\n}}'.encode()


def _png(data: bytes) -> bytes:
    """Give the chunks of a PNG checksums that fit."""
    if not data.startswith(b"\x89PNG"):
        return data
    parts, place = [data[:8]], 8
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        parts.append(data[place:end] + zlib.crc32(data[place + 4 : end]).to_bytes(4, "big"))
        place = end + 4
    return b"".join([*parts, data[place:]])


def _with_binary(text: str, whole: bytes) -> bytes:
    """Write a body of tensors, after a line with the length of its JSON."""
    length, _, body = whole.partition(b"\n")
    return b"%d\n" % len(text.encode("utf-8", "replace")) + text.encode("utf-8", "replace") + body[int(length) :]


def _shallow(text: str) -> Any:
    """Parse JSON; lists inside each other that are too many stay a text."""
    return json.loads(text) if "[[[[[[" not in text else {"a": [text]}


def _table(text: str, schema: pa.Schema) -> pa.Table:
    """Make a table of columns in JSON, of the types of a schema where that fits, or of texts where no type does."""
    columns = _shallow(text)
    columns = columns if isinstance(columns, dict) else {"a": columns}
    lists = {ascii(name)[1:-1]: value if isinstance(value, list) else [value] for name, value in columns.items()}
    most = max(map(len, lists.values()), default=0)
    kinds = {name: schema.field(name).type if name in schema.names else None for name in lists}
    rows = {name: [*value, *[None] * (most - len(value))] for name, value in lists.items()}
    return pa.table({name: _array(values, kinds[name]) for name, values in rows.items()})


def _array(values: list[Any], kind: pa.DataType | None) -> Any:
    """Make an array, of a type if that fits; a text with half a character becomes one that is not UTF-8."""
    for each in (kind, None):
        with contextlib.suppress(pa.ArrowException, OverflowError, UnicodeError):
            return pa.array(values, each)
    with contextlib.suppress(pa.ArrowException, OverflowError):
        return _as_text(pa.array(_as_bytes(values)))
    return pa.array([repr(value).encode("ascii", "backslashreplace").decode() for value in values])


def _as_bytes(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_bytes(each) for each in value]
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value


def _as_text(array: Any) -> Any:
    """Take bytes, also in lists, for texts."""
    if pa.types.is_list(array.type):
        return pa.ListArray.from_arrays(array.offsets, _as_text(array.values))
    return array.view(pa.string()) if pa.types.is_binary(array.type) else array


def _values(table: pa.Table) -> Any:
    """Return the columns of a table. Raises ArrowInvalid where its buffers do not fit, as to read them would crash."""
    table.validate(full=True)
    return table.to_pydict()


def stream_of(table: pa.Table, **options: Any) -> bytes:
    """Write a table as an Arrow stream, with options of IpcWriteOptions."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue()


def tensors_of(columns: Mapping[str, Any], **more: Any) -> bytes:
    """Write columns as a body of tensors after the length of its JSON; those of whole numbers are binary."""
    tensors, binary = [], b""
    for name, value in columns.items():
        array = np.array(value if isinstance(value, list) else [value])
        kind = {"U": "BYTES", "f": "FP32"}.get(array.dtype.kind, "INT64")
        given = {"parameters": {"binary_data_size": array.nbytes}} if kind == "INT64" else {"data": array.tolist()}
        tensors.append({"name": name, "datatype": kind, "shape": list(array.shape)} | given)
        binary += array.tobytes() if kind == "INT64" else b""
    text = json.dumps({"inputs": tensors, **more}).encode()
    return b"%d\n" % len(text) + text + binary


def parquet_of(table: pa.Table) -> bytes:
    """Write a table as a Parquet file of small row groups; one without columns where Parquet lacks a type."""
    sink = io.BytesIO()
    try:
        pq.write_table(table, sink, row_group_size=2)
    except pa.ArrowException:
        return parquet_of(pa.table({}))
    return sink.getvalue()


def _names(data: bytes) -> Any:
    """Read the metadata of a file of a store, and the names of its columns."""
    schema = pq.read_schema(pa.BufferReader(data))
    return {"metadata": {name.decode(): text.decode() for name, text in schema.metadata.items()}, "names": schema.names}


def _with_names(text: str, whole: bytes) -> bytes:
    """Write a file of a store with other metadata, and with other names for its first columns, or for all."""
    given, table = _shallow(text), pq.read_table(pa.BufferReader(whole))
    names, metadata = (given.get(part) if isinstance(given, dict) else None for part in ("names", "metadata"))
    named = [ascii(name) for name in names[: table.num_columns]] if isinstance(names, list) else []
    texts = {ascii(name): ascii(value) for name, value in metadata.items()} if isinstance(metadata, dict) else None
    return parquet_of(table.select(range(len(named))).rename_columns(named).replace_schema_metadata(texts))


def _npy(data: bytes) -> Any:
    """Read the header of an array as numpy writes one, and its bytes."""
    length = int.from_bytes(data[8:10], "little")
    return {"header": ast.literal_eval(data[10 : 10 + length].decode()), "bytes": data[10 + length :].hex()}


def _with_header(text: str, whole: bytes) -> bytes:
    """Write a header before the bytes of an array; of a shape that asks for more, there are more."""
    given = _shallow(text)
    header, numbers = (given.get(part) if isinstance(given, dict) else given for part in ("header", "bytes"))
    if isinstance(header, dict) and isinstance(header.get("shape"), list):
        header["shape"] = tuple(header["shape"])
    line = f"{header!r}\n".encode("utf-8", "replace")[: 1 << 15]
    with contextlib.suppress(ValueError, TypeError):
        return whole[:8] + len(line).to_bytes(2, "little") + line + bytes.fromhex(numbers)
    return whole[:8] + len(line).to_bytes(2, "little") + line


BYTES, PNG = Form(), Form(repair=_png)
NPY, SHARD = Form(_npy, _with_header), Form(_names, _with_names)
JSON, YAML = Form(json.loads), Form(yaml.safe_load)
TENSORS = Form(lambda data: json.loads(data.partition(b"\n")[2][: int(data.partition(b"\n")[0])]), _with_binary)
SEALED = Form(
    lambda data: json.loads(_SEALED.sub(b"\n}", data)),
    lambda text, _: sealed(text.encode("utf-8", "surrogatepass")),
    sealed,
)
STREAM = Form(
    lambda data: _values(pa.ipc.open_stream(data).read_all()),
    lambda text, whole: stream_of(_table(text, pa.ipc.open_stream(whole).schema)),
)
PARQUET = Form(
    lambda data: _values(pq.read_table(pa.BufferReader(data))),
    lambda text, whole: parquet_of(_table(text, pq.read_schema(pa.BufferReader(whole)))),
)


@functools.cache
def _loaded(form: Form, data: bytes) -> Any:
    return form.load(data)


def mutated(draw: random.Random, valid: Sequence[bytes], form: Form) -> bytes:
    """Draw an input: a valid one with up to three values changed, or up to four edits of bytes, or both."""
    whole = data = draw.choice(valid)
    by_value = form.load is not None and draw.randint(0, 2) > 0
    if by_value:
        value = _loaded(form, data)
        for _ in range(draw.randint(1, 3)):
            value = _changed(draw, value)
        data = form.dump(_text(draw, value), whole)
    if not by_value or draw.randint(0, 4) == 0:
        for _ in range(draw.randint(1, 4)):
            data = _edited(draw, data)
        data = form.repair(data) if draw.random() < 0.5 else data
    return data[:MOST_BYTES]


def _changed(draw: random.Random, value: Any) -> Any:
    """Replace, drop, repeat, rename or move one value, at any depth."""
    value = {"": copy.deepcopy(value)}
    places: list[tuple[Any, Any]] = []
    waiting: list[Any] = [value]
    while waiting:
        inside = waiting.pop()
        own = list(inside) if isinstance(inside, dict) else range(len(inside))
        places += [(inside, key) for key in own]
        waiting += [inside[key] for key in own if isinstance(inside[key], dict | list)]
    inside, key = draw.choice(places)
    action = draw.randint(0, 9)
    if action < 6:
        alike = [each for each in ODD if type(each) is type(inside[key])] if action < 4 else []
        inside[key] = draw.choice(alike or ODD)
    elif action == 6 and inside is not value:
        del inside[key]
    elif action == 7:
        there, at = draw.choice(places)
        inside[key] = copy.deepcopy(there[at])
    elif action == 8 and isinstance(inside, dict) and inside is not value:
        name = draw.choice(["", "x", "\0", "__class__", "-1", *(str(at) for _, at in places)])
        inside[name] = inside.pop(key)
    elif isinstance(inside[key], list):
        inside[key] = inside[key] * draw.choice([0, 2, 200])
    return value.get("")


def _text(draw: random.Random, value: Any) -> str:
    """Write JSON; one time in ten a name is there twice."""
    text = json.dumps(value, indent=draw.choice([1, None]), ensure_ascii=draw.random() < 0.5)
    names = re.findall(r'"[^"\\]*"(?=: )', text)
    if names and draw.randint(0, 9) == 0:
        name, other = draw.choice(names), json.dumps(draw.choice(ODD[:20]))
        text = text.replace(f"{name}: ", f"{name}: {other}, {name}: ", 1)
    return _DEEP.sub(lambda found: "[" * int(found[1]) + "]" * int(found[1]), text)


def _edited(draw: random.Random, data: bytes) -> bytes:
    """Flip, cut, double or insert bytes at one place, or end there."""
    place = draw.randint(0, len(data))
    length = draw.choice([1, 1, 2, 4, 8, 50, 1_000])
    action = draw.randint(0, 7)
    if action < 2:
        return data[:place] + bytes([draw.randint(0, 255)]) + data[place + 1 :]
    if action == 2:
        return data[:place] + data[place + length :]
    if action == 3:
        return data[:place] + data[place : place + length] * draw.choice([2, 2, 30]) + data[place + length :]
    if action == 4:
        return data[:place] if draw.randint(0, 3) == 0 else data[:place] + data[place + 1 :]
    piece = draw.choice(PIECES)
    return data[:place] + piece + data[place + (len(piece) if action == 5 else 0) :]
