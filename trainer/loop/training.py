"""The training loop: epochs, evaluation, early stopping, checkpoints and signals.

E and the networks may have memorised known pictures, which says nothing of new ones, and no training sample tells by
how much. So an evaluation scores the ads that are in no training sample twice, and the way that ranks these better, by
AUC, holds in scoring and serving until another evaluation. Ads with a trained ID row keep their pictures either way, so
only the others tell.
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch

from featurestore.keys import Float64Array
from featurestore.text import count_text
from trainer.comm import Comm
from trainer.engine.engine import PreparedBatch
from trainer.engine.machine import objects_frozen
from trainer.errors import CheckpointError, RemoteRankError, TrainerError
from trainer.evaluation.bootstrap import Metrics
from trainer.evaluation.predict import evaluate
from trainer.ids.exact import Figures, gather_figures, warning_of
from trainer.loop import summary
from trainer.models.newads import NewAds
from trainer.problems import Problem
from trainer.runs.checkpoint import CheckpointState
from trainer.runs.open import Run
from trainer.runs.saving import Checkpointer, Outcome, end_with
from trainer.samples.reader import Batch, BatchPosition
from trainer.stages import WAIT, Kind, ReadAhead, prepare_ahead

History = Sequence[Mapping[str, Any]]


def best_step(history: History) -> int | None:
    """Return the step of the evaluation with the highest GAUC, the earliest of equal ones; None without any evaluation.

    Raises TrainerError where a GAUC is not defined.
    """
    for entry in history:
        if entry["gauc"] is None:
            raise TrainerError(Problem.NO_GAUC, entry["step"])
    best = max(history, key=lambda entry: (entry["gauc"], -entry["step"]), default=None)
    return None if best is None else int(best["step"])


def num_plateaus(history: History) -> int:
    """Count the evaluations whose AUC is no better than the best before them."""
    best, count = -math.inf, 0
    for auc in (entry["auc"] for entry in history if entry["auc"] is not None):
        count += auc <= best
        best = max(best, auc)
    return count


def has_ended(history: History, patience: int | None) -> bool:
    """Return whether the last `patience` evaluations were all no better than the best one before them."""
    if patience is None:
        return False
    best = best_step(history)
    return best is not None and sum(entry["step"] > best for entry in history) >= patience


def has_finished(report: Mapping[str, Any], step: int, total_steps: int, patience: int | None, tested: bool) -> bool:
    """Return whether the run that wrote this report has nothing left to do after `step`, its newest checkpoint.

    Where the best one is chosen, that may be long before the last. `tested`: there are test samples.
    """
    if report["global_step"] != step or (tested and not report["metrics"]):
        return False
    last = max([step, *(entry["step"] for entry in report["history"])])
    return last >= total_steps or has_ended(report["history"], patience)


def metrics_of(history: History, step: int) -> dict[str, Any]:
    """Return the metrics of the evaluation after `step`."""
    (entry, *_) = (entry for entry in history if entry["step"] == step)
    return {name: value for name, value in entry.items() if name != "step"}


LEAST = 1_000
"""Impressions of ads without a trained row that decide; an evaluation with fewer leaves all as it was."""
MOST_FAILURES = 5
"""Checkpoints in a row that may fail to be written while the training continues; one more ends the run."""
_ROUNDING = 1e-5  # two evaluations of the same may differ by it, on a GPU


def checked(
    measured: Callable[[], tuple[Metrics, Float64Array]], new_ads: NewAds, comm: Comm, say: Callable[[str], None]
) -> Metrics:
    """Decide by one evaluation whether pictures count, and return its metrics as they are then. All ranks call it.

    `measured`: metrics of all test impressions, the same on every rank, and the logits of this rank's. Costs it twice
    where there are enough new ads. Stopped in between, all stays as it was.
    """
    earlier = new_ads.pictures_count
    metrics, logit_N = measured()
    num_new = int(metrics["new_ad_impressions"] or 0)
    if num_new < LEAST or metrics["new_ad_auc"] is None:
        return metrics
    try:
        new_ads.decide(pictures_count=not earlier)
        others, other_N = measured()
    finally:
        new_ads.decide(pictures_count=earlier)
    differing = (~np.isclose(logit_N, other_N, rtol=_ROUNDING, atol=_ROUNDING)).sum()
    num_telling = int(comm.allreduce_sum_(torch.tensor([int(differing)]), "new ads that tell"))
    counted = f"new ads: {num_telling:,} of {num_new:,} impressions are of ads without a trained ID row"
    if num_telling < LEAST:
        say(f"{counted}; {LEAST:,} would show whether their pictures count; that stays unchanged")
        return metrics
    found = {earlier: metrics, not earlier: others}
    own, none = (float(found[count]["new_ad_auc"] or 0) for count in (True, False))
    if own != none:
        new_ads.decide(pictures_count=own > none)
    kept = "keep them" if new_ads.pictures_count else "have none"
    say(f"{counted}; AUC {own:.4f} with their pictures, {none:.4f} without; from here on they {kept}")
    return found[new_ads.pictures_count]


class StoppedError(TrainerError):
    """A signal asked for the run to end. It travels to the other ranks as any error does, instead of a batch."""


@contextlib.contextmanager
def stopped_together() -> Iterator[None]:
    """Raise StoppedError in the block where another rank has raised it."""
    try:
        yield
    except RemoteRankError as failure:
        if failure.values["kind"] == StoppedError.__name__:
            raise StoppedError(str(failure.values["reason"])) from None
        raise


class StopSignals:
    """Notes the first SIGINT or SIGTERM within the block; the second one acts as without it."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, self._before[number])


class Training:
    """Trains a run from its next step to its end. Every rank does the same, and the same number of times."""

    def __init__(self, run: Run, progress: summary.ProgressLog, signals: StopSignals) -> None:
        self._run, self._engine, self._config = run, run.engine, run.config
        self._progress, self._signals = progress, signals
        self._patience = run.config.train.early_stopping
        self._chooses = self._patience is not None or run.validation_reader is not None
        self._measured_reader = run.validation_reader or run.test_reader
        self.totals = summary.StepTotals()
        self.metrics: Metrics = {}
        self.tables: dict[str, Figures] = {}
        """Figures of the ids since the run, or its resumption, began; known after each epoch."""
        self._warned: set[str] = set()
        train = run.config.train
        self._saves = Checkpointer(run.comm, run.place, train.checkpoint_every_s, progress.flush)
        self.checkpoints = {"written": 0, "failed": 0}
        """Counts since the run, or its resumption, began."""
        self._failed_in_a_row = 0

    def fit(self) -> None:
        """Do all remaining steps, the last evaluation and checkpoint; where the best one is chosen, end with it.

        On a signal: a checkpoint, then StoppedError.
        """
        self._follow_plateaus()
        try:
            if self._was_stopped_in_evaluation():
                self._between_steps()
            with objects_frozen():
                for epoch in range(self._run.position.epoch, self._config.train.epochs):
                    self._epoch(epoch)
            self._say_early_stop()
            self.evaluate()
        except StoppedError:
            path = self._save()
            self._progress.say(f"stopped after step {self._engine.num_steps}; continue with run.resume={path}")
            raise
        except BaseException:
            self._saves.close()
            raise
        self._finish()
        if self._run.validation_reader is not None:
            self._measured_reader, self.metrics = self._run.test_reader, {}
            if self._run.test_reader.num_samples:
                with self.totals.timed("evaluate"):
                    self.metrics, _ = self._measured()
                self._progress.metrics(self._engine.num_steps, self.metrics)

    def evaluate(self) -> None:
        """Measure the parameters unless that was just done; without samples to do so, do nothing."""
        run = self._run
        if self._is_evaluated():
            self.metrics = metrics_of(run.history, self._engine.num_steps)
            return
        if self._measured_reader.num_samples == 0:
            return

        new_ads = self._engine.model.new_ads
        without_rows = run.config.run.warm_start is not None and run.config.run.warm_parts == "partial"
        with self.totals.timed("evaluate"):
            # Where E continues and ID rows begin again, an ad without a trained row is not new to E.
            if new_ads is not None and not without_rows:
                self.metrics = checked(self._measured, new_ads, run.comm, self._progress.say)
            else:
                self.metrics, _ = self._measured()
        run.history.append({"step": self._engine.num_steps, **self.metrics})
        self._follow_plateaus()
        split = "test" if run.validation_reader is None else "validation"
        self._progress.metrics(self._engine.num_steps, self.metrics, split)

    def _follow_plateaus(self) -> None:
        """Reduce the rates by the evaluations on validation days."""
        if self._run.validation_reader is not None:
            self._engine.num_plateaus = num_plateaus(self._run.history)

    def _measured(self) -> tuple[Metrics, Float64Array]:
        """Predict and measure the validation or test samples; return the logits of this rank's, too."""
        run, reader, logits = self._run, self._measured_reader, [np.empty(0)]
        with self._prepared(reader.batches(), reader.steps_per_epoch, "eval") as coming:

            def predicted() -> Iterator[tuple[Batch, Float64Array]]:
                for each in coming:
                    logits.append(self._engine.predict(each))
                    yield each.batch, logits[-1]

            metrics = evaluate(run.comm, predicted(), run.known_ads, run.schema)
        return metrics, np.concatenate(logits)

    def _epoch(self, epoch: int) -> None:
        if self._is_over():
            return
        reader, first_step = self._run.train_reader, self._run.position.step
        count = min(reader.steps_per_epoch - first_step, total_steps(self._run) - self._engine.num_steps)
        batches = reader.batches(epoch, first_step)
        with self._prepared(batches, count, "step") as coming:
            for step, prepared in enumerate(coming, first_step):
                self._step(prepared)
                last = step + 1 == reader.steps_per_epoch
                self._run.position = BatchPosition(epoch + 1, 0) if last else BatchPosition(epoch, step + 1)
                self._between_steps()
                if self._is_over():
                    break
        self._report_tables()

    @contextlib.contextmanager
    def _prepared(self, batches: Iterator[Batch], count: int, kind: Kind) -> Iterator[Iterator[PreparedBatch]]:
        """Yield `count` batches, read ahead, each one prepared during the step of the one before."""
        stages = self._engine.stages
        with stopped_together(), contextlib.closing(ReadAhead(stages.each("read", batches, kind))) as ahead:
            coming = stages.each("wait for samples", ahead, kind)
            prepare = partial(next, self._engine.prepared(self._until_signal(coming), kind))
            with contextlib.closing(prepare_ahead(count, prepare)) as waiting:
                yield (self._waited(each, kind) for each in waiting)

    def _waited(self, result: Callable[[], PreparedBatch], kind: Kind) -> PreparedBatch:
        if kind == "eval":  # all of an evaluation is timed as such
            return result()
        with self.totals.timed("wait"), self._engine.stages.timed(WAIT):
            return result()

    def _step(self, prepared: PreparedBatch) -> None:
        start_s = time.perf_counter()
        references, images = summary.count_images(prepared.request)
        with self.totals.timed("compute"):
            result = self._engine.train_step(prepared)
        if not math.isfinite(result.loss):
            raise TrainerError(Problem.LOSS_NOT_FINITE, self._engine.num_steps, result.loss)
        self.totals.add(result, references, images)
        samples, seconds = self.totals.steady
        speed = samples * self._run.comm.size / seconds
        scalars = {"loss": result.loss, "learning_rate": result.learning_rate, "samples_per_s": speed}
        details = summary.step_details(self._engine.stages) if self._is_due(self._config.train.log_every) else {}
        self._progress.step(self._engine.num_steps, scalars, details)
        self._engine.stages.add_rest(time.perf_counter() - start_s)

    def _between_steps(self) -> None:
        if self._engine.num_steps == total_steps(self._run):
            return
        if self._is_evaluation_due():
            self.evaluate()
            if self._best() == self._engine.num_steps:
                self._save()
        due, step = self._is_due(self._config.train.checkpoint_every), self._engine.num_steps
        if self._saves.should_poll(step):
            with self.totals.timed("checkpoint"):
                outcome, by_the_clock = self._saves.look(step)
            self._note_outcome(outcome)
            due = due or by_the_clock
        if due:
            self._save(beside=self._config.train.checkpoint_beside)

    def _note_outcome(self, outcome: Outcome | None) -> None:
        """Count a checkpoint that has ended, and say so where it failed. Raises CheckpointError where too many did."""
        if outcome is None:
            return
        self.checkpoints["failed" if outcome.error else "written"] += 1
        self._failed_in_a_row = self._failed_in_a_row + 1 if outcome.error else 0
        if self._failed_in_a_row > MOST_FAILURES:
            raise CheckpointError(Problem.CHECKPOINTS_FAIL, outcome.step, outcome.error, MOST_FAILURES)
        if outcome.error:
            self._progress.say(
                f"warning: the checkpoint of step {outcome.step} could not be written: {outcome.error}; training goes "
                "on, and the next one is tried"
            )

    def _was_stopped_in_evaluation(self) -> bool:
        """Return whether this step's evaluation was due when a signal stopped the run that is resumed."""
        evaluated = [entry["step"] for entry in self._run.history[-1:]]
        due = self._engine.num_steps > 0 and self._is_evaluation_due() and self._measured_reader.num_samples > 0
        return due and evaluated != [self._engine.num_steps]

    def _is_over(self) -> bool:
        at_end = self._engine.num_steps == total_steps(self._run)
        return at_end or (self._is_evaluated() and has_ended(self._run.history, self._patience))

    def _say_early_stop(self) -> None:
        """Print why the run ends before its last step, where it does."""
        step, total, best = self._engine.num_steps, total_steps(self._run), self._best()
        if step == total or best is None:
            return
        epoch = -(-step // self._run.train_reader.steps_per_epoch)
        self._progress.say(
            f"stopped early after step {step} of {total}, in epoch {epoch} of {self._config.train.epochs}: "
            f"no better in {count_text(self._patience or 0, 'evaluation')} than at step {best}, "
            f"GAUC {metrics_of(self._run.history, best)['gauc']:.4f} (train.early_stopping)"
        )

    def _is_evaluated(self) -> bool:
        """Return whether these parameters were just evaluated, where the best ones are chosen."""
        history = self._run.history
        return self._chooses and bool(history) and history[-1]["step"] == self._engine.num_steps

    def _best(self) -> int | None:
        """Return the step whose parameters the run ends with, where the best ones are chosen."""
        return best_step(self._run.history) if self._chooses else None

    def _finish(self) -> None:
        """Save a checkpoint; or, where an evaluation saw better parameters before, let theirs become the last."""
        run, best = self._run, self._best()
        with self.totals.timed("checkpoint"):
            self._note_outcome(self._saves.wait())
        if best is None or best == self._engine.num_steps:
            self._save()
        elif run.comm.broadcast_object(run.place.has(best)):
            path = end_with(run.comm, run.place, best, self._engine, run.config.data.cache_dir)
            self.metrics = metrics_of(run.history, best)
            self._progress.say(f"step {best} had the best GAUC, {self.metrics['gauc']:.4f}: the run ends with {path}")
        else:
            self._progress.say(f"step {best} had the best GAUC, but in an earlier run; this one has no such checkpoint")
            self._save()

    def _report_tables(self) -> None:
        """Write figures of the ID tables, and print one warning for each where too many ids share a row."""
        tables = {name: table for name, table in self._engine.tables.items() if not table.shape.direct}
        self.tables = gather_figures(self._run.comm, tables)
        for name, figures in self.tables.items():
            scalars = {f"tables/{name}/{what}": value for what, value in figures.items() if what != "kind"}
            self._progress.details(self._engine.num_steps, scalars)
            if name not in self._warned and (warning := warning_of(name, figures)):
                self._warned.add(name)
                self._progress.say(f"warning: {warning}")

    def _is_evaluation_due(self) -> bool:
        position, every = self._run.position, self._config.train.eval_every
        by_epoch = every is None or self._run.validation_reader is not None
        at_end_of_epoch = by_epoch and position.step == 0 and position.epoch > 0
        return at_end_of_epoch or self._is_due(every)

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self._engine.num_steps % every == 0

    def _until_signal(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches; a stop signal is raised in place of one, so that all ranks stop there together."""
        for batch in batches:
            if self._signals.received:
                raise StoppedError(Problem.STOP_SIGNAL, self._signals.received)
            yield batch

    def _save(self, *, beside: bool = False) -> str:
        """Write a checkpoint after the end of the one before, and wait for it unless it is written `beside` training.

        Returns its address. Raises CheckpointError."""
        run = self._run
        state = CheckpointState(
            step=self._engine.num_steps,
            epoch=run.position.epoch,
            step_in_epoch=run.position.step,
            num_ranks=run.comm.size,
            origin=run.origin,
            stores=run.stores,
            history=[*run.history],
            files={},
        )
        given = self._engine, state, self._config.train.keep_checkpoints, self._best()
        with self.totals.timed("checkpoint"):
            self._note_outcome(self._saves.wait())
            if beside:
                self._note_outcome(self._saves.begin(*given))
            else:
                self._saves.save(*given)
                self._note_outcome(Outcome(state.step, ""))
        return run.place.address(state.step)


def total_steps(run: Run) -> int:
    """Count the steps at the end of the run: its own, and those of the run that it continues."""
    everything = run.config.train.epochs * run.train_reader.steps_per_epoch
    return run.engine.first_step + min(everything, run.config.train.max_steps or everything)
