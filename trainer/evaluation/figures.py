"""What an evaluation reports, as report.json holds it; the explorer reads it back. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its interval; None where it is not defined (no impression, or one class only)."""

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
    """All of it; `missing_curve` is empty where it was not asked for."""

    whole: Measured
    sliced_by: dict[str, SlicedBy]
    reliability: list[Bin]
    missing_curve: list[Hidden]
