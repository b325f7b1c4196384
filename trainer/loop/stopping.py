"""Early stopping on GAUC, decided from the run's history alone: so every rank decides alike, and a resumed run too."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.errors import TrainerError

History = Sequence[Mapping[str, Any]]


def best_step(history: History) -> int | None:
    """Return the step of the evaluation with the highest GAUC, the earliest of equal ones; None without any evaluation.

    Raises TrainerError where a GAUC is not defined.
    """
    for entry in history:
        if entry["gauc"] is None:
            raise TrainerError(
                f"train.early_stopping goes by GAUC, which the evaluation after step {entry['step']} has not: no user "
                "of the test samples has both a click and an impression without; give more of them, or set it to null"
            )
    best = max(history, key=lambda entry: (entry["gauc"], -entry["step"]), default=None)
    return None if best is None else int(best["step"])


def has_ended(history: History, patience: int | None) -> bool:
    """Return whether the last `patience` evaluations were all no better than the best one before them."""
    if patience is None:
        return False
    best = best_step(history)
    return best is not None and sum(entry["step"] > best for entry in history) >= patience


def has_finished(report: Mapping[str, Any], step: int, total_steps: int, patience: int | None, tested: bool) -> bool:
    """Return whether the run that wrote this report has nothing left to do after `step`, its newest checkpoint.

    With early stopping that is the best step, which may be long before the last. `tested`: there are test samples.
    """
    if report["global_step"] != step or (tested and not report["metrics"]):
        return False
    last = max([step, *(entry["step"] for entry in report["history"])]) if patience is not None else step
    return last >= total_steps or has_ended(report["history"], patience)


def metrics_of(history: History, step: int) -> dict[str, Any]:
    """Return what the evaluation after `step` measured."""
    (entry, *_) = (entry for entry in history if entry["step"] == step)
    return {name: value for name, value in entry.items() if name != "step"}
