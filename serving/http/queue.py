"""The queue of a worker: bodies wait here until the model is free, and are refused if that would take too long.

A body is decoded as soon as it is received, so that the predicted wait of later ones includes its cost. One task of the
event loop scores waiting bodies in pieces, between which other tasks run; there is no second thread. One model answers
a whole body. On one core, with 200 candidates a request, scoring in the loop was faster than in a thread of its own,
which has to exchange the interpreter's lock with the loop: see docs/SERVE.md.
"""

import asyncio
import math
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serving.http.codec import Scores
from serving.http.inference import Body
from serving.http.limits import AGAIN, RefusedError
from serving.http.live import LiveModel
from serving.network import ResultT, Steps
from serving.problems import Problem
from serving.scoring.sent import REQUEST_COST, SentTable, Sizes, joined
from serving.settings import ServerSettings

if TYPE_CHECKING:
    from serving.scoring.scorer import Scorer

FIRST_GUESS_S = 2.5e-7
"""Seconds per pair of a candidate and a behaviour, until it was measured; see `Sizes.cost`."""
BATCH_COST = 50_000
"""Waiting bodies are scored together up to this cost; with more, the first would wait for the last."""
ALWAYS_WAIT = 4
"""Number of bodies that may always wait: a few clients are not an overload, even while a model is loaded."""
LARGEST_AT_ONCE = 4
"""Bodies of the largest size that may wait to be decoded."""
PIECE_S = 0.005
"""Seconds of work after which other tasks run."""
TURNS = 5
"""Rounds of the event loop between two pieces: a new connection needs some until it has its answer."""
_WEIGHT = 0.1
_MOST_GROWTH = 3.0


@dataclass
class Work:
    """One waiting body: its content, its time of arrival, and the duration of each stage."""

    body: Body
    sent: SentTable
    sizes: Sizes
    model: "Scorer"
    """The model by whose columns it was decoded."""
    done: "asyncio.Future[Scores]"
    stages: dict[str, float]
    cost: int
    """See `Sizes.cost`."""
    decoded_s: float = field(default_factory=time.perf_counter)


class Pace:
    """Lets other tasks of the event loop run after each `PIECE_S` of work."""

    _worked_s = 0.0

    async def pause(self, worked_s: float = 0.0) -> None:
        """Let other tasks run if it is time to; `worked_s`: seconds of other work that count as well."""
        self._worked_s += worked_s
        if self._worked_s >= PIECE_S:
            self._worked_s = 0.0
            for _ in range(TURNS):
                await asyncio.sleep(0)

    async def through(self, steps: Steps[ResultT]) -> ResultT:
        """Do work in pieces, and let others run between them."""
        while True:
            start_s = time.perf_counter()
            try:
                while self._worked_s + time.perf_counter() - start_s < PIECE_S:
                    next(steps)
            except StopIteration as end:
                result: ResultT = end.value
                return result
            finally:
                self._worked_s += time.perf_counter() - start_s
            await self.pause()


class ScoringQueue:
    """Bodies that wait for the model; `run` is the one task that scores them."""

    def __init__(self, live: LiveModel, settings: ServerSettings) -> None:
        self._live, self._budget, self._max_wait_s = live, settings, settings.max_wait_ms / 1000
        self._waiting: deque[Work] = deque()
        self._some = asyncio.Event()
        self._decoding = asyncio.Lock()
        self._undecoded = 0
        self._undecoded_bytes, self._max_undecoded_bytes = 0, LARGEST_AT_ONCE * settings.max_body_bytes
        self._cost = 0
        self.pace = Pace()
        self.seconds_per_cost = FIRST_GUESS_S

    def __len__(self) -> int:
        return self._undecoded + len(self._waiting)

    @property
    def predicted_wait_s(self) -> float:
        """How long a body arriving now would wait for all earlier ones, including those being scored."""
        return self._cost * self.seconds_per_cost

    async def score(self, body: Body, size_bytes: int) -> Scores:
        """Wait for the model and score a body. Raises RefusedError (503), RequestError."""
        self._live.model  # noqa: B018 (raises if there is none yet)
        if len(self) >= ALWAYS_WAIT and (wait_s := self.predicted_wait_s) > self._max_wait_s:
            again = {"Retry-After": str(max(1, math.ceil(wait_s)))}
            raise RefusedError(503, Problem.BUSY, 1000 * wait_s, 1000 * self._max_wait_s, **again)
        if self._undecoded_bytes and self._undecoded_bytes + size_bytes > self._max_undecoded_bytes:
            raise RefusedError(503, Problem.TOO_MANY_LARGE_BODIES, **AGAIN)
        self._undecoded_bytes += size_bytes
        self._undecoded += 1
        self._cost += REQUEST_COST  # a lower bound
        try:
            async with self._decoding:  # one at a time: others run after each
                work = await self._decoded(body)
        finally:
            self._undecoded_bytes -= size_bytes
            self._undecoded -= 1
            self._cost -= REQUEST_COST
        self._waiting.append(work)
        self._cost += work.cost
        self._some.set()
        return await work.done

    async def _decoded(self, body: Body) -> Work:
        """Decode a body and measure it. Raises RequestError."""
        model, start_s = self._live.model, time.perf_counter()
        sent, sizes = await self.pace.through(self._decoding_steps(body, model))
        await self.pace.pause()
        stages = {"parse": time.perf_counter() - start_s}
        return Work(body, sent, sizes, model, asyncio.get_running_loop().create_future(), stages, sizes.cost)

    def _decoding_steps(self, body: Body, model: "Scorer") -> Steps[tuple[SentTable, Sizes]]:
        sent = yield from body.decode(model.inputs, self._budget)
        sizes = sent.sizes(model.inputs)
        sizes.check(self._budget)
        return sent, sizes

    async def run(self) -> None:
        """Score bodies until cancelled."""
        while True:
            await self._some.wait()
            works = self._take()
            start_s, cost = time.perf_counter(), sum(work.cost for work in works)
            try:
                with self._live.held() as model:
                    await self._process(model, works)
            except Exception as error:  # a bug: the waiting requests get the error, and the queue continues
                for work in works:
                    _fail(work, error)
            self._cost -= cost
            # One pause says little about the next.
            measured = min((time.perf_counter() - start_s) / cost, _MOST_GROWTH * self.seconds_per_cost)
            self.seconds_per_cost += _WEIGHT * (measured - self.seconds_per_cost)
            await asyncio.sleep(0)
            await self.pace.pause()

    def _take(self) -> list[Work]:
        """Take the next batch: bodies up to `BATCH_COST`, and at least one."""
        taken: list[Work] = []
        cost = 0
        while self._waiting and (not taken or cost + self._waiting[0].cost <= BATCH_COST):
            taken.append(self._waiting.popleft())
            cost += taken[-1].cost
        if not self._waiting:
            self._some.clear()
        return taken

    async def _process(self, model: "Scorer", works: list[Work]) -> None:
        together: list[Work] = []
        for work in works:
            work.stages["wait"] = time.perf_counter() - work.decoded_s
            if work.model is not model:  # switched meanwhile, maybe to other columns
                try:
                    steps = self._decoding_steps(work.body, model)
                    work.sent, work.sizes = await self.pace.through(steps)
                except Exception as error:
                    _fail(work, error)
                    continue
            if all(isinstance(each.values, list) for each in work.sent.columns.values()):  # Python's, as JSON's are
                together.append(work)
            else:
                await self._score(model, [work])
        if together:
            await self._score(model, together)

    async def _score(self, model: "Scorer", works: list[Work]) -> None:
        """Score several bodies together; if that fails, score each alone, so that a bad one fails alone."""
        start_s = time.perf_counter()
        try:
            sent, sizes = joined([work.sent for work in works]), Sizes.joined([work.sizes for work in works])
            scored = await self.pace.through(model.steps(sent, sizes))
        except Exception as error:
            if len(works) == 1:
                _fail(works[0], error)
                return
            for work in works:
                await self._score(model, [work])
            return
        elapsed_s = time.perf_counter() - start_s
        for work in works:
            own, scored = scored[: len(work.sizes)], scored[len(work.sizes) :]
            stages = work.stages | {"score": elapsed_s}
            if not work.done.done():  # its client may have left
                scores = Scores(identity=model.identity, fields=model.fields, sent=work.sent, scored=own, stages=stages)
                work.done.set_result(scores)


def _fail(work: Work, error: Exception) -> None:
    if not work.done.done():
        work.done.set_exception(error)
