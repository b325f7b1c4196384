"""Exact ID tables for tests: made, trained by one step, looked into; and what plain ones are in the reference."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.config import ExactTableConfig, IdOptimizer, OptimConfig
from trainer.engine.wiring import build_tables
from trainer.ids.exact import ExactShape, ExactTable
from trainer.ids.optimizers import row_optimizer
from trainer.ids.shards import TableShape
from trainer.ids.tables import IdTable, RowRequest
from trainer.optim import Rates

sys.path.append(str(Path(__file__).parents[1] / "equivalence"))  # the reference's modules find each other there
from exact import PlainIds, PlainRows

__all__ = ["PlainIds", "PlainRows"]

RATES = Rates(lr=0.1, ids_lr=0.1)
OPTIM = OptimConfig(lr=0.1, ids_lr=None)
SEED = 7  # that of tests/trainer/equivalence, whose reference draws first values too
SHARDS = 8
STEPS = [np.random.default_rng(step).integers(-60, 60, 50) for step in range(8)]


def shape_of(max_rows: int = 4000, **rules: Any) -> ExactShape:
    return ExactShape("item", 3, max_rows, SHARDS, rules=ExactTableConfig(kind="exact", max_rows=max_rows, **rules))


def tables_of(
    shape: TableShape, rank: int = 0, num_ranks: int = 1, ids: IdOptimizer = "rowwise_adagrad", **own: Any
) -> Any:
    own = {"seed": SEED, "scale": 0.05, "dtype": torch.float64, **own}
    optimizer = row_optimizer(OPTIM.model_copy(update={"ids": ids}), torch.float64)
    return build_tables([shape], rank, num_ranks, optimizer=optimizer, **own)


def table_of(shape: ExactShape | None = None, rank: int = 0, num_ranks: int = 1, **own: Any) -> ExactTable:
    return tables_of(shape or shape_of(), rank, num_ranks, **own)["item"]


def train(table: IdTable, ids: Sequence[int] | np.ndarray) -> None:
    """One step in which the loss is the sum of each id's vector, times the id."""
    request = table.serve(np.asarray(ids, np.int64), "step")
    vectors_QV = vectors_of(table, request)
    weight_R = torch.from_numpy(np.asarray(ids, np.float64)).unsqueeze(1)
    (vectors_QV[torch.from_numpy(request.inverse_R)] * weight_R).sum().backward()
    move(table)


def vectors_of(table: IdTable, request: RowRequest) -> Tensor:
    """Those of one table, where the others of its width are asked for nothing."""
    tables, none = list(table.source.key_sources.values()), np.empty(0, np.int64)
    requests = [request if each is table else each.serve(none, "eval") for each in tables]
    return table.source.vectors(requests)[tables.index(table)]


def move(table: IdTable) -> None:
    """End a training step."""
    table.source.move(RATES)
    table.optimizer.end_step(RATES)


def state_of(table: ExactTable) -> dict[str, Tensor]:
    return {name: values.clone() for name, values in table.export_shards().items()}
