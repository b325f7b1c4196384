"""The queue of a worker: bodies wait here until the model is free, and are refused when that would take too long.

One task of the event loop takes what waits, decodes it, scores it in one call of the network, and lets other tasks run
before the next batch; there is no second thread. So a model is switched between two batches by an assignment, and
all answers of a batch are of one model. On one core, with 200 candidates a request, scoring in the loop
was faster than in a thread of its own, which has to pass the interpreter's lock to and fro: see docs/SERVING.md.
"""

import asyncio
import math
import time
from collections import deque
from dataclasses import dataclass, field

import pyarrow as pa

from serving.errors import RequestTooLargeError
from serving.http.codec import Body
from serving.http.limits import RefusedError
from serving.http.live.model import Decoded, Model, Scores, num_entries
from serving.http.live.switch import LiveModel
from serving.scoring.request import Scored

REQUEST_BYTES = 2_000
"""A request without a body costs about as much as this many bytes of one."""
FIRST_GUESS_S = 2e-7
"""Seconds for each byte, before any was measured."""
BATCH_BYTES = 64 << 10
"""What waits is scored together up to this size: more would let the first ones wait for the last."""
ALWAYS_WAIT = 4
"""The number of bodies that may always wait: a few clients are no overload, not while a model is loaded either."""
_WEIGHT = 0.1
_MOST_GROWTH = 3.0


@dataclass
class Work:
    """One body on its way: when it came, and how long each stage took."""

    body: Body
    size_bytes: int
    done: "asyncio.Future[Scores]"
    came_s: float = field(default_factory=time.perf_counter)
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def cost(self) -> int:
        return REQUEST_BYTES + self.size_bytes


class ScoringQueue:
    """Bodies that wait for the model; `run` is the one task that scores them."""

    def __init__(self, live: LiveModel, max_candidates: int, max_wait_s: float) -> None:
        self._live, self._max_candidates, self._max_wait_s = live, max_candidates, max_wait_s
        self._waiting: deque[Work] = deque()
        self._some = asyncio.Event()
        self._cost = 0
        self.seconds_per_byte = FIRST_GUESS_S

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def predicted_wait_s(self) -> float:
        """How long a body that came now would wait for those before it."""
        return self._cost * self.seconds_per_byte

    async def score(self, body: Body, size_bytes: int) -> Scores:
        """Wait for the model and score a body. Raises NotReadyError, RefusedError (503), RequestError."""
        self._live.model  # noqa: B018 (raises where there is none yet)
        if len(self._waiting) >= ALWAYS_WAIT and (wait_s := self.predicted_wait_s) > self._max_wait_s:
            raise RefusedError(
                503,
                f"the server is busy: a request would wait {1000 * wait_s:.0f} ms, over {1000 * self._max_wait_s:g}; "
                "try again later, or start more workers",
                {"Retry-After": str(max(1, math.ceil(wait_s)))},
            )
        work = Work(body, size_bytes, asyncio.get_running_loop().create_future())
        self._waiting.append(work)
        self._cost += work.cost
        self._some.set()
        return await work.done

    async def run(self) -> None:
        """Score what comes, until cancelled."""
        while True:
            await self._some.wait()
            works = self._take()
            try:
                self._process(works)
            except Exception as error:  # an own bug: those who wait get it, and the queue lives on
                for work in works:
                    if not work.done.done():
                        work.done.set_exception(error)
            await asyncio.sleep(0)

    def _take(self) -> list[Work]:
        """Take the next batch: those before `BATCH_BYTES` are reached, and one at least."""
        taken: list[Work] = []
        size = 0
        while self._waiting and (not taken or size + self._waiting[0].size_bytes <= BATCH_BYTES):
            work = self._waiting.popleft()
            self._cost -= work.cost
            size += work.size_bytes
            if not work.done.done():  # its client may be gone
                taken.append(work)
        if not self._waiting:
            self._some.clear()
        return taken

    def _process(self, works: list[Work]) -> None:
        model = self._live.model
        start_s = time.perf_counter()
        together: list[tuple[Work, Decoded]] = []
        for work in works:
            try:
                value = self._decoded(model, work)
            except Exception as error:
                work.done.set_exception(error)
                continue
            if isinstance(value, pa.Table):
                self._score(model, [(work, value)])
            else:
                together.append((work, value))
        if together:
            self._score(model, together)
        if works:
            measured = (time.perf_counter() - start_s) / sum(work.cost for work in works)
            measured = min(measured, _MOST_GROWTH * self.seconds_per_byte)  # one pause says little of the next batch
            self.seconds_per_byte += _WEIGHT * (measured - self.seconds_per_byte)

    def _decoded(self, model: Model, work: Work) -> Decoded:
        start_s = time.perf_counter()
        work.stages["wait"] = start_s - work.came_s
        value = work.body.decode(model)
        count = _candidates_of(value, model)
        if count > self._max_candidates:
            raise RequestTooLargeError(
                f"the body has {count:,} candidates; this server takes at most {self._max_candidates:,}: send several "
                "bodies, or let the server take more by --max-candidates"
            )
        work.stages["parse"] = time.perf_counter() - start_s
        return value

    def _score(self, model: Model, batch: list[tuple[Work, Decoded]]) -> None:
        """Score several bodies together; where that fails, each alone, so that one does not spoil the others."""
        start_s = time.perf_counter()
        try:
            scored = _scored(model, [value for _, value in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0][0].done.set_exception(error)
                return
            for each in batch:
                self._score(model, [each])
            return
        elapsed_s = time.perf_counter() - start_s
        rest = list(scored)
        for work, value in batch:
            own, rest = rest[: len(value)], rest[len(value) :]
            stages = work.stages | {"score": elapsed_s}
            work.done.set_result(
                Scores(identity=model.identity, fields=model.fields, decoded=value, scored=own, stages=stages)
            )


def _scored(model: Model, values: list[Decoded]) -> list[Scored]:
    """Score one table, or the requests of several bodies together."""
    if isinstance(values[0], pa.Table):
        return model.score_table(values[0]) if len(values[0]) else []
    requests = [request for value in values if not isinstance(value, pa.Table) for request in value]
    return model.score(requests) if requests else []


def _candidates_of(value: Decoded, model: Model) -> int:
    """Count the candidates of a body, before any is decoded: the longest column counts."""
    if isinstance(value, pa.Table):
        columns = [name for name, rule in model.columns.items() if rule.side == "ad" and name in value.column_names]
        return max((num_entries(value.column(name)) for name in columns), default=0)
    return sum(max((len(values) for values in each.candidates.values()), default=0) for each in value)
