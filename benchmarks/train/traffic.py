"""Bytes on the wire: what the trainer sent by collective, counted at its Comm, and the paper's table 2 made of it.

Letters of shapes as in trainer/batch.py.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trainer.batch import Batch
from trainer.comm import Comm
from trainer.run import Run
from trainer.schema import Field

PAPER_RANKS = 20
_DENSE = "allreduce.dense"


class Traffic:
    """Trains with the engine of the trainer, and counts the bytes of each collective and the images of the batch."""

    def __init__(self, run: Run) -> None:
        self._run, self._engine = run, run.engine
        self._content: list[Field] = [field for field in run.engine.fields if field.kind == "content"]
        self.figures: dict[str, float] = {}
        self._sums: Counter[str] = Counter()
        self._steps = 0

    def batches(self) -> Iterator[Batch]:
        """The trainer's own."""
        return self._run.train_reader.batches(0)

    def step(self, batch: Batch) -> tuple[float, None]:
        """One step of the engine."""
        with counted(self._run.comm) as sent:
            loss = self._engine.train_step(self._engine.prepare(batch)).loss
        self._sums.update(sent)
        self._steps += 1
        self.figures = {f"{name}_bytes": total / self._steps for name, total in self._sums.items()}
        return loss, None


@contextmanager
def counted(comm: Comm) -> Iterator[Counter[str]]:
    """Bytes that this rank sends to others in the block, by collective."""
    sent: Counter[str] = Counter()
    methods = {name: getattr(comm, name) for name in ("alltoall", "allreduce_sum_", "allgather")}

    def counting(method: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            before = comm.bytes_sent
            result = method(*arguments, **named)
            sent[named["name"]] += comm.bytes_sent - before
            return result

        return call

    for name, method in methods.items():
        setattr(comm, name, counting(method))
    try:
        yield sent
    finally:
        for name in methods:
            delattr(comm, name)
