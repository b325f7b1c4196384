"""The Open Inference Protocol (KServe's V2, Triton's HTTP): health, metadata and inference for unchanged clients.

A body of tensors is one request. docs/SERVE.md has the shape and the type of each column's tensor, and of the outputs.

Data of a tensor is JSON, or binary (Triton's extension): binary data of all tensors follows the JSON, in the order of
the tensors: numbers little-endian, a text of BYTES after its length as uint32. The header
Inference-Header-Content-Length has the length of the JSON.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.responses import Response

from featurestore.keys import Int64Array
from serving.errors import RequestError
from serving.http.codec import JSON, ArrowBody, JsonBody, Scores, parse_json
from serving.network import CHUNK, Steps
from serving.problems import Problem
from serving.scoring.request import RequestColumns, short_repr, unfit
from serving.scoring.sent import Names, SentColumn, SentTable
from serving.settings import Budget
from trainer.samples.columns import Rule

HEADER = "inference-header-content-length"
DTYPES = {
    "BOOL": "?", "UINT8": "<u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "<i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
MAX_DIMENSIONS = 3
LENGTHS = ".lengths"
OUTPUTS = {"score": "FP32", "logit": "FP32", "unknown": "INT32", "missing": "INT32"}
BINARY = "application/octet-stream"
SERVER = {"name": "crossmedia", "extensions": ["binary_tensor_data"]}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a request: `values` are flat, in row-major order; texts, and numbers of JSON, are Python's."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: list[Any] | NDArray[Any]


def split_body(body: bytes, header: str | None, budget: Budget) -> Steps[tuple[Any, memoryview]]:
    """Parse a body's JSON and return the binary data after it. Raises RequestError."""
    if header is None:
        return (yield from parse_json(body, budget)), memoryview(b"")
    if not (header.isascii() and header.isdigit()) or len(header) > 12 or int(header) > len(body):
        raise unfit(HEADER, header[:40], f"the length of the JSON that begins the body, at most {len(body)}")
    return (yield from parse_json(body[: int(header)], budget)), memoryview(body)[int(header) :]


def tensors_of(value: Any, binary: memoryview, budget: Budget) -> Steps[dict[str, Tensor]]:
    """Read the tensors of a request by their names. Raises RequestError naming the tensor and the mistake."""
    inputs = value.get("inputs") if isinstance(value, dict) else None
    if not isinstance(inputs, list):
        raise RequestError(Problem.NO_INPUTS)
    found: dict[str, Tensor] = {}
    count = 0
    for each in inputs:
        if not isinstance(each, dict) or not isinstance(each.get("name"), str):
            raise unfit("an input", each, "an object with name, shape, datatype and data")
        budget.check_names([each["name"]])
        tensor, binary = yield from _tensor(each, binary, budget)
        budget.check("values", count := count + len(tensor.values))
        if found.setdefault(tensor.name, tensor) is not tensor:
            raise RequestError(Problem.SENT_TWICE, short_repr(tensor.name))
    if len(binary):
        raise RequestError(Problem.BYTES_FOLLOW, len(binary))
    return found


def _tensor(each: dict[str, Any], binary: memoryview, budget: Budget) -> Steps[tuple[Tensor, memoryview]]:
    name, datatype, shape = each["name"], each.get("datatype"), each.get("shape")
    where = f"input {short_repr(name)}"
    if not isinstance(datatype, str) or (datatype not in DTYPES and datatype != "BYTES"):
        raise unfit(f"{where}: datatype", datatype, f"BYTES, {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not _is_shape(shape):
        raise unfit(f"{where}: shape", shape, f"a list of 1 to {MAX_DIMENSIONS} sizes")
    budget.check("values", prod(max(size, 1) for size in shape))  # [10**9, 0] means 10**9 lists
    parameters = each.get("parameters") or {}
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is None:
        if "data" not in each:
            raise RequestError(Problem.NO_DATA, where)
        values: list[Any] | NDArray[Any] = _flat(each["data"], where)
    else:
        if type(size) is not int or not 0 <= size <= len(binary):
            raise unfit(f"{where}: binary_data_size", size, f"0 to {len(binary)}, the bytes that are left")
        values, binary = (yield from _from_binary(binary[:size], datatype, prod(shape), where)), binary[size:]
    yield
    if prod(shape) != len(values):
        raise RequestError(Problem.OTHER_COUNT, where, prod(shape), len(values))
    return Tensor(name, datatype, tuple(shape), values), binary


def _is_shape(shape: list[Any]) -> bool:
    return 1 <= len(shape) <= MAX_DIMENSIONS and all(type(size) is int and size >= 0 for size in shape)


def _flat(data: Any, where: str) -> list[Any]:
    """Flatten nested lists, up to the depth of a tensor; the values are checked where their column is decoded."""
    values = data if isinstance(data, list) else [data]
    for _ in range(MAX_DIMENSIONS - 1):
        kinds = set(map(type, values))
        if list not in kinds:
            break
        if kinds != {list}:
            raise RequestError(Problem.MIXED_DATA, where)
        values = list(chain.from_iterable(values))
    return values


def _from_binary(data: memoryview, datatype: str, count: int, where: str) -> Steps[list[Any] | NDArray[Any]]:
    """Read the values of a tensor; refuses more than `count` texts before it reads them."""
    if datatype == "BYTES":
        return (yield from _texts(data, count, where))
    dtype = np.dtype(DTYPES[datatype])
    if len(data) % dtype.itemsize:
        raise RequestError(Problem.NOT_MULTIPLE, where, len(data), datatype)
    return np.frombuffer(data, dtype)


def _texts(data: memoryview, count: int, where: str) -> Steps[list[str]]:
    texts: list[str] = []
    place = 0
    while place < len(data):
        if place + 4 > len(data):
            raise RequestError(Problem.TEXT_CUT, where, len(texts), 4, len(data) - place)
        (length,) = struct.unpack_from("<I", data, place)
        place += 4
        if place + length > len(data):
            raise RequestError(Problem.TEXT_CUT, where, len(texts), length, len(data) - place)
        try:
            texts.append(str(data[place : place + length], "utf-8"))
        except UnicodeDecodeError:
            raise RequestError(Problem.TEXT_NOT_UTF8, where, len(texts)) from None
        place += length
        if len(texts) > count:
            raise RequestError(Problem.OTHER_COUNT, where, count, "more")
        if len(texts) % CHUNK == 0:
            yield
    return texts


def metadata(columns: Mapping[str, Rule]) -> list[dict[str, Any]]:
    """Describe the input tensors of a model for the protocol's metadata; -1 is a variable size."""
    return [
        {
            "name": name,
            "datatype": "FP32" if rule.is_real else "BYTES" if rule.text == "uri" else "INT64",
            "shape": [-1] * (rule.depth - 1) + [rule.width or -1] if rule.depth else [1],
        }
        for name, rule in columns.items()
    ]


def sent_tensors(columns: RequestColumns, tensors: Mapping[str, Tensor]) -> SentTable:
    """Lay out tensors by the columns of the model, as one request.

    Raises RequestError: an unknown tensor, or one of another shape.
    """
    rules = columns.sources
    for name in tensors.keys() - rules.keys():
        if not (name.endswith(LENGTHS) and name.removesuffix(LENGTHS) in tensors.keys() & rules.keys()):
            raise RequestError(Problem.UNKNOWN_TENSOR, "input", short_repr(name), ", ".join(rules))
    levels = {name: _levels(name, tensors, rule) for name, rule in rules.items() if name in tensors}
    rows = {name: int(each[0][0]) for name, each in levels.items() if rules[name].side == "ad"}
    num_candidates = 0 if set(rows.values()) == {0, 1} else max(rows.values(), default=0)
    found = {}
    for name, each in levels.items():
        in_context = num_candidates != 1 and rows.get(name) == 1
        found[name] = SentColumn(tensors[name].values, each, in_context_G=np.array([True]) if in_context else None)
    return SentTable(found, np.array([num_candidates]), Names(lambda column, _: f"input {column}"))


def _levels(name: str, tensors: Mapping[str, Tensor], rule: Rule) -> tuple[Int64Array, ...]:
    """Return the lengths of a column's lists, by the shape of its tensor."""
    tensor = tensors[name]
    if rule.depth == 2 and (lengths := tensors.get(name + LENGTHS)) is not None:
        return _by_lengths(name, tensor, lengths)
    if len(tensor.shape) != max(1, rule.depth) or (rule.depth == 0 and tensor.shape != (1,)):
        outer = "C" if rule.side == "ad" else "L"
        of_lists = f"[{outer}, {rule.width or 'K'}], or [N] with a tensor {name}{LENGTHS} [{outer}]"
        raise unfit(f"input {name}: shape", tensor.shape, ("[1]", f"[{outer}]", of_lists)[rule.depth])
    rows, *widths = tensor.shape
    return (np.array([rows]), *(np.full(rows, width) for width in widths)) if rule.depth else ()


def _by_lengths(name: str, tensor: Tensor, lengths: Tensor) -> tuple[Int64Array, ...]:
    # Python's integers, whose sum is exact.
    counts = lengths.values if isinstance(lengths.values, list) else lengths.values.tolist()
    if len(lengths.shape) != 1 or not set(map(type, counts)) <= {int}:
        sent = f"{lengths.datatype} {list(lengths.shape)}"
        raise RequestError(Problem.UNFIT, f"input {name}{LENGTHS}", sent, "INT64 [C]")
    if any(count < 0 for count in counts) or sum(counts) != len(tensor.values):
        raise RequestError(Problem.OTHER_TOTAL, name, sum(counts), len(tensor.values))
    if len(tensor.shape) != 1:
        raise unfit(f"input {name}: shape", tensor.shape, f"[N], as {name}{LENGTHS} is sent")
    return np.array([len(counts)]), np.array(counts, np.int64)


def model_metadata(name: str, version: int, columns: Mapping[str, Rule]) -> dict[str, Any]:
    """Describe a model and its tensors."""
    return {
        "name": name,
        "versions": [str(version)],
        "platform": "crossmedia",
        "inputs": metadata(columns),
        "outputs": [{"name": output, "datatype": kind, "shape": [-1]} for output, kind in OUTPUTS.items()],
    }


@dataclass
class TensorBody:
    """A body of tensors, in JSON alone or with binary data after `header` bytes of JSON."""

    body: bytes
    header: str | None
    name: str
    _asked: dict[str, bool] = field(default_factory=dict)
    """The outputs to send, and which of them as binary data."""
    _id: str | None = None

    def decode(self, columns: RequestColumns, budget: Budget) -> Steps[SentTable]:
        """Read the tensors of one request."""
        value, binary = yield from split_body(self.body, self.header, budget)
        tensors = yield from tensors_of(value, binary, budget)
        self._asked, self._id = _asked(value), value.get("id")
        if self._id is not None and not isinstance(self._id, str):
            raise unfit("id", self._id, "a text")
        return sent_tensors(columns, tensors)

    def answer(self, scores: Scores) -> Response:
        """Write the outputs that were asked for."""
        outputs, identity = _outputs(scores), scores.identity
        fields: dict[str, Any] = {"model_name": self.name, "model_version": str(identity.version)}
        fields |= {"id": self._id} if self._id is not None else {}
        fields["parameters"] = {f"vectors.{store}": snapshot for store, snapshot in identity.vectors.items()}
        parts: list[bytes] = []
        written: list[dict[str, Any]] = []
        for name, as_binary in self._asked.items():
            values, datatype = outputs[name], OUTPUTS[name]
            written.append({"name": name, "datatype": datatype, "shape": [len(values)]})
            if as_binary:
                parts.append(values.astype(DTYPES[datatype]).tobytes())
                written[-1]["parameters"] = {"binary_data_size": len(parts[-1])}
            else:
                written[-1]["data"] = values
        head = orjson.dumps(fields | {"outputs": written}, option=orjson.OPT_SERIALIZE_NUMPY)
        if not parts:
            return Response(head, media_type=JSON)
        return Response(b"".join([head, *parts]), headers={HEADER: str(len(head))}, media_type=BINARY)


def _outputs(scores: Scores) -> dict[str, NDArray[Any]]:
    """Return all outputs; unknown and missing are counts of each candidate's fields, without those of the user."""
    (scored,) = scores.scored
    ads = {each.name for each in scores.fields if each.side == "ad"}
    counts = {"unknown": np.zeros_like(scored.logits_C, np.int32), "missing": np.zeros_like(scored.logits_C, np.int32)}
    for output, places in (("unknown", scored.unknown), ("missing", scored.missing)):
        for name in places.keys() & ads:
            counts[output][np.unique(places[name])] += 1
    return {"score": scored.probabilities(), "logit": scored.logits_C, **counts}


def _asked(value: dict[str, Any]) -> dict[str, bool]:
    """Return the requested outputs, by default all, and which of them as binary data. Raises RequestError."""
    parameters = value.get("parameters") or {}
    all_binary = isinstance(parameters, dict) and parameters.get("binary_data_output") is True
    outputs = value.get("outputs")
    if outputs is None:
        return dict.fromkeys(OUTPUTS, all_binary)
    if not isinstance(outputs, list) or not all(isinstance(each, dict) for each in outputs):
        raise unfit("outputs", outputs, "a list of objects with a name")
    asked: dict[str, bool] = {}
    for each in outputs:
        if not isinstance(each.get("name"), str) or each["name"] not in OUTPUTS:
            raise RequestError(Problem.UNKNOWN_TENSOR, "output", short_repr(each.get("name")), ", ".join(OUTPUTS))
        own = each.get("parameters") or {}
        asked[each["name"]] = own.get("binary_data", all_binary) is True if isinstance(own, dict) else all_binary
    return asked


Body = JsonBody | ArrowBody | TensorBody
"""A received body. `decode`, called first, lays it out by the columns of the model, in pieces; `answer` writes scores
in the same form. Raises RequestError, or RequestTooLargeError over the budget."""
