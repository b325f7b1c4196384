"""What all tests share: the type of the matrix products, and S3 servers."""

import os
import signal
from collections.abc import Iterator
from typing import get_args

import pytest

from featurestore.lookup.compute_dtype import VARIABLE, AutoDType
from tests.servers import environment_of, moto, new_bucket, seaweedfs


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--compute-dtype",
        choices=get_args(AutoDType),
        default="float32",
        help="what compute_dtype=auto means in every test, on every processor (default: %(default)s)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Settles the type of the products: tried out on a busy machine, it may differ between two runs of one test. And a
    shell starts what runs behind it deaf to SIGINT, and so would all be that tests interrupt."""
    os.environ[VARIABLE] = config.getoption("--compute-dtype")
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a SeaweedFS server that lives as long as the tests; its credentials are in the environment."""
    server = seaweedfs(tmp_path_factory.mktemp("seaweedfs"))
    try:
        server.start()
        with environment_of(server.endpoint):
            yield server.endpoint
    finally:
        server.kill()


@pytest.fixture
def s3_url(s3_endpoint: str) -> str:
    """An empty bucket of its own, as s3://NAME."""
    return new_bucket()


@pytest.fixture(scope="session")
def moto_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a moto server that lives as long as the tests."""
    server = moto(tmp_path_factory.mktemp("moto"))
    try:
        server.start()
        yield server.endpoint
    finally:
        server.kill()


@pytest.fixture
def moto_url(moto_endpoint: str) -> Iterator[str]:
    """An empty bucket of its own on the moto server, as s3://NAME; the environment leads there meanwhile."""
    with environment_of(moto_endpoint):
        yield new_bucket()
