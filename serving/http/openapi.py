"""An example request to the model in use, and the server's description as OpenAPI 3.1: both of the model's columns."""

import shlex
from collections.abc import Mapping
from typing import Any

from serving.http.codec import JSON
from serving.scoring.request import RequestColumns, expected
from serving.scoring.sent import ARROW
from trainer.samples.columns import Rule

EXAMPLE = "/v1/example"
_NUM_CANDIDATES, _NUM_VALUES = 3, 2
_REFUSALS = {400: "the body cannot be scored", 413: "more than the server's limits", 415: "another kind of body"}
_OBJECT, _PLACES = {"type": "object"}, {"type": "array", "items": {"type": "integer"}}


def example_of(columns: RequestColumns) -> dict[str, Any]:
    """Make a request with values for all columns of a model: one user with short lists, and three candidates.

    The values are made up, so that a model knows few of them, and nothing of anybody's data is shown.
    """
    user = {name: _value(rule, rule.depth, 1) for name, rule in columns.sources.items() if rule.side == "user"}
    candidates = {
        name: [_value(rule, rule.depth - 1, place + 1) for place in range(_NUM_CANDIDATES)]
        for name, rule in columns.sources.items()
        if rule.side == "ad"
    }
    return {"user": user, "candidates": candidates}


def _value(rule: Rule, depth: int, number: int) -> Any:
    if depth == 0:
        return float(number) if rule.is_real else number
    count = _NUM_VALUES if rule.width is None or depth > 1 else rule.width
    return [_value(rule, depth - 1, number + place) for place in range(count)]


def command_of(server: str, *, with_token: bool) -> str:
    """Write the shell's line that scores the example; it has no double quotes, which JSON would escape."""
    curl = "curl -s" + (" -H 'Authorization: Bearer '$TOKEN" if with_token else "")
    kind = shlex.quote(f"Content-Type: {JSON}")
    return f"{curl} {shlex.quote(server + EXAMPLE)} | {curl} {shlex.quote(f'{server}/v1/score')} -H {kind} -d @-"


def description(name: str, version: str, columns: RequestColumns, routes: list[tuple[str, str, str]]) -> dict[str, Any]:
    """Describe the server as OpenAPI 3.1. `routes`: method, path with {names}, and what it does, of each address."""
    paths: dict[str, dict[str, Any]] = {}
    for method, path, summary in routes:
        words = [word[1:-1] for word in path.split("/") if word.startswith("{")]
        parameters = [{"name": word, "in": "path", "required": True, "schema": {"type": "string"}} for word in words]
        answers = {"200": {"description": "the answer"}, "default": {"$ref": "#/components/responses/Refused"}}
        operation = {"summary": summary, "responses": answers} | ({"parameters": parameters} if words else {})
        paths.setdefault(path, {})[method.lower()] = operation
    paths["/v1/score"]["post"] |= _scoring(columns)
    error = {**_OBJECT, "properties": {"error": {"type": "string"}, "status": {"type": "integer"}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"Scorer of {name}", "version": version, "description": "docs/SERVE.md has all of it."},
        "paths": paths,
        "components": {
            "schemas": {"Request": _request(columns), "Answer": _answer(), "Error": error},
            "responses": {"Refused": _json("an error, in one message", _ref("Error"))},
        },
    }


def _scoring(columns: RequestColumns) -> dict[str, Any]:
    several = {**_OBJECT, "required": ["requests"], "properties": {"requests": _list(_ref("Request"))}}
    answers = {**_OBJECT, "properties": {"answers": _list(_ref("Answer"))}}
    sent = {"anyOf": [_ref("Request"), several, _list(_ref("Request"))]}
    body = {JSON: {"schema": sent, "example": example_of(columns)}, ARROW: {"schema": {"type": "string"}}}
    logits = {"name": "logits", "in": "query", "schema": {"enum": ["true", "false"]}}
    refused = {str(code): {"description": why} for code, why in _REFUSALS.items()}
    return {
        "parameters": [logits],
        "requestBody": {"required": True, "content": body},
        "responses": {"200": _json("the scores", {"anyOf": [_ref("Answer"), answers]}), **refused},
    }


def _request(columns: RequestColumns) -> dict[str, Any]:
    of_side: dict[str, dict[str, Any]] = {"user": {}, "ad": {}}
    for name, rule in columns.sources.items():
        of_side[rule.side][name] = _column(rule, name in columns.nullable)
    context = {name: schema["items"] for name, schema in of_side["ad"].items()}
    user = {**_OBJECT, "properties": of_side["user"], "required": sorted(of_side["user"])}
    parts = {"user": user, "context": {**_OBJECT, "properties": context}}
    parts["candidates"] = {**_OBJECT, "properties": of_side["ad"]}
    return {**_OBJECT, "properties": parts, "required": ["user", "candidates"]}


def _column(rule: Rule, nullable: bool) -> dict[str, Any]:
    kinds = ["number"] if rule.is_real else ["integer", *(["string"] if rule.text else [])]
    schema: dict[str, Any] = {"type": [*kinds, *(["null"] if nullable or rule.may_miss else [])]}
    for _ in range(rule.depth):
        schema = _list(schema)
    return {**schema, "description": expected(rule, 0)}


def _answer() -> dict[str, Any]:
    places = {**_OBJECT, "additionalProperties": _PLACES}
    scores = _list({"type": "number", "minimum": 0, "maximum": 1})
    known = {"version": {"type": "integer"}, "vectors": {**_OBJECT, "additionalProperties": {"type": "integer"}}}
    parts: Mapping[str, Any] = {"scores": scores, "logits": _list({"type": "number"}), "unknown": places}
    return {**_OBJECT, "properties": {**parts, "missing": places, **known}, "required": ["scores"]}


def _list(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(what: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": what, "content": {JSON: {"schema": schema}}}
