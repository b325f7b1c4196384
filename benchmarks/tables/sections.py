"""From the runs of a table to its figures: means with intervals, and gains over the baseline, paired by seed."""

from collections.abc import Mapping, Sequence

from benchmarks.report import Figure, Section
from benchmarks.seeds import holm, p_value, seed_mean
from benchmarks.tables.runs import METRICS, Runner
from benchmarks.tables.variants import Table
from featurestore.console.output import print_line, text_console
from trainer.comm import Comm


def make(tables: Mapping[str, Table], seeds: Sequence[int], runner: Runner, comm: Comm) -> list[Section]:
    """Run what is missing, and return the tables. Every rank calls it.

    Raises TrainerError, FeatureStoreError; what any of the runs lacks, before the first one.
    """
    console = text_console(quiet=comm.rank != 0)
    planned = {
        name: [(row, [runner.plan(table, variant, seed) for seed in seeds]) for row, variant in table.variants.items()]
        for name, table in tables.items()
    }
    sections = []
    for name, rows in planned.items():
        metrics: dict[str, list[Mapping[str, float]]] = {}
        stores: dict[str, Mapping[str, Figure]] = {}
        for row, runs in rows:
            for seed, run in zip(seeds, runs, strict=True):
                metrics.setdefault(row, []).append(runner.metrics(run))
                print_line(console, f"{name}: {row}, seed {seed}: GAUC {metrics[row][-1]['gauc']:.4f}")
            if any("data.store" in variant.settings for variant in tables[name].variants.values()):
                stores[row] = runner.store_figures(runs[0])
        sections.append(section_of(name, tables[name], metrics, stores))
    return sections


def section_of(
    name: str,
    table: Table,
    metrics: Mapping[str, Sequence[Mapping[str, float]]],
    stores: Mapping[str, Mapping[str, Figure]] | None = None,
) -> Section:
    """Make a table from the metrics of each variant, one mapping for each seed in the same order.

    `gauc_95` and `gain_95` are half the widths of 95 % intervals; `p` is of the paired t test, corrected for the
    table's rows; `stores` are further columns.
    """
    gauc = {row: [run["gauc"] for run in runs] for row, runs in metrics.items()}
    gains = {
        row: [ours - theirs for ours, theirs in zip(gauc[row], gauc[table.baseline_of(row)], strict=True)]
        for row in gauc
        if row != table.baseline_of(row)
    }
    p_values = holm({row: p_value(each) for row, each in gains.items()})
    grid: dict[str, dict[str, Figure]] = {}
    for row, runs in metrics.items():
        cells = grid[row] = {}
        for column, values in (("gauc", gauc[row]), ("gain", gains.get(row))):
            if values:
                found = seed_mean(values)
                cells |= {column: found.mean, f"{column}_95": found.half_width}
        cells |= {"p": p_values[row]} if row in p_values else {}
        for metric in METRICS[1:]:
            if all(metric in run for run in runs):
                cells[metric] = seed_mean([run[metric] for run in runs]).mean
        if (paper := table.variants[row].paper_gauc) is not None:
            cells["paper_gauc"] = paper
        cells |= (stores or {}).get(row, {})
    num_seeds = len(next(iter(gauc.values())))
    return Section(f"{table.title} ({name}); {num_seeds} seed{'s' * (num_seeds > 1)}", grid=grid, prefix=f"{name}_")
