"""Hosts that are hosts, on one machine: namespaces with an address, a name, processes, a disk and a core of their own.

    with network(tmp_path, ["a", "b", "s3"]) as net:
        done = net["a"].run("ssh", "b", "hostname")       # a CompletedProcess: "b"
        job = net["a"].start(HOROVODRUN, "-H", "a:1,b:1", ...)  # a Popen
        net.cut("a", "b", 30)                             # nothing passes between a and b for 30 s
        net.kill("b")                                     # a power cut: all that runs on b is gone
        net.revive("b")                                   # it is back, with its name and address, and an empty disk

A host has a network of its own (eth0 in 10.77.0.0/24, 1 Gbit/s each way, on a bridge in a namespace: nothing else is
reached from it, nor it from elsewhere), a name and /etc/hosts, processes that end together, a core that it may share
with others, /mnt, a disk in memory, and sshd, that lets root of every host in without a password, as horovodrun needs
it. All other files are the machine's, so that the project is there.

It needs root, namespaces, `ip` and `tc`, and what tools/cluster_packages.sh fetches; `lacking()` says what of it this
machine does not have. Nothing stays behind: a host is the tree of processes below one shell that waits on a
pipe from this process, and the kernel removes its network and mounts with its last process. So they end with this
process, also by SIGKILL.
"""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from tests.cli import ran, wait_until

ROOT = Path(__file__).parent.parent.parent
PACKAGES = Path(os.environ.get("CLUSTER_PACKAGES") or ROOT / "data" / "cluster")
"""Where tools/cluster_packages.sh has unpacked sshd and Slurm."""
PROGRAMS = ("unshare", "nsenter", "setpriv", "taskset", "mount", "ip", "tc")
NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid")
SUBNET = "10.77.0."
RATE = "1gbit"
READY_S = 20.0
RUN_S = 200.0
NOBODYS_MAC = "02:00:00:00:00:01"

SETUP = """
set -e
hostname "$NAME"
mount -t tmpfs -o mode=755 run /run && mkdir /run/sshd
mount -t tmpfs disk /mnt
for file in hosts passwd shadow; do
    mount --bind "$FOLDER/$file" "/etc/$file"
done
ip link set lo up
echo ready
read -r _ || true
"""
"""What the first process of a host does; it ends, and with it the host, when its input is closed."""


@functools.cache
def lacking(program: str = "sshd") -> str | None:
    """What this machine lacks for hosts, and `program` of tools/cluster_packages.sh; None where it has all."""
    if os.geteuid() != 0:
        return "root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"the programs {', '.join(missing)}"
    tried = ran("unshare", *NAMESPACES, "--fork", "sh", "-c", "mount -t tmpfs disk /mnt && ip link add v type veth")
    if tried.returncode:
        return f"namespaces ({tried.stderr.strip()})"
    return None if (PACKAGES / "bin" / program).exists() else f"{program} (tools/cluster_packages.sh {PACKAGES})"


def of_packages() -> dict[str, str]:
    """The variables by which unpacked programs are found, and find their libraries."""
    folders = sorted((PACKAGES / "usr" / "lib").glob("*-linux-gnu"))
    libraries = ":".join(str(path) for each in folders for path in (each, each / "slurm-wlm"))
    return {"PATH": f"{PACKAGES / 'bin'}:{os.environ['PATH']}", "LD_LIBRARY_PATH": libraries}


def parts_of_sshd() -> dict[str, Path]:
    """The options by which an unpacked sshd finds its parts; from 9.8 on it is several programs."""
    helpers = PACKAGES / "usr" / "lib" / "openssh"
    parts = {"SshdSessionPath": helpers / "sshd-session", "SshdAuthPath": helpers / "sshd-auth"}
    return {option: path for option, path in parts.items() if path.exists()}


def make_key(path: Path, *kind: str) -> None:
    """Write a key of ssh without a password, and PATH.pub."""
    keygen = ["ssh-keygen", "-q", "-N", "", "-C", path.parent.name, *kind, "-f", str(path)]
    subprocess.run(keygen, env=os.environ | of_packages(), check=True)


class Host:
    def __init__(self, name: str, address: str, core: int, folder: Path) -> None:
        self.name, self.address, self.core = name, address, core
        self.mac = "02:77:" + ":".join(f"{int(part):02x}" for part in address.split(".")) if address else ""
        self.folder = folder
        """Its log of sshd, its keys and root's home are here, on the machine's disk; they outlive a `kill`."""
        self.home = folder / "home"
        self._started: list[subprocess.Popen[bytes]] = []
        self._shell: subprocess.Popen[str] | None = None
        self._init: psutil.Process | None = None

    @property
    def pid(self) -> int:
        """The number, on the machine, of the host's first process."""
        assert self._init is not None, f"host {self.name} is down"
        return self._init.pid

    def command(self, *words: object) -> list[str]:
        """The command line that runs `words` on this host, in the project's folder, when it is run on the machine.

        Where its process is killed, so is what it has started on the host.
        """
        enter = ["nsenter", f"--target={self.pid}", *NAMESPACES, f"--wdns={ROOT}", "setpriv", "--pdeathsig", "KILL"]
        return ["taskset", "--cpu-list", str(self.core), *enter, "--", *map(str, words)]

    def environment(self, env: Mapping[str, str] | None = None) -> dict[str, str]:
        """The variables of a command on this host: this process's own, root's home on the host, and `env`.

        Not those of S3, which other tests set here: they name a server and a key of theirs.
        """
        search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        own = {"HOME": str(self.home), "OMP_NUM_THREADS": "1", "PYTHONPATH": search}
        here = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        return {**here, **own, **(env or {})}

    def run(
        self, *words: object, env: Mapping[str, str] | None = None, timeout_s: float = RUN_S, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, with its output captured; fails with that output unless it ends with 0."""
        options = {"env": self.environment(env), "stdin": subprocess.DEVNULL, "timeout": timeout_s}
        done = ran(*self.command(*words), **options)
        assert not check or done.returncode == 0, f"{words} on {self.name}: {done.stdout}\n{done.stderr}"
        return done

    def listens(self, address: str, port: int) -> bool:
        return self.run("bash", "-c", f"</dev/tcp/{address}/{port}", check=False).returncode == 0

    def start(self, *words: object, log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a command whose output, of both kinds, is added to `log`.

        kill() of what is returned ends the command by SIGKILL.
        """
        with log.open("ab") as out:
            started = subprocess.Popen(
                self.command(*words), env=self.environment(env), stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        self._started.append(started)
        return started

    def boot(self, files: Path) -> None:
        """Start the host's first process, with the files of `files` in its /etc."""
        unshare = ["unshare", *NAMESPACES, "--mount-proc", "--fork", "--kill-child=KILL"]
        self._shell = subprocess.Popen(
            ["taskset", "--cpu-list", str(self.core), *unshare, "bash", "-c", SETUP],
            env={**os.environ, "NAME": self.name, "FOLDER": str(files)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        said = self._shell.stdout.readline()
        assert said == "ready\n", f"host {self.name} did not start: {said}{self._shell.stdout.read()}"
        (self._init,) = psutil.Process(self._shell.pid).children()

    def halt(self) -> None:
        """End everything that runs on this host, at once, as when its power is cut. Safe to call twice."""
        if self._init is None or self._shell is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            self._init.send_signal(signal.SIGKILL)
        for started in self._started:  # one that was stopped with its command would never see that this is gone
            started.kill()
        self._shell.communicate(timeout=READY_S)  # it ends once the kernel has ended all processes of the host
        self._init = self._shell = None
        self._started.clear()


class Network:
    """Hosts that are joined by one switch; made by `network`."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        cores = sorted(os.sched_getaffinity(0))
        self.hosts = {
            name: Host(name, f"{SUBNET}{10 + number}", cores[number % len(cores)], folder / name)
            for number, name in enumerate(names)
        }
        self.folder = folder
        """Where the hosts' files lie."""
        self._switch = Host("switch", "", cores[-1], folder / "switch")
        self._ports: dict[str, str] = {}

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def open(self) -> None:
        write_files(self.folder, list(self.hosts.values()))
        self._switch.boot(self.folder)
        self._on_switch("ip", "link", "add", "bridge", "type", "bridge")
        self._on_switch("ip", "link", "set", "bridge", "up")
        for name in self.hosts:
            self.revive(name)

    def close(self) -> None:
        for host in (*self.hosts.values(), self._switch):
            host.halt()

    def kill(self, name: str) -> None:
        """End all that runs on a host, its network first: its peers hear nothing of it, also no end of connections."""
        self._on_switch("ip", "link", "del", self._ports.pop(name))
        self.hosts[name].halt()

    def revive(self, name: str) -> None:
        """Start a host that is down: with its name, address and keys, and nothing of what it ran."""
        host = self.hosts[name]
        host.boot(self.folder / name)
        port = self._ports[name] = f"to-{host.address}"
        card = ["eth0", "address", host.mac, "netns", str(host.pid)]
        self._on_switch("ip", "link", "add", port, "type", "veth", "peer", "name", *card)
        self._on_switch("ip", "link", "set", port, "master", "bridge", "up")
        host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        limit = ["root", "tbf", "rate", RATE, "burst", "256kb", "latency", "50ms"]
        host.run("tc", "qdisc", "add", "dev", "eth0", *limit)
        self._on_switch("tc", "qdisc", "add", "dev", port, *limit)
        log, sshd = host.folder / "sshd.log", PACKAGES / "bin" / "sshd"
        started = host.start(sshd, "-D", "-e", "-f", host.folder / "sshd_config", log=log, env=of_packages())
        wait_until(lambda: host.listens(host.address, 22), log.read_text, job=started)

    def cut(self, one: str, other: str, seconds: float) -> None:
        """Let nothing pass between two hosts for so long, and return then; no connection is told, as by a pulled cable.

        Their ways to the other hosts stay open.
        """
        ways = [(self[one], self[other].address), (self[other], self[one].address)]
        for host, address in ways:  # frames for a card that no host has
            host.run("ip", "neigh", "replace", address, "lladdr", NOBODYS_MAC, "dev", "eth0", "nud", "permanent")
        time.sleep(seconds)
        for host, address in ways:
            host.run("ip", "neigh", "del", address, "dev", "eth0", check=False)

    def _on_switch(self, *words: str) -> None:
        """Run a command in the switch's network; numbers of processes in it are the machine's."""
        enter = ["nsenter", f"--target={self._switch.pid}", "--net"]
        done = ran(*enter, *words)
        assert done.returncode == 0, f"{words}: {done.stderr}"


@contextlib.contextmanager
def network(folder: Path, names: Sequence[str]) -> Iterator[Network]:
    """Start hosts of these names, at most 200, with a link of RATE each; all of them are gone at the end.

    `folder` is for their logs and keys.
    """
    net = Network(folder, names)
    try:
        net.open()
        yield net
    finally:
        net.close()


def python_words(*arguments: object) -> list[str]:
    """The command `python ARGUMENTS` with the Python of this process."""
    return [sys.executable, *map(str, arguments)]


def num_lines(file: Path) -> int:
    """How many lines a file has so far; none where it is not there yet."""
    return file.read_text().count("\n") if file.exists() else 0


def write_files(folder: Path, hosts: Sequence[Host]) -> None:
    """Write the files of /etc of every host, and its keys: one for sshd, and one of root that all of them know."""
    names = "".join(f"{host.address} {host.name}\n" for host in hosts)
    users = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith(("root:", "sshd:"))]
    for host in [*hosts, Host("", "", 0, folder)]:  # the last one is the switch, which lets nobody in
        host.home.mkdir(parents=True)
        (host.folder / "hosts").write_text(f"127.0.0.1 localhost\n::1 localhost\n{names}")
        root = f"root:x:0:0:root:{host.home}:/bin/bash"
        sshd = "sshd:x:999:65534::/run/sshd:/usr/sbin/nologin"
        (host.folder / "passwd").write_text("\n".join([root, sshd, *users, ""]))
        (host.folder / "shadow").write_text("root:*:19000:0:99999:7:::\nsshd:!:19000::::::\n")
    for path in [folder / "root_key", *(host.folder / "sshd_key" for host in hosts)]:
        make_key(path, "-t", "ed25519")
    known = "".join(f"{host.name},{host.address} {(host.folder / 'sshd_key.pub').read_text()}" for host in hosts)
    for host in hosts:
        keys = host.home / ".ssh"
        keys.mkdir(mode=0o700)
        shutil.copy(folder / "root_key", keys / "id_ed25519")
        shutil.copy(folder / "root_key.pub", keys / "authorized_keys")
        (keys / "known_hosts").write_text(known)
        options = {
            "ListenAddress": host.address, "HostKey": host.folder / "sshd_key",
            "AuthorizedKeysFile": ".ssh/authorized_keys", "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no", "StrictModes": "no", "PidFile": "none", "UsePAM": "no",
            "UseDNS": "no", "MaxStartups": 100, **parts_of_sshd(),
        }  # fmt: skip
        (host.folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in options.items()))
