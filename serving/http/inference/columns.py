"""Columns of a request as tensors of the Open Inference Protocol, by the model's own columns.

A tensor has its column's name. On the user's side: [1] for one value, [L] for a list. On the ads' side: [C], an entry
for each candidate, or [1] for a context value, which is the same for all. Texts are BYTES, IDs and image keys INT64 or
BYTES, numbers FP32; a missing number is NaN, in JSON null.

A list of lists (an ad's categories, the images of a gallery) is [C, K] if all lists are equally long. Otherwise the
tensor has the concatenated values, [N], and a second tensor COLUMN.lengths, INT64 [C], has the lengths of the lists.
"""

from collections.abc import Mapping
from itertools import accumulate, pairwise
from math import isnan
from typing import Any

from serving.errors import RequestError
from serving.http.inference.tensors import Tensor
from serving.network.steps import Steps
from serving.scoring.request import Request
from serving.scoring.values import short_repr
from trainer.samples.columns import Rule

LENGTHS = ".lengths"


def metadata(columns: Mapping[str, Rule]) -> list[dict[str, Any]]:
    """Describe the input tensors of a model for the protocol's metadata; -1 is a variable size."""
    return [{"name": name, "datatype": _datatype(rule), "shape": _shape(rule)} for name, rule in columns.items()]


def request_of(tensors: Mapping[str, Tensor], columns: Mapping[str, Rule]) -> Steps[Request]:
    """Build a request from its tensors. Raises RequestError: an unknown tensor, or one of another shape."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name in columns:
            found[name] = _value(name, tensor, tensors, columns)
            yield
    for name in tensors.keys() - columns.keys():
        if not (name.endswith(LENGTHS) and name.removesuffix(LENGTHS) in tensors.keys() & columns.keys()):
            raise RequestError(f"input {short_repr(name)} is not an input of the model: {', '.join(columns)}")
    ads = {name: value for name, value in found.items() if columns[name].side == "ad"}
    counts = {len(value) for value in ads.values()}
    num_candidates = 0 if counts == {0, 1} else max(counts, default=0)
    context = {name: value[0] for name, value in ads.items() if len(value) == 1 and num_candidates != 1}
    return Request(
        user={name: value for name, value in found.items() if columns[name].side == "user"},
        context=context,
        candidates={name: value for name, value in ads.items() if name not in context},
        as_tensors=True,
    )


def _datatype(rule: Rule) -> str:
    return "FP32" if rule.is_real else "BYTES" if rule.text == "uri" else "INT64"


def _shape(rule: Rule) -> list[int]:
    if rule.depth == 0:
        return [1]
    return [-1] * (rule.depth - 1) + [rule.width or -1]


def _value(name: str, tensor: Tensor, tensors: Mapping[str, Tensor], columns: Mapping[str, Rule]) -> Any:
    """Return a column's value in a request: a single value, a list, or a list of lists."""
    rule = columns[name]
    values = _with_missing(tensor, rule)
    if rule.depth == 0:
        if tensor.shape != (1,):
            raise _shape_error(name, tensor, "[1]")
        return values[0]
    if rule.depth == 1:
        if len(tensor.shape) != 1:
            raise _shape_error(name, tensor, "[C]" if rule.side == "ad" else "[L]")
        return values
    if (lengths := tensors.get(name + LENGTHS)) is not None:
        return _by_lengths(name, tensor, values, lengths)
    if len(tensor.shape) != 2:
        outer = "C" if rule.side == "ad" else "L"
        raise _shape_error(
            name, tensor, f"[{outer}, {rule.width or 'K'}], or [N] with a tensor {name}{LENGTHS} [{outer}]"
        )
    rows, width = tensor.shape
    return [values[width * row : width * (row + 1)] for row in range(rows)]


def _by_lengths(name: str, tensor: Tensor, values: list[Any], lengths: Tensor) -> list[list[Any]]:
    if len(lengths.shape) != 1 or lengths.datatype in ("BYTES", "FP16", "FP32", "FP64"):
        raise RequestError(f"input {name}{LENGTHS} is {lengths.datatype} {list(lengths.shape)}; it has to be INT64 [C]")
    if any(length < 0 for length in lengths.values) or sum(lengths.values) != len(values):
        raise RequestError(
            f"input {name}{LENGTHS} adds up to {sum(lengths.values)}, but {name} has {len(values)} values"
        )
    if len(tensor.shape) != 1:
        raise _shape_error(name, tensor, f"[N], as {name}{LENGTHS} is sent")
    return [values[start:end] for start, end in pairwise(accumulate(lengths.values, initial=0))]


def _with_missing(tensor: Tensor, rule: Rule) -> list[Any]:
    """Replace NaN, which marks a missing number in a tensor, by None, as in a request."""
    if not rule.may_miss or not tensor.datatype.startswith("FP"):
        return tensor.values
    return [None if value is None or isnan(value) else value for value in tensor.values]


def _shape_error(name: str, tensor: Tensor, wanted: str) -> RequestError:
    return RequestError(f"input {name} has shape {list(tensor.shape)}, and has to be {wanted}")
