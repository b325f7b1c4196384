"""The processes of the server: one, or a supervisor and several that share one listening socket.

Uvicorn's own supervisor (`uvicorn.supervisors.Multiprocess`) is not enough: it ignores a second signal while it waits
for workers to drain, it takes a worker that is busy loading a model for a hung one, its new workers accept connections
before they can score, and it ends with exit code 0 if no worker could start.

One of several workers accepts connections only when its model is warm, so that until then the kernel's queue goes to
workers that can answer. A worker that died is restarted at once, and with growing pauses if it dies before it is ready.
SIGTERM and SIGINT drain; a second signal ends at once.
"""

import multiprocessing
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from featurestore.console.commandline import STOPPED, say_error
from featurestore.console.memory import bound_freed_memory
from featurestore.errors import FAILED, UserError
from serving.http import access
from serving.http.access import logger
from serving.http.app import Scoring
from serving.http.limits import allow_connections
from serving.http.live import BundleSource
from serving.http.metrics import FOLDER_VARIABLE
from serving.settings import ServerSettings

MakeSource = Callable[[ServerSettings], BundleSource]

_MAX_PAUSE_S = 30.0
_LONGEST_ROUND_S = 10.0
"""An event loop that has not come round for so long hangs."""
_LARGEST_KEPT = 32 << 20
"""Bytes; more glibc does not allow."""
_TICKS_TO_STOP = 5
"""Ten are a second."""
_TICKS_OF_BACKLOG = 2
"""The last of these ticks, in which new connections are refused."""
_TICKS_OF_PATIENCE = 10
"""Most ticks to wait for the first request of a connection that is already open."""


def serve(settings: ServerSettings, make_source: MakeSource = BundleSource) -> int:
    """Listen and answer until a signal, and return the exit code.

    Raises ServerSettingsError or TokenFileError for a file that does not work, ListenError if the port is taken, and
    the source's errors if the first model cannot be loaded.
    """
    access.configure_logging()
    access.check_files(settings)
    listener = access.listen(settings)
    url = access.url_of(settings, listener)
    logger.info("listening on %s for model %s of %s", url, settings.model_name, settings.model)
    with listener:
        if settings.workers == 1:
            return run_worker(settings, listener, make_source)
        return WorkerSupervisor(settings, listener, make_source).run()


def run_worker(
    settings: ServerSettings,
    listener: socket.socket,
    make_source: MakeSource,
    on_ready: Callable[[], None] | None = None,
) -> int:
    """Answer on the listening socket in this process; return the exit code. `on_ready`: set for one of several."""
    bound_freed_memory(_LARGEST_KEPT)
    allow_connections()
    credentials = access.Credentials(settings)
    scoring = Scoring(settings, make_source(settings), on_ready, credentials.tokens)
    server = DrainingServer(scoring, credentials, listener)
    # Of several workers the supervisor answers health checks.
    with nullcontext() if on_ready else health_port(settings, server.is_live, scoring.can_answer):
        server.run(sockets=[listener])
    if scoring.failure is not None:
        raise scoring.failure
    logger.info("stopped")
    return 0


class DrainingServer(access.SecuredServer):
    """Uvicorn's server that drains at a first signal; a second one ends the process at once.

    One of several workers leaves the second signal to its supervisor, as a signal to the whole group reaches it twice.
    """

    def __init__(self, scoring: Scoring, credentials: access.Credentials, listener: socket.socket) -> None:
        super().__init__(scoring.settings, credentials, scoring.app())
        self._scoring, self._listener = scoring, listener
        self._ticks_left = _TICKS_TO_STOP
        self._round_s: float | None = None
        """When its event loop came round last; None until it has begun."""

    def is_live(self) -> bool:
        """Return whether its event loop does not hang."""
        return self._round_s is None or time.monotonic() - self._round_s < _LONGEST_ROUND_S

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain; end on a second signal."""
        if self._scoring.stopping and self._scoring.on_ready is None:
            os._exit(STOPPED)
        self._scoring.stopping = True

    async def on_tick(self, counter: int) -> bool:
        """Stop after a signal, or if the first model could not be loaded.

        For a few ticks after a signal every answer closes its connection, as a request sent while the server closes the
        connection would be lost. In the last ones new connections are refused, and open ones get their answer.
        """
        self._round_s = time.monotonic()
        if self._scoring.stopping:
            self._ticks_left -= 1
            if self._ticks_left == _TICKS_OF_BACKLOG and self._scoring.on_ready is None:
                access.stop_connecting(self._listener)  # of several workers, which share it, the supervisor does it
            is_patient = self._ticks_left > -_TICKS_OF_PATIENCE and self._has_new_connections()
            self.should_exit = self.should_exit or (self._ticks_left <= 0 and not is_patient)
        return await super().on_tick(counter) or self._scoring.failure is not None

    def _has_new_connections(self) -> bool:
        """Return whether a connection waits to be accepted, or was accepted and has not sent a request."""
        waiting = select.poll()
        waiting.register(self._listener, select.POLLIN)
        connections: Iterable[Any] = self.server_state.connections
        return bool(waiting.poll(0)) or any(each.cycle is None for each in connections)


@dataclass
class _Worker:
    process: SpawnProcess
    ready: Event
    pause_s: float = 0.0


@dataclass
class WorkerSupervisor:
    """Starts the workers, restarts those that died, and ends them all."""

    settings: ServerSettings
    listener: socket.socket
    make_source: MakeSource
    _workers: list[_Worker] = field(default_factory=list)
    _signals: int = 0

    def run(self) -> int:
        """Run until a signal or until no worker can start; returns the exit code."""
        folder = tempfile.mkdtemp(prefix="serving-metrics-")
        os.environ[FOLDER_VARIABLE] = folder  # spawned workers read it when they import prometheus_client
        with access.signals_handled(self._on_signal):
            try:
                self._workers = [self._start() for _ in range(self.settings.workers)]
                with health_port(self.settings, lambda: True, self._can_answer):
                    return self._watch(folder)
            finally:
                for worker in self._workers:
                    worker.process.kill()
                    worker.process.join()
                del os.environ[FOLDER_VARIABLE]
                shutil.rmtree(folder, ignore_errors=True)

    def _start(self, pause_s: float = 0.0) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ready = context.Event()
        arguments = (self.settings, self.listener, self.make_source, ready, pause_s)
        process = context.Process(target=_work, args=arguments, name="serving worker")
        process.start()
        return _Worker(process, ready, pause_s)

    def _can_answer(self) -> bool:
        return not self._signals and any(worker.ready.is_set() for worker in self._workers)

    def _watch(self, folder: str) -> int:
        ever_ready = False
        while True:
            wait([each.process.sentinel for each in self._workers if each.process.exitcode is None], timeout=0.2)
            ever_ready = ever_ready or any(worker.ready.is_set() for worker in self._workers)
            dead = [worker for worker in self._workers if worker.process.exitcode is not None]
            if self._signals:
                if self.listener.fileno() >= 0:
                    access.stop_connecting(self.listener)
                    self.listener.close()
                if len(dead) == len(self._workers):
                    return 0 if self._signals == 1 else STOPPED
                continue
            for worker in dead:
                code = worker.process.exitcode or 0
                if not ever_ready:
                    return code if code > 0 else FAILED
                self._replace(worker, code, folder)

    def _replace(self, worker: _Worker, code: int, folder: str) -> None:
        from prometheus_client.multiprocess import mark_process_dead

        pause_s = 0.0 if worker.ready.is_set() else min(_MAX_PAUSE_S, 2 * worker.pause_s or 1.0)
        mark_process_dead(worker.process.pid, path=folder)  # type: ignore[no-untyped-call]
        logger.error("worker %s ended with %d; starting another in %g s", worker.process.pid, code, pause_s)
        worker.process.join()
        self._workers[self._workers.index(worker)] = self._start(pause_s)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        for worker in self._workers:
            if worker.process.exitcode is None:
                (worker.process.terminate if self._signals == 1 else worker.process.kill)()


def _work(
    settings: ServerSettings, listener: socket.socket, make_source: MakeSource, ready: Event, pause_s: float
) -> None:
    """Run one of several workers; ends with its supervisor."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and the supervisor passes it on
    threading.Thread(target=_end_with_parent, daemon=True).start()
    access.configure_logging()
    time.sleep(pause_s)
    try:
        code = run_worker(settings, listener, make_source, ready.set)
    except UserError as error:
        say_error(error)
        code = error.exit_code
    sys.exit(code)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def health_port(settings: ServerSettings, is_live: Callable[[], bool], is_ready: Callable[[], bool]) -> Iterator[None]:
    """Answer health checks on `--health-port`, where one is given, until the end of the block; plain HTTP, no token.

    A thread answers them, so that no client of the scorer's port is before them: one that opens a thousand connections
    at once keeps the event loop for 0.2 s. Raises ListenError if the port is taken."""
    if settings.health_port is None:
        yield
        return
    checks = dict(zip(access.OPEN_PATHS, (is_live, is_ready), strict=True))

    async def answer(request: Request) -> Response:
        path, is_so = request.url.path, checks[request.url.path]()
        return access.json_response({path.rpartition("/")[2]: is_so}, 200 if is_so else 503)

    app = Starlette(routes=[Route(path, answer) for path in checks])
    with access.listen(settings, "health_port") as listener:
        server = uvicorn.Server(access.uvicorn_config(settings, None, app))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="health")
        thread.start()
        try:
            yield
        finally:
            server.should_exit = True
            thread.join()
