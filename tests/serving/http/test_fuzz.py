"""Thousands of damaged bodies: each gets an answer that is not a 500, and memory does not grow.

Whether each parser of a body keeps its rule, tests/fuzz says; here the whole application answers, and scores.
"""

import asyncio
import gc
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from serving.http.app import Scoring
from serving.http.codec import ARROW
from serving.http.codec import JSON as JSON_TYPE
from serving.http.inference import HEADER
from serving.http.live import BundleSource
from serving.http.openapi import example_of
from serving.scoring.scorer import Scorer
from serving.settings import ServerSettings
from tests.fuzz.mutate import JSON, STREAM, TENSORS, mutated, stream_of, tensors_of
from tests.serving.http.conftest import Published
from tests.serving.http.fakes import scoring_of

ALLOWED = {200, 400, 404, 413, 415, 422}
"""Status codes of their answers."""


def bodies(model: Scorer, samples: Path, count: int) -> Iterator[tuple[str, tuple[str, str], bytes]]:
    """The address, a header and the content of bodies in all forms, in turn."""
    example = example_of(model.inputs)
    ads = {name: values * 70 for name, values in example["candidates"].items()}
    requests = [example, [example, example], {"requests": [example | {"candidates": ads}]}]
    texts = [json.dumps(each).encode() for each in requests]
    tensors = [tensors_of({**example["user"], **example["candidates"]})]
    stream = stream_of(pq.read_table(samples, columns=list(model.inputs.sources)).slice(0, 2))
    for number in range(count):
        draw = random.Random(number)
        if number % 3 == 0:
            yield "/v1/score", ("content-type", JSON_TYPE), mutated(draw, texts, JSON)
        elif number % 3 == 1:
            length, _, content = mutated(draw, tensors, TENSORS).partition(b"\n")
            yield "/v2/models/ctr/infer", (HEADER, length.decode("latin-1")), content
        else:
            yield "/v1/score", ("content-type", ARROW), mutated(draw, [stream], STREAM)


async def answer_of(app: Any, path: str, header: tuple[str, str], content: bytes) -> tuple[int, bytes]:
    """Call the application without a client: ten times as quick."""
    sent: list[dict[str, Any]] = []
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode(),
        "query_string": b"", "root_path": "", "scheme": "http", "server": ("scorer", 80), "client": ("test", 1),
        "headers": [(header[0].encode(), header[1].encode("latin-1"))], "state": {},
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], sent[1]["body"]


async def fuzz(scoring: Scoring, samples: Path, count: int) -> None:
    app, codes, process = scoring.app(), Counter(), psutil.Process()
    memory_mb: list[float] = []
    async with app.router.lifespan_context(app):
        while not scoring.live.is_ready:
            await asyncio.sleep(0.01)
        for number, body in enumerate(bodies(scoring.live.model, samples, count)):
            code, content = await answer_of(app, *body)
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
def test_no_damaged_body_is_a_500_and_none_stays_in_memory(bundle: Published, tmp_path: Path, count: int) -> None:
    settings = ServerSettings(model=bundle.url, name="ctr", cache_dir=tmp_path)
    asyncio.run(fuzz(scoring_of(BundleSource(settings)), bundle.samples, count))
