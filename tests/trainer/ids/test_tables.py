"""ID tables: the place and first value of a row do not depend on the number of ranks; Adam moves touched rows alone."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.ids.exact_tables import move, vectors_of
from trainer.comm import SoloComm
from trainer.config import OptimConfig
from trainer.engine.wiring import build_tables
from trainer.ids.exact import figures_of, gather_figures, warning_of
from trainer.ids.exact import num_ids as num_ids_of
from trainer.ids.optimizers import RowOptimizer, row_optimizer
from trainer.ids.shards import TableShape, initial_rows, owned_bytes
from trainer.ids.tables import IdTable
from trainer.optim import Rates

SHAPE = TableShape("item", width=3, num_rows=50, num_shards=8)
OPTIM = OptimConfig(lr=0.1, ids_lr=None, ids="rowwise_adagrad")
RATES = Rates(lr=0.1, ids_lr=0.1)


def optimizer(**changes: Any) -> RowOptimizer:
    return row_optimizer(OPTIM.model_copy(update=changes), torch.float64)


def table_of(rank: int = 0, num_ranks: int = 1, shape: TableShape = SHAPE, seed: int = 1, **changes: Any) -> IdTable:
    own = {"optimizer": optimizer(**changes), "seed": seed, "scale": 0.05, "dtype": torch.float64}
    return build_tables([shape], rank, num_ranks, **own)[shape.name]


def train(table: IdTable, ids: list[int], rates: Rates = RATES) -> None:
    request = table.serve(np.array(ids))
    rows_QV = vectors_of(table, request)
    (rows_QV[torch.from_numpy(request.inverse_R)] * torch.arange(1, len(ids) + 1).unsqueeze(1)).sum().backward()
    move(table, rates)


class TestShape:
    def test_rows_fill_every_shard(self) -> None:
        assert SHAPE.rows_per_shard == 7
        assert TableShape("t", 3, num_rows=1, num_shards=8).rows_per_shard == 1

    def test_ids_spread_over_shards_and_rows(self) -> None:
        shape = TableShape("t", 1, num_rows=1 << 12, num_shards=64)
        shard, row = shape.place_of(np.arange(100_000) * 64)  # equal low bits must not meet
        counts = np.bincount(shard * shape.rows_per_shard + row, minlength=1 << 12)
        assert 3 < counts.min() < counts.max() < 60  # Poisson around 24


class TestInitialRows:
    def test_mean_and_deviation(self) -> None:
        rows = initial_rows(TableShape("t", 12, 64 * 1000, 64), shard=3, seed=0, scale=0.05)
        assert abs(rows.mean()) < 0.002
        assert rows.std() == pytest.approx(0.05, rel=0.02)

    def test_differ_by_seed_table_and_shard(self) -> None:
        base = initial_rows(SHAPE, 0, 1, 1.0)
        other_name = TableShape("image", 3, 50, 8)
        for other in (
            initial_rows(SHAPE, 1, 1, 1.0),
            initial_rows(SHAPE, 0, 2, 1.0),
            initial_rows(other_name, 0, 1, 1.0),
        ):
            assert not np.isclose(base, other).any()


class TestMemory:
    def test_bytes_are_those_of_the_tensors(self) -> None:
        for rank in range(3):
            rows = table_of(rank, 3).rows.block_NW
            assert owned_bytes(SHAPE, rank, 3, optimizer().state, torch.float64) == rows.nbytes


class OneOfMany(SoloComm):
    """Hands out what the ranks of `everyone` have to say."""

    def __init__(self, everyone: list[object]) -> None:
        self._everyone = everyone

    def allgather_object(self, value: object, name: str = "objects") -> list:
        return self._everyone


IDS = np.random.default_rng(0).integers(-(2**62), 2**62, 100_000)


def counted(rows: int, ids: np.ndarray) -> tuple[int, float]:
    """Rows used and share of ids in shared rows, by counting."""
    shape = TableShape("item", 2, rows, 64)
    shard, row = shape.place_of(ids)
    ids_of_row = np.unique(shard * shape.rows_per_shard + row, return_counts=True)[1]
    return len(ids_of_row), float(ids_of_row[ids_of_row > 1].sum()) / len(ids)


class TestFigures:
    @pytest.mark.parametrize("ids", ["rowwise_adagrad", "adam"])
    @pytest.mark.parametrize("num_ranks", [1, 3])
    @pytest.mark.parametrize(("num_ids", "rows"), [(0, 10), (1, 64), (2, 64), (3_000, 1_000), (50_000, 200_000)])
    def test_rows_in_use_tell_ids_and_shares(self, num_ids: int, rows: int, num_ranks: int, ids: str) -> None:
        shape, everyone = TableShape("item", 2, rows, 64), []
        for rank in range(num_ranks):
            table = table_of(rank, num_ranks, shape, ids=ids)
            for step_ids in np.array_split(IDS[:num_ids], 3):
                train(table, step_ids[table.owner_of(step_ids) == rank].tolist())
            vectors_of(table, table.serve(IDS[-100:][table.owner_of(IDS[-100:]) == rank], "eval"))  # notes nothing
            everyone.append({"item": table.tally()})
        found = gather_figures(OneOfMany(everyone), {"item": table})["item"]
        if not num_ids:
            assert found == {"kind": "hashed", "rows": shape.size, "used_rows": 0, "share": None}
            assert warning_of("item", found) is None
            return
        used, share = counted(rows, IDS[:num_ids])
        assert (found["rows"], found["used_rows"]) == (shape.size, used)
        assert found["share"] == pytest.approx(share, abs=0.03)
        assert num_ids_of(shape.size, used) == pytest.approx(num_ids, rel=0.1)

    def test_a_hundred_thousand_ids_in_the_presets_table_are_warned_of(self) -> None:
        used, share = counted(65_536, IDS)
        found = figures_of(TableShape("item", 2, 65_536, 64), {"used_rows": used})
        warning = warning_of("item", found) or ""
        assert share == pytest.approx(0.78, abs=0.02) and warning.startswith("table item: about 78% of its ids share")
        assert warning.endswith(f"max_rows: {2 * num_ids_of(65_536, used)}}}")
        assert num_ids_of(64, 64) > 64 * 4  # full: at least so many

    @pytest.mark.parametrize("num_ids", [4095, 65_536])
    def test_no_warning_at_four_rows_for_each_id(self, num_ids: int) -> None:
        rows = 4 * num_ids
        found = figures_of(TableShape("item", 2, rows, 64), {"used_rows": counted(rows, IDS[:num_ids])[0]})
        assert found["share"] == pytest.approx(0.22, abs=0.02)
        assert warning_of("item", found) is None
