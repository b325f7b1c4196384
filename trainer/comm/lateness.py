"""Which ranks have not come to a collective in time: those that wait for them tell each other on a board."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_GRACE_S = 2.0
"""Between the ends of two ranks' patience: how long a rank waits for the others to say that they wait too."""
Answer = TypeVar("Answer")
_AFTER_A_LOSS = "start again, with run.resume=latest and the run's name where it has a checkpoint"


class Bulletin:
    """A board where ranks past their deadline say in which collectives they are.

    `put` and `get` are those of a store of texts that all ranks reach: the launcher's own. `get` returns None for a key
    that is not there; both swallow the errors of a store that is gone.
    A rank may wait in two collectives at once: that of its step, and that of the thread ahead.
    """

    def __init__(self, rank: int, put: Callable[[str, str], object], get: Callable[[str], str | None]) -> None:
        self._rank, self._put, self._get = rank, put, get

    def lateness(self, name: str, size: int, deadline_s: float) -> str:
        """Say which of `size` ranks have not come to collective `name` before its deadline, and where they are."""
        self._put(f"{self._rank}.{name}", name)
        self._put(str(self._rank), name)
        time.sleep(_GRACE_S)
        late = [rank for rank in range(size) if rank != self._rank and self._get(f"{rank}.{name}") is None]
        where = {rank: self._get(str(rank)) for rank in late}
        ranks = ", ".join(f"rank {rank}" + (f" (in {at})" if at else "") for rank, at in where.items())
        return (
            f"collective {name} has taken more than run.deadline_s={deadline_s:g} on rank {self._rank}; "
            f"not there: {ranks or 'nobody is missing, so look at the network'}. See what that rank is doing "
            "(pip install py-spy; py-spy dump), or raise run.deadline_s; start again with run.resume=latest"
        )


def loss(rank: int, name: str) -> str:
    """Say that another rank has gone, or is out of reach, in the middle of collective `name`."""
    return f"rank {rank} lost another rank in the middle of collective {name}; {_AFTER_A_LOSS}"


def in_time(question: Callable[[], Answer], patience_s: float) -> Answer:
    """Return what the store says. Raises TimeoutError where it says nothing: its client would wait for ever.

    The store may be in a process that hangs, or on a host that has lost its power.
    """
    answer: Future[Answer] = Future()

    def ask() -> None:
        try:
            answer.set_result(question())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return answer.result(patience_s)
