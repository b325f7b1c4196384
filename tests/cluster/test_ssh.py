"""Ranks on two hosts, started by horovodrun over ssh; samples, features and runs on S3 on a third (docs/RANKS.md)."""

import subprocess
import time
from pathlib import Path

from tests.cli import wait_until
from tests.cluster.conftest import RUNS, STEPS, Shop
from tests.cluster.hosts import Network, num_lines, python_words
from tests.ranks import HOROVODRUN
from tests.servers import SECRET_KEY
from tests.trainer.runs.resumed.legs import WORKER, Killed, Leg, assert_no_step_or_sample_is_lost

DEADLINE_S = 15


def start(shop: Shop, notes: Path, log: Path, *settings: str) -> "subprocess.Popen[bytes]":
    """Start noted ranks on hosts a and b by horovodrun on a."""
    launcher = [HOROVODRUN, "--gloo", "-np", "2", "-H", "a:1,b:1", "--network-interfaces", "eth0"]
    return shop.net["a"].start(*launcher, *python_words(WORKER, notes, 0, *settings), log=log, env=shop.s3)


def test_two_hosts_train_as_two_ranks_of_one_machine(shop: Shop, whole: Leg, tmp_path: Path) -> None:
    """The same samples in every step, and losses of the same bits; and no secret is on a command line meanwhile.

    Horovodrun writes all variables on command lines, which everybody on a host can read.
    """
    log, run = tmp_path / "log.txt", Killed(tmp_path, [])
    job = start(shop, run.notes(0), log, *shop.settings_on_s3(f"{RUNS}/{tmp_path.name}"))
    seen, end = "", time.monotonic() + 200
    while job.poll() is None:
        assert time.monotonic() < end, log.read_text()
        seen += "".join(shop.net[name].run("ps", "axww", "-o", "args").stdout for name in "ab")
        time.sleep(1)
    assert job.returncode == 0, log.read_text()
    assert "AWS_ENDPOINT_URL" in seen and SECRET_KEY not in seen
    leg = run.seen(0, 2)
    assert leg.samples == whole.samples and leg.losses == whole.losses
    assert len(leg.losses) == STEPS
    assert shop.net["a"].run("ls", "/mnt/cache").stdout and shop.net["b"].run("ls", "/mnt/cache").stdout


def test_two_hosts_train_by_torchrun_too(shop: Shop, whole: Leg, tmp_path: Path) -> None:
    """One torchrun on each host, and no ssh."""
    run = Killed(tmp_path, [])
    worker = [WORKER, run.notes(0), 0, *shop.settings_on_s3(f"{RUNS}/{tmp_path.name}")]
    jobs = {}
    for number, name in enumerate("ab"):
        place = f"--nnodes 2 --node-rank {number} --nproc-per-node 1 --master-addr a --master-port 29500".split()
        log = tmp_path / f"{name}.txt"
        words = python_words("-m", "torch.distributed.run", *place, *worker)
        jobs[log] = shop.net[name].start(*words, log=log, env=shop.s3)
    assert [job.wait(200) for job in jobs.values()] == [0, 0], "".join(log.read_text() for log in jobs)
    assert_no_step_or_sample_is_lost([run.seen(0, 2)], whole, STEPS)


def test_a_host_that_loses_its_power_ends_the_run_and_it_is_resumed(shop: Shop, whole: Leg, tmp_path: Path) -> None:
    """Nothing tells the peers: no connection ends. Then the host is back, and no step is lost."""
    log, run = tmp_path / "log.txt", Killed(tmp_path, [])
    settings = shop.settings_on_s3(f"{RUNS}/{tmp_path.name}", run__deadline_s=DEADLINE_S)
    job = start(shop, run.notes(0), log, *settings, "run.resume=null")
    notes = run.notes(0) / "0-of-2.jsonl"  # two lines a step
    wait_until(lambda: num_lines(notes) >= 2 * 25, log.read_text, 120, job, 0.01)
    shop.net.kill("b")
    start_s = time.monotonic()
    assert job.wait(120) != 0
    assert time.monotonic() - start_s < DEADLINE_S + 30
    assert "not there: rank 1" in log.read_text()
    shop.net.revive("b")
    job = start(shop, run.notes(1), log, *settings, "run.resume=latest")
    assert job.wait(200) == 0, log.read_text()
    assert_no_step_or_sample_is_lost([run.seen(0, 2), run.seen(1, 2)], whole, STEPS)


LISTENING = """
import psutil
from trainer.comm import connect
comm = connect(30)
comm.allgather_object("here", name="ranks")
found = (each.laddr.ip for each in psutil.Process().net_connections("tcp") if each.status == "LISTEN")
print(*sorted(set(found)))
comm.close()
"""


def test_ranks_of_two_hosts_and_their_store_listen_at_their_own_addresses(net: Network, tmp_path: Path) -> None:
    """As trainer.supervise and crossmedia slurm start them with --by torch; docs/SECURITY.md says so."""
    a, b = net["a"], net["b"]
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": a.address}
    env, log = place | {"MASTER_PORT": "29511"}, tmp_path / "b.txt"
    other = b.start(*python_words("-c", LISTENING), log=log, env=env | {"RANK": "1"})
    assert a.run(*python_words("-c", LISTENING), env=env | {"RANK": "0"}).stdout.split() == [a.address]
    assert other.wait(60) == 0 and log.read_text().split() == [b.address]
