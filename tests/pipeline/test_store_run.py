"""How the building of shards is shared out, and what a run that lost its parts to another one says."""

from types import SimpleNamespace

import pytest

from featurestore import FeatureStore, StoreInfo
from featurestore.errors import InvalidRowsError
from pipeline import store_run
from pipeline.import_vectors import extractor_of
from pipeline.store_run import build_shards
from tests.faulty import faulty

MB = 1 << 20


@pytest.fixture
def store(tmp_path):
    return FeatureStore.create(tmp_path / "features", StoreInfo(num_shards=64, dim=2, extractor=extractor_of("x")))


def cluster(*workers):
    """A client of workers with (threads, MB of memory)."""
    found = {str(place): {"nthreads": threads, "memory_limit": mb * MB} for place, (threads, mb) in enumerate(workers)}
    return SimpleNamespace(
        nthreads=lambda: {place: worker["nthreads"] for place, worker in found.items()},
        scheduler_info=lambda n_workers: {"workers": found},
    )


@pytest.mark.parametrize(
    ("workers", "num_tasks"),
    [
        ([(1, 16_384)], 3),  # of 512 MB
        ([(1, 0)], 3),  # no limit is set
        ([(4, 16_384), (4, 16_384)], 8),  # one for each thread
        ([(2, 16_384), (2, 1024)], 9),  # of 128 MB, a quarter of half of the smaller worker
        ([(1, 16)], 64),  # never less than a shard
    ],
)
def test_tasks_that_build_shards_are_few_and_fit_into_memory(store, monkeypatch, workers, num_tasks):
    calls = []
    large = faulty(store, entries=lambda entries, path: [SimpleNamespace(size_bytes=512 * MB)] * 2)
    monkeypatch.setattr(store_run, "run_all", lambda client, title, function, given, advice: calls.extend(given) or [])
    assert build_shards(cluster(*workers), large, "run", ["part"]) == {}
    assert len(calls) == num_tasks
    assert [shard for _, _, shards, _ in calls for shard in shards] == list(range(64))


def test_a_run_whose_parts_another_one_discarded_says_what_to_do(client, store):
    with pytest.raises(InvalidRowsError, match=r"two runs of the same job .* Run one at a time; run this again"):
        build_shards(client, store, "run", ["part"])
