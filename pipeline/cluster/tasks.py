"""Many equal tasks on a Dask cluster: a bounded number at once, and lost workers distinguished from bad input."""

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Sequence, Set
from typing import Any

from dask.typing import Key
from distributed import Client, Future, KilledWorker, Worker, as_completed
from distributed.protocol import pickle

from featurestore.console.output import progress_bar
from featurestore.errors import InvalidRowsError, KeyCollisionError
from pipeline.errors import SCHEDULER_LOST, ClusterError, PipelineError

IN_FLIGHT_PER_THREAD = 3  # enough that no worker waits for the client
SENT_TOGETHER = 16  # in one message of the client, whose size is that of their arguments
END_S = 60.0  # that `run_all` waits at most for tasks that are running when one has failed; each takes seconds
RETRIES = 1  # of a task that raised: a full disk stays full, a lost connection comes back
MISTAKES = (PipelineError, KeyCollisionError, InvalidRowsError)  # of a person, or of the data: never tried again


class Killed:
    """The result of a task whose worker died again and again. Not proof: other tasks on that worker get this too."""


def run_tasks(
    client: Client,
    function: Callable[..., Any],
    calls: Iterable[tuple[Any, ...]],
    in_flight: int | None = None,
    end_s: float = 0,
) -> Generator[tuple[int, Any], None, None]:
    """Run `function(*call)` for each call on the cluster; yield (place of the call, result or Killed) as they finish.

    At most `in_flight` are taken from `calls` and with the scheduler at once (default: 3 per thread of the cluster);
    the first ones go there together, which takes half of the time that one after the other does. The error of a task
    is raised here and the others are cancelled; those that are running have `end_s` seconds to end before. A task
    that was running on a lost worker starts again on another one.
    """
    waiting = iter(enumerate(calls))
    running: dict[Key, tuple[int, Future[Any]]] = {}
    finished = as_completed()

    def start(count: int) -> None:
        first = itertools.islice(waiting, count)
        while together := list(itertools.islice(first, SENT_TOGETHER)):
            keys = [f"{function.__name__}-{uuid.uuid4().hex}" for _ in together]  # so the dashboard has its name
            packed = [pickle.dumps((function, call)) for _, call in together]
            futures = client.map(_attempt, packed, key=keys, retries=RETRIES, pure=False)
            running.update({future.key: (index, future) for (index, _), future in zip(together, futures, strict=True)})
            finished.update(futures)

    try:
        start(in_flight or IN_FLIGHT_PER_THREAD * num_threads(client))
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

    When one fails, nothing of the others runs any more once the error is here: a folder that they write to can go.
    Raises as `run_tasks`; ClusterError with `advice` where workers die again and again.
    """
    results: list[Any] = [None] * len(calls)
    finished = run_tasks(client, function, calls, end_s=END_S)
    with progress_bar(title, len(calls)) as bar, contextlib.closing(finished):
        for place, result in finished:
            if isinstance(result, Killed):
                raise ClusterError(
                    f"{title}: task {place + 1} of {len(calls)} brings the workers down, most likely for lack of"
                    f" memory; {advice}"
                )
            results[place] = result
            bar.advance(1)
    return results


def run_alone(client: Client, function: Callable[..., Any], *call: Any) -> Any:
    """Run one call while nothing else runs; return its result, or Killed, which is proof now."""
    return next(run_tasks(client, function, [call], in_flight=1))[1]


def num_threads(client: Client) -> int:
    """Count the threads of all workers, at least 1."""
    return max(1, sum(int(count) for count in client.nthreads().values()))


def _wait_for_end(client: Client, keys: Set[Key], end_s: float) -> None:
    """Return when cancelled tasks neither run nor wait on any worker, or after `end_s`; a lost scheduler has none."""
    last_s = time.monotonic() + end_s
    with contextlib.suppress(OSError):
        while not keys.isdisjoint(itertools.chain(*client.processing().values())) and time.monotonic() < last_s:
            time.sleep(0.01)  # the scheduler has not heard of it yet; then it sends none of them to a worker any more
        client.run(_ended, keys, max(0.0, last_s - time.monotonic()), on_error="ignore")


async def _ended(keys: Set[Key], end_s: float, dask_worker: Worker) -> None:
    """Return when this worker has none of the tasks any more, or after `end_s`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(end_s):
            while not keys.isdisjoint(dask_worker.state.tasks):
                await asyncio.sleep(0.01)


def _attempt(packed: bytes) -> Any:
    """Return a mistake as a result: Dask would log a raised one with its traceback, and try again.

    The call comes packed, as the scheduler opens what it is sent, and would import Torch with our modules.
    """
    function, call = pickle.loads(packed)
    try:
        return function(*call)
    except MISTAKES as error:
        return error


def _result(future: Future[Any]) -> Any:
    if future.status == "cancelled":
        raise ClusterError(SCHEDULER_LOST)
    error = future.exception()
    if isinstance(error, KilledWorker):
        return Killed()
    if error is not None:
        raise error
    result = future.result()
    if isinstance(result, MISTAKES):
        raise result
    return result
