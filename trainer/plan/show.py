"""The output of a plan: tables on stdout for a person, JSON for programs."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from featurestore.console.output import print_line, print_table
from featurestore.console.page.plots import Mark, Plot, bars
from featurestore.console.page.recording import current_page
from trainer.plan.build import TrainingPlan
from trainer.plan.cost import DESIGNS, StepCost

_Groups = Mapping[str, Sequence[Mark]]


def as_json(plan: TrainingPlan) -> dict[str, Any]:
    """Return everything in the plan as plain values; `ranks` maps each number of ranks to its row."""
    rows = {
        str(row.ranks): {
            "counts": dataclasses.asdict(row.counts),
            "choose": row.best,
            "stored_bytes_per_rank": dict(row.stored),
            "memory_bytes_per_rank": row.rank_bytes,
            "sample_feature_bytes_per_day": row.sample_day_bytes,
            "designs": {
                design: {
                    "step_s": cost.seconds,
                    "samples_per_s": cost.samples_per_s,
                    "day_s": row.day_s[design],
                    "efficiency": row.efficiency[design],
                    "bytes_by_part": dict(cost.bytes_by_part),
                    "bytes_sent": cost.bytes_sent,
                    "stages_s": {name: stage.seconds for name, stage in cost.stages.items()},
                }
                for design, cost in row.costs.items()
            },
        }
        for row in plan.rows
    }
    return {
        "title": plan.title,
        "base_ranks": plan.base_ranks,
        "samples_per_day": plan.samples_per_day,
        "ranks": rows,
        "machines": {str(local): dataclasses.asdict(machine) for local, machine in plan.machines.items()},
        "advice": list(plan.advice),
        "assumptions": list(plan.assumptions),
    }


def show(plan: TrainingPlan, console: Console) -> None:
    """Print tables of counts, memory, bytes and times, then what to choose and what was taken for granted."""
    print_line(console, plan.title, style="bold")
    for draw in (_counts, _stored, _bytes, _times, _stages):
        print_table(console, draw(plan))
        if (page := current_page()) and draw in _PLOTS:
            page.add_plot(_PLOTS[draw](plan))
    print_line(console, "What to choose", style="bold")
    for line in plan.advice:
        print_line(console, f"- {line}")
    print_line(console, "Taken for granted", style="bold")
    for line in plan.assumptions:
        print_line(console, f"- {line}")


def size(count: float) -> str:
    """Format bytes with a unit, as 1.23 MB."""
    return decimal(round(count), precision=2)


def duration(seconds: float) -> str:
    """Format seconds, as 1.23 ms, 12.3 s, 4.56 h."""
    if seconds == 0:
        return "-"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 600:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.3g} h"


def _counts(plan: TrainingPlan) -> Table:
    table = _table("A global batch (~ is extrapolated)", "ranks", "samples", "images", "of a rank", "images used")
    for name in ("busiest owner", "ids", "ids of a rank"):
        table.add_column(name, justify="right")
    for row in plan.rows:
        images, ids = row.counts.images, row.counts.ids
        mark = "~" if images.extrapolated or ids.extrapolated else ""
        skew = images.owned * row.ranks / images.unique if images.unique else 1.0
        figures = (images.unique, images.asked, images.references)
        table.add_row(
            str(row.ranks),
            f"{row.counts.samples:,}",
            *(f"{mark}{value:,.0f}" for value in figures),
            f"{skew - 1:+.1%}",
            *(f"{mark}{value:,.0f}" for value in (ids.unique, ids.asked)),
        )
    return table


def _stored(plan: TrainingPlan) -> Table:
    table = _table("Features of a rank, by dtype of the store", "ranks", *plan.rows[0].stored, "with ID rows, as it is")
    for row in plan.rows:
        table.add_row(str(row.ranks), *(size(value) for value in row.stored.values()), size(row.rank_bytes))
    return table


def _bytes(plan: TrainingPlan) -> Table:
    parts = list(dict.fromkeys(part for row in plan.rows for cost in row.costs.values() for part in cost.bytes_by_part))
    table = _table("Bytes of a step, out of each rank; samples are read, not sent", "ranks", "design", *parts, "sent")
    table.columns[1].justify = "left"
    for row in plan.rows:
        for design in DESIGNS:
            cost = row.costs[design]
            cells = [size(cost.bytes_by_part[part]) if part in cost.bytes_by_part else "" for part in parts]
            table.add_row(str(row.ranks), design, *cells, size(cost.bytes_sent))
    return table


def _times(plan: TrainingPlan) -> Table:
    against = f"efficiency against its own {plan.base_ranks}"
    table = _table("Time", "ranks", "design", "step", "samples/s", f"a day of {plan.samples_per_day:,.0f}", against)
    table.columns[1].justify = "left"
    for row in plan.rows:
        for design in DESIGNS:
            cost, style = row.costs[design], "bold" if design == row.best else None
            cells = (duration(cost.seconds), f"{cost.samples_per_s:,.0f}", duration(row.day_s[design]))
            table.add_row(str(row.ranks), design, *cells, f"{row.efficiency[design]:.0%}", style=style)
    return table


def _stages(plan: TrainingPlan) -> Table:
    names = list(plan.rows[0].costs["exchange"].stages)
    table = _table("Stages of a step of the exchange, each by itself", "ranks", *names)
    for row in plan.rows:
        stages: Mapping[str, Any] = row.costs["exchange"].stages
        table.add_row(str(row.ranks), *(duration(stages[name].seconds) for name in names))
    return table


def _by_design(plan: TrainingPlan, value: Callable[[StepCost], float], text: Callable[[float], str]) -> _Groups:
    """Make marks of a figure of the three designs, for each number of ranks; the design to choose is marked."""
    return {
        _ranks(row.ranks): [
            Mark(
                f"{design}, to choose" if design == row.best else design,
                value(row.costs[design]),
                figure=text(value(row.costs[design])),
                is_good=design == row.best,
            )
            for design in DESIGNS
        ]
        for row in plan.rows
    }


def _plot_of_memory(plan: TrainingPlan) -> Plot | None:
    marks = [Mark(_ranks(row.ranks), row.rank_bytes, figure=size(row.rank_bytes)) for row in plan.rows]
    return bars("Features and ID rows of a rank", marks)


def _plot_of_bytes(plan: TrainingPlan) -> Plot | None:
    return bars("Bytes sent in a step, out of each rank", _by_design(plan, lambda cost: cost.bytes_sent, size))


def _plot_of_times(plan: TrainingPlan) -> Plot | None:
    return bars("Time of a step", _by_design(plan, lambda cost: cost.seconds, duration))


def _plot_of_stages(plan: TrainingPlan) -> Plot | None:
    marks = {
        _ranks(row.ranks): [
            Mark(name, stage.seconds, figure=duration(stage.seconds))
            for name, stage in row.costs["exchange"].stages.items()
            if stage.seconds
        ]
        for row in plan.rows
    }
    return bars("Stages of a step of the exchange", marks)


_PLOTS: Mapping[Callable[[TrainingPlan], Table], Callable[[TrainingPlan], Plot | None]] = {
    _stored: _plot_of_memory,
    _bytes: _plot_of_bytes,
    _times: _plot_of_times,
    _stages: _plot_of_stages,
}


def _ranks(count: int) -> str:
    return f"{count:,} rank{'s' * (count > 1)}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_style="bold")
    for column in columns:
        table.add_column(column, justify="right")
    return table
