"""A Dask cluster inside this process, for jobs that a test runs in it."""

from collections.abc import Iterator
from contextlib import contextmanager

import dask
import pytest
from distributed import Client, LocalCluster

from pipeline.cluster.connect import WORKER_CONFIG


@contextmanager
def own_cluster() -> Iterator[Client]:
    """A client of a cluster with one worker, all in this process."""
    with (
        dask.config.set(WORKER_CONFIG),
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    with own_cluster() as client:
        yield client
