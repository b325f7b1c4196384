"""Bodies of /v1/score: JSON and Arrow IPC to requests, and scores back in the same form.

JSON: one request {"user": …, "context": …, "candidates": …}, or several as {"requests": [...]} or as a list.
Arrow: a stream (application/vnd.apache.arrow.stream) with the columns of the sample files, one request per row.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from starlette.responses import Response

from serving.bundle.log import BundleIdentity
from serving.errors import RequestError
from serving.network import Steps
from serving.problems import Problem
from serving.scoring.request import Request, RequestColumns, Scored, short_repr, unfit
from serving.scoring.sent import ARROW, SentTable, check_table, sent_requests, sent_table, stream_of
from serving.settings import Budget
from trainer.schema.fields import Field

JSON = "application/json"
_PARTS = ("user", "context", "candidates")
_EXAMPLE = '{"user": {...}, "context": {...}, "candidates": {...}}'
_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
_NO_MARKS = bytes(set(range(256)) - set(b'[]{},:"'))
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_OBJECT = 3
"""Extra values that an object counts for, by the time and memory that its parsing takes."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The answers to one body, all of one model, and the seconds that each stage took."""

    identity: BundleIdentity
    fields: Sequence[Field]
    sent: SentTable
    scored: Sequence[Scored]
    stages: dict[str, float]


@dataclass
class JsonBody:
    """A JSON body: one request or several; `?logits=true` asks for logits as well."""

    body: bytes
    logits: bool = False
    _alone: bool = True

    def decode(self, columns: RequestColumns, budget: Budget) -> Steps[SentTable]:
        """Parse it, see `requests_of`."""
        requests, self._alone = requests_of((yield from parse_json(self.body, budget)), budget)
        return (yield from sent_requests(columns, requests))

    def answer(self, scores: Scores) -> Response:
        """Write one object, or one with `answers` for several requests."""
        answers = [_answer(each, self.logits) for each in scores.scored]
        identity = {"version": scores.identity.version, "vectors": dict(scores.identity.vectors)}
        answer = answers[0] if self._alone else {"answers": answers}
        return Response(orjson.dumps(answer | identity, option=_OPTIONS), media_type=JSON)


@dataclass(frozen=True)
class ArrowBody:
    """An Arrow stream with one request per row."""

    body: bytes

    def decode(self, columns: RequestColumns, budget: Budget) -> Steps[SentTable]:
        """Read the table, see `arrow_table`."""
        return (yield from sent_table(columns, (yield from arrow_table(self.body, budget))))

    def answer(self, scores: Scores) -> Response:
        """Write a row for each request, with version and snapshots in the schema's metadata."""
        identity, scored = scores.identity, scores.scored
        metadata = {"version": str(identity.version)}
        metadata |= {f"vectors.{store}": str(snapshot) for store, snapshot in identity.vectors.items()}
        table = pa.table(
            {
                "score": pa.array([each.probabilities() for each in scored], pa.list_(pa.float32())),
                "logit": pa.array([each.logits_C for each in scored], pa.list_(pa.float32())),
                "unknown": _maps([each.unknown for each in scored]),
                "missing": _maps([each.missing for each in scored]),
            }
        ).replace_schema_metadata(metadata)
        return Response(stream_of(table), media_type=ARROW)


def parse_json(body: bytes, budget: Budget) -> Steps[Any]:
    """Count the values of JSON, then parse it. Raises RequestError: not JSON, NaN, text that is not UTF-8."""
    yield from _check_outline(body, budget)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as failure:
        raise RequestError(Problem.NOT_JSON, failure, _EXAMPLE) from None
    yield
    return value


def _check_outline(body: bytes, budget: Budget) -> Steps[None]:
    """Count the values and the depth of JSON without parsing it: two bytes may be a list of 56.

    Outside of texts, each comma counts as a value, each colon as a name, and lists and objects by the memory that they
    take. The count of invalid JSON does not matter, as the parser refuses it."""
    if b"\\" in body:
        body = body.replace(b"\\\\", b"")
        yield
        body = body.replace(b'\\"', b"")
        yield
    if len(body) // 4 > budget.max_values:  # before texts are cut out one by one
        budget.check("values", body.count(b'"') // 4)
    marks = body.translate(None, _NO_MARKS)
    yield
    marks = b"".join(marks.split(b'"')[::2])
    budget.check("values", len(marks) - marks.count(b"]") - marks.count(b"}") + _OBJECT * marks.count(b"{"))
    opened = np.frombuffer(marks.translate(_STEPS, b",:"), np.int8)
    budget.check("depth", int(np.cumsum(opened, dtype=np.int64).max(initial=0)))
    yield


def requests_of(value: Any, budget: Budget) -> tuple[list[Request], bool]:
    """Return the requests of a parsed body, and whether it is a single one. Raises RequestError naming the mistake."""
    if isinstance(value, dict) and "requests" not in value:
        return [request_of(value, "the body", budget)], True
    several = value["requests"] if isinstance(value, dict) else value
    if isinstance(value, dict) and len(value) > 1:
        extra = next(key for key in value if key != "requests")
        raise RequestError(Problem.BESIDE_REQUESTS, short_repr(extra))
    if not isinstance(several, list):
        where, one = ("requests", "") if isinstance(value, dict) else ("the body", f"one request, {_EXAMPLE}, or ")
        raise unfit(where, several, f"{one}a list of requests, each {_EXAMPLE}")
    budget.check("requests", len(several))
    return [request_of(each, f"requests[{place}]", budget) for place, each in enumerate(several)], False


def request_of(value: Any, where: str, budget: Budget) -> Request:
    """Return the request of a JSON object; the scorer checks the values later. Raises RequestError."""
    if not isinstance(value, dict):
        raise unfit(where, value, f"an object, {_EXAMPLE}")
    for part, columns in value.items():
        if part not in _PARTS:
            raise RequestError(Problem.UNKNOWN_PART, where, short_repr(part), ", ".join(_PARTS))
        if not isinstance(columns, dict):
            raise unfit(f"{where}: {part}", columns, "an object with a value per column")
        budget.check_names(columns)
    if "candidates" not in value:
        raise RequestError(Problem.NO_CANDIDATES, where, _EXAMPLE)
    return Request(user=value.get("user", {}), context=value.get("context", {}), candidates=value["candidates"])


def _answer(scored: Scored, logits: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {"scores": scored.probabilities()}
    if logits:
        answer["logits"] = scored.logits_C
    return answer | {"unknown": _places(scored.unknown), "missing": _places(scored.missing)}


def _places(places: Mapping[str, Any]) -> dict[str, Any]:
    return {field: found for field, found in places.items() if len(found)}


def arrow_table(body: bytes, budget: Budget) -> Steps[pa.Table]:
    """Read an Arrow stream and check every offset and text in it. Raises RequestError.

    Checks the lengths that lists claim before it follows any offset.
    """
    try:
        _check_messages(body, budget)
        yield
        table = pa.ipc.open_stream(body).read_all()
        budget.check_names(table.column_names)
        table.validate()
        check_table(budget, table)
        yield
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, struct.error, IndexError) as failure:
        raise RequestError(Problem.NOT_ARROW, failure) from None
    yield
    return table


def _check_messages(body: bytes, budget: Budget) -> None:
    """Raise RequestError for a stream that may unfold to more than its bytes: compressed, or with dictionaries."""
    for number, message in enumerate(pa.ipc.MessageReader.open_stream(body)):
        budget.check("messages", number)  # without the schema
        if number == 0:
            budget.check("schema_bytes", message.metadata.size)
        if message.type == "dictionary":
            raise RequestError(Problem.ARROW_DICTIONARY)
        if message.type == "record batch" and _is_compressed(message.metadata.to_pybytes()):
            raise RequestError(Problem.ARROW_COMPRESSED)


def _maps(parts: Sequence[Mapping[str, Any]]) -> Any:
    return pa.array([list(_places(part).items()) for part in parts], pa.map_(pa.string(), pa.list_(pa.int64())))


def _is_compressed(message: bytes) -> bool:
    """Return whether a record batch has compressed buffers.

    pyarrow does not tell, so this reads Arrow's flatbuffers: Message{version, header_type, header, …},
    RecordBatch{length, nodes, buffers, compression}.
    """
    header_at = _field_at(message, struct.unpack_from("<I", message)[0], 2)
    return _field_at(message, header_at + int(struct.unpack_from("<I", message, header_at)[0]), 3) != 0


def _field_at(message: bytes, table: int, number: int) -> int:
    """Return the position of a field of a flatbuffer's table; 0 if it is left out."""
    vtable = table - struct.unpack_from("<i", message, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", message, vtable)[0]:
        return 0
    offset = struct.unpack_from("<H", message, vtable + 4 + 2 * number)[0]
    return table + offset if offset else 0
