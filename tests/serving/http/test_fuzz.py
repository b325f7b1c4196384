"""Thousands of damaged bodies: each gets an answer that is no 500, and memory does not grow."""

import asyncio
import gc
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from serving.http.app import Scoring
from serving.http.live import BundleSource
from serving.settings import ServerSettings
from tests.serving.http.conftest import Published
from tests.serving.http.fuzz import ALLOWED, FuzzBody, bodies
from tests.serving.http.in_process import scoring_of


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
