"""ID tables: the place and first value of a row do not depend on the number of ranks; figures of rows in use."""

import numpy as np
import pytest
import torch

from tests.trainer.ids.exact_tables import shape_of, table_of, tables_of, train, vectors_of
from trainer.comm import SoloComm
from trainer.config import IdOptimizer
from trainer.ids.exact import figures_of, gather_figures, warning_of
from trainer.ids.exact import num_ids as num_ids_of
from trainer.ids.shards import TableShape, initial_rows, owned_bytes

SHAPE = TableShape("item", width=3, num_rows=50, num_shards=8)
IDS = np.random.default_rng(0).integers(-(2**62), 2**62, 100_000)


def test_ids_spread_over_shards_and_rows() -> None:
    assert SHAPE.rows_per_shard == 7
    assert TableShape("t", 3, num_rows=1, num_shards=8).rows_per_shard == 1
    shape = TableShape("t", 1, num_rows=1 << 12, num_shards=64)
    shard, row = shape.place_of(np.arange(100_000) * 64)  # equal low bits must not meet
    counts = np.bincount(shard * shape.rows_per_shard + row, minlength=1 << 12)
    assert 3 < counts.min() < counts.max() < 60  # Poisson around 24


def test_first_values_have_the_deviation_and_differ_by_seed_table_and_shard() -> None:
    rows = initial_rows(TableShape("t", 12, 64 * 1000, 64), shard=3, seed=0, scale=0.05)
    assert abs(rows.mean()) < 0.002
    assert rows.std() == pytest.approx(0.05, rel=0.02)
    base = initial_rows(SHAPE, 0, 1, 1.0)
    for shape, shard, seed in ((SHAPE, 1, 1), (SHAPE, 0, 2), (TableShape("image", 3, 50, 8), 0, 1)):
        assert not np.isclose(base, initial_rows(shape, shard, seed, 1.0)).any()


@pytest.mark.parametrize("rank", range(3))
def test_bytes_are_those_of_the_arrays(rank: int) -> None:
    hashed = tables_of(SHAPE, rank, 3)["item"]
    assert owned_bytes(SHAPE, rank, 3, hashed.optimizer.state, torch.float64) == hashed.rows.block_NW.nbytes
    shape = shape_of(1000, admit_after=3)
    table = table_of(shape, rank, 3)
    assert table.filter is not None
    index = [table.map.id_of_place, table.map.row_of_entry]
    arrays = [*index, table.last_use, table.used_at, table.filter.counts_SC, table.rows.block_NW]
    found_bytes = sum(each.nbytes for each in arrays)
    assert owned_bytes(shape, rank, 3, table.optimizer.state, torch.float64) == found_bytes


class OneOfMany(SoloComm):
    """Hands out what the ranks of `everyone` have to say."""

    def __init__(self, everyone: list[object]) -> None:
        self._everyone = everyone

    def allgather_object(self, value: object, name: str = "objects") -> list:
        return self._everyone


def counted(rows: int, ids: np.ndarray) -> tuple[int, float]:
    """Rows used and share of ids in shared rows, by counting."""
    shape = TableShape("item", 2, rows, 64)
    shard, row = shape.place_of(ids)
    ids_of_row = np.unique(shard * shape.rows_per_shard + row, return_counts=True)[1]
    return len(ids_of_row), float(ids_of_row[ids_of_row > 1].sum()) / len(ids)


@pytest.mark.parametrize("ids", ["rowwise_adagrad", "adam"])
@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize(("num_ids", "rows"), [(0, 10), (1, 64), (2, 64), (3_000, 1_000), (50_000, 200_000)])
def test_rows_in_use_tell_ids_and_shares(num_ids: int, rows: int, num_ranks: int, ids: IdOptimizer) -> None:
    shape, everyone = TableShape("item", 2, rows, 64), []
    for rank in range(num_ranks):
        table = tables_of(shape, rank, num_ranks, ids=ids)["item"]
        for step_ids in np.array_split(IDS[:num_ids], 3):
            train(table, step_ids[table.owner_of(step_ids) == rank])
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


def test_a_hundred_thousand_ids_in_the_presets_table_are_warned_of() -> None:
    used, share = counted(65_536, IDS)
    found = figures_of(TableShape("item", 2, 65_536, 64), {"used_rows": used})
    warning = warning_of("item", found) or ""
    assert share == pytest.approx(0.78, abs=0.02) and warning.startswith("table item: about 78% of its ids share")
    assert warning.endswith(f"max_rows: {2 * num_ids_of(65_536, used)}}}")
    assert num_ids_of(64, 64) > 64 * 4  # full: at least so many


@pytest.mark.parametrize("num_ids", [4095, 65_536])
def test_no_warning_at_four_rows_for_each_id(num_ids: int) -> None:
    rows = 4 * num_ids
    found = figures_of(TableShape("item", 2, rows, 64), {"used_rows": counted(rows, IDS[:num_ids])[0]})
    assert found["share"] == pytest.approx(0.22, abs=0.02)
    assert warning_of("item", found) is None
