"""Settings and fixtures that all tests share: the type of the matrix products, ranks and S3 servers."""

import contextlib
import gc
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import pytest

from featurestore.console import commandline
from featurestore.lookup import VARIABLE, AutoDType
from tests.proxy import Fault, Request, proxy_before
from tests.ranks import Forks, StandingRanks, TorchRanks, forks_of_ranks, standing_ranks
from tests.running.guard import Guard
from tests.running.spared import (
    check_each_kind_once,
    freeze_for_good,
    keep_files_in_memory,
    parse_services_once,
    spare_pandas,
    spare_the_disk,
)
from tests.servers import Server, environment_of, new_buckets

if TYPE_CHECKING:
    from distributed import Client

check_each_kind_once()  # here: the conftest of a folder may import what takes the check from its module

SERVICES = {
    "forks", "two_ranks", "two_torch_ranks", "two_ranks_of_each", "results_of", "client", "cluster", "s3_endpoint",
    "dies_at", "serve",
}  # fmt: skip
"""Fixtures that start ranks, a Dask cluster, a server or writers to be killed: their tests are marked `services`."""
SERVERS = {"s3", "seaweedfs", "s3_url"}
"""Parameters of tests and fixtures that ask for a server."""
SELDOM = {
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "60s",
    "distributed.worker.memory.monitor-interval": "60s",
}
"""What a Dask cluster does to watch itself, for one that is idle most of the time."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--compute-dtype",
        choices=get_args(AutoDType),
        default="float32",
        help="what compute_dtype=auto means in every test, on every processor (default: %(default)s)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Settle what machines decide differently.

    The type of the products: tried out on a busy machine, it may differ between two runs of one test. The threads of
    torch: on a busy machine, threads that wait for each other are many times slower than one. SIGINT: a shell starts
    what runs behind it deaf to it, and so would all be that tests interrupt. A command that tests call in their own
    process does not end that.
    """
    os.environ[VARIABLE] = config.getoption("--compute-dtype")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    commandline.end_process = sys.exit
    config.pluginmanager.register(Guard())
    spare_the_disk()
    keep_files_in_memory()
    spare_pandas()
    gc.disable()  # until all is imported, of which nothing goes


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts a service before `-m` looks at the marks."""
    for item in items:
        assert isinstance(item, pytest.Function)
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        asked = {*item.fixturenames, *(each for each in parameters if isinstance(each, str))}
        if asked & (SERVICES | SERVERS):
            item.add_marker("services")
    _begin_with_the_longest(items)


def _begin_with_the_longest(items: list[pytest.Item]) -> None:
    """Put the files first that take longest, by their marks: a long one at the end would run beside an idle worker."""
    seconds = Counter[Path]()
    for item in items:
        if not item.get_closest_marker("slow"):
            long = item.get_closest_marker("long") or item.get_closest_marker("services")
            seconds[item.path] += next(iter(long.args), 3) if long else 0.1
    items.sort(key=lambda item: -seconds[item.path])


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what tests and libraries hold: to look at it takes a third of a second."""
    freeze_for_good()
    gc.enable()


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    with forks_of_ranks() as forks:
        yield forks


@pytest.fixture(scope="session")
def two_ranks(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandingRanks]:
    """Two ranks of Horovod that stay as long as the tests; for command lines that end well."""
    with standing_ranks(forks, tmp_path_factory.mktemp("two-ranks")) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def two_torch_ranks(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandingRanks]:
    """Two ranks of torch.distributed, in the same way."""
    with standing_ranks(forks, tmp_path_factory.mktemp("two-torch-ranks"), TorchRanks(2)) as ranks:
        yield ranks


@pytest.fixture(scope="module", params=["horovod", pytest.param("torch", marks=pytest.mark.slow)])
def two_ranks_of_each(request: pytest.FixtureRequest) -> StandingRanks:
    """Two ranks of each communicator, one after the other; `make test` takes Horovod's: both have the same bits."""
    ranks: StandingRanks = request.getfixturevalue("two_ranks" if request.param == "horovod" else "two_torch_ranks")
    return ranks


@pytest.fixture(scope="session")
def client() -> Iterator["Client"]:
    """A Dask client whose one worker is a thread of this process, so that tests can look at the network it uses.

    However long a test keeps the worker from saying that it is there, the scheduler waits for it: there is no other.
    It lives as long as the tests of this process, and looks at its clocks and its memory more seldom than Dask would:
    fifty times a second, a fiftieth of a processor all the time.
    """
    import dask
    from distributed import Client, LocalCluster

    from pipeline.cluster.tasks import WORKER_CONFIG

    with (
        pytest.MonkeyPatch.context() as patch,
        dask.config.set({**WORKER_CONFIG, **SELDOM, "distributed.scheduler.worker-ttl": None}),
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        patch.setattr("pipeline.features.part.torch_threads", lambda workers_per_host: 1)
        yield client


@pytest.fixture
def connected(client: "Client", monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs that ask for a cluster get that client's."""
    monkeypatch.setattr("pipeline.cluster.tasks.connect", lambda **_: contextlib.nullcontext(client))


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a SeaweedFS server that lives as long as the tests; its credentials are in the environment."""
    server = Server(tmp_path_factory.mktemp("seaweedfs"))
    parse_services_once()
    try:
        server.start()
        with environment_of(server.endpoint):
            yield server.endpoint
    finally:
        server.kill()


@pytest.fixture(scope="session")
def s3_buckets(s3_endpoint: str) -> list[str]:
    """Buckets of that server that no test has yet."""
    return []


@pytest.fixture
def s3_url(s3_endpoint: str, s3_buckets: list[str]) -> str:
    """An empty bucket of its own, as s3://NAME."""
    if not s3_buckets:
        with environment_of(s3_endpoint):
            s3_buckets += new_buckets(12)
    return s3_buckets.pop()


@pytest.fixture
def missing_bucket(s3_endpoint: str) -> Iterator[str]:
    """A bucket that the server of the environment does not have, as s3://NAME."""

    def rule(request: Request) -> Fault | None:
        return Fault.NO_BUCKET if request.path.startswith("/nobucket") else None

    with proxy_before(s3_endpoint) as proxy, environment_of(proxy.endpoint):
        proxy.rule = rule
        yield "s3://nobucket"
