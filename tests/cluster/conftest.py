"""Every test below is marked `cluster`; where the machine lacks what it needs, it says so and is not run."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Network, lacking, lacking_packages, network

FOLDER = f"{Path(__file__).parent}{os.sep}"
TIMEOUT_S = 600  # of a test here: each waits for daemons and programs, with deadlines of their own


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if str(item.path).startswith(FOLDER):  # of thousands, most of which are elsewhere
            item.add_marker("cluster")
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Leave out, and say why, what needs hosts that this machine cannot make."""
    missing = lacking() or lacking_packages("sshd")
    if missing:
        pytest.skip(f"several hosts need {missing}")


@pytest.fixture(scope="module")
def net(namespaces: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """Hosts a, b and s3 with ssh between them, at 1 Gbit/s; a test that kills one of them revives it."""
    with network(tmp_path_factory.mktemp("hosts"), ["a", "b", "s3"]) as net:
        yield net
