"""Collisions of hashed rows: the share of ids that share a row, without keeping the ids, for any number of ranks."""

import numpy as np
import pytest
import torch

from trainer.comm import SoloComm
from trainer.config.options import OptimConfig
from trainer.engine.wiring import build_tables
from trainer.ids.figures import Collisions, collisions_of, gather_figures, rows_for
from trainer.ids.optimizers import RowOptimizer
from trainer.ids.shards import TableShape
from trainer.schema.fields import DistinctCount, table_rows

READER = RowOptimizer(OptimConfig())
IDS = np.random.default_rng(0).integers(-(2**62), 2**62, 100_000)


class OneOfMany(SoloComm):
    """Hands out what the ranks of `everyone` have to say."""

    def __init__(self, everyone: list[object]) -> None:
        self._everyone = everyone

    def allgather_object(self, value: object, name: str = "objects") -> list:
        return self._everyone


def shape_of(rows: int) -> TableShape:
    return TableShape("item", 2, rows, 64)


def counted(shape: TableShape, ids: np.ndarray) -> tuple[int, float]:
    """Rows used and share of ids in shared rows, by counting."""
    shard, row = shape.place_of(ids)
    ids_of_row = np.unique(shard * shape.rows_per_shard + row, return_counts=True)[1]
    return len(ids_of_row), float(ids_of_row[ids_of_row > 1].sum()) / len(ids)


@pytest.mark.parametrize(("num_ids", "rows"), [(1, 1), (2, 64), (100, 256), (4000, 4096), (4000, 1_000_000)])
def test_few_ids_are_counted(num_ids: int, rows: int) -> None:
    shape = shape_of(rows)
    found = collisions_of(shape, DistinctCount().with_values(IDS[:num_ids]))
    assert found == Collisions(num_ids, shape.size, *counted(shape, IDS[:num_ids]), True)


@pytest.mark.parametrize("rows", [1000, 65_536, 1_000_000])
def test_many_ids_are_estimated_closely(rows: int) -> None:
    shape = shape_of(rows)
    found = collisions_of(shape, DistinctCount().with_values(IDS))
    used, share = counted(shape, IDS)
    assert not found.is_exact
    assert found.ids == pytest.approx(100_000, rel=0.06)
    assert found.used_rows == pytest.approx(used, rel=0.06)
    assert found.share == pytest.approx(share, rel=0.06)


def test_the_preset_holds_a_hundred_thousand_ids_badly() -> None:
    found = collisions_of(shape_of(65_536), DistinctCount().with_values(IDS))
    assert found.share == pytest.approx(0.78, abs=0.02)
    warning = found.warning("item")
    assert warning is not None
    assert warning.startswith(f"table item: {found.share:.0%} of {found.ids:,} different ids share one of its 65,536 ")
    assert f"model.tables.item={rows_for(found.ids)} " in warning


def test_the_rows_that_the_warning_names_would_do() -> None:
    rows = rows_for(len(IDS))
    assert rows is not None
    assert counted(shape_of(rows), IDS)[1] == pytest.approx(0.01, abs=0.001)
    assert rows_for(10**11) is None
    assert [rows_for(0), rows_for(1), rows_for(2)] == [1, 1, 100]


def test_no_warning_where_few_ids_meet() -> None:
    assert collisions_of(shape_of(1_000_000), DistinctCount().with_values(IDS)).warning("item") is None
    none = collisions_of(shape_of(10), DistinctCount())
    assert (none.ids, none.share, none.warning("item")) == (0, None, None)


@pytest.mark.parametrize("num_ids", [4095, 65_536])
def test_no_warning_at_the_rows_that_we_suggest(num_ids: int) -> None:
    """At the numbers of ids that get four rows each and no more."""
    rows = table_rows(num_ids)
    found = collisions_of(shape_of(rows), DistinctCount().with_values(IDS[:num_ids]))
    assert rows / num_ids == pytest.approx(4, abs=0.01) and found.share == pytest.approx(0.22, abs=0.02)
    assert found.warning("item") is None


@pytest.mark.parametrize("num_ids", [3000, 100_000])
@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_ranks_know_together_what_one_knows(num_ranks: int, num_ids: int) -> None:
    shape, ids = shape_of(5000), IDS[:num_ids]
    own = []
    for rank in range(num_ranks):
        table = build_tables([shape], rank, num_ranks, seed=0, scale=0.05, optimizer=READER)["item"]
        for step_ids in np.array_split(ids, 7):
            table.serve(step_ids[table.owner_of(step_ids) == rank], "step")
        own.append({"item": table})
    everyone = [{"item": (each["item"].seen.hashes_K, {})} for each in own]
    alone = collisions_of(shape, DistinctCount().with_values(ids))
    assert all(gather_figures(OneOfMany(everyone), each) == {"item": alone} for each in own)


def test_evaluation_notes_no_ids() -> None:
    table = build_tables([shape_of(100)], 0, 1, seed=0, scale=0.05, optimizer=READER, dtype=torch.float32)["item"]
    table.serve(IDS[:10], "eval")
    assert table.seen.estimate == 0
