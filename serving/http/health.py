"""Health checks on a port of their own: a thread answers them, so that no client of the scorer's port is before them.

A client that opens a thousand connections at once keeps the event loop for 0.2 s, and a check on a new connection waits
for its turn behind them.
"""

import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.http import access
from serving.settings import ServerSettings


@contextmanager
def health_port(settings: ServerSettings, is_live: Callable[[], bool], is_ready: Callable[[], bool]) -> Iterator[None]:
    """Answer health checks on `--health-port`, where one is given, until the end of the block; plain HTTP, no token.

    Raises ListenError if the port is taken."""
    if settings.health_port is None:
        yield
        return
    paths = dict(zip(access.OPEN_PATHS, (is_live, is_ready), strict=True))
    app = Starlette(routes=[Route(path, _answer(path.rpartition("/")[2], holds)) for path, holds in paths.items()])
    with access.listen(settings, "health_port") as listener:
        server = uvicorn.Server(access.uvicorn_config(settings, None, app))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="health")
        thread.start()
        try:
            yield
        finally:
            server.should_exit = True
            thread.join()


def _answer(name: str, holds: Callable[[], bool]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        is_so = holds()
        return Response(orjson.dumps({name: is_so}), 200 if is_so else 503, media_type="application/json")

    return answer
