"""The server's application without sockets: an httpx2 client that calls it in this process."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
from starlette.applications import Starlette

from serving.http.app import Scoring
from serving.http.live import BundleSource
from serving.settings import ServerSettings
from tests.serving.http.fakes import FakeSource, write_state

BASE = "http://scorer"


def scoring_of(source: BundleSource, tokens: list[str] | None = None, **settings: Any) -> Scoring:
    """The parts of a server with these settings."""
    failures: list[Exception] = []
    scoring = Scoring(ServerSettings(model="-", name="ctr", **settings), source, failures.append, tokens=tokens)
    scoring.failures = failures
    return scoring


@asynccontextmanager
async def client_of(scoring: Scoring, wait: bool = True) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the running application, by default once its model is loaded."""
    app = scoring.app()
    starlette = app if isinstance(app, Starlette) else app.app
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with starlette.router.lifespan_context(starlette), httpx2.AsyncClient(transport=transport) as client:
        client.base_url = BASE
        while wait and not scoring.live.is_ready:
            await asyncio.sleep(0.005)
        yield client


def run_with(
    folder: Path, test: Callable[[httpx2.AsyncClient, Scoring], Awaitable[None]], version: int = 3, **settings: Any
) -> None:
    """Run an asynchronous test against a fake model."""
    state = write_state(folder, version=version, vectors={"images": 7})

    async def run() -> None:
        scoring = scoring_of(FakeSource(state), **settings)
        async with client_of(scoring) as client:
            await test(client, scoring)

    asyncio.run(run())
