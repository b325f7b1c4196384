"""Thousands of damaged bodies: each gets an answer that is not a 500, and memory does not grow."""

import asyncio
import gc
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import psutil
import pyarrow as pa
import pytest

from serving.http.app import Scoring
from serving.http.codec import ARROW, JSON
from serving.http.inference import HEADER
from serving.http.live import BundleSource
from serving.scoring.scorer import Scorer
from serving.settings import ServerSettings
from tests.serving.http.conftest import Published
from tests.serving.http.fakes import scoring_of
from trainer.samples.columns import Rule

ALLOWED = {200, 400, 404, 413, 415}
"""Status codes of their answers."""
ODD = [
    None, True, False, 0, -1, 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 1e308, -1e-308, 0.5, 1e20,
    "", " ", "1", "-0", "\0", "a" * 300, "ä", "\u202e", "😀", "9" * 25, "1e5", "NaN", "\x7f", "Infinity", "null",
    [], {}, [[]], [None], [[1, 2], [3]], {"a": 1}, [[[[1]]]], ["a", 1], [1.5, None, "x"], [True],
]  # fmt: skip


class FuzzBody(NamedTuple):
    """What is sent."""

    path: str
    headers: dict[str, str]
    content: bytes


def bodies(model: Scorer, count: int, seed: int = 0) -> Iterator[FuzzBody]:
    """Bodies in all forms, in turn; about one in ten is valid."""
    chance = random.Random(seed)
    requests = [
        {
            "user": {name: value_of(rule, behaviors) for name, rule in model.columns.items() if rule.side == "user"},
            "candidates": {name: value_of(rule, ads) for name, rule in model.columns.items() if rule.side == "ad"},
        }
        for ads, behaviors in ((1, 30), (200, 30), (0, 0), (2, 1))
    ]
    for number in range(count):
        request = orjson.loads(orjson.dumps(chance.choice(requests)))
        kind = number % 4
        if kind == 0:
            yield FuzzBody("/v1/score", {"content-type": JSON}, damaged_bytes(chance, orjson.dumps(request)))
        elif kind == 1:
            value: Any = [damaged(chance, request) for _ in range(chance.randrange(1, 3))]
            yield FuzzBody("/v1/score", {"content-type": JSON}, orjson.dumps(chance.choice([value, value[0]])))
        elif kind == 2:
            yield tensors(chance, model.columns, request)
        else:
            yield FuzzBody("/v1/score", {"content-type": ARROW}, arrow(chance, request))


def value_of(rule: Rule, count: int) -> Any:
    """A value of a column: `count` entries at the outermost level, inside them the rule's width or one."""
    number: Any = 1 if rule.number == "integer" else 0.5
    if rule.depth == 0:
        return number
    if rule.side == "user" and rule.depth == 1 and rule.width is not None:
        return [number] * rule.width
    return [number if rule.depth == 1 else [number] * (rule.width or 1)] * count


def damaged(chance: random.Random, value: Any, depth: int = 0) -> Any:
    """Replace, drop, repeat or rename something somewhere inside a JSON value."""
    if isinstance(value, list) and len(value) > 5:
        value = value[: chance.randrange(6)]
    if chance.random() < 0.12 or not isinstance(value, dict | list) or not value:
        return chance.choice(ODD) if chance.random() < 0.3 else value
    if isinstance(value, dict):
        key = chance.choice(list(value))
        changed = {name: each[:3] if isinstance(each, list) else each for name, each in value.items()}
        changed[key] = damaged(chance, value[key], depth + 1)
        if chance.random() < 0.1:
            changed[chance.choice(["", "user", "ad_item", "x", "candidates", "\0"])] = changed.pop(key)
        return changed
    place = chance.randrange(len(value))
    return [*value[:place], damaged(chance, value[place], depth + 1), *value[place + 1 :]]


def damaged_bytes(chance: random.Random, content: bytes) -> bytes:
    """Flip, cut, repeat or insert bytes."""
    data = bytearray(content[:2_000] if chance.random() < 0.1 else content)
    for _ in range(chance.choice([0, 1, 1, 2, 8])):
        place = chance.randrange(len(data) + 1)
        action = chance.randrange(4)
        if action == 0 and place < len(data):
            data[place] = chance.randrange(256)
        elif action == 1:
            del data[place : place + chance.choice([1, 2, 50])]
        elif action == 2:
            data[place:place] = data[place : place + 20]
        else:
            data[place:place] = chance.choice([b"\0", b"NaN", b"]", b"{", b'"', b"\xff", b"1e999", b"9" * 20])
    return bytes(data)


def tensors(chance: random.Random, columns: Any, request: dict[str, Any]) -> FuzzBody:
    """An inference request, in JSON and binary tensors, some of them damaged."""
    inputs, parts = [], []
    for name, rule in columns.items():
        values = (request["user"] if rule.side == "user" else request["candidates"])[name]
        tensor, part = one_tensor(chance, name, rule, values)
        inputs.append(tensor)
        parts.append(part)
    head = orjson.dumps(damaged(chance, {"inputs": inputs}) if chance.random() < 0.7 else {"inputs": inputs})
    length = chance.choice([len(head)] * 9 + [0, 3, len(head) + 1, 10**9, "x"])
    content = head + b"".join(parts)
    if chance.random() < 0.3:
        content = damaged_bytes(chance, content)
    return FuzzBody("/v2/models/ctr/infer", {HEADER: str(length)}, content)


def one_tensor(chance: random.Random, name: str, rule: Rule, value: Any) -> tuple[dict[str, Any], bytes]:
    """A column's tensor, in JSON or in binary."""
    array = np.array(value)
    shape = list(array.shape) or [1]
    datatype = "FP32" if rule.is_real else "INT64"
    tensor: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
    if chance.random() < 0.5:
        return tensor | {"data": array.ravel().tolist()}, b""
    part = array.astype("<f4" if rule.is_real else "<i8").tobytes()
    if chance.random() < 0.1:
        part = damaged_bytes(chance, part)
    return tensor | {"parameters": {"binary_data_size": len(part)}}, part


def arrow(chance: random.Random, request: dict[str, Any]) -> bytes:
    """A stream with one or two rows, of other types here and there, with its bytes damaged or not."""
    columns = {**request["user"], **request["candidates"]}
    if chance.random() < 0.5:
        name = chance.choice(list(columns))
        odd = chance.choice(ODD)
        columns[name] = odd
    rows = chance.randrange(1, 3)
    arrays = {}
    for name, value in columns.items():
        try:
            arrays[name] = pa.array([value] * rows)
        except (pa.ArrowException, OverflowError):
            arrays[name] = pa.array(["x"] * rows)
    table = pa.table(arrays)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content = sink.getvalue().to_pybytes()
    return damaged_bytes(chance, content) if chance.random() < 0.7 else content


async def answer_of(app: Any, body: FuzzBody) -> tuple[int, bytes]:
    """Call the application without a client: ten times as quick."""
    sent: list[dict[str, Any]] = []
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": body.path, "raw_path": body.path.encode(),
        "query_string": b"", "root_path": "", "scheme": "http", "server": ("scorer", 80), "client": ("test", 1),
        "headers": [(name.encode(), value.encode()) for name, value in body.headers.items()], "state": {},
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body.content, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], sent[1]["body"]


async def fuzz(scoring: Scoring, count: int) -> None:
    app, codes, process = scoring.app(), Counter(), psutil.Process()
    memory_mb: list[float] = []
    async with app.router.lifespan_context(app):
        while not scoring.live.is_ready:
            await asyncio.sleep(0.01)
        for number, body in enumerate(bodies(scoring.live.model, count)):
            code, content = await answer_of(app, body)
            codes[code] += 1
            assert code in ALLOWED, (number, body, code, content)
            if number in (count // 2, count - 1):
                gc.collect()
                memory_mb.append(process.memory_info().rss / 1e6)
    assert codes[200] > count / 20
    assert codes[400] > count / 3
    assert memory_mb[1] - memory_mb[0] < 15


@pytest.mark.parametrize(
    "count", [pytest.param(1_300, marks=pytest.mark.long), pytest.param(10_400, marks=pytest.mark.slow)]
)
def test_no_damaged_body_is_an_error_of_the_server_and_none_stays_in_memory(
    bundle: Published, tmp_path: Path, count: int
) -> None:
    settings = ServerSettings(model=bundle.url, name="ctr", cache_dir=tmp_path)
    asyncio.run(fuzz(scoring_of(BundleSource(settings), slow_ms=1e9), count))
