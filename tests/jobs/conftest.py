"""A Dask cluster inside this process, for jobs that a test runs in it."""

from collections.abc import Iterator

import dask
import pytest
from distributed import Client, LocalCluster

from pipeline.cluster import WORKER_CONFIG


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with (
        dask.config.set(WORKER_CONFIG),
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        yield client
