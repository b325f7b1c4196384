"""Numbers of a snapshot against numpy over all its rows: exact where that is little reading, drawn where it is much."""

import numpy as np
import pytest

from explorer.data.store import statistics
from explorer.data.store.statistics import histogram, put_together, store_numbers
from tests.explorer.stores import DIM, make_store, storied


def matrix(store):
    return np.array(store.snapshot().to_arrow(["feature"])["feature"].to_pylist(), np.float64)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_moments_are_those_of_the_live_rows(tmp_path, kind):
    store = storied(tmp_path / "store", kind)
    numbers, expected_ND = store_numbers(store.snapshot()), matrix(store)
    assert numbers.is_exact
    assert numbers.num_rows == 44
    np.testing.assert_allclose(numbers.mean_D, expected_ND.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(numbers.std_D, expected_ND.std(axis=0), rtol=1e-5)
    np.testing.assert_allclose(np.sort(numbers.norm_N), np.sort(np.linalg.norm(expected_ND, axis=1)), rtol=1e-5)
    assert numbers.num_constant == 0


def test_of_much_to_read_a_draw_is_told_as_such(tmp_path, monkeypatch):
    store = storied(tmp_path / "store")
    monkeypatch.setattr(statistics, "_LITTLE_BYTES", 100)
    monkeypatch.setattr(statistics, "DRAWN_ROWS", 12)
    numbers = store_numbers(store.snapshot())
    assert (numbers.is_exact, numbers.num_rows, len(numbers.norm_N)) == (False, 12, 12)
    assert np.abs(numbers.mean_D - matrix(store).mean(axis=0)).max() < 1.5


def test_an_empty_store_has_no_numbers(tmp_path):
    numbers = store_numbers(make_store(tmp_path / "store").snapshot())
    assert (numbers.num_rows, len(numbers.norm_N), numbers.num_constant) == (0, 0, DIM)
    assert histogram(numbers.norm_N) == ([], [])


def test_a_histogram_counts_every_row():
    edges, counts = histogram(np.arange(100.0))
    assert sum(counts) == 100
    assert (len(edges), edges[0], edges[-1]) == (len(counts) + 1, 0, 99)


@pytest.mark.parametrize("width", [1, 256, 257, 1000, 4096])
def test_many_dimensions_are_put_together_by_their_means(width):
    values_D = np.random.default_rng(0).standard_normal(width).astype(np.float32)
    starts, means = put_together(values_D)
    assert len(starts) == len(means) <= 256
    ends = [*starts[1:], width]
    expected = [values_D[start:end].mean(dtype=np.float64) for start, end in zip(starts, ends, strict=True)]
    np.testing.assert_allclose(means, expected, rtol=1e-6)
