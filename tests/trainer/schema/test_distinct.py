"""Counting different values in little memory: exact while there are few, close when there are many, in any parts."""

import numpy as np
import pytest

from trainer.schema.fields import DistinctCount


def test_few_values_are_counted_exactly():
    count = DistinctCount().with_values([3, 3, -1]).with_values([]).merged(DistinctCount().with_values([-1, 7]))
    assert (count.estimate, count.is_exact) == (3, True)
    assert DistinctCount().estimate == 0


@pytest.mark.long
@pytest.mark.parametrize("num", [4_000, 4_096, 50_000, 1_000_000])
def test_many_values_are_counted_closely_however_they_come(num):
    values_N = np.random.default_rng(num).permutation(num)
    whole = DistinctCount().with_values(values_N)
    parts = DistinctCount()
    for part_N in np.array_split(values_N, 5):
        parts = parts.merged(DistinctCount().with_values(part_N).with_values(values_N[:100]))
    assert parts.estimate == whole.estimate == pytest.approx(num, rel=0.06)
    assert whole.is_exact == (num < 4_096)
    assert len(whole.hashes_K) <= 4_096
