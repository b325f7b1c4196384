"""The application: its routes, and the handling of a request from its headers to its answer, with metrics.

It uses starlette, the thinnest maintained layer with routes over ASGI; no validating framework is between orjson and
the scorer. Each error is a JSON object {"error": "one message with field, value and the way out"}.
"""

import asyncio
import contextlib
import gc
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from serving.errors import NotFiniteError, RequestError, RequestTooLargeError
from serving.http.access import TokenGuard, error_response, json_response, logger
from serving.http.codec import JSON, ArrowBody, JsonBody
from serving.http.inference import HEADER, SERVER, Body, TensorBody, model_metadata
from serving.http.limits import BODIES_AT_ONCE, CLOSE, BodyLimits, RefusedError
from serving.http.live import BundleSource, LiveModel
from serving.http.metrics import ServingMetrics
from serving.http.openapi import EXAMPLE, command_of, description, example_of
from serving.http.queue import ScoringQueue
from serving.problems import Problem
from serving.scoring.sent import ARROW
from serving.settings import ServerSettings

Endpoint = Callable[[Request], Awaitable[Response]]
_MODEL = "/v2/models/{name}"
_VERSION = "/v2/models/{name}/versions/{version}"


@dataclass
class Scoring:
    """All parts of a worker's server, put together; `app` answers with them."""

    settings: ServerSettings
    source: BundleSource
    on_ready: Callable[[], None] | None = None
    """Called, in one of several workers, when it can answer; it listens only then, as others can answer meanwhile."""
    tokens: list[str] | None = None
    metrics: ServingMetrics = field(default_factory=ServingMetrics)

    def __post_init__(self) -> None:
        settings = self.settings
        self.live = LiveModel(self.source, self.metrics, settings.poll_s)
        self.queue = ScoringQueue(self.live, settings)
        self.stopping = False
        self.failure: Exception | None = None
        """Why the first model cannot be loaded."""

    def app(self) -> ASGIApp:
        """Build the application. Its lifespan loads the model, scores, and polls for newer models."""
        self._routes = routes = [
            ("GET", "/", self.about),
            ("GET", "/openapi.json", self.openapi),
            ("GET", EXAMPLE, self.example),
            ("POST", "/v1/score", self.score),
            ("GET", "/metrics", self.prometheus_metrics),
            ("GET", "/v2/health/live", self.is_live),
            ("GET", "/v2/health/ready", self.is_ready),
            ("GET", "/v2", self.server_metadata),
            *[("GET", path, self.model_metadata) for path in (_MODEL, _VERSION)],
            *[("GET", f"{path}/ready", self.model_is_ready) for path in (_MODEL, _VERSION)],
            *[("POST", f"{path}/infer", self.infer) for path in (_MODEL, _VERSION)],
        ]
        app = Starlette(
            routes=[Route(path, self._measured(path, endpoint), methods=[method]) for method, path, endpoint in routes],
            middleware=[
                Middleware(
                    BodyLimits,
                    max_bytes=self.settings.max_body_bytes,
                    max_held_bytes=BODIES_AT_ONCE * self.settings.max_body_bytes,
                    timeout_s=self.settings.read_timeout_s,
                    way_out="send fewer requests or candidates at a time, or raise the server's --max-body-mb",
                )
            ],
            exception_handlers={HTTPException: self._no_route},
            lifespan=self._lifespan,
        )
        app.router.redirect_slashes = False  # behind a proxy the redirect would name an address without TLS
        return app if self.tokens is None else TokenGuard(app, self.tokens, partial(self._count_other, 401))

    async def about(self, request: Request) -> Response:
        """Describe the server and its model."""
        name, identity = self.settings.model_name, self.live.model.identity if self.live.is_ready else None
        return json_response(
            {
                "name": name,
                "what": "click probabilities of candidates for a user: POST /v1/score, or the Open Inference Protocol",
                "version": identity and identity.version,
                "vectors": identity and dict(identity.vectors),
                "example": identity and example_of(self.live.model.inputs),
                "try": command_of(f"{request.url.scheme}://{request.url.netloc}", with_token=self.tokens is not None),
                "addresses": [f"{method} {path}" for method, path, _ in self._routes],
            }
        )

    async def example(self, request: Request) -> Response:
        """Return a request that the model in use can score."""
        return json_response(example_of(self.live.model.inputs))

    async def openapi(self, request: Request) -> Response:
        """Describe all addresses, and the columns of requests, as OpenAPI."""
        routes = [(method, path, endpoint.__doc__ or "") for method, path, endpoint in self._routes]
        return json_response(description(self.settings.model_name, _own_version(), self.live.model.inputs, routes))

    async def score(self, request: Request) -> Response:
        """Score the requests of a JSON or Arrow body."""
        kind = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
        if kind not in (JSON, ARROW):
            raise RefusedError(415, Problem.OTHER_CONTENT_TYPE, kind[:60], JSON, ARROW)
        content = await self._read(request)
        logits = _asks_for_logits(request) if request.scope["query_string"] else False
        return await self._scored(request, ArrowBody(content) if kind == ARROW else JsonBody(content, logits), content)

    async def infer(self, request: Request) -> Response:
        """Score the tensors of an inference request."""
        self._check_name(request)
        content = await self._read(request)
        body = TensorBody(content, request.headers.get(HEADER), self.settings.model_name)
        return await self._scored(request, body, content)

    async def prometheus_metrics(self, request: Request) -> Response:
        """Return the metrics in Prometheus' text format."""
        if self.live.is_ready:
            self.metrics.record_age(self.live.model)
        self.metrics.queue.set(len(self.queue))
        self.metrics.predicted.set(self.queue.predicted_wait_s)
        self.metrics.flush()
        text = await asyncio.to_thread(self.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def is_live(self, request: Request) -> Response:
        """Answer that the process is alive."""
        return json_response({"live": True})

    async def is_ready(self, request: Request) -> Response:
        """Return whether a model is warmed up and the server is not stopping."""
        ready = self.can_answer()
        return json_response({"ready": ready}, 200 if ready else 503)

    async def server_metadata(self, request: Request) -> Response:
        """Describe the server."""
        return json_response(SERVER | {"version": _own_version()})

    async def model_metadata(self, request: Request) -> Response:
        """Describe the model and its tensors."""
        self._check_name(request)
        model = self.live.model
        return json_response(model_metadata(self.settings.model_name, model.identity.version, model.inputs.sources))

    async def model_is_ready(self, request: Request) -> Response:
        """Return whether the model is warmed up."""
        self._check_name(request)
        ready = self.live.is_ready
        return json_response({"name": self.settings.model_name, "ready": ready}, 200 if ready else 503)

    def can_answer(self) -> bool:
        """Return whether a model is warmed up and the server is not stopping."""
        return self.live.is_ready and not self.stopping

    async def _read(self, request: Request) -> bytes:
        start_s = time.perf_counter()
        if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
            raise RefusedError(415, Problem.ENCODED, encoding[:40], **CLOSE)
        content = await request.body()
        request.state.read_s = time.perf_counter() - start_s
        return content

    async def _scored(self, request: Request, body: Body, content: bytes) -> Response:
        scores = await self.queue.score(body, len(content))
        start_s = time.perf_counter()
        answer = body.answer(scores)
        scores.stages["read"] = request.state.read_s
        scores.stages["encode"] = encode_s = time.perf_counter() - start_s
        await self.queue.pace.pause(encode_s)
        self.metrics.record_scored(scores)
        return answer

    def _check_name(self, request: Request) -> None:
        """Raise RefusedError (404) if the address names another model or version."""
        name, asked = request.path_params["name"], request.path_params.get("version")
        if name != self.settings.model_name:
            raise RefusedError(404, Problem.OTHER_MODEL, name[:60], self.settings.model_name)
        if asked is not None and asked != (served := str(self.live.model.identity.version)):
            raise RefusedError(404, Problem.NOT_SERVED, asked[:20], served)

    def _measured(self, route: str, endpoint: Endpoint) -> Endpoint:
        """Wrap an endpoint: turn errors into answers, and count and time the answer."""

        async def answered(request: Request) -> Response:
            start_s = time.perf_counter()
            try:
                response = await endpoint(request)
            except Exception as error:
                response = response_of(error)
            if self.stopping:  # the client should not send its next request on a connection that is about to close
                response.headers["Connection"] = "close"
            self.metrics.record_answer(route, response.status_code, time.perf_counter() - start_s)
            return response

        return answered

    async def _no_route(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        self._count_other(error.status_code)
        where, headers = f"{request.method} {request.url.path[:100]}", error.headers or {}
        message = Problem.UNKNOWN_ADDRESS.of(where, error.detail)
        if error.status_code == 405:
            message = Problem.OTHER_METHOD.of(where, error.detail, headers.get("Allow", "another"))
        return error_response(error.status_code, message, headers)

    def _count_other(self, code: int) -> None:
        """Count an answer that does not come from a route."""
        self.metrics.requests.labels("other", code).inc()

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Load the model; a single worker answers health checks meanwhile, one of several waits for the model first."""
        task = asyncio.create_task(self._work())
        try:
            while self.on_ready is not None and not self.live.is_ready and not task.done():
                await asyncio.sleep(0.02)
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            self.live.close()

    async def _work(self) -> None:
        try:
            await self.live.start()
        except Exception as error:
            self.failure = error
            return
        await asyncio.to_thread(gc.collect)
        gc.freeze()  # objects loaded so far are not scanned again, which takes a fifth of a second
        if self.on_ready is not None:
            self.on_ready()
        await asyncio.gather(self.queue.run(), self.live.run(), self.metrics.flush_often())


def _asks_for_logits(request: Request) -> bool:
    """Read the query parameters. Raises RefusedError for unknown ones, so that a typo is not ignored."""
    words = dict(request.query_params)
    answer = words.pop("logits", "false")
    if words or answer not in ("true", "false"):
        raise RefusedError(400, Problem.UNKNOWN_PARAMETER, request.url.query[:60])
    return answer == "true"


def _own_version() -> str:
    try:
        return version("crossmedia")
    except PackageNotFoundError:  # run from its sources
        return "0"


_STATUSES = {RequestTooLargeError: 413, NotFiniteError: 422}


def response_of(error: Exception) -> Response:
    """Turn an error into its answer: 400, 413 or 422 for a request, or a RefusedError's status.

    Any other error is a bug: 500. The log gets the traceback without the message, which may contain user data."""
    if isinstance(error, RefusedError):
        return error_response(error.status, str(error), error.headers)
    if isinstance(error, RequestError):
        return error_response(_STATUSES.get(type(error), 400), str(error))
    logger.error("bug: %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)).rstrip())
    return error_response(500, Problem.BUG.of(type(error).__name__))
