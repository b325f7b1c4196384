"""From the figures of runs to a table: mean, interval, and whether a variant differs from its baseline.

Seeds are shared by the variants, so a variant is compared with its baseline seed by seed: the paired t test and the
interval of Student's t (of scipy.special; scipy.stats takes a second to import). Several rows of one table are several
looks: Holm's correction holds the chance of any false star below 5 %.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.filesize import decimal as bytes_text
from rich.table import Table
from scipy.special import stdtr, stdtrit

from featurestore.console.output import print_line, print_table
from trainer.experiments.grid import Experiment

LEVEL = 0.95
_FIGURES = ("GAUC", "gain", "p", "AUC", "AUC, new ads", "log loss")
_PAPER = ("paper: GAUC", "paper: gain")
_STORES = ("GAUC, new ads", "network", "numbers", "dtype", "images", "bytes", "s / 1,000 images")


@dataclass(frozen=True)
class SeedMean:
    """Mean over seeds, and half the width of its 95 % interval; None for one seed."""

    mean: float
    half_width: float | None


@dataclass(frozen=True)
class Row:
    """One variant; `gain` is of GAUC over its baseline, `p_value` of that gain, corrected for the table's rows."""

    name: str
    baseline: str | None
    metrics: Mapping[str, SeedMean]
    gain: SeedMean | None
    p_value: float | None
    paper_gauc: float | None
    paper_gain: float | None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Of a variant that is a feature store: what `trainer.experiments.sources.facts_of` says of it."""


def seed_mean(values: Sequence[float]) -> SeedMean:
    """Compute the mean and Student's interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return SeedMean(mean, None)
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return SeedMean(mean, float(stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * error)


def rows_of(
    experiment: Experiment,
    figures: Mapping[str, Sequence[Mapping[str, float]]],
    facts: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Row]:
    """Make the rows of a table from `figures`, the metrics of each variant.

    A variant has one mapping for each seed, in the same order; `facts` are by variant.
    """
    paper = {variant.name: variant.paper_gauc for variant in experiment.variants}
    rows: list[Row] = []
    for variant in experiment.variants:
        if variant.name not in figures:
            continue
        mine, base_name = figures[variant.name], experiment.baseline_of(variant.name)
        names = [name for name in mine[0] if all(name in each for each in mine)]
        metrics = {name: seed_mean([each[name] for each in mine]) for name in names}
        baseline = None if base_name == variant.name else base_name
        gain, p_value, paper_gain = None, None, None
        if baseline is not None and baseline in figures:
            gains = [a["gauc"] - b["gauc"] for a, b in zip(mine, figures[baseline], strict=True)]
            gain, p_value = seed_mean(gains), _p_value(gains)
            known, known_base = paper[variant.name], paper[baseline]
            paper_gain = known - known_base if known is not None and known_base is not None else None
        rows.append(
            Row(
                variant.name,
                baseline,
                metrics,
                gain,
                p_value,
                paper[variant.name],
                paper_gain,
                (facts or {}).get(variant.name, {}),
            )
        )
    return _corrected(rows)


def as_markdown(experiment: Experiment, rows: Sequence[Row], num_seeds: int) -> str:
    """Write a section with one table."""
    lines = [f"### {experiment.title} (`{experiment.name}`)", ""]
    lines += [experiment.note, ""] if experiment.note else []
    headings = _headings(experiment)
    lines += [_method(num_seeds), "", f"| | {' | '.join(headings)} |", "|---" * (1 + len(headings)) + "|"]
    lines += [f"| {' | '.join(_cells(experiment, row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def show(console: Console, experiment: Experiment, rows: Sequence[Row], num_seeds: int) -> None:
    """Print the same for a person."""
    print_line(console, f"{experiment.title} ({experiment.name})", style="bold")
    for line in filter(None, (experiment.note, _method(num_seeds))):
        print_line(console, line)
    table = Table("")
    for heading in _headings(experiment):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*_cells(experiment, row))
    print_table(console, table)


def as_values(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Return the rows for JSON."""
    return [asdict(row) for row in rows]


def _method(num_seeds: int) -> str:
    return (
        f"Mean of {num_seeds} seed{'s' if num_seeds > 1 else ''} with its 95 % interval; * differs from its baseline"
        " (p < 0.05, paired t test, Holm)."
    )


def _headings(experiment: Experiment) -> tuple[str, ...]:
    return (*_FIGURES, *(_STORES if experiment.of_stores else _PAPER))


def _cells(experiment: Experiment, row: Row) -> list[str]:
    """The row's name, and its figures under `_headings`."""
    star = "*" if row.p_value is not None and row.p_value < 1 - LEVEL else ""
    return [
        row.name,
        _shown(row.metrics.get("gauc")),
        "baseline" if row.gain is None else _signed(row.gain) + star,
        "" if row.p_value is None else f"{row.p_value:.2g}",
        *(_shown(row.metrics.get(name)) for name in ("auc", "new_ad_auc", "logloss")),
        *(_store_cells(row) if experiment.of_stores else _paper_cells(row)),
    ]


def _paper_cells(row: Row) -> list[str]:
    return [
        "" if row.paper_gauc is None else f"{row.paper_gauc:.4f}",
        "" if row.paper_gain is None else f"{row.paper_gain:+.4f}",
    ]


def _store_cells(row: Row) -> list[str]:
    facts, cost = row.facts, row.facts.get("seconds_per_image")
    return [
        _shown(row.metrics.get("new_ad_gauc")),
        *(str(facts.get(name, "")) for name in ("network", "numbers", "dtype")),
        f"{facts['images']:,}" if "images" in facts else "",
        _bytes(facts),
        "" if cost is None else f"{1000 * cost:.3g}",
    ]


def _bytes(facts: Mapping[str, Any]) -> str:
    return bytes_text(facts["bytes"]) if "bytes" in facts else ""


def _p_value(gains: Sequence[float]) -> float | None:
    """Two-sided; None for one seed, or where all differences are equal."""
    if len(gains) < 2 or float(np.std(gains)) == 0:
        return None
    error = float(np.std(gains, ddof=1)) / len(gains) ** 0.5
    return 2 * float(stdtr(len(gains) - 1, -abs(float(np.mean(gains))) / error))


def _corrected(rows: Sequence[Row]) -> list[Row]:
    """Holm's step-down: the k-th smallest of m p-values times m - k + 1, never below the one before."""
    tested = sorted((row.p_value, number) for number, row in enumerate(rows) if row.p_value is not None)
    corrected, highest = dict.fromkeys(range(len(rows)), None), 0.0
    values: dict[int, float | None] = dict(corrected)
    for place, (p_value, number) in enumerate(tested):
        highest = max(highest, min(1.0, p_value * (len(tested) - place)))
        values[number] = highest
    return [Row(**{**vars(row), "p_value": values[number]}) for number, row in enumerate(rows)]


def _shown(value: SeedMean | None) -> str:
    if value is None:
        return ""
    return f"{value.mean:.4f}" + ("" if value.half_width is None else f" ± {value.half_width:.4f}")


def _signed(value: SeedMean) -> str:
    return f"{value.mean:+.4f}" + ("" if value.half_width is None else f" ± {value.half_width:.4f}")
