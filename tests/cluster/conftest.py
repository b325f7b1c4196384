"""Every test below is marked `cluster`; where the machine lacks what it needs, it says so and is not run.

They share hosts, and one small run whose steps are noted, on one machine and on several: the same samples and store.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster import buckets
from tests.cluster.hosts import Network, lacking, network
from tests.trainer.conftest import Places, make_places
from tests.trainer.runs.resumed.legs import Killed, Leg, comparable_settings, write_schema_with_serials

FOLDER = f"{Path(__file__).parent}{os.sep}"
TIMEOUT_S = 600  # of a test here: each waits for daemons and programs, with deadlines of their own
STEPS, CHECKPOINT_EVERY = 40, 10
BUCKET = "s3://shop"
RUNS = f"{BUCKET}/runs"


@dataclass(frozen=True)
class Shop:
    """Samples and features in a folder of the machine, and in a bucket that hosts a and b reach."""

    net: Network
    places: Places
    schema: Path
    s3: dict[str, str]
    """The variables by which hosts find the bucket."""

    def settings_on_s3(self, run_dir: object, **changes: object) -> list[str]:
        """Settings of a run whose samples and features are in the bucket, and its cache on each host's own disk.

        With a `run_dir` below RUNS, the hosts have no disk in common.
        """
        places = {"data__samples": f"{BUCKET}/samples", "data__store": f"{BUCKET}/features"}
        ours = {**places, "data__cache_dir": "/mnt/cache", **changes}
        return comparable_settings(self.places, self.schema, run_dir, STEPS, CHECKPOINT_EVERY, **ours)

    def alone(self, folder: Path, num_ranks: int) -> Leg:
        """The undisturbed run, on loopback and the machine's disk."""
        settings = comparable_settings(self.places, self.schema, folder, STEPS, CHECKPOINT_EVERY)
        return Killed(folder, settings).leg(0, num_ranks)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if str(item.path).startswith(FOLDER):  # of thousands, most of which are elsewhere
            item.add_marker("cluster")
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(scope="module")
def net(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """Hosts with ssh between them, at 1 Gbit/s: a, b and s3, or HOSTS of the module; who kills one of them revives it.

    Left out, with the reason, where this machine cannot make them."""
    if missing := lacking():
        pytest.skip(f"several hosts need {missing}")
    with network(tmp_path_factory.mktemp("hosts"), getattr(request.module, "HOSTS", ["a", "b", "s3"])) as net:
        yield net


@pytest.fixture(scope="module")
def shop(net: Network, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Samples and features, copied to S3 on host s3."""
    folder = tmp_path_factory.mktemp("shop")
    places, s3 = make_places(folder), buckets.serve_s3(net, "s3")
    for part in ("samples", "features"):
        buckets.upload(net["a"], places.folder / part, f"{BUCKET}/{part}", s3)
    return Shop(net, places, write_schema_with_serials(folder), s3)


@pytest.fixture(scope="module")
def whole(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Leg:
    """The run of two ranks."""
    return shop.alone(tmp_path_factory.mktemp("alone"), 2)
