"""ID tables: who has a row, who shares the cold one, and that neither ranks nor the order of ids matter."""

import re
from collections import Counter
from datetime import date, timedelta
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from featurestore.keys import shard_of, splitmix64
from tests.raised import raises
from tests.trainer.checkpoints import assert_same_tensors
from tests.trainer.ids.exact_tables import (
    OPTIM,
    SHARDS,
    STEPS,
    PlainIds,
    PlainRows,
    move,
    shape_of,
    state_of,
    table_of,
    tables_of,
    train,
    vectors_of,
)
from trainer.comm import SoloComm
from trainer.config import IdOptimizer
from trainer.errors import CheckpointError
from trainer.ids.exact import CountingFilter, ExactShape, figures_of, gather_figures, warning_of
from trainer.ids.exact import num_ids as num_ids_of
from trainer.ids.shards import TableShape, initial_rows, owned_bytes
from trainer.problems import Problem

RULES: list[dict[str, Any]] = [
    {},
    {"admit_after": 3},
    {"max_rows": 40},
    {"max_rows": 40, "when_full": "refuse"},
    {"expire_days": 1},
    {"admit_after": 3, "expire_days": 2},
    {"max_rows": 120, "expire_days": 1},
]


class Plain:
    """The same table, one id at a time, by the reference of tests/trainer/equivalence."""

    def __init__(self, shape: ExactShape, ids: IdOptimizer) -> None:
        self.shape, self.ids = shape, PlainIds(shape, 0.05)
        weight = torch.zeros(shape.size, shape.width, dtype=torch.float64).requires_grad_()
        self.rows = PlainRows(weight, OPTIM.model_copy(update={"ids": ids}))
        self.tally = Counter[str]()

    def train(self, ids: np.ndarray) -> None:
        self.ids.admit(ids.tolist(), self.rows)
        self.rows.weight.grad = torch.zeros_like(self.rows.weight)
        for each in ids.tolist():
            self.rows.weight.grad[self.ids.place(each)] += each
        self.rows.step(sorted({self.ids.place(each) for each in ids.tolist()}), 0.1)
        self.tally.update(served=len({*ids.tolist()}), cold=len({*ids.tolist()} - self.ids.place_of.keys()))

    def state(self) -> dict[str, Tensor]:
        parts = {part: self.ids.in_use(values) for part, values in self.rows.parts().items()} | {"ids": self.ids.ids()}
        return {
            f"item/{shard:04d}/{part}": values
            for part, of_shards in parts.items()
            for shard, values in enumerate(of_shards)
        }


ONE_RANK, OTHER_RANKS = (1, 1), (3, 11, 2)


@pytest.mark.parametrize(
    ("legs", "optimizer"),
    [
        (ONE_RANK, "rowwise_adagrad"),
        *(pytest.param(OTHER_RANKS, each, marks=pytest.mark.long) for each in IdOptimizer.__args__),
    ],
    ids=lambda each: {ONE_RANK: "one rank", OTHER_RANKS: "other ranks"}.get(each, each),
)
@pytest.mark.parametrize("rules", RULES, ids="+".join)
def test_it_is_as_one_id_at_a_time_for_any_ranks_and_resumed(
    rules: dict[str, Any], legs: tuple[int, ...], optimizer: IdOptimizer
) -> None:
    """Some steps and days in each leg, which other ranks continue from a checkpoint; it is compared after each."""
    shape, draw, tally = shape_of(**rules), np.random.default_rng(0), Counter[str]()
    plain, state, shared = Plain(shape, optimizer), dict[str, Tensor](), dict[str, Tensor]()
    alone = table_of(shape, ids=optimizer)
    for leg, num_ranks in enumerate(legs):
        tables = [table_of(shape, rank, num_ranks, ids=optimizer) for rank in range(num_ranks)]
        for table in tables if state else []:
            table.optimizer.load_shared_state(shared)
            table.import_shards({name: state[name] for name in table.names()})
        for step in range(6 * leg, 6 * leg + 6):
            if step % 2 == 0:
                plain.ids.expire_rows(100 + step, plain.rows)
                for table in (alone, *tables):
                    table.expire_rows(date(2026, 1, 1) + timedelta(step))
            ids = draw.integers(6 * step, 6 * step + 60, 50) - 60
            plain.train(draw.permutation(ids))
            train(alone, ids)
            for rank, table in enumerate(tables):
                train(table, ids[table.owner_of(ids) == rank])
        state = {name: part for table in tables for name, part in state_of(table).items()}
        shared = tables[0].optimizer.shared_state()
        for table in tables:
            tally.update({name: count for name, count in table.tally().items() if name != "used_rows"})
        for name, expected in plain.state().items():
            torch.testing.assert_close(state[name], expected.to(state[name].dtype), rtol=0, atol=1e-11)
        assert_same_tensors(state, state_of(alone))  # bit for bit
    assert sum(table.tally()["used_rows"] for table in tables) == len(plain.ids.place_of)
    assert {name: tally[name] for name in ("served", "cold")} == dict(plain.tally)
    assert (tally["evicted"], tally["expired"]) == (plain.ids.evicted, plain.ids.expired)
    assert (tally["refused"] > 0) == ("max_rows" in rules and tally["cold"] > 0)
    assert tally["evicted"] > 40 or rules != {"max_rows": 40}
    assert tally["expired"] > 5 or "expire_days" not in rules


def test_evaluation_neither_counts_nor_admits_nor_uses() -> None:
    table = table_of(shape_of(admit_after=2))
    train(table, [5])
    before = state_of(table)
    for _ in range(3):
        vectors_of(table, table.serve(np.array([5, 9, 13]), "eval"))  # with gradients, as if they were wanted
        with torch.no_grad():
            vectors_of(table, table.serve(np.array([5]), "eval"))
            vectors_of(table, table.serve(np.array([5, 9]), "step"))
    assert_same_tensors(state_of(table), before)
    assert (table.counts["served"], table.counts["cold"]) == (1, 1)


def test_first_values_have_the_deviation_of_hashed_ones_and_are_others_by_seed() -> None:
    shape, ids = shape_of(100_000), np.arange(20_000)
    one, other = (vectors_of(table, table.serve(ids)).detach() for table in (table_of(shape), table_of(shape, seed=2)))
    assert abs(float(one.mean())) < 0.001 and float(one.std()) == pytest.approx(0.05, rel=0.02)
    assert len(one.unique()) == one.numel() and not (one == other).any()


@pytest.mark.parametrize("max_rows", [4000, 40])
@pytest.mark.parametrize("steps_ahead", [1, len(STEPS)])
def test_rows_asked_for_long_before_their_step_are_the_same(max_rows: int, steps_ahead: int) -> None:
    """Also where another id has the row by then."""
    one, ahead = table_of(shape_of(max_rows, admit_after=2)), table_of(shape_of(max_rows, admit_after=2))
    requests = [ahead.serve(ids, "step") for ids in STEPS[:steps_ahead]]
    for step, ids in enumerate(STEPS):
        requests += [ahead.serve(later, "step") for later in STEPS[step + steps_ahead : step + steps_ahead + 1]]
        train(one, ids)
        request, weight_R = requests[step], torch.from_numpy(ids.astype(np.float64)).unsqueeze(1)
        (vectors_of(ahead, request)[torch.from_numpy(request.inverse_R)] * weight_R).sum().backward()
        move(ahead)
    assert_same_tensors(state_of(ahead), state_of(one))


def test_ids_that_wait_for_their_admission_take_no_ones_room() -> None:
    rows = 32  # of a shard: two make room at once
    table, some = table_of(shape_of(rows * SHARDS, admit_after=2)), np.arange(10_000)
    ids = some[shard_of(some, SHARDS) == 3][: rows + 3].tolist()
    for each in ids[:rows]:
        train(table, [each])
        train(table, [each])
    train(table, ids[rows : rows + 1])
    assert table.counts["evicted"] == 0
    train(table, ids[rows:])
    have_rows = {each for slot in range(len(table.shards)) for each in table.map.ids_of(slot).tolist()}
    assert table.counts["evicted"] == 2 and have_rows == {*ids[2 : rows + 1]}


def test_a_hashed_table_and_too_many_rows_are_refused() -> None:
    """What an exact one lacks in the checkpoint of a hashed one is noticed when it is read."""
    hashed = tables_of(TableShape("item", 3, 50, SHARDS))["item"]
    assert "item/0000/ids" in {*table_of().names()} - {*hashed.names()}
    with raises(CheckpointError, Problem.TABLE_SHAPE, where="item/0000/weight", value=(1, 3), wanted=(7, 3)):
        hashed.import_shards(table_of().export_shards())
    table = table_of()
    train(table, np.arange(100))
    with raises(CheckpointError, Problem.TABLE_TOO_SMALL, where="item", value=re.compile(r"^\d+$"), room=1):
        table_of(shape_of(max_rows=8)).import_shards(table.export_shards())


def add(counts: CountingFilter, ids: np.ndarray) -> np.ndarray:
    return counts.add(shard_of(ids, SHARDS), splitmix64(ids))


def test_a_count_is_never_too_low_seldom_too_high_and_ends_at_255() -> None:
    """As many ids wait as the table has rows."""
    draw, truth = np.random.default_rng(0), Counter[int]()
    rows = 4096
    counts = CountingFilter(SHARDS, 8 * rows // SHARDS)
    for _ in range(30):
        ids = np.unique(np.minimum(draw.zipf(1.3, 400), rows))
        add(counts, ids)
        truth.update(ids.tolist())
    ids = np.arange(1, rows)
    over = add(counts, ids).astype(int) - 1 - np.array([truth[each] for each in ids.tolist()])
    assert over.min() == 0
    assert (over > 0).mean() < 0.05
    for _ in range(300):
        last = add(counts, np.array([5]))
    assert last.tolist() == [255] and counts.counts_SC.max() == 255


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
    index = [table.map.id_of_place, table.map.row_of_entry]
    arrays = [*index, table.last_use, table.used_at, table.filter.counts_SC, table.rows.block_NW]
    found_bytes = sum(each.nbytes for each in arrays)
    assert owned_bytes(shape, rank, 3, table.optimizer.state, torch.float64) == found_bytes


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
    shape, comm, everyone = TableShape("item", 2, rows, 64), SoloComm(), []
    for rank in range(num_ranks):
        table = tables_of(shape, rank, num_ranks, ids=ids)["item"]
        for step_ids in np.array_split(IDS[:num_ids], 3):
            train(table, step_ids[table.owner_of(step_ids) == rank])
        vectors_of(table, table.serve(IDS[-100:][table.owner_of(IDS[-100:]) == rank], "eval"))  # notes nothing
        everyone.append({"item": table.tally()})
    comm.allgather_object = lambda value, name: everyone  # type: ignore[method-assign]
    found = gather_figures(comm, {"item": table})["item"]
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
    for num_ids in (4095, 65_536):  # with four rows for each
        used, _ = counted(4 * num_ids, IDS[:num_ids])
        found = figures_of(TableShape("item", 2, 4 * num_ids, 64), {"used_rows": used})
        assert found["share"] == pytest.approx(0.22, abs=0.02)
        assert warning_of("item", found) is None
