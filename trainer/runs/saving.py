"""The writer of checkpoints: begin one, then wait for its end, or let it be written in the background.

The thread takes part in no collective. Every rank writes its own part, and says how far it is when all ranks look,
between two steps that all of them know; when all parts are there, a thread of rank 0 publishes the checkpoint. A part
that cannot be written in the background (a full disk, an object store that is away) fails this checkpoint alone: it is
reported, and the training continues.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from featurestore.errors import StorageError
from trainer.comm import Comm
from trainer.engine.machine import free_bytes
from trainer.errors import CheckpointError
from trainer.runs.checkpoint import DENSE, CheckpointState, Trained, rows_name, state_bytes
from trainer.runs.places import CheckpointPlace, PackedTensors, WrittenPart, packed_bytes

_FAILURES = (OSError, StorageError, SafetensorError, MemoryError)
_WAIT_S = 0.01
_PATIENCE_S = 5.0
_THERE = "it is there"
_LOOK_EVERY_S = 0.25
_SHARE = 0.05
"""Of the time, at most, that checkpoints by the clock may take from the training."""


class Phase(StrEnum):
    """How far a rank is with a checkpoint."""

    IDLE = "idle"
    WRITING = "writing"
    WRITTEN = "written"
    PUBLISHING = "publishing"
    PUBLISHED = "published"
    FAILED = "failed"


_BUSY = (Phase.WRITING, Phase.PUBLISHING)


@dataclass
class _Progress:
    """What a rank says when all look. `clock_s`, `step_s` count on rank 0 alone."""

    phase: Phase = Phase.IDLE
    parts: dict[str, WrittenPart] = field(default_factory=dict)
    error: str = ""
    is_fatal: bool = False
    cost_s: float = 0.0
    """What the checkpoint took from the training: its stall, and the processor's time of the thread."""
    clock_s: float = 0.0
    """Since the last checkpoint was begun."""
    step_s: float = 0.0


class Outcome(NamedTuple):
    """The end of a checkpoint: published where `error` is empty."""

    step: int
    error: str


class Checkpointer:
    """Writes one checkpoint at a time. Every rank calls the same methods at the same steps.

    `every_s`: a checkpoint is due so long after the last one was begun, and not before checkpoints take no more than a
    twentieth of the time; None: by the clock none is. `before_publishing` is called in the thread of rank 0.
    """

    def __init__(
        self, comm: Comm, place: CheckpointPlace, every_s: float | None, before_publishing: Callable[[], None]
    ) -> None:
        self._comm, self._place, self._every_s = comm, place, every_s
        self._before_publishing = before_publishing
        self._rows, self._dense = PackedTensors(), PackedTensors()
        self._mine = _Progress()
        self._step: int | None = None  # of the checkpoint that is written
        self._is_publishing = False  # all of its parts are written
        self._publish: Callable[[Mapping[str, WrittenPart]], None] = lambda parts: None
        self._begun_s = self._looked_s = time.monotonic()
        self._looked_step: int | None = None
        self._next_look = 0
        self._cost_s = 0.0
        self._thread: threading.Thread | None = None
        self.num_begun = 0
        self.stall_s = 0.0
        """What this rank's training stood still for the checkpoints of `begin`."""

    @property
    def is_writing(self) -> bool:
        """Return whether a checkpoint is under way; the same on every rank."""
        return self._step is not None

    def looks_after(self, step: int) -> bool:
        """Return whether all ranks look after that step; the same on every rank."""
        if self._looked_step is None:
            self._looked_step, self._next_look = step, step
        wanted = self.is_writing or self._every_s is not None
        return wanted and step >= self._next_look

    def begin(self, trained: Trained, state: CheckpointState, keep: int, best: int | None) -> Outcome | None:
        """Copy the state and begin to write it, unless the checkpoint is there already.

        Nothing may be under way. Returns an outcome where it failed at once.

        Where memory has no room for copies, it is written before this returns.
        """
        start_s = time.perf_counter()
        self.num_begun += 1
        outcome = self._start(trained, state, keep, best, in_background=True)
        self.stall_s += time.perf_counter() - start_s
        return outcome

    def save(self, trained: Trained, state: CheckpointState, keep: int, best: int | None) -> str:
        """Write a checkpoint without copies, unless it is there already, wait for its end, and return its address.

        Nothing may be under way. Raises CheckpointError on all ranks where one cannot write.
        """
        outcome = self._start(trained, state, keep, best, in_background=False) or self._ended()
        if outcome is not None and outcome.error:
            raise CheckpointError(f"cannot write {self._place.address(state.step)}: {outcome.error}")
        return self._place.address(state.step)

    def _start(
        self, trained: Trained, state: CheckpointState, keep: int, best: int | None, in_background: bool
    ) -> Outcome | None:
        """Write or begin to write this rank's parts. Returns an outcome where that failed at once."""
        start_s, self._begun_s = time.perf_counter(), time.monotonic()
        step = state.step
        content, error, is_fatal = self._prepared(step, trained)
        needed = sum(packed_bytes(each) for each in content.values())
        held = len(self._rows.data) + len(self._dense.data)
        said = _Ready(error, is_fatal, socket.gethostname(), max(0, needed - held), free_bytes())
        everyone = self._comm.allgather_object(said, name="checkpoint.begin")
        if failed := next((each for each in everyone if each.error), None):
            if failed.is_fatal:
                raise CheckpointError(failed.error)
            return None if failed.error == _THERE else Outcome(step, failed.error)
        self._step, self._mine = step, _Progress(Phase.WRITING)
        self._publish = lambda parts: self._published(state, parts, keep, best)
        self._next_look = step + 1
        if in_background and _fits(everyone):
            write = self._with_copies(step, content)
            self._mine.cost_s = time.perf_counter() - start_s
            self._thread = _in_thread(write)
        else:
            self._mine.cost_s = time.perf_counter() - start_s
            self._write(step, content)
        return None

    def look(self, step: int) -> tuple[Outcome | None, bool]:
        """See how far all ranks are.

        Returns how a checkpoint ended, if one did, and whether the next is due by the clock. Raises CheckpointError on
        all ranks where the run may not continue.
        """
        start_s = time.perf_counter()
        mine, now_s = self._mine, time.monotonic()
        mine.clock_s = now_s - self._begun_s
        mine.step_s = (now_s - self._looked_s) / max(1, step - (self._looked_step or 0))
        everyone = self._comm.allgather_object(mine, name="checkpoint.look")
        self._looked_s, self._looked_step = now_s, step
        outcome = self._settled(everyone)
        is_due = self._schedule(step, everyone[0])
        self.stall_s += time.perf_counter() - start_s
        return outcome, is_due

    def wait(self) -> Outcome | None:
        """Let all ranks wait for the end of what is under way. Returns how it ended; None where nothing was."""
        start_s = time.perf_counter()
        outcome = self._ended()
        self.stall_s += time.perf_counter() - start_s
        return outcome

    def _ended(self) -> Outcome | None:
        outcome = None
        while self.is_writing:
            outcome = self._settled(self._comm.allgather_object(self._mine, name="checkpoint.look"))
            if outcome is None:
                time.sleep(_WAIT_S)
        return outcome

    def close(self) -> None:
        """End what is under way: a rank alone publishes it, one of several leaves it, as the others may be gone."""
        if self._comm.size == 1:
            with contextlib.suppress(CheckpointError):
                self.wait()
        elif self._thread is not None:
            self._thread.join(_PATIENCE_S)

    def _prepared(self, step: int, trained: Trained) -> tuple[dict[str, Mapping[str, Tensor]], str, bool]:
        """Returns what is to be written, or why that failed: the other ranks wait for it."""
        content: dict[str, Mapping[str, Tensor]] = {}
        try:
            if self._comm.rank == 0:
                if self._place.has(step):
                    return {}, _THERE, False
                content[DENSE] = trained.dense_state()
            content[rows_name(self._comm)] = trained.shard_state()
        except Exception as failure:
            return {}, _text(failure), isinstance(failure, CheckpointError)
        return content, "", False

    def _with_copies(self, step: int, content: Mapping[str, Mapping[str, Tensor]]) -> Callable[[], None]:
        """Copies now; returns what is left to do. Where there is no memory after all, it says so when ranks look."""
        try:
            copies = {
                name: (self._dense if name == DENSE else self._rows).pack(tensors) for name, tensors in content.items()
            }
        except MemoryError as failure:
            self._mine = _Progress(Phase.FAILED, error=_text(failure))
            return lambda: None
        return lambda: self._write(step, copies)

    def _write(self, step: int, content: Mapping[str, Mapping[str, Tensor] | PackedTensors]) -> None:
        with self._noted():
            parts = {name: self._place.write(step, name, each) for name, each in content.items()}
            self._mine.parts, self._mine.phase = parts, Phase.WRITTEN

    def _published(self, state: CheckpointState, parts: Mapping[str, WrittenPart], keep: int, best: int | None) -> None:
        with self._noted():
            self._before_publishing()
            self._place.commit(state.step, parts, state_bytes(state, parts), keep, best)
            self._mine.phase = Phase.PUBLISHED

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        """Note of a block in a thread its processor's time, and an error as the end of this rank's part."""
        progress, start_s, failure = self._mine, time.thread_time(), None
        try:
            yield
        except Exception as error:
            failure = error
        progress.cost_s += time.thread_time() - start_s
        if failure is not None:
            progress.is_fatal = not isinstance(failure, _FAILURES)
            progress.error, progress.phase = _text(failure), Phase.FAILED  # last: other threads look at the phase

    def _settled(self, everyone: list[_Progress]) -> Outcome | None:
        """Do what follows from how far all ranks are: the same on each of them."""
        step = self._step
        if step is None or any(each.phase in _BUSY for each in everyone):
            return None
        if fatal := next((each.error for each in everyone if each.is_fatal), None):
            raise CheckpointError(fatal)
        failed = [(rank, each.error) for rank, each in enumerate(everyone) if each.phase is Phase.FAILED]
        if failed or everyone[0].phase is Phase.PUBLISHED:
            self._place.end(failed=not self._is_publishing)
            self._step, self._mine, self._is_publishing = None, _Progress(), False
            self._cost_s = max(each.cost_s for each in everyone)
            return Outcome(step, self._named(*failed[0]) if failed else "")
        self._is_publishing = True
        if self._comm.rank == 0:
            self._mine.phase = Phase.PUBLISHING
            parts = {name: part for each in everyone for name, part in each.parts.items()}
            self._thread = _in_thread(lambda: self._publish(parts))
        else:
            self._mine.phase = Phase.WRITTEN
        return None

    def _named(self, rank: int, error: str) -> str:
        return f"rank {rank}: {error}" if self._comm.size > 1 else error

    def _schedule(self, step: int, of_rank_0: _Progress) -> bool:
        """Choose the step after which all look again, by the clock of rank 0; return whether a checkpoint is due."""
        step_s = max(of_rank_0.step_s, 1e-6)
        if self._step is not None:
            self._next_look = step + max(1, min(step - self._step, int(_LOOK_EVERY_S / step_s)))
            return False
        if self._every_s is None:
            return False
        left_s = max(self._every_s, self._cost_s / _SHARE) - of_rank_0.clock_s
        # Half of what is left: so many looks a minute as it has powers of two of a step, and a slower step is noticed.
        self._next_look = step + max(1, int(left_s / step_s / 2))
        return left_s < step_s / 2


class _Ready(NamedTuple):
    """What a rank says when a checkpoint begins: why it cannot, or the memory that its copy takes."""

    error: str
    is_fatal: bool
    host: str
    needed_bytes: int
    free_bytes: int | None


def _fits(everyone: list[_Ready]) -> bool:
    """Whether the copies of all ranks of each machine take at most half of what is free there."""
    for host in {each.host for each in everyone}:
        here = [(each.needed_bytes, each.free_bytes) for each in everyone if each.host == host]
        free = min((free for _, free in here if free is not None), default=None)
        if free is not None and sum(needed for needed, _ in here) > free // 2:
            return False
    return True


def _text(error: BaseException) -> str:
    return (
        str(error)
        if isinstance(error, OSError | StorageError | CheckpointError)
        else f"{type(error).__name__}: {error}"
    )


def _in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, name="checkpoint", daemon=True)
    thread.start()
    return thread
