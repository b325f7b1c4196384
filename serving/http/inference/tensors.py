"""Tensors of the Open Inference Protocol: JSON data or binary data (Triton's extension) to Python lists, and back.

Binary data of all tensors follows the JSON, in the order of the tensors: numbers little-endian, a text of BYTES after
its length as uint32. The header Inference-Header-Content-Length has the length of the JSON.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import RequestError
from serving.http.codec import parse_json
from serving.network.steps import CHUNK, Steps
from serving.scoring.budget import Budget
from serving.scoring.values import short_repr

HEADER = "inference-header-content-length"
DTYPES = {
    "BOOL": "?", "UINT8": "<u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "<i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
MAX_DIMENSIONS = 3


@dataclass(frozen=True)
class Tensor:
    """A tensor of a request: `values` are flat Python numbers or texts, in row-major order."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: list[Any]


def split_body(body: bytes, header: str | None, budget: Budget) -> Steps[tuple[Any, memoryview]]:
    """Parse a body's JSON and return the binary data after it. Raises RequestError."""
    if header is None:
        return (yield from parse_json(body, budget)), memoryview(b"")
    if not (header.isascii() and header.isdigit()) or len(header) > 12 or int(header) > len(body):
        raise RequestError(
            f"{HEADER} is {short_repr(header[:40])}, and has to be the length of the JSON at the beginning of the "
            f"body, at most {len(body)}"
        )
    return (yield from parse_json(body[: int(header)], budget)), memoryview(body)[int(header) :]


def tensors_of(value: Any, binary: memoryview, budget: Budget) -> Steps[dict[str, Tensor]]:
    """Read the tensors of a request by their names. Raises RequestError naming the tensor and the mistake."""
    inputs = value.get("inputs") if isinstance(value, dict) else None
    if not isinstance(inputs, list):
        raise RequestError('the body has no inputs; send {"inputs": [{"name", "shape", "datatype", "data"}, ...]}')
    found: dict[str, Tensor] = {}
    count = 0
    for each in inputs:
        if not isinstance(each, dict) or not isinstance(each.get("name"), str):
            raise RequestError(
                f"an input is {short_repr(each)}; it has to be an object with name, shape, datatype and data"
            )
        budget.check_names([each["name"]])
        tensor, binary = yield from _tensor(each, binary, budget)
        budget.check("values", count := count + len(tensor.values))
        if found.setdefault(tensor.name, tensor) is not tensor:
            raise RequestError(f"input {short_repr(tensor.name)} is sent twice; send each tensor once")
    if len(binary):
        raise RequestError(f"{len(binary)} bytes follow the last tensor; give each tensor its binary_data_size")
    return found


def _tensor(each: dict[str, Any], binary: memoryview, budget: Budget) -> Steps[tuple[Tensor, memoryview]]:
    name, datatype, shape = each["name"], each.get("datatype"), each.get("shape")
    where = f"input {short_repr(name)}"
    if not isinstance(datatype, str) or (datatype not in DTYPES and datatype != "BYTES"):
        raise RequestError(f"{where}: datatype is {short_repr(datatype)}; it is BYTES, {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not _is_shape(shape):
        raise RequestError(
            f"{where}: shape is {short_repr(shape)}, and has to be a list of 1 to {MAX_DIMENSIONS} sizes"
        )
    budget.check("values", prod(max(size, 1) for size in shape))  # [10**9, 0] means 10**9 lists
    parameters = each.get("parameters") or {}
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is None:
        if "data" not in each:
            raise RequestError(f"{where} has neither data nor the parameter binary_data_size")
        values = _flat(each["data"], where)
    else:
        if type(size) is not int or not 0 <= size <= len(binary):
            raise RequestError(f"{where}: binary_data_size is {short_repr(size)}; {len(binary)} bytes are left")
        values, binary = (yield from _from_binary(binary[:size], datatype, prod(shape), where)), binary[size:]
    yield
    if prod(shape) != len(values):
        raise RequestError(
            f"{where}: shape {short_repr(shape)} has {prod(shape)} values, but the data has {len(values)}"
        )
    _check_type(values, datatype, where)
    return Tensor(name, datatype, tuple(shape), values), binary


def _is_shape(shape: list[Any]) -> bool:
    return 1 <= len(shape) <= MAX_DIMENSIONS and all(type(size) is int and size >= 0 for size in shape)


def _flat(data: Any, where: str) -> list[Any]:
    """Flatten nested lists, up to the depth of a tensor; keeps null, a missing number."""
    values = data if isinstance(data, list) else [data]
    for _ in range(MAX_DIMENSIONS - 1):
        kinds = set(map(type, values))
        if list not in kinds:
            return values
        if kinds != {list}:
            raise RequestError(f"{where}: data mixes lists and values; nest all alike, or send one flat list")
        values = list(chain.from_iterable(values))
    return values


def _check_type(values: list[Any], datatype: str, where: str) -> None:
    """Check that JSON and datatype agree; a number's size is checked where its column is decoded."""
    if datatype == "BYTES":
        kinds: set[type] = {str}
    elif datatype.startswith("FP"):
        kinds = {int, float, type(None)}
    else:
        kinds = {bool} if datatype == "BOOL" else {int}
    if not set(map(type, values)) <= kinds:
        wrong = next(each for each in values if type(each) not in kinds)
        raise RequestError(f"{where}: data has {short_repr(wrong)}, which is not {datatype}")


def _from_binary(data: memoryview, datatype: str, count: int, where: str) -> Steps[list[Any]]:
    """Read at most `count` values of a tensor; refuses more before it reads them."""
    if datatype == "BYTES":
        return (yield from _texts(data, count, where))
    dtype = np.dtype(DTYPES[datatype])
    if len(data) % dtype.itemsize:
        raise RequestError(f"{where}: {len(data)} bytes are not a multiple of the size of {datatype}")
    if len(data) > count * dtype.itemsize:
        raise RequestError(f"{where}: its shape has {count} values, but the data has {len(data) // dtype.itemsize}")
    values: list[Any] = np.frombuffer(data, dtype).tolist()
    return values


def _texts(data: memoryview, count: int, where: str) -> Steps[list[str]]:
    texts: list[str] = []
    place = 0
    while place < len(data):
        if place + 4 > len(data):
            raise RequestError(f"{where}: the binary data ends inside the length of text {len(texts)}")
        (length,) = struct.unpack_from("<I", data, place)
        place += 4
        if place + length > len(data):
            raise RequestError(f"{where}: text {len(texts)} has {length} bytes, but {len(data) - place} are left")
        try:
            texts.append(str(data[place : place + length], "utf-8"))
        except UnicodeDecodeError:
            raise RequestError(f"{where}: text {len(texts)} is not UTF-8") from None
        place += length
        if len(texts) > count:
            raise RequestError(f"{where}: its shape has {count} values, but the data has more")
        if len(texts) % CHUNK == 0:
            yield
    return texts


def encode(
    outputs: Sequence[tuple[str, NDArray[Any], bool]], answer: dict[str, Any]
) -> tuple[list[bytes], dict[str, Any]]:
    """Add output tensors (name, FP32 or INT32 values, whether as binary data) to an answer.

    Returns the binary parts, and the answer with its outputs."""
    parts: list[bytes] = []
    written: list[dict[str, Any]] = []
    for name, values, as_binary in outputs:
        datatype = "FP32" if values.dtype == np.float32 else "INT32"
        tensor: dict[str, Any] = {"name": name, "datatype": datatype, "shape": [len(values)]}
        if as_binary:
            parts.append(values.astype(DTYPES[datatype]).tobytes())
            tensor["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            tensor["data"] = values
        written.append(tensor)
    return parts, answer | {"outputs": written}
