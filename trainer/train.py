"""The training loop: batches to steps, evaluations and checkpoints when they are due, and a clean end on a signal."""

import itertools
import math
from contextlib import closing
from typing import Any

import numpy as np

from trainer import checkpoint, summary
from trainer.batch import Batch, BatchPosition
from trainer.checkpoint import FORMAT_VERSION, CheckpointState
from trainer.config import config_digest
from trainer.errors import RemoteRankError, TrainerError
from trainer.evaluation.quick import Metrics, evaluate
from trainer.exchange import ContentRequest
from trainer.prefetch import read_ahead
from trainer.progress import Progression
from trainer.run import Run
from trainer.signals import StoppedError, StopSignals
from trainer.step import Prepared


class Training:
    """Trains a run from where it stands to its end. Every rank does the same, and the same number of times."""

    def __init__(self, run: Run, progress: Progression, signals: StopSignals) -> None:
        self._run, self._engine, self._config = run, run.engine, run.config
        self._progress, self._signals = progress, signals
        self._content = [field.name for field in run.engine.fields if field.kind == "content"]
        self.totals = summary.Totals()
        self.metrics: Metrics = {}

    def fit(self) -> None:
        """All remaining steps, the last evaluation and checkpoint. On a signal: a checkpoint, then StoppedError."""
        try:
            for epoch in range(self._run.position.epoch, self._config.train.epochs):
                self._epoch(epoch)
            self._evaluate()
        except StoppedError:
            path = self._save()
            self._progress.say(f"stopped after step {self._engine.num_steps}; go on with run.resume={path}")
            raise
        self._save()

    def _epoch(self, epoch: int) -> None:
        reader, first_step = self._run.train_reader, self._run.position.step
        batches = reader.batches(epoch, first_step)
        with closing(read_ahead(batches, self._config.data.prefetch_batches)) as ahead:
            for step in itertools.count(first_step):
                if step == reader.steps_per_epoch or self._engine.num_steps == total_steps(self._run):
                    break
                with self.totals.timed("data"):
                    item = next(ahead)
                self._step(item)
                last = step + 1 == reader.steps_per_epoch
                self._run.position = BatchPosition(epoch + 1, 0) if last else BatchPosition(epoch, step + 1)
                self._between_steps()

    def _step(self, item: Batch | Exception) -> None:
        with self.totals.timed("exchange"):
            prepared = self._prepare(item)
        references, images = self._count_images(prepared)
        with self.totals.timed("compute"):
            result = self._engine.train_step(prepared)
        if not math.isfinite(result.loss):
            raise TrainerError(f"the loss of step {self._engine.num_steps} is {result.loss}; try a lower train.lr")
        self.totals.add(result, references, images)
        samples, seconds = self.totals.steady
        speed = samples * self._run.comm.size / seconds
        scalars = {"loss": result.loss, "learning_rate": result.learning_rate, "samples_per_s": speed}
        self._progress.step(self._engine.num_steps, scalars, self._is_due(self._config.train.log_every))

    def _between_steps(self) -> None:
        if self._engine.num_steps == total_steps(self._run):
            return
        if self._is_due(self._config.train.eval_every):
            self._evaluate()
        if self._is_due(self._config.train.checkpoint_every):
            self._save()

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self._engine.num_steps % every == 0

    def _prepare(self, item: Batch | Exception) -> Prepared:
        """The engine's `prepare`; a stop signal goes in place of the batch, so that all ranks stop here together."""
        if self._signals.received and isinstance(item, Batch):
            item = StoppedError(f"{self._signals.received} received")
        try:
            return self._engine.prepare(item)
        except RemoteRankError as failure:
            raise StoppedError.sent_by(failure) or failure from None

    def _count_images(self, prepared: Prepared) -> tuple[int, int]:
        """Image keys in this rank's batch, and unique images that this rank computes for all."""
        references = sum(len(prepared.batch.fields[name].values_N) for name in self._content)
        served = prepared.request.served_S
        return references, sum(each.num_unique for each in served if isinstance(each, ContentRequest))

    def _evaluate(self) -> None:
        run = self._run

        def predict(item: Batch | Exception) -> tuple[Batch, np.ndarray[Any, np.dtype[np.float64]]]:
            prepared = self._prepare(item)
            return prepared.batch, self._engine.predict(prepared)

        with (
            self.totals.timed("evaluate"),
            closing(read_ahead(run.test_reader.batches(), self._config.data.prefetch_batches)) as ahead,
        ):
            self.metrics = evaluate(run.comm, ahead, predict, run.known_ads, run.schema.new_ad_field)
        run.history.append({"step": self._engine.num_steps, **self.metrics})
        self._progress.metrics(self._engine.num_steps, self.metrics)

    def _save(self) -> str:
        run = self._run
        state = CheckpointState(
            format_version=FORMAT_VERSION,
            step=self._engine.num_steps,
            epoch=run.position.epoch,
            step_in_epoch=run.position.step,
            num_ranks=run.comm.size,
            origin=run.origin,
            store_url=self._config.data.store if run.partition else None,
            store_version=run.partition.snapshot_version if run.partition else None,
            config_digest=config_digest(self._config.model_dump(mode="json")),
            history=run.history,
            files={},
        )
        with self.totals.timed("checkpoint"):
            return str(
                checkpoint.save(run.comm, run.checkpoints, self._engine, state, self._config.train.keep_checkpoints)
            )


def total_steps(run: Run) -> int:
    """Steps of the whole run, from its very beginning."""
    everything = run.config.train.epochs * run.train_reader.steps_per_epoch
    return min(everything, run.config.train.max_steps or everything)
