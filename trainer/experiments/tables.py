"""From the figures of runs to a table: mean, interval, and whether a variant differs from its baseline.

Seeds are shared by the variants, so a variant is compared with its baseline seed by seed: the paired t test and the
interval of Student's t (scipy). Several rows of one table are several looks: Holm's correction holds the chance of any
false star below 5 %.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from featurestore.console.output import print_line, print_table
from featurestore.console.page.plots import Mark, Plot, intervals
from featurestore.console.page.recording import current_page
from trainer.experiments.grid import Experiment

LEVEL = 0.95
_HEADINGS = ("GAUC", "gain", "p", "AUC", "AUC, new ads", "log loss", "paper: GAUC", "paper: gain")


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


def seed_mean(values: Sequence[float]) -> SeedMean:
    """Compute the mean and Student's interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return SeedMean(mean, None)
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return SeedMean(mean, float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error)


def rows_of(experiment: Experiment, figures: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Row]:
    """Make the rows of `figures`, the metrics of each variant, one mapping for each seed in the same order."""
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
        rows.append(Row(variant.name, baseline, metrics, gain, p_value, paper[variant.name], paper_gain))
    return _corrected(rows)


def as_markdown(experiment: Experiment, rows: Sequence[Row], num_seeds: int) -> str:
    """Write a section with one table."""
    lines = [f"### {experiment.title} (`{experiment.name}`)", ""]
    lines += [experiment.note, ""] if experiment.note else []
    lines += [_method(num_seeds), "", f"| | {' | '.join(_HEADINGS)} |", "|---" * (1 + len(_HEADINGS)) + "|"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def show(console: Console, experiment: Experiment, rows: Sequence[Row], num_seeds: int) -> None:
    """Print the same for a person."""
    print_line(console, f"{experiment.title} ({experiment.name})", style="bold")
    for line in filter(None, (experiment.note, _method(num_seeds))):
        print_line(console, line)
    table = Table("")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*_cells(row))
    print_table(console, table)
    if page := current_page():
        for plot in _plots(rows):
            page.add_plot(plot)


def as_values(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Return the rows for JSON."""
    return [asdict(row) for row in rows]


def _plots(rows: Sequence[Row]) -> Iterator[Plot | None]:
    """Draw GAUC and its gain over the baseline, each with its interval."""
    yield intervals("GAUC, mean over seeds", [_mark(row.name, row.metrics.get("gauc"), _shown) for row in rows])
    gains = [_mark(row.name, row.gain, _signed) for row in rows if row.gain is not None]
    if gains:
        yield intervals("Gain of GAUC over the baseline, on the dashed line none", gains, line=0.0)


def _mark(name: str, value: SeedMean | None, text: Callable[[SeedMean], str]) -> Mark:
    if value is None:
        return Mark(name, None)
    half = value.half_width
    low, high = (None, None) if half is None else (value.mean - half, value.mean + half)
    return Mark(name, value.mean, low, high, text(SeedMean(value.mean, None)))


def _method(num_seeds: int) -> str:
    return (
        f"Mean of {num_seeds} seed{'s' if num_seeds > 1 else ''} with its 95 % interval; * differs from its baseline"
        " (p < 0.05, paired t test, Holm)."
    )


def _cells(row: Row) -> list[str]:
    """The row's name, and its figures under `_HEADINGS`."""
    star = "*" if row.p_value is not None and row.p_value < 1 - LEVEL else ""
    return [
        row.name,
        _shown(row.metrics.get("gauc")),
        "baseline" if row.gain is None else _signed(row.gain) + star,
        "" if row.p_value is None else f"{row.p_value:.2g}",
        *(_shown(row.metrics.get(name)) for name in ("auc", "new_ad_auc", "logloss")),
        "" if row.paper_gauc is None else f"{row.paper_gauc:.4f}",
        "" if row.paper_gain is None else f"{row.paper_gain:+.4f}",
    ]


def _p_value(gains: Sequence[float]) -> float | None:
    """Two-sided; None for one seed, or where all differences are equal."""
    if len(gains) < 2 or float(np.std(gains)) == 0:
        return None
    return float(stats.ttest_1samp(gains, 0.0).pvalue)


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
