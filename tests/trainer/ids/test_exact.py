"""Exact ID tables: who has a row, who shares the cold one, and that neither ranks nor the order of ids matter."""

from collections.abc import Sequence

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
    ids_of_shard,
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
from trainer.ids.exact import ExactTable, longest_unused
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
            assert state[f"item/{shard:04d}/sum"].tolist() == [pytest.approx(sum(ids) ** 2)]
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
        assert table.tally() == {
            "used_rows": 8,
            "served": 90,
            "cold": late,
            "refused": late,
            "evicted": 0,
            "expired": 0,
        }

    def test_bytes_are_those_of_the_arrays(self) -> None:
        shape = shape_of(1000, admit_after=3)
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
    @pytest.mark.parametrize("ids", ["rowwise_adagrad", "adam"])
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
        assert table.names() == [] and table.tally()["used_rows"] == 0


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
    @pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
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

    @pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
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


ROWS = 32  # of a shard: two make room at once
IDS = ids_of_shard(3, ROWS + 20)


def filled(order: Sequence[int] = IDS[:ROWS], **rules: int) -> ExactTable:
    """A table whose shard 3 is full; an id a step."""
    table = table_of(shape_of(ROWS * SHARDS, **rules))
    for each in order:
        train(table, [each])
    return table


class TestChoice:
    def test_by_step_then_by_id(self) -> None:
        used_at, ids = np.array([5, 2, 2, 9, 2, 1], np.int32), np.array([1, 30, -20, 4, 10, 6])
        for most, expected in ((1, [5]), (2, [2, 5]), (3, [2, 4, 5]), (4, [1, 2, 4, 5]), (9, [0, 1, 2, 4, 5])):
            assert longest_unused(used_at, ids, most, now=9).tolist() == expected
        assert longest_unused(used_at, ids, 3, now=1).tolist() == []

    def test_as_sorting_all_would(self) -> None:
        draw = np.random.default_rng(0)
        for _ in range(200):
            count = int(draw.integers(1, 60))
            used_at, ids = draw.integers(0, 9, count).astype(np.int32), draw.permutation(1000)[:count] - 500
            most, now = int(draw.integers(1, 70)), int(draw.integers(1, 10))
            order = [row for row in np.lexsort((ids, used_at)).tolist() if used_at[row] < now]
            assert longest_unused(used_at, ids, most, now).tolist() == sorted(order[:most])


class TestRoom:
    def test_the_longest_unused_go_a_sixteenth_at_once(self) -> None:
        table = filled()
        train(table, [IDS[0], IDS[2]])  # used again
        assert table.counts.evicted == 0
        train(table, [IDS[ROWS]])
        assert have_rows(table, IDS) == {*IDS[: ROWS + 1]} - {IDS[1], IDS[3]}
        train(table, [IDS[ROWS + 1]])  # there is one left
        assert table.tally() == {"used_rows": 32, "served": 36, "cold": 0, "refused": 0, "evicted": 2, "expired": 0}

    def test_rows_that_moved_keep_the_step_of_their_last_use(self) -> None:
        """The newest rows take the places of the oldest, which go first, and not also their steps."""
        table = filled()
        train(table, [IDS[ROWS]])
        train(table, IDS[ROWS + 1 : ROWS + 4])
        assert have_rows(table, IDS) == {*IDS[4 : ROWS + 4]}

    def test_as_many_as_are_needed_where_that_is_more(self) -> None:
        table = filled()
        train(table, IDS[ROWS : ROWS + 7])
        assert have_rows(table, IDS) == {*IDS[7 : ROWS + 7]} and table.counts.evicted == 7

    def test_of_one_step_those_with_the_smaller_ids(self) -> None:
        table = filled([])
        train(table, IDS[:ROWS][::-1])
        train(table, IDS[ROWS : ROWS + 5])
        assert have_rows(table, IDS) == {*IDS[5 : ROWS + 5]}

    def test_a_new_row_counts_as_used_in_its_first_step(self) -> None:
        table = filled(IDS[:ROWS][::-1])  # the largest id is the oldest row
        train(table, [IDS[ROWS]])
        assert have_rows(table, IDS) == {*IDS[: ROWS - 2], IDS[ROWS]}

    def test_no_row_that_the_step_uses(self) -> None:
        table = filled()
        train(table, IDS[: ROWS + 3])
        assert have_rows(table, IDS) == {*IDS[:ROWS]}
        assert (table.counts.evicted, table.counts.refused, table.counts.cold) == (0, 3, 3)
        train(table, IDS[5 : ROWS + 7])
        assert have_rows(table, IDS) == {*IDS[5 : ROWS + 5]} and (table.counts.evicted, table.counts.refused) == (5, 5)

    def test_ids_that_wait_for_their_admission_take_no_ones_room(self) -> None:
        table = filled([each for each in IDS[:ROWS] for _ in range(2)], admit_after=2)
        train(table, [IDS[ROWS]])
        assert table.counts.evicted == 0
        train(table, [IDS[ROWS]])
        assert table.counts.evicted == 2 and have_rows(table, IDS) == {*IDS[2 : ROWS + 1]}

    def test_evaluation_is_no_use(self) -> None:
        table = filled()
        vector_of(table, IDS[0])
        train(table, [IDS[ROWS]])
        assert IDS[0] not in have_rows(table, IDS)

    def test_a_row_that_moves_in_the_step_that_uses_it_is_read_and_trained(self) -> None:
        """The last rows take the places of those that go, while the step has their vectors in hand."""
        table, large = filled(), table_of()
        for each in IDS[:ROWS]:
            train(large, [each])
        for each in (table, large):
            train(each, [*IDS[ROWS - 4 : ROWS], *IDS[ROWS : ROWS + 3]])
        assert table.counts.evicted == 3
        for each in IDS[ROWS - 4 : ROWS + 3]:
            assert torch.equal(vector_of(table, each), vector_of(large, each))

    def test_other_shards_keep_their_rows(self) -> None:
        table, others = filled(), ids_of_shard(5, 9)
        train(table, others)
        train(table, IDS[ROWS : ROWS + 9])
        assert have_rows(table, others) == {*others}


@pytest.mark.parametrize("optimizer", IdOptimizer.__args__)
class TestValues:
    def test_what_is_left_trains_on_as_before(self, optimizer: IdOptimizer) -> None:
        """Against a table that is never full: the same values, at other places."""
        large, small = (table_of(shape_of(rows), ids=optimizer) for rows in (4000, 60 * SHARDS))
        often = IDS[:20]
        for number in range(40):
            for table in (large, small):
                train(table, [*often, *range(1000 * number, 1000 * number + 100)])
        assert small.counts.evicted > 1000 and have_rows(small, often) == {*often}
        for each in often:
            assert torch.equal(vector_of(large, each), vector_of(small, each))

    def test_an_id_that_comes_back_begins_anew(self, optimizer: IdOptimizer) -> None:
        table, fresh = table_of(shape_of(ROWS * SHARDS), ids=optimizer), table_of(ids=optimizer)
        for each in (IDS[0], IDS[0], *IDS[1:ROWS], IDS[ROWS]):
            train(table, [each])
        assert IDS[0] not in have_rows(table, IDS)
        fresh.optimizer.load_shared_state(table.optimizer.shared_state())
        for each in (table, fresh):
            train(each, [IDS[0]])
        assert torch.equal(vector_of(table, IDS[0]), vector_of(fresh, IDS[0]))

    def test_rows_that_are_free_are_zero(self, optimizer: IdOptimizer) -> None:
        table = table_of(shape_of(ROWS * SHARDS), ids=optimizer)
        for each in IDS[: ROWS + 1]:
            train(table, [each])
        slot = table.shards.index(3)
        end = (slot + 1) * table.shape.rows_per_shard
        assert table.map.used_S[slot] == ROWS - 1
        assert all(part[end - 1].count_nonzero() == 0 for part in table.rows.parts.values())
        assert table.used_at[end - 1] == table.last_use[end - 1] == 0


class TestGoingOn:
    def test_a_day_goes_on_with_the_order_of_the_day_before(self) -> None:
        before = filled()
        train(before, [IDS[0]])
        after = table_of(shape_of(ROWS * SHARDS))
        after.begin_with(state_of(before))
        for table in (before, after):
            train(table, IDS[ROWS : ROWS + 5])
        mine, theirs = (
            {n: v for n, v in state_of(t).items() if n.endswith(("ids", "used_at", "clock"))} for t in (after, before)
        )
        assert_same(mine, theirs)
        assert have_rows(after, IDS) == {IDS[0], *IDS[6 : ROWS + 5]}
