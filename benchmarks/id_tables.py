"""Exact ID tables compared with hashed ones of equally many rows: whole training steps, in turn, in one process.

python -m benchmarks.id_tables --json data/bench/id_tables.json

Letters of shapes as in trainer/samples/reader.py. Ids are drawn by Zipf's law, and every variant trains on the same
batches.
A step is the preparation of its batch and the step itself, one after the other, so nothing is hidden behind anything.
"""

import statistics
import time
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from benchmarks.report import JsonPath, Section, write_sections
from featurestore.console.commandline import CommandApp, run_app
from trainer.config.options import ExactTableConfig, ModelConfig, OptimConfig, TableConfig
from trainer.schema import Field, Schema

if TYPE_CHECKING:
    from trainer.engine.engine import Engine
    from trainer.samples.reader import Batch

_SCHEMA = Schema(
    fields=(
        Field(name="user", side="user", kind="id"),
        Field(name="behavior_item", side="user", kind="multi_id", table="item"),
        Field(name="ad_item", side="ad", kind="id", table="item"),
    )
)
_WARM_UP = 20
_MOST = 1.15

app = CommandApp(report=True)


def batch_of(number: int, samples: int, ids: int, behaviors: int) -> "Batch":
    """Draw the batch of a step: single samples with a number of behaviours each."""
    from trainer.samples.reader import Batch, Jagged

    draw = np.random.default_rng(number)
    one = np.ones(samples, np.int32)
    return Batch(
        fields={
            "user": Jagged(draw.integers(0, ids, samples), one),
            "behavior_item": Jagged(draw.zipf(1.2, behaviors * samples) % ids, behaviors * one),
            "ad_item": Jagged(draw.zipf(1.2, samples) % ids, one),
        },
        dense={},
        group_of_sample_B=np.arange(samples),
        label_B=draw.integers(0, 2, samples).astype(np.float32),
        group_id_B=np.arange(samples),
        global_samples=samples,
    )


def engine_of(table: TableConfig) -> "Engine":
    """Make a model of IDs alone, with this table for users and for items."""
    from trainer.comm import SoloComm
    from trainer.engine.engine import Engine

    model = ModelConfig(images="none", compute_dtype="float32", tables={"user": table, "item": table})
    return Engine(SoloComm(), _SCHEMA, {}, model, OptimConfig(), seed=0)


@app.command()
def main(
    json_path: JsonPath = None,
    steps: Annotated[int, typer.Option(min=2, help="Timed steps of each variant.")] = 120,
    samples: Annotated[int, typer.Option(min=1, help="Of a step.")] = 2048,
    ids: Annotated[int, typer.Option(min=1, help="Different users, and items.")] = 200_000,
    behaviors: Annotated[int, typer.Option(min=1, help="Of a sample.")] = 20,
) -> None:
    """Time training steps with exact and with hashed ID tables of equally many rows."""
    rows = 2 * ids
    variants: dict[str, TableConfig] = {
        "hashed": rows,
        "exact": ExactTableConfig(kind="exact", max_rows=rows),
        "exact_admit_after_3": ExactTableConfig(kind="exact", max_rows=rows, admit_after=3),
    }
    engines = {name: engine_of(table) for name, table in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(_WARM_UP + steps):
        batch, order = batch_of(number, samples, ids, behaviors), list(engines)
        for name in order if number % 2 else reversed(order):
            start = time.perf_counter()
            engines[name].train_step(engines[name].prepare(batch))
            seconds[name].append(time.perf_counter() - start)
    median_ms = {name: 1e3 * statistics.median(each[_WARM_UP:]) for name, each in seconds.items()}
    slowest_ms = {name: 1e3 * max(each[_WARM_UP:]) for name, each in seconds.items()}
    grid = {name: {"step_ms": median_ms[name], "slowest_step_ms": slowest_ms[name]} for name in engines}
    ratio = median_ms["exact"] / median_ms["hashed"]
    admitting = median_ms["exact_admit_after_3"] / median_ms["hashed"]
    figures = {"exact_vs_hashed_table": ratio, "exact_admit_after_3_vs_hashed_table": admitting, "at_most": _MOST}
    write_sections([Section("exact and hashed tables of equally many rows", figures, grid)], json_path)


if __name__ == "__main__":
    run_app(app)
