"""Hosts that die, come back or are cut off under trainer.supervise: the run ends as an undisturbed one, by itself"""

import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.cli import wait_until
from tests.cluster.conftest import BUCKET, STEPS, Shop
from tests.trainer.runs.resumed.legs import Leg, assert_no_step_or_sample_is_lost
from tests.trainer.supervise.supervised import PAUSE_S, WORKER, Supervised

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LEASE_S = 10
TIMEOUT_S = 280


@pytest.fixture(scope="module")
def whole(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Leg:
    """The run of one rank, which takes no launcher."""
    return shop.alone(tmp_path_factory.mktemp("alone"), 1)


def start(shop: Shop, run: Supervised, pause_s: float = 1) -> "subprocess.Popen[bytes]":
    """Start the supervisor on host a; a step takes so long at least."""
    variables = {**shop.s3, **run.next_notes(), PAUSE_S: str(pause_s)}
    return shop.net["a"].start(*run.command(), log=run.log, env=variables)


def wait(job: "subprocess.Popen[bytes]", run: Supervised, holds: Callable[[], object]) -> None:
    wait_until(holds, run.log.read_text, TIMEOUT_S, job)


def said_at_the_end(job: "subprocess.Popen[bytes]", run: Supervised) -> str:
    """What was printed, once the supervisor has ended with 0 and no rank is left on any host."""
    assert job.wait(TIMEOUT_S) == 0, run.log.read_text()
    folder = next(setting for setting in run.settings if setting.startswith("run.dir="))

    def is_alone() -> bool:
        return not any(folder in (each.info["cmdline"] or ()) for each in psutil.process_iter(["cmdline"]))

    wait_until(is_alone, run.log.read_text, 30)
    return run.log.read_text()


def supervised(shop: Shop, folder: Path) -> Supervised:
    return Supervised(folder, shop.settings_on_s3(folder), ("--hosts", "a:1,b:1", "--lease-s", str(LEASE_S)))


def test_a_host_dies(shop: Shop, whole: Leg, tmp_path: Path) -> None:
    run = supervised(shop, tmp_path)
    job = start(shop, run)
    wait(job, run, lambda: run.newest_step() >= 10)
    shop.net.kill("b")
    try:
        wait(job, run, lambda: any(leg.num_ranks == 1 and leg.losses for leg in run.legs()))
    finally:
        shop.net.revive("b")
    said = said_at_the_end(job, run)
    assert "rank 1 on b is out of reach" in said and "1 of 2 slots left; resuming at step 10 on 1 rank (a:1)" in said
    assert "supervise: without b: " in said
    legs = run.legs()
    assert [leg.num_ranks for leg in legs] == [2, 1]
    assert_no_step_or_sample_is_lost(legs, whole, STEPS)


def test_the_network_between_two_hosts_is_cut_for_30_seconds(shop: Shop, whole: Leg, tmp_path: Path) -> None:
    """The rank beyond the cut ends before another one is started: it has heard nothing for a lease."""
    run = supervised(shop, tmp_path)
    job = start(shop, run)
    wait(job, run, lambda: run.newest_step() >= 10)
    cut_s = time.monotonic()
    cut = threading.Thread(target=shop.net.cut, args=("a", "b", 30))
    cut.start()
    try:
        wait(job, run, lambda: "on 1 rank (a:1)" in run.log.read_text())
        assert LEASE_S / 2 < time.monotonic() - cut_s < 30
        left = shop.net["b"].run("ps", "axww", "-o", "args").stdout
        assert WORKER.name not in left
    finally:
        cut.join()
    said = said_at_the_end(job, run)
    assert "rank 1 on b is out of reach (it has not answered in time)" in said
    legs = run.legs()
    assert [leg.num_ranks for leg in legs] == [2, 1]
    assert_no_step_or_sample_is_lost(legs, whole, STEPS)


def test_the_disk_is_full_for_a_while(shop: Shop, whole: Leg, tmp_path: Path) -> None:
    """The run's folder is on a small disk of host a, which other files fill until a checkpoint could not be written."""
    host = shop.net["a"]
    host.run("mount", "--mkdir", "-t", "tmpfs", "-o", "size=20m", "disk", "/mnt/small")
    run = Supervised(tmp_path, shop.settings_on_s3("/mnt/small"), ("--hosts", "a:2"))
    job = start(shop, run, pause_s=0.3)
    wait(job, run, lambda: "step-00000010" in host.run("ls", "/mnt/small/run/checkpoints/files", check=False).stdout)
    host.run("sh", "-c", "head -c 100M /dev/zero > /mnt/small/others", check=False)
    # TensorBoard's scalars meet the full disk too, perhaps long before a checkpoint does: a warning, not the end.
    wait(job, run, lambda: "ended with exit code 1 (error: " in run.log.read_text())
    host.run("rm", "/mnt/small/others")
    assert "No space left on device" in said_at_the_end(job, run)
    legs = run.legs()
    assert len(legs) > 1
    assert_no_step_or_sample_is_lost(legs, whole, STEPS)


def test_s3_is_away_for_a_minute(shop: Shop, whole: Leg, tmp_path: Path) -> None:
    """Nothing can be read or written: ranks and supervisor wait, or ranks fail and are started again until it is back.

    The run is on S3 too, so no disk is shared by the hosts."""
    run = Supervised(tmp_path, shop.settings_on_s3(f"{BUCKET}/runs"), ("--hosts", "a:1,b:1", "--backoff-s", "5"))
    job = start(shop, run, pause_s=0.5)
    wait(job, run, lambda: any(len(leg.losses) > 12 for leg in run.legs()))
    cut = threading.Thread(target=shop.net.cut, args=("b", "s3", 60))
    cut.start()
    shop.net.cut("a", "s3", 60)
    cut.join()
    said = said_at_the_end(job, run)
    assert f"with step {STEPS}" in said
    assert_no_step_or_sample_is_lost(run.legs(), whole, STEPS)
