"""Clients of a Dask cluster, checks before one is used, and tasks that run on its workers."""

import asyncio
import contextlib
import ipaddress
import itertools
import json
import logging
import os
import signal
import socket
import struct
import sys
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Set
from concurrent.futures import CancelledError
from importlib.machinery import ModuleSpec
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar

import dask
import dask.system
from dask.typing import Key
from distributed import Client, Future, KilledWorker, LocalCluster, Worker, as_completed
from distributed.client import ClosedClientError
from distributed.comm.addressing import parse_address, parse_host_port
from distributed.comm.core import CommClosedError
from distributed.comm.core import connect as connect_comm
from distributed.comm.registry import backends
from distributed.protocol import pickle
from distributed.security import Security

from featurestore.console.output import progress_bar
from featurestore.errors import InvalidRowsError, KeyCollisionError, UserError
from pipeline import errors
from pipeline.problems import Problem

IN_FLIGHT_PER_THREAD = 3  # enough that no worker waits for the client
SENT_TOGETHER = 16  # in one message of the client, whose size is that of their arguments
END_S = 60.0  # at most, for tasks that are running when one has failed; each takes seconds
RETRIES = 1  # of a task that raised: a full disk stays full, a lost connection comes back
MISTAKES = (errors.PipelineError, KeyCollisionError, InvalidRowsError)  # of a user, or of the data: never retried


Part = TypeVar("Part")


class TaskError(Exception):
    """An error of ours in a task, which may be tried again; workers do not log it."""

    def __init__(self, error: UserError) -> None:
        super().__init__(error)
        self.error = error


class Killed:
    """The result of a task whose worker died again and again. Not proof: other tasks on that worker get this too."""


def run_tasks(
    client: Client, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]
) -> Generator[tuple[int, Any], None, None]:
    """Run `function(*call)` for each call on the cluster; yield (place of the call, result or Killed) as they finish.

    At most 3 per thread of the cluster are taken from `calls` and with the scheduler at once; the first ones go there
    together, which takes half of the time that one after the other does. The error of a task is raised here once
    nothing of the others runs any more, or after END_S: a folder that they write to can go. A task that was running on
    a lost worker starts again on another one.
    """
    end_s, waiting = END_S, iter(enumerate(calls))
    running: dict[Key, tuple[int, Future[Any]]] = {}
    finished = as_completed(loop=client.loop)  # by default that of the newest client of this process

    def start(count: int) -> None:
        first = itertools.islice(waiting, count)
        while together := list(itertools.islice(first, SENT_TOGETHER)):
            keys = [f"{function.__name__}-{uuid.uuid4().hex}" for _ in together]  # so the dashboard has its name
            packed = [pickle.dumps((function, call)) for _, call in together]
            futures = client.map(_attempt, packed, key=keys, retries=RETRIES, pure=False)
            running.update({future.key: (index, future) for (index, _), future in zip(together, futures, strict=True)})
            finished.update(futures)

    try:
        start(IN_FLIGHT_PER_THREAD * num_threads(client))
        for future in finished:
            index, _ = running.pop(future.key)
            result = _result(future)
            start(1)
            yield index, result
    except (KeyboardInterrupt, SystemExit):
        end_s = 0
        raise
    finally:
        client.cancel([future for _, future in running.values()])
        if running and end_s and client.status == "running":
            _wait_for_end(client, set(running), end_s)


def run_all(
    client: Client, title: str, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], advice: str
) -> list[Any]:
    """Return `function(*call)` of each call, in their order, with a bar called `title`.

    Raises as `run_tasks`; ClusterError with `advice` where workers die again and again.
    """
    results: list[Any] = [None] * len(calls)
    finished = run_tasks(client, function, calls)
    with progress_bar(title, len(calls)) as bar, contextlib.closing(finished):
        for place, result in finished:
            if isinstance(result, Killed):
                raise errors.ClusterError(Problem.DEADLY_TASK, title, place + 1, len(calls), advice)
            results[place] = result
            bar.advance(1)
    return results


def run_alone(client: Client, function: Callable[..., Any], *call: Any) -> Any:
    """Run one call while nothing else runs; return its result, or Killed, which is proof now."""
    return next(run_tasks(client, function, [call]))[1]


def neighbours(parts: Iterable[Part], sizes: Iterable[int], most: int) -> list[list[Part]]:
    """Put neighbouring parts together, up to `most` of their sizes; a larger part is by itself."""
    together: list[list[Part]] = []
    room = 0
    for part, size in zip(parts, sizes, strict=True):
        if not together or size > room:
            together.append([])
            room = most
        together[-1].append(part)
        room -= size
    return together


def num_threads(client: Client) -> int:
    """Count the threads of all workers, at least 1."""
    return max(1, sum(int(count) for count in client.nthreads().values()))


def _wait_for_end(client: Client, keys: Set[Key], end_s: float) -> None:
    """Return when cancelled tasks neither run nor wait on any worker, or after `end_s`; a lost scheduler has none."""
    last_s = time.monotonic() + end_s
    with contextlib.suppress(OSError):
        while time.monotonic() < last_s and (
            not keys.isdisjoint(itertools.chain(*client.processing().values()))  # the scheduler has not heard of it yet
            or any(client.run(_has_any, keys, on_error="ignore").values())
        ):
            time.sleep(0.01)


def _has_any(keys: Set[Key], dask_worker: Worker) -> bool:
    return not keys.isdisjoint(dask_worker.state.tasks)


def _attempt(packed: bytes) -> Any:
    """Return a mistake as a result: Dask would log a raised one with its traceback, and try again.

    The call comes packed, as the scheduler opens what it is sent, and would import Torch with our modules.
    """
    function, call = pickle.loads(packed)
    try:
        return function(*call)
    except MISTAKES as error:
        return error
    except UserError as error:
        raise TaskError(error) from error


def _result(future: Future[Any]) -> Any:
    if future.status == "cancelled":
        raise errors.ClusterError(Problem.SCHEDULER_LOST)
    error = future.exception()
    if isinstance(error, KilledWorker):
        return Killed()
    if isinstance(error, TaskError):
        raise error.error
    if error is not None:
        raise error
    result = future.result()
    if isinstance(result, MISTAKES):
        raise result
    return result


LOCAL_VARIABLE = "CROSSMEDIA_LOCAL_CLUSTER"  # JSON: the size of a local cluster, as `connect` takes it
CONNECT_TIMEOUT_S = 10.0
SEND_INTERVAL_S = 0.001
# The worker's profiler asks for the frames of all threads many times a second. On Python 3.11 that can stop the whole
# process for ever (python/cpython#106883: a garbage collection inside sys._current_frames waits for its own lock).
# And Dask has workers give memory back at every 64 kB, and so the C library remaps each larger array: samples took a
# fifth more of the processor's time by that, for an eighth less of memory.
WORKER_CONFIG = {
    "distributed.worker.profile.enabled": False,
    "distributed.worker.preload": ["pipeline.cluster"],
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": 64 << 20,
    "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": 32 << 20,
}


@contextlib.contextmanager
def connect(timeout_s: float = CONNECT_TIMEOUT_S, **size: Any) -> Iterator[Client]:
    """Open a client of the configured scheduler, else of a local cluster; all that was started is closed at the end.

    A scheduler is configured by DASK_SCHEDULER_ADDRESS (dask-submit sets it for its script), DASK_SCHEDULER_FILE,
    or the same names in Dask's configuration; it stays running, and `size`, as `local_cluster` takes it, does not count
    then. Sizes that were given to dask-submit, or as options of a job, come before all of these. Raises ClusterError,
    before anything is sent, and in the block in place of Dask's error when the scheduler dies.
    """
    asked = os.environ.get(LOCAL_VARIABLE)
    address = None if asked else configured_address(timeout_s)
    if address is not None:
        check_address(address)
        with ended_by_sigterm(), _loss_named(), open_client(address, timeout_s) as client:
            yield _prompt(client)
        return
    size |= json.loads(asked) if asked else {}
    with ended_by_sigterm(), _loss_named(), local_cluster(**size) as cluster, Client(cluster) as client:
        if asked:
            print_cluster(client)
        yield _prompt(client)


def print_cluster(client: Client) -> None:
    """Print where a cluster is, and its size, on stderr: stdout is the script's."""
    if "dashboard" in client.scheduler_info()["services"]:
        sys.stderr.write(f"note: dashboard {client.dashboard_link}\n")
    threads = client.nthreads()
    size = f"workers {len(threads)}, threads {sum(threads.values())}"
    sys.stderr.write(f"note: scheduler {client.scheduler_info()['address']}, {size}\n")


def _prompt(client: Client) -> Client:
    """Send tasks at once: by default a client that has just forgotten those of one stage keeps the next for 10 ms."""
    if client.scheduler_comm is not None:
        client.scheduler_comm.interval = SEND_INTERVAL_S
    return client


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as an error does, so that resources are closed, unless the program handles it.

    The first process of a container would not end at all: there the signal does nothing by itself.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as a shell says it
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _loss_named() -> Iterator[None]:
    """Raise one error when the scheduler is lost, in place of the client's log and one of many errors."""
    log = logging.getLogger("distributed.client")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except (CommClosedError, CancelledError, ClosedClientError) as error:
        raise errors.ClusterError(Problem.SCHEDULER_LOST) from error
    finally:
        log.setLevel(level)


def configured_address(timeout_s: float = CONNECT_TIMEOUT_S) -> str | None:
    """Find the scheduler's address in the environment or Dask's configuration; an address goes before a file."""
    address = os.environ.get("DASK_SCHEDULER_ADDRESS") or dask.config.get("scheduler-address", None)
    if address:
        return str(address)
    file = os.environ.get("DASK_SCHEDULER_FILE") or dask.config.get("scheduler-file", None)
    return address_in_file(Path(file), timeout_s) if file else None


def address_in_file(path: Path, timeout_s: float) -> str:
    """Read the address that `dask scheduler --scheduler-file PATH` writes; wait for it, as it may be starting.

    Raises SchedulerUnreachableError when the file has no address after `timeout_s`.
    """
    from featurestore.storage.local import read_regular  # not above: pipeline.cluster.submit says why

    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return str(json.loads(read_regular(path))["address"])
        except FileNotFoundError:
            reason = "there is no such file"
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"not a scheduler file: {error!r}"
        if time.monotonic() > deadline:
            raise errors.SchedulerUnreachableError(
                Problem.NO_SCHEDULER, f"the one of {path}", f"{reason}, after {timeout_s:g} s"
            )
        time.sleep(0.05)


@contextlib.contextmanager
def open_client(address: str, timeout_s: float = CONNECT_TIMEOUT_S) -> Iterator[Client]:
    """Open a client of the running scheduler at `address`, which stays running.

    Raises ClusterError.
    """
    try:
        asyncio.run(asyncio.wait_for(_shake_hands(address, timeout_s), 2 * timeout_s))
        client = Client(address, timeout=timeout_s)
    except TypeError as error:  # so says distributed.comm where it has no certificates
        raise errors.ClusterError(Problem.NO_CERTIFICATES, address) from error
    except (MemoryError, struct.error) as error:  # of the size that other words would have as a message of Dask
        raise errors.SchedulerUnreachableError(Problem.NO_SCHEDULER, address, Problem.NOT_A_SCHEDULER) from error
    except (OSError, ValueError) as error:  # ValueError: an unknown protocol
        reason = str(error) or Problem.SILENT.of(2 * timeout_s)  # wait_for's TimeoutError has no text
        raise errors.SchedulerUnreachableError(Problem.NO_SCHEDULER, address, reason) from error
    with client:
        yield client


async def _shake_hands(address: str, timeout_s: float) -> None:
    """Connect once, as Client does; but that waits for ever where a service is not a scheduler, and stays half open."""
    comm = await connect_comm(address, timeout=timeout_s, **Security().get_connection_args("client"))
    await comm.close()


@contextlib.contextmanager
def _interrupt_blocked() -> Iterator[None]:
    """Let the threads and processes that start in here never see SIGINT, so that the command ends in its own way.

    The mask is inherited by what they start themselves, also later.
    """
    resource_tracker.ensure_running()  # multiprocessing would start it with the first process, and unblock SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _main_not_repeated() -> Iterator[None]:
    """Let no new process run the program's main file again, which has jobs without an `if __name__ == "__main__"`."""
    main = sys.modules["__main__"]
    spec, main.__spec__ = main.__spec__, ModuleSpec("__main__", None)
    try:
        yield
    finally:
        main.__spec__ = spec


@contextlib.contextmanager
def local_cluster(
    workers: int | None = None, threads_per_worker: int | None = None, memory_limit: str | int | None = None
) -> Iterator[LocalCluster]:
    """Start a scheduler and worker processes on loopback, closed at the end; the dashboard has a free port.

    Without numbers it is one worker with all cores as threads, which suits torch: one copy of a network, batches
    that share it. `threads_per_worker` is by default an equal part of the cores; `memory_limit` is per worker.
    """
    num_workers = workers or 1
    with _main_not_repeated():  # also where a worker starts again
        with dask.config.set(WORKER_CONFIG), _interrupt_blocked():
            cluster = LocalCluster(
                n_workers=num_workers,
                threads_per_worker=threads_per_worker or max(1, dask.system.CPU_COUNT // num_workers),
                processes=True,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                memory_limit=memory_limit or "auto",
                silence_logs=logging.ERROR,
            )
        with cluster:
            yield cluster


SAFE_PROTOCOLS = ("tls", "wss", "inproc")  # encrypted, or inside this process
INSECURE_KEY = "crossmedia.insecure-scheduler"  # of Dask's configuration
INSECURE_VARIABLE = "DASK_CROSSMEDIA__INSECURE_SCHEDULER"  # the same as an environment variable
IMPORT_OURS = "import featurestore, pipeline"


def check_address(address: str, insecure: bool = False) -> None:
    """Raise InsecureSchedulerError unless `address` is encrypted, or every IP of its host is loopback.

    Not where a user has accepted it: by `insecure` (dask-submit's option), or for jobs and all by Dask's
    configuration. Raises SchedulerUnreachableError when the host's name has no IP, or the address no meaning.
    """
    if insecure or dask.config.get(INSECURE_KEY, False) in (True, 1):
        return
    try:
        protocol, location = parse_address(address)
        if protocol in SAFE_PROTOCOLS:
            return
        if protocol not in backends:
            raise ValueError(Problem.UNKNOWN_PROTOCOL.of(protocol, ", ".join(sorted(backends))))
        host, _ = parse_host_port(location, 0)
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise errors.SchedulerUnreachableError(Problem.NO_SCHEDULER, address, error) from error
    if not all(ipaddress.ip_address(sockaddr[0]).is_loopback for *_, sockaddr in found):
        raise errors.InsecureSchedulerError(Problem.INSECURE_SCHEDULER, address, INSECURE_VARIABLE)


def wait_for_workers(client: Client, address: str, count: int, timeout_s: float) -> None:
    """Return once `count` workers are there. Raises ClusterError after `timeout_s`."""
    if count == 0:
        return
    try:
        client.wait_for_workers(count, timeout=timeout_s)
    except TimeoutError as error:
        raise errors.ClusterError(Problem.TOO_FEW_WORKERS, len(client.nthreads()), count, address, timeout_s) from error


def check_packages(client: Client) -> None:
    """Raise ClusterError, with the reason, for workers that cannot import our packages.

    `exec` and not a function of ours is sent: to read that, the worker would have to import us.
    """
    answers = client.run(exec, IMPORT_OURS, {}, on_error="return")
    failures = [f"{worker}: {answer!r}" for worker, answer in answers.items() if isinstance(answer, Exception)]
    if failures:
        raise errors.ClusterError(Problem.NOT_INSTALLED, len(failures), "; ".join(failures[:3]))
