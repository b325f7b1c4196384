"""Slurm on hosts: slurmctld on one of them, slurmd on the nodes, all from Debian's packages unpacked into a folder."""

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.cluster.hosts import PACKAGES, READY_S, Host, Network

DEAD_AFTER_S = 10
"""A node that does not answer for so long is down, and its jobs are requeued."""


class Slurm:
    """A Slurm cluster of one partition; jobs are submitted on the controller's host."""

    def __init__(self, net: Network, controller: str, nodes: Sequence[str]) -> None:
        self._net, self._head, self._nodes = net, net[controller], list(nodes)
        self.folder = net.folder / "slurm"

    def open(self) -> None:
        """Start all daemons, and wait until the nodes are idle."""
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

    def wait_for_nodes(self, names: Sequence[str], state: str = "idle", timeout_s: float = 6 * READY_S) -> None:
        """Return once these nodes are in a state."""
        end = time.monotonic() + timeout_s
        while self.call("sinfo", "-h", "-N", "-o", "%T", "-n", ",".join(names)).split() != [state] * len(names):
            assert time.monotonic() < end, self.call("scontrol", "show", "nodes") + self.log()
            time.sleep(0.3)

    def submit(self, script: Path, *arguments: object, options: Sequence[str] = (), env: Mapping[str, str]) -> int:
        """Submit a job from the project's folder; returns its number."""
        said = self.call("sbatch", "--parsable", *options, str(script), *map(str, arguments), env=env)
        return int(said.strip().partition(";")[0])

    def show(self, job: int) -> dict[str, str]:
        """What Slurm says about a job; it does so for five minutes after its end."""
        shown = self.call("scontrol", "-o", "show", "job", str(job))
        return dict(each.partition("=")[::2] for each in shlex.split(shown))

    def state(self, job: int) -> str:
        """The state of a job, e.g. RUNNING."""
        return self.show(job)["JobState"]

    def wait(self, job: int, timeout_s: float) -> str:
        """Return the state in which a job ends."""
        end = time.monotonic() + timeout_s
        while (state := self.state(job)) in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"):
            assert time.monotonic() < end, f"job {job} is {state}: {self.log()}"
            time.sleep(0.3)
        return state

    def start_again_now(self, job: int, timeout_s: float = 6 * READY_S) -> None:
        """Wait until a job is requeued, and let it start at once: by itself, Slurm waits two minutes."""
        end = time.monotonic() + timeout_s
        while self.state(job) != "PENDING":
            assert time.monotonic() < end, f"job {job} is {self.state(job)}: {self.log()}"
            time.sleep(0.3)
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now")

    def call(self, *words: str, env: Mapping[str, str] | None = None) -> str:
        """What a command of Slurm prints on the controller's host."""
        return self._head.run(*words, env={**(env or {}), **self.variables()}).stdout

    def variables(self) -> dict[str, str]:
        """The variables by which Slurm's programs and libraries are found."""
        libraries = sorted((PACKAGES / "usr" / "lib").glob("*-linux-gnu"))
        return {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{PACKAGES / 'bin'}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": ":".join(str(path) for each in libraries for path in (each, each / "slurm-wlm")),
        }

    def log(self) -> str:
        """The ends of the daemons' logs."""
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
