"""May a run use a store, or a model the place of another? One comparison, its gates, and python -m trainer.compat."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GateLimits:
    """Limits of the gates; here, as a command's help shows them, and loads nothing for that."""

    min_coverage: float = 0.99
    """Of the images that the impressions name: the share that has a feature."""
    max_quarantine: float = 0.01
    """Of the images that the store was given: the share that could not be read."""
    max_gauc_loss: float = 0.002
    max_logloss_rise: float = 0.002


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """What one gate found, as `text` says; `value` is None where there was nothing to measure."""

    gate: str
    value: float | None = None
    limit: float = 0
    holds: bool
    text: str

    @property
    def failure(self) -> str:
        """The line that says why the gate fails: its name, value and limit, and what the value is of."""
        value = "not measured" if self.value is None else f"{self.value:.4g}"
        return f"gate {self.gate}: {value}, limit {self.limit:g}: {self.text}"
