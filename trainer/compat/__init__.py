"""Checks whether a run may use a store, or replace a model: one comparison, its gates, and crossmedia compat."""

from dataclasses import dataclass
from typing import Annotated

import typer


@dataclass(frozen=True, kw_only=True)
class GateLimits:
    """Limits of the gates; defined here so that a command's help needs no other imports."""

    min_coverage: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the impressions' images with a feature.")
    ] = 0.99
    max_quarantine: Annotated[float, typer.Option(min=0, max=1, help="Share of images in quarantine.")] = 0.01
    max_gauc_loss: Annotated[float, typer.Option(min=0, help="By how much GAUC may fall, beyond noise.")] = 0.002
    max_logloss_rise: Annotated[float, typer.Option(min=0, help="By how much log loss may rise, beyond noise.")] = 0.002


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """The finding of one gate; `value` is None if there was nothing to measure."""

    gate: str
    value: float | None = None
    limit: float = 0
    holds: bool
    text: str

    @property
    def failure(self) -> str:
        """The line on why the gate fails: its name, value, limit and text."""
        value = "not measured" if self.value is None else f"{self.value:.4g}"
        return f"gate {self.gate}: {value}, limit {self.limit:g}: {self.text}"
