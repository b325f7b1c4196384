"""The results of an evaluation, as in report.json, which the explorer reads. Does not import torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its interval; None if it is not defined (no impression, or one class only)."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Measured:
    """A set of impressions."""

    impressions: int
    users: int
    clicks: int
    metrics: dict[str, Estimate]


@dataclass(frozen=True)
class SlicedBy:
    """The slices of one slicing that have impressions, in their order."""

    title: str
    slices: dict[str, Measured]


@dataclass(frozen=True)
class Bin:
    """Impressions with predictions of about one height."""

    impressions: int
    predicted: float
    clicked: Estimate


@dataclass(frozen=True)
class Hidden:
    """Metrics with a share of the images hidden. `gauc_change`: against none hidden, on the same resamples."""

    share: float
    impressions_without_ad_image: int
    metrics: dict[str, Estimate]
    gauc_change: Estimate


@dataclass(frozen=True)
class Figures:
    """All results; `missing_curve` is empty unless it was requested."""

    whole: Measured
    sliced_by: dict[str, SlicedBy]
    reliability: list[Bin]
    missing_curve: list[Hidden]
