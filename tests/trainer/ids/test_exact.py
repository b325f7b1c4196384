"""Exact ID tables: who has a row, who shares the cold one, and that neither ranks nor the order of ids matter."""

import numpy as np
import pytest
import torch
from torch import Tensor

from featurestore.keys import shard_of
from tests.trainer.ids.exact_tables import (
    SHARDS,
    STEPS,
    assert_same,
    counts_of,
    day_of,
    have_rows,
    ids_of,
    move,
    shape_of,
    state_of,
    table_of,
    tables_of,
    train,
    vector_of,
    vectors_of,
)
from trainer.config.options import IdOptimizer
from trainer.errors import CheckpointError
from trainer.ids.shards import WEIGHT, TableShape, owned_bytes


class TestAdmission:
    def test_a_row_comes_with_the_step_that_is_the_third(self) -> None:
        table = table_of(shape_of(admit_after=3))
        for step in ([5, 6], [5], [6, 7], [5]):
            train(table, step)
        assert have_rows(table, range(10)) == {5}
        train(table, [6, 6, 7])  # many times in one step are one
        assert have_rows(table, range(10)) == {5, 6}
        assert table.counts.refused == 0

    def test_at_first_sight(self) -> None:
        table = table_of()
        train(table, [5, 6])
        assert have_rows(table, range(10)) == {5, 6} and table.counts.cold == 0

    def test_ids_without_a_row_train_the_cold_row_of_their_shard_together(self) -> None:
        table = table_of(shape_of(admit_after=3))
        by_shard: dict[int, list[int]] = {}
        for each in range(1, 40):
            by_shard.setdefault(int(shard_of([each], SHARDS)[0]), []).append(each)
        train(table, list(range(1, 40)))
        for shard, ids in by_shard.items():
            state = state_of(table)
            assert state[f"item/{shard:04d}/momentum"].tolist() == [[pytest.approx(0.1 * sum(ids))] * 3]
            assert state[f"item/{shard:04d}/steps"].tolist() == [1]
            assert all(torch.equal(vector_of(table, each), vector_of(table, ids[0])) for each in ids)
        unseen = next(each for each in range(100, 200) if int(shard_of([each], SHARDS)[0]) == shard)
        assert torch.equal(vector_of(table, unseen), vector_of(table, ids[0]))
        assert vector_of(table, unseen).abs().max() > 0.05

    def test_evaluation_neither_counts_nor_admits(self) -> None:
        table = table_of(shape_of(admit_after=2))
        train(table, [5])
        before = state_of(table)
        for _ in range(3):
            vector_of(table, 5)
            vectors_of(table, table.serve(np.array([5, 9, 13]), "eval"))  # with gradients, as if they were wanted
            with torch.no_grad():
                vectors_of(table, table.serve(np.array([5, 9]), "step"))
        assert_same(state_of(table), before)
        assert table.seen.estimate == 2  # what "step" brought
        assert (table.counts.served, table.counts.cold) == (1, 1)

    def test_ids_without_a_row_are_counted_once_a_step(self) -> None:
        table = table_of(shape_of(admit_after=3))
        for step in ([5, 6], [5, 7], [5], [5]):
            train(table, step)
        assert counts_of(table, [5, 6, 7, 8]) == [3, 1, 1, 0]


class TestRows:
    def test_first_values_depend_on_seed_table_and_id_alone(self) -> None:
        one, other = table_of(), table_of(rank=0, num_ranks=1)
        vectors_of(one, one.serve(np.array([1, 5, 9]), "step"))
        for each in ([9], [1], [7, 5]):
            vectors_of(other, other.serve(np.array(each), "step"))
        assert all(torch.equal(vector_of(one, each), vector_of(other, each)) for each in (1, 5, 9))
        values = torch.stack([vector_of(one, each) for each in (1, 5, 9)])
        assert len(values.unique()) == 9
        elsewhere = table_of(seed=2)
        vectors_of(elsewhere, elsewhere.serve(np.array([5]), "step"))
        assert not torch.equal(vector_of(elsewhere, 5), vector_of(one, 5))

    def test_first_values_have_the_deviation_of_hashed_ones(self) -> None:
        table, ids = table_of(shape_of(100_000)), np.arange(20_000)
        values = vectors_of(table, table.serve(ids, "step")).detach()
        assert abs(float(values.mean())) < 0.001
        assert float(values.std()) == pytest.approx(0.05, rel=0.02)

    @pytest.mark.parametrize("ids_optimizer", IdOptimizer.__args__)
    def test_ids_train_as_in_a_hashed_table_where_none_collide(self, ids_optimizer: IdOptimizer) -> None:
        hashed = tables_of(TableShape("item", 3, 10**6, SHARDS), scale=0, ids=ids_optimizer)
        exact = tables_of(shape_of(), scale=0, ids=ids_optimizer)
        for ids in STEPS:
            for tables in (hashed, exact):
                request = tables["item"].serve(ids, "step")
                inverse_R = torch.from_numpy(request.inverse_R)
                (vectors_of(tables["item"], request)[inverse_R] * torch.from_numpy(ids).unsqueeze(1)).sum().backward()
                move(tables["item"])
        ids = np.unique(np.concatenate(STEPS))
        with torch.no_grad():
            found = [
                vectors_of(table, request)[torch.from_numpy(request.inverse_R)]
                for table in (hashed["item"], exact["item"])
                for request in (table.serve(ids, "eval"),)
            ]
        assert torch.equal(*found) and found[0].abs().max() > 0.1

    def test_a_full_shard_keeps_its_rows_and_counts_who_came_too_late(self) -> None:
        table = table_of(shape_of(max_rows=SHARDS, when_full="refuse"))  # a row for each shard
        train(table, np.arange(30))
        first = have_rows(table, range(30))
        assert len(first) == len({int(shard_of([each], SHARDS)[0]) for each in range(30)})
        assert table.counts.refused == table.counts.cold == 30 - len(first)
        train(table, np.arange(60))
        assert have_rows(table, range(30)) == first
        late = 90 - 2 * 8
        assert table.tally() == {"rows": 8, "served": 90, "cold": late, "refused": late, "evicted": 0, "expired": 0}

    @pytest.mark.parametrize("when_full", ["evict", "refuse"])
    def test_bytes_are_those_of_the_arrays(self, when_full: str) -> None:
        shape = shape_of(1000, admit_after=3, when_full=when_full)
        for rank in range(3):
            table = table_of(shape, rank, 3)
            assert table.filter is not None
            index = [table.map.id_of_place, table.map.row_of_entry]
            arrays = [*index, table.last_use, table.used_at, table.filter.counts_SC]
            arrays_bytes = sum(each.nbytes for each in arrays)
            found_bytes = table.rows.block_NW.nbytes + arrays_bytes
            assert owned_bytes(shape, rank, 3, table.optimizer.state, torch.float64) == found_bytes


class TestRanks:
    @pytest.mark.long
    @pytest.mark.parametrize("ids", ["rowwise_adam", "adam"])
    @pytest.mark.parametrize("rules", [{}, {"admit_after": 3}, {"max_rows": 40, "admit_after": 2}])
    @pytest.mark.parametrize("num_ranks", [2, 3, 11])
    def test_the_same_for_any_number_of_ranks(self, num_ranks: int, rules: dict[str, int], ids: IdOptimizer) -> None:
        shape, alone = shape_of(**rules), table_of(shape_of(**rules), ids=ids)
        alone.begin_day(day_of(20_000))
        together: dict[str, Tensor] = {}
        for each in STEPS:
            train(alone, each)
        assert (alone.counts.evicted > 40) == ("max_rows" in rules)
        for rank in range(num_ranks):
            table = table_of(shape, rank, num_ranks, ids=ids)
            table.begin_day(day_of(20_000))
            for each in STEPS:
                train(table, ids_of(table, each, rank))
            together |= state_of(table)
        assert_same(together, state_of(alone))

    @pytest.mark.parametrize("max_rows", [4000, 40])
    @pytest.mark.parametrize("steps_ahead", [1, len(STEPS)])
    def test_rows_asked_for_long_before_their_step_are_the_same(self, max_rows: int, steps_ahead: int) -> None:
        """Also where another id has the row by then."""
        one, ahead = table_of(shape_of(max_rows, admit_after=2)), table_of(shape_of(max_rows, admit_after=2))
        requests = [ahead.serve(ids, "step") for ids in STEPS[:steps_ahead]]
        for step, ids in enumerate(STEPS):
            requests += [ahead.serve(later, "step") for later in STEPS[step + steps_ahead : step + steps_ahead + 1]]
            train(one, ids)
            request, weight_R = requests[step], torch.from_numpy(ids.astype(np.float64)).unsqueeze(1)
            (vectors_of(ahead, request)[torch.from_numpy(request.inverse_R)] * weight_R).sum().backward()
            move(ahead)
        assert_same(state_of(ahead), state_of(one))

    def test_a_rank_beyond_the_shards_owns_nothing(self) -> None:
        table = table_of(shape_of(admit_after=2), rank=9, num_ranks=11)
        table.begin_day(day_of(20_000))
        train(table, [])
        assert table.names() == [] and table.tally()["rows"] == 0


class TestExpiry:
    def test_rows_go_when_they_were_not_used_for_more_days(self) -> None:
        table = table_of(shape_of(expire_days=2))
        for day, ids in ((100, [1, 2, 3]), (101, [1]), (102, [1, 2])):
            table.begin_day(day_of(day))
            train(table, ids)
        assert have_rows(table, range(9)) == {1, 2, 3}
        kept = {each: vector_of(table, each) for each in (1, 2)}
        table.begin_day(day_of(103))
        assert have_rows(table, range(9)) == {1, 2} and table.counts.expired == 1
        assert all(torch.equal(vector_of(table, each), values) for each, values in kept.items())

    def test_a_row_that_comes_back_begins_anew(self) -> None:
        table, fresh = (table_of(shape_of(expire_days=2)) for _ in range(2))
        table.begin_day(day_of(100))
        train(table, [1, 2, 3])
        table.begin_day(day_of(200))
        assert all(parts.count_nonzero() == 0 for part, parts in table.rows.parts.items() if part != WEIGHT)
        for each in (table, fresh):
            each.begin_day(day_of(200))
            train(each, [3])
        assert torch.equal(vector_of(table, 3), vector_of(fresh, 3))

    def test_what_is_left_trains_on_as_before(self) -> None:
        """Against a table that lets nothing go: the same values, at other places."""
        keeps, expires = table_of(shape_of()), table_of(shape_of(expire_days=1))
        daily, some = np.arange(0, 80, 6), np.arange(0, 80, 3)
        for day, ids in ((1, np.arange(1, 81)), (2, some), (3, daily), (4, daily), (5, np.arange(1, 81))):
            for table in (keeps, expires):
                table.begin_day(day_of(day))
                train(table, ids)
        assert expires.counts.expired == 80 - len(daily) + 1  # 0 came on day 2
        same = [each for each in range(81) if torch.equal(vector_of(keeps, each), vector_of(expires, each))]
        assert same == daily.tolist()

    def test_counts_are_halved_every_so_many_days(self) -> None:
        table = table_of(shape_of(admit_after=4, expire_days=3))
        for day in (10, 11, 12):
            table.begin_day(day_of(day))
            train(table, [5])
        assert counts_of(table, [5]) == [3]
        table.begin_day(day_of(13))
        assert counts_of(table, [5]) == [1]


class TestCheckpoint:
    @pytest.mark.parametrize("optimizer", ["rowwise_adam", "adam"])
    @pytest.mark.parametrize(("num_before", "num_after"), [(1, 3), (3, 2), (2, 11)])
    def test_goes_on_at_another_number_of_ranks(self, num_before: int, num_after: int, optimizer: IdOptimizer) -> None:
        shape = shape_of(60, admit_after=2, expire_days=5)
        through = table_of(shape, ids=optimizer)
        through.begin_day(day_of(7))
        for ids in STEPS:
            train(through, ids)
        assert through.counts.evicted > 20
        saved: dict[str, Tensor] = {}
        for rank in range(num_before):
            table = table_of(shape, rank, num_before, ids=optimizer)
            table.begin_day(day_of(7))
            for ids in STEPS[:4]:
                train(table, ids_of(table, ids, rank))
            saved |= state_of(table)
            shared = table.optimizer.shared_state()
        resumed: dict[str, Tensor] = {}
        for rank in range(num_after):
            table = table_of(shape, rank, num_after, ids=optimizer)
            train(table, ids_of(table, np.arange(500, 600), rank))  # not a fresh one
            table.optimizer.load_shared_state(shared)
            table.import_shards({name: saved[name] for name in table.names()})
            table.begin_day(day_of(7))
            for ids in STEPS[4:]:
                train(table, ids_of(table, ids, rank))
            resumed |= state_of(table)
        assert_same(resumed, state_of(through))

    def test_counts_fade_on_the_day_on_which_they_would_have(self) -> None:
        through = table_of(shape_of(admit_after=4, expire_days=3))
        through.begin_day(day_of(10))
        for _ in range(3):
            train(through, [5])
        resumed = table_of(shape_of(admit_after=4, expire_days=3))
        resumed.import_shards(state_of(through))
        for table in (through, resumed):
            table.begin_day(day_of(13))
            assert counts_of(table, [5]) == [1]

    @pytest.mark.parametrize("optimizer", ["rowwise_adam", "adam"])
    def test_a_warm_start_at_another_size_takes_rows_and_leaves_counts(self, optimizer: IdOptimizer) -> None:
        before = table_of(shape_of(60, admit_after=2), ids=optimizer)
        for ids in ([3, 4], [3, 5]):
            train(before, ids)
        larger = table_of(shape_of(6000, admit_after=2), ids=optimizer)
        larger.begin_with(state_of(before))
        assert torch.equal(vector_of(larger, 3), vector_of(before, 3))
        assert have_rows(larger, (3, 4, 5)) == {3}
        assert counts_of(larger, [4]) == [0]

    def test_a_hashed_table_is_refused(self) -> None:
        hashed = tables_of(TableShape("item", 3, 50, SHARDS))
        with pytest.raises(CheckpointError, match=r"item/0000/ids is not in .* another model\.tables\.item,"):
            table_of().import_shards(hashed["item"].export_shards())
        with pytest.raises(CheckpointError, match=r"item/0000/weight has shape \(1, 3\).*\(7, 3\)"):
            hashed["item"].import_shards(table_of().export_shards())

    def test_too_many_rows_are_refused(self) -> None:
        table = table_of()
        train(table, np.arange(100))
        with pytest.raises(CheckpointError, match=r"of the checkpoint has \d+ rows, and this run room for 1; raise"):
            table_of(shape_of(max_rows=8)).import_shards(table.export_shards())
