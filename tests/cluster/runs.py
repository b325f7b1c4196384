"""One small run whose steps are noted, on one machine and on several: the same samples, store and settings."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import buckets
from tests.cluster.hosts import Network, python_words
from tests.ranks import HOROVODRUN
from tests.trainer.conftest import Places, make_places
from tests.trainer.runs.resumed.legs import WORKER, Killed, Leg, comparable_settings, write_schema_with_serials

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

    def settings(self, run_dir: object, **changes: object) -> list[str]:
        """Settings of a run on the machine's own folder."""
        return comparable_settings(self.places, self.schema, run_dir, STEPS, CHECKPOINT_EVERY, **changes)

    def settings_on_s3(self, run_dir: object, **changes: object) -> list[str]:
        """Settings of a run whose samples and features are in the bucket, and its cache on each host's own disk.

        With a `run_dir` below RUNS, the hosts have no disk in common.
        """
        places = {"data__samples": f"{BUCKET}/samples", "data__store": f"{BUCKET}/features"}
        return self.settings(run_dir, **{**places, "data__cache_dir": "/mnt/cache", **changes})

    def alone(self, folder: Path, num_ranks: int) -> Leg:
        """The undisturbed run, on loopback and the machine's disk."""
        return Killed(folder, self.settings(folder)).leg(0, num_ranks)


def open_shop(net: Network, folder: Path) -> Shop:
    """Write samples and features, and copy them to S3 on host s3."""
    places = make_places(folder)
    s3 = buckets.serve_s3(net, "s3")
    for part in ("samples", "features"):
        buckets.upload(net["a"], places.folder / part, f"{BUCKET}/{part}", s3)
    return Shop(net, places, write_schema_with_serials(folder), s3)


def start_over_ssh(shop: Shop, hosts: str, notes: Path, log: Path, *settings: str) -> "subprocess.Popen[bytes]":
    """Start noted ranks by horovodrun on host a, e.g. on "a:1,b:1"."""
    num_ranks = sum(int(each.partition(":")[2]) for each in hosts.split(","))
    launcher = [HOROVODRUN, "--gloo", "-np", str(num_ranks), "-H", hosts, "--network-interfaces", "eth0"]
    worker = python_words(WORKER, notes, 0, *settings)
    return shop.net["a"].start(*launcher, *worker, log=log, env=shop.s3)
