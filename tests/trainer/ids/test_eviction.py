"""Full shards of exact ID tables: the rows longest unused make room, and what is left goes on as it was."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.trainer.ids.exact_tables import (
    SHARDS,
    STEPS,
    assert_same,
    day_of,
    have_rows,
    ids_of_shard,
    shape_of,
    state_of,
    table_of,
    train,
    vector_of,
)
from trainer.config.options import IdOptimizer
from trainer.ids.exact import ExactTable, longest_unused

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
        assert table.tally() == {"rows": 32, "served": 36, "cold": 0, "refused": 0, "evicted": 2, "expired": 0}

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

    def test_after_a_run_in_which_rows_made_no_room_days_tell_the_order(self) -> None:
        before = table_of(shape_of(ROWS * SHARDS, when_full="refuse"))
        for day, ids in ((20, IDS[:ROWS]), (21, IDS[10:ROWS]), (22, IDS[:3])):
            before.begin_day(day_of(day))
            train(before, ids)
        assert not [name for name in before.names() if name.endswith(("used_at", "clock"))]
        after = table_of(shape_of(ROWS * SHARDS))
        assert set(before.warm_names()) < set(after.warm_names())
        after.begin_with(state_of(before))
        train(after, IDS[ROWS : ROWS + 7])
        assert have_rows(after, IDS) == {*IDS[:3], *IDS[10 : ROWS + 7]}

    def test_a_table_that_refuses_counts_no_steps(self) -> None:
        table = table_of(shape_of(40, when_full="refuse"))
        for ids in STEPS:
            train(table, ids)
        assert len(table.used_at) == 0 and table.counts.evicted == 0 < table.counts.refused
