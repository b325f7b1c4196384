"""The Open Inference Protocol (KServe's V2, Triton's HTTP): health, metadata and inference for unchanged clients.

A body of tensors is one request; `columns.py` maps columns to tensors. Outputs: score and logit, FP32 [C], and unknown
and missing, INT32 [C], the number of each candidate's fields whose ID or image the model does not know.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from serving.errors import RequestError
from serving.http.codec import JSON, WrittenAnswer
from serving.http.inference.columns import metadata, request_of
from serving.http.inference.tensors import HEADER, encode, split_body, tensors_of
from serving.http.live.model import Decoded, Model, Scores
from serving.network.steps import Steps
from serving.scoring.budget import Budget
from serving.scoring.request import Scored
from serving.scoring.values import short_repr

OUTPUTS = {"score": "FP32", "logit": "FP32", "unknown": "INT32", "missing": "INT32"}
BINARY = "application/octet-stream"
SERVER = {"name": "crossmedia", "extensions": ["binary_tensor_data"]}


def model_metadata(name: str, model: Model) -> dict[str, Any]:
    """Describe a model and its tensors."""
    return {
        "name": name,
        "versions": [str(model.identity.version)],
        "platform": "crossmedia",
        "inputs": metadata(model.columns),
        "outputs": [{"name": output, "datatype": kind, "shape": [-1]} for output, kind in OUTPUTS.items()],
    }


@dataclass
class TensorBody:
    """A body of tensors, in JSON alone or with binary data after `header` bytes of JSON."""

    body: bytes
    header: str | None
    name: str
    _fields_of_ads: frozenset[str] = frozenset()
    _asked: dict[str, bool] = field(default_factory=dict)
    """The outputs to send, and which of them as binary data."""
    _id: str | None = None

    def decode(self, model: Model, budget: Budget) -> Steps[Decoded]:
        """Read the tensors of one request."""
        value, binary = yield from split_body(self.body, self.header, budget)
        tensors = yield from tensors_of(value, binary, budget)
        self._asked, self._id = _asked(value), value.get("id")
        if self._id is not None and not isinstance(self._id, str):
            raise RequestError(f"id is {short_repr(self._id)}, and has to be a text")
        self._fields_of_ads = frozenset(each.name for each in model.fields if each.side == "ad")
        return [(yield from request_of(tensors, model.columns))]

    def answer(self, scores: Scores) -> WrittenAnswer:
        """Write the outputs that were asked for."""
        outputs = self._outputs(scores.scored[0])
        identity = scores.identity
        fields: dict[str, Any] = {"model_name": self.name, "model_version": str(identity.version)}
        fields |= {"id": self._id} if self._id is not None else {}
        fields["parameters"] = {f"vectors.{store}": snapshot for store, snapshot in identity.vectors.items()}
        parts, answer = encode([(name, outputs[name], binary) for name, binary in self._asked.items()], fields)
        head = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
        if not parts:
            return WrittenAnswer(head, JSON)
        return WrittenAnswer(b"".join([head, *parts]), BINARY, {HEADER: str(len(head))})

    def _outputs(self, scored: Scored) -> dict[str, NDArray[Any]]:
        return {
            "score": scored.probabilities(),
            "logit": scored.logits_C,
            "unknown": self._counts(scored.unknown, len(scored.logits_C)),
            "missing": self._counts(scored.missing, len(scored.logits_C)),
        }

    def _counts(self, places: Mapping[str, NDArray[np.int64]], num_candidates: int) -> NDArray[np.int32]:
        """Count the fields of each candidate; the user's fields do not count."""
        counts = np.zeros(num_candidates, np.int32)
        for name in places.keys() & self._fields_of_ads:
            counts[np.unique(places[name])] += 1
        return counts


def _asked(value: dict[str, Any]) -> dict[str, bool]:
    """Return the requested outputs, by default all, and which of them as binary data. Raises RequestError."""
    parameters = value.get("parameters") or {}
    all_binary = isinstance(parameters, dict) and parameters.get("binary_data_output") is True
    outputs = value.get("outputs")
    if outputs is None:
        return dict.fromkeys(OUTPUTS, all_binary)
    if not isinstance(outputs, list) or not all(isinstance(each, dict) for each in outputs):
        raise RequestError(f"outputs is {short_repr(outputs)}, and has to be a list of objects with a name")
    asked: dict[str, bool] = {}
    for each in outputs:
        if not isinstance(each.get("name"), str) or each["name"] not in OUTPUTS:
            raise RequestError(
                f"output {short_repr(each.get('name'))} is not an output of the model: {', '.join(OUTPUTS)}"
            )
        own = each.get("parameters") or {}
        asked[each["name"]] = own.get("binary_data", all_binary) is True if isinstance(own, dict) else all_binary
    return asked
