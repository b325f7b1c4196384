"""Horovod's own store of texts, in the process that started the ranks: where they meet before Horovod connects them.

Horovod connects its ranks by Gloo, which ends the process (SIGABRT) where one does not come for 30 s. Here they wait
for each other in sight of their deadline.
"""

import itertools
import os
import time
from collections.abc import Callable
from http.client import HTTPException

from trainer.comm.lateness import Answer, in_time
from trainer.errors import LateRankError, LostRankError

_ADDRESS = ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT")
_ANSWER_S = 5.0
"""How long an answer may take: the store may be in a process that is stopped."""
_times = itertools.count()


def put(key: str, value: str, scope: str = "late") -> None:
    """Write a text; nothing where the store is gone."""
    _ask(lambda: _put(key, value, scope))


def get(key: str, scope: str = "late") -> str | None:
    """Read a text; None where nobody wrote, or the store is gone."""
    answer, _ = _ask(lambda: _get(key, scope))
    return answer


def meet(rank: int, size: int, deadline_s: float) -> None:
    """Wait until all ranks have come here. Each asks for one key, but rank 0, which asks for one of each rank.

    Raises LostRankError where the store is out of reach, LateRankError where ranks do not come, after `deadline_s`.
    """
    scope = f"meeting.{next(_times)}"  # several Comms of one process come one after the other
    end_s, pause_s, number, is_written = time.monotonic() + deadline_s, 1e-3, 0, False
    awaited = [str(each) for each in range(size)] if rank == 0 else ["all"]
    while number < len(awaited):
        if not is_written:
            _, trouble = _ask(lambda: _put(str(rank), "here", scope))
            is_written = trouble is None
        if is_written and get(awaited[number], scope) is not None:
            number += 1
            continue
        if time.monotonic() > end_s:
            raise _absence(rank, size, deadline_s, scope) if is_written else _no_store(rank, deadline_s, trouble)
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, 0.1)
    if rank == 0:
        put("all", "here", scope)


def _absence(rank: int, size: int, deadline_s: float, scope: str) -> LateRankError:
    late = [each for each in range(size) if get(str(each), scope) is None] or [0]  # which has to say that all are there
    return LateRankError(
        f"rank {rank} has waited more than run.deadline_s={deadline_s:g} for the others to start; not there: "
        f"{', '.join(f'rank {each}' for each in late)}. See what that rank is doing (py-spy dump), or raise "
        "run.deadline_s, and start again"
    )


def _no_store(rank: int, deadline_s: float, trouble: str | None) -> LostRankError:
    return LostRankError(
        f"rank {rank} did not reach the process that started the ranks within run.deadline_s={deadline_s:g}, at "
        f"{':'.join(_ADDRESS)}={':'.join(_place())}: {trouble}"
    )


def _ask(question: Callable[[], Answer]) -> tuple[Answer | None, str | None]:
    """Return the answer, or None and why there is none."""
    try:
        return in_time(question, _ANSWER_S), None
    except TimeoutError:
        return None, "no answer"
    except (RuntimeError, OSError, HTTPException) as error:
        return None, str(error.args[-1]) if error.args else type(error).__name__


def _put(key: str, value: str, scope: str) -> None:
    from horovod.runner.http.http_client import put_data_into_kvstore

    put_data_into_kvstore(*_place(), scope, key, value)


def _get(key: str, scope: str) -> str:
    from horovod.runner.http.http_client import read_data_from_kvstore

    return str(read_data_from_kvstore(*_place(), scope, key))


def _place() -> list[str]:
    return [os.environ.get(name, "") for name in _ADDRESS]
