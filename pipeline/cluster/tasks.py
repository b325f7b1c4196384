"""Many equal tasks on a Dask cluster: a bounded number in flight, and lost workers told apart from bad input."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dask.typing import Key
from distributed import Client, Future, KilledWorker, as_completed

from pipeline.errors import SCHEDULER_LOST, ClusterError

IN_FLIGHT_PER_THREAD = 3  # enough that no worker waits for the client
RETRIES = 1  # of a task that raised: a full disk stays full, a lost connection comes back


class Killed:
    """The result of a task whose worker died again and again. Not proof: tasks beside a guilty one get this too."""


def run_tasks(
    client: Client, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], in_flight: int | None = None
) -> Iterator[tuple[int, Any]]:
    """`function(*call)` for each call on the cluster: (place of the call, result or Killed), as they finish.

    At most `in_flight` are with the scheduler at once (default: 3 per thread of the cluster). The error of a task is
    raised here and the others are cancelled. A task that was running on a lost worker starts again on another one.
    """
    waiting = iter(enumerate(calls))
    running: dict[Key, tuple[int, Future[Any]]] = {}
    finished = as_completed()

    def start_next() -> None:
        for index, call in waiting:
            future = client.submit(function, *call, pure=False, retries=RETRIES)
            running[future.key] = index, future
            finished.add(future)
            return

    try:
        for _ in range(in_flight or IN_FLIGHT_PER_THREAD * num_threads(client)):
            start_next()
        for future in finished:
            index, _ = running.pop(future.key)
            result = _result(future)
            start_next()
            yield index, result
    finally:
        client.cancel([future for _, future in running.values()])


def run_alone(client: Client, function: Callable[..., Any], *call: Any) -> Any:
    """One call while nothing else runs: its result, or Killed, which is proof now."""
    return next(run_tasks(client, function, [call], in_flight=1))[1]


def num_threads(client: Client) -> int:
    """Threads of all workers, at least 1."""
    return max(1, sum(int(count) for count in client.nthreads().values()))


def _result(future: Future[Any]) -> Any:
    if future.status == "cancelled":
        raise ClusterError(SCHEDULER_LOST)
    error = future.exception()
    if isinstance(error, KilledWorker):
        return Killed()
    if error is not None:
        raise error
    return future.result()
