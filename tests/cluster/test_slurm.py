"""Training as a job of Slurm, by the project's own batch scripts (docs/RANKS.md): a node fails, the time is over."""

import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from tests.cli import wait_until
from tests.cluster import buckets
from tests.cluster.conftest import BUCKET, RUNS, STEPS, Shop
from tests.cluster.hosts import PACKAGES, READY_S, ROOT, Host, Network, lacking, num_lines, of_packages, python_words
from tests.pipeline.conftest import draw_photo, encode_image
from tests.pipeline.samples.rows import all_bytes, random_logs, write
from tests.trainer.runs.resumed.legs import Killed, Leg, assert_no_step_or_sample_is_lost

DEAD_AFTER_S = 10
"""A node that does not answer for so long is down, and its jobs are requeued."""
IMAGES = 40
EXTRACT = [
    "--images", f"{BUCKET}/images", "--backbone", "mobilenet_v3_small:avgpool", "--weights", "random:0", "--dtype",
    "float32", "--precision", "float32", "--batch-size", 2, "--part-size", 2, "--num-shards", 4, "--store",
]  # fmt: skip
SAME_ROWS = "import sys; from tests.pipeline.features import test_killed; test_killed.assert_same_rows(*sys.argv[1:])"


class Slurm:
    """A Slurm cluster of one partition; jobs are submitted on the controller's host."""

    def __init__(self, net: Network, controller: str, nodes: Sequence[str]) -> None:
        self._net, self._head, self._nodes = net, net[controller], list(nodes)
        self.folder = net.folder / "slurm"
        self.folder.mkdir()
        key = self.folder / "slurm.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        (self.folder / "slurm.conf").write_text(self._configuration())
        self._start(self._head, "slurmctld", "-D")
        for name in self._nodes:
            self.start_node(name)
        self.wait_for_nodes(self._nodes)

    def start_node(self, name: str) -> None:
        """Start slurmd on a host, which has been revived or never had one."""
        self._start(self._net[name], "slurmd", "-D", "-N", name, "-d", str(PACKAGES / "bin" / "slurmstepd"))

    def wait_for_nodes(self, names: Sequence[str], state: str = "idle") -> None:
        command = ["sinfo", "-h", "-N", "-o", "%T", "-n", ",".join(names)]
        self._wait(lambda: self.call(*command).split() == [state] * len(names))

    def _wait(self, holds: Callable[[], object], timeout_s: float = 6 * READY_S) -> None:
        shown = ("scontrol", "show", "nodes"), ("scontrol", "show", "jobs")
        wait_until(holds, lambda: "".join(self.call(*each) for each in shown) + self.log(), timeout_s, pause_s=0.3)

    def submit(self, script: str, *arguments: object, log: Path, env: Mapping[str, str] | None = None) -> int:
        """Submit a script of deploy/slurm from the project's folder; returns its number."""
        words = [f"--output={log}", str(ROOT / "deploy" / "slurm" / script), *map(str, arguments)]
        env = {"VENV": sys.prefix, "PYTHONPATH": str(ROOT), **(env or {})}
        return int(self.call("sbatch", "--parsable", *words, env=env).strip().partition(";")[0])

    def show(self, job: int) -> dict[str, str]:
        """What Slurm says about a job; it does so for five minutes after its end."""
        shown = self.call("scontrol", "-o", "show", "job", str(job))
        return dict(each.partition("=")[::2] for each in shlex.split(shown))

    def state(self, job: int) -> str:
        return self.show(job)["JobState"]

    def wait(self, job: int, timeout_s: float) -> str:
        active = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")
        self._wait(lambda: self.state(job) not in active, timeout_s)
        return self.state(job)

    def start_again_now(self, job: int) -> None:
        """Wait until a job is requeued, and let it start at once: by itself, Slurm waits two minutes."""
        self._wait(lambda: self.state(job) == "PENDING")
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now")

    def call(self, *words: str, env: Mapping[str, str] | None = None) -> str:
        return self._head.run(*words, env={**(env or {}), **self.variables()}).stdout

    def variables(self) -> dict[str, str]:
        """The variables by which Slurm's programs, libraries and settings are found."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), **of_packages()}

    def log(self) -> str:
        return "\n".join(f"{file.name}: {file.read_text()[-2000:]}" for file in sorted(self.folder.glob("*.log")))

    def _start(self, host: Host, program: str, *arguments: str) -> None:
        log = self.folder / f"{program}-{host.name}.log"
        host.start(PACKAGES / "bin" / program, *arguments, log=log, env=self.variables())

    def _configuration(self) -> str:
        plugins = next((PACKAGES / "usr" / "lib").glob("*-linux-gnu")) / "slurm-wlm"
        settings = {
            "ClusterName": "test", "SlurmctldHost": f"{self._head.name}({self._head.address})", "SlurmUser": "root",
            "SlurmdUser": "root", "PluginDir": plugins, "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": "/mnt/slurmd", "SlurmctldPidFile": "/run/ctl.pid", "SlurmdPidFile": "/run/slurmd.pid",
            "AuthType": "auth/slurm", "CredType": "cred/slurm", "ProctrackType": "proctrack/pgid",
            "TaskPlugin": "task/none", "JobAcctGatherType": "jobacct_gather/none", "MpiDefault": "none",
            "SlurmdParameters": "config_overrides", "ReturnToService": 2, "SlurmdTimeout": DEAD_AFTER_S,
            "KillWait": 5, "MessageTimeout": 5, "BatchStartTimeout": 10, "TCPTimeout": 2,
            "SchedulerParameters": "sched_interval=1,requeue_delay=1", "SchedulerType": "sched/builtin",
            "SelectType": "select/linear", "SwitchType": "switch/none",
        }  # fmt: skip
        lines = [f"{name}={value}" for name, value in settings.items()]
        lines += [f"NodeName={name} NodeAddr={self._net[name].address} CPUs=1" for name in self._nodes]
        lines += [f"PartitionName=all Nodes={','.join(self._nodes)} Default=YES MaxTime=60 State=UP"]
        return "\n".join([*lines, ""])


@pytest.fixture(scope="module")
def slurm(net: Network) -> Slurm:
    if missing := lacking("slurmctld"):
        pytest.skip(f"jobs of Slurm need {missing}")
    return Slurm(net, "s3", ["a", "b"])


class Training:
    """A job of train.sbatch whose ranks note their steps, and what it printed."""

    def __init__(
        self, slurm: Slurm, shop: Shop, folder: Path, *changes: str, by: str = "horovod", pause_s: float = 0
    ) -> None:
        self.slurm, self._folder, self.log = slurm, folder, folder / "log.txt"
        noted = {"NOTES": str(folder), "PYTHONPATH": f"{ROOT / 'tests' / 'cluster' / 'noted'}:{ROOT}"}
        settings = [f"--set={each}" for each in (*shop.settings_on_s3(f"{RUNS}/{folder.name}"), *changes)]
        env = {**shop.s3, **noted, "PAUSE_S": str(pause_s), "TRAIN_BY": by}
        self.job = slurm.submit("train.sbatch", *settings, log=self.log, env=env)

    def wait_for_step(self, step: int) -> None:
        file = self._folder / "notes-0" / "0-of-2.jsonl"  # two lines a step
        wait_until(lambda: num_lines(file) >= 2 * step, self.output, 120, pause_s=0.02)

    def wait(self) -> str:
        return self.slurm.wait(self.job, 200)

    def legs(self, count: int) -> list[Leg]:
        return [Killed(self._folder, []).seen(number, 2) for number in range(count)]

    def output(self) -> str:
        return (self.log.read_text() if self.log.exists() else "") + self.slurm.log()


@pytest.mark.parametrize("by", ["horovod", pytest.param("torch", marks=pytest.mark.slow)])
def test_two_nodes_train_as_ranks_of_one_machine(slurm: Slurm, shop: Shop, whole: Leg, tmp_path: Path, by: str) -> None:
    training = Training(slurm, shop, tmp_path, by=by)
    assert training.wait() == "COMPLETED", training.output()
    (leg,) = training.legs(1)
    assert_no_step_or_sample_is_lost([leg], whole, STEPS)
    if by == "horovod":
        assert leg.samples == whole.samples and leg.losses == whole.losses
    else:
        assert "torch" in training.log.read_text(), training.output()


@pytest.mark.slow
@pytest.mark.parametrize("node", ["a", "b"])
def test_a_job_whose_node_fails_goes_on_later(slurm: Slurm, shop: Shop, whole: Leg, tmp_path: Path, node: str) -> None:
    """Of the batch script and rank 0, or of rank 1: the node loses its power, and is back after Slurm has noticed."""
    training = Training(slurm, shop, tmp_path, pause_s=0.1)
    training.wait_for_step(15)
    shop.net.kill(node)
    slurm.wait_for_nodes([node], "down*")
    shop.net.revive(node)
    slurm.start_node(node)
    slurm.start_again_now(training.job)
    assert training.wait() == "COMPLETED", training.output()
    assert slurm.show(training.job)["Restarts"] == "1"
    assert_no_step_or_sample_is_lost(training.legs(2), whole, STEPS)


@pytest.mark.slow
def test_a_job_whose_time_is_over_writes_a_checkpoint_and_waits_for_a_drained_node(
    slurm: Slurm, shop: Shop, whole: Leg, tmp_path: Path
) -> None:
    """No step is repeated: Slurm sends SIGUSR1 to the batch script before it ends the job."""
    training = Training(slurm, shop, tmp_path, pause_s=0.1)
    training.wait_for_step(15)
    slurm.call("scontrol", "update", "NodeName=b", "State=DRAIN", "Reason=test")
    slurm.call("scancel", "--batch", "--signal=USR1", str(training.job))
    slurm.start_again_now(training.job)
    time.sleep(3)
    assert slurm.state(training.job) == "PENDING"
    slurm.call("scontrol", "update", "NodeName=b", "State=RESUME")
    assert training.wait() == "COMPLETED", training.output()
    legs = training.legs(2)
    assert_no_step_or_sample_is_lost(legs, whole, STEPS)
    assert legs[1].first_step == max(legs[0].losses) + 1, training.output()


def test_a_rank_that_fails_ends_the_job_with_its_message(slurm: Slurm, shop: Shop, tmp_path: Path) -> None:
    training = Training(slurm, shop, tmp_path, "data.store=s3://shop/nothing")
    assert training.wait() == "FAILED"
    assert slurm.show(training.job)["ExitCode"] in ("1:0", "2:0")
    assert "s3://shop/nothing" in training.output()


@pytest.mark.slow
def test_an_extraction_goes_on_when_a_node_fails(slurm: Slurm, shop: Shop, tmp_path: Path) -> None:
    """dask.sbatch: Dask over TLS; its key is on the nodes' own disks, and gone when the job has ended."""
    log, begun, head = tmp_path / "log.txt", tmp_path / "begun.txt", shop.net["s3"]
    (tmp_path / "images").mkdir()
    for number in range(IMAGES):
        (tmp_path / "images" / f"{number:02}.jpg").write_bytes(encode_image(draw_photo(number)))
    buckets.upload(head, tmp_path / "images", f"{BUCKET}/images", shop.s3)
    head.run(*python_words(ROOT / "jobs" / "extract_features.py", *EXTRACT, f"{BUCKET}/calm"), env=shop.s3)
    slow = {
        "BEGUN": str(begun), "DASK_DISTRIBUTED__WORKER__PRELOAD": str(Path(__file__).with_name("slowed.py")),
        "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "20s", "TMPDIR": "/mnt",
    }  # fmt: skip
    words = ["jobs/extract_features.py", *EXTRACT, f"{BUCKET}/again"]
    job = slurm.submit("dask.sbatch", *words, log=log, env={**shop.s3, **slow})
    wait_until(lambda: num_lines(begun) >= IMAGES // 2, lambda: log.read_text() + slurm.log(), 250)
    keys = [shop.net[name].run("bash", "-c", "stat -c %a /mnt/dask-*/key.pem").stdout for name in "ab"]
    assert keys == ["600\n", "600\n"]
    shop.net.kill("b")
    assert slurm.wait(job, 250) == "COMPLETED", log.read_text() + slurm.log()
    assert slurm.show(job)["Restarts"] == "0"
    assert shop.net["a"].run("bash", "-c", "ls /mnt/dask-*/key.pem", check=False).stdout == ""
    head.run(*python_words("-c", SAME_ROWS, f"{BUCKET}/again", f"{BUCKET}/calm"), env=shop.s3)
    shop.net.revive("b")
    slurm.start_node("b")
    slurm.wait_for_nodes(["a", "b"])


def test_samples_are_built_by_a_job(slurm: Slurm, shop: Shop, tmp_path: Path) -> None:
    """dask.sbatch with build_samples, on the nodes together, writes what one process writes."""
    logs, log, calm = tmp_path / "logs", tmp_path / "log.txt", tmp_path / "calm"
    write(logs, *([part[n::4] for n in range(4)] for part in random_logs(random.Random(5))))
    build = ROOT / "jobs" / "build_samples.py"
    subprocess.run([sys.executable, build, "--logs", logs, "--samples", calm], check=True, timeout=200)
    words = ["jobs/build_samples.py", "--logs", logs, "--samples", tmp_path / "samples"]
    job = slurm.submit("dask.sbatch", *words, log=log)
    assert slurm.wait(job, 250) == "COMPLETED", log.read_text() + slurm.log()
    assert all_bytes(tmp_path / "samples") == all_bytes(calm)
