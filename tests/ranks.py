"""Real ranks for tests: by horovodrun and torchrun, by forks, and two that stay for many command lines."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from trainer.launch import LOOPBACK, By, Reach, environments

HOROVODRUN, TORCHRUN = (str(Path(sys.executable).with_name(name)) for name in ("horovodrun", "torchrun"))
TIMEOUT_S = 200
ROOT = Path(__file__).parent.parent
QUICK_HOROVODRUN = ROOT / "tests" / "horovodrun.py"
FORKS = ROOT / "tests" / "trainer" / "forks.py"
STANDING = ROOT / "tests" / "trainer" / "standing_ranks.py"
PATIENT = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "86400"}
"""Of ranks that are stopped now and then: that time counts too."""


class TorchRanks(int):
    """A number of ranks that torchrun starts; those of any other number are horovodrun's."""

    def __str__(self) -> str:
        return f"{int(self)}-by-torchrun"


def command_of(num_ranks: int, *arguments: object) -> list[str]:
    """The command line that runs `python ARGUMENTS` on ranks of their own; without a launcher where it is one.

    --gloo: else horovodrun starts one more process that imports torch, to ask whether there is MPI; QUICK_HOROVODRUN
    leaves out that for Gloo, too. --standalone: jobs beside each other take ports of their own.
    """
    words = list(map(str, arguments))
    if isinstance(num_ranks, TorchRanks):
        return [TORCHRUN, "--standalone", "--nproc-per-node", f"{int(num_ranks)}", *words]
    launcher = [sys.executable, str(QUICK_HOROVODRUN), "--gloo", "-np", str(num_ranks)] if num_ranks > 1 else []
    return [*launcher, sys.executable, *words]


def environment() -> dict[str, str]:
    """The variables of ranks: one thread each, seldom meetings of Horovod, and modules below tests/ can be imported."""
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    seldom = {"HOROVOD_CYCLE_TIME": "5"}  # ms: meetings take the processor also while ranks wait, and tests beside them
    return {**os.environ, **seldom, "OMP_NUM_THREADS": "1", "PYTHONPATH": search}


def ranks_of(launcher: subprocess.Popen[bytes] | subprocess.Popen[str], *arguments: str) -> list[psutil.Process]:
    """The processes `python ARGUMENTS ...` that a launcher has started, in the order of ranks; none after its end."""
    wanted, found = list(arguments), {}
    children = psutil.Process(launcher.pid).children(recursive=True) if launcher.poll() is None else []
    for process in children:
        words = [word for word in process.cmdline()[1:] if word != "-u"]  # which torchrun adds
        if words[: len(wanted)] == wanted:
            its = process.environ()
            found[int(its.get("HOROVOD_RANK") or its["RANK"])] = process
    return [found[rank] for rank in sorted(found)]


class Forks:
    """A process that forks ranks (trainer/forks.py): for tests in which the launcher does not count."""

    def __init__(self, variables: Mapping[str, str] | None = None) -> None:
        self._variables, self._lock = variables or {}, threading.Lock()
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, FORKS], env={**environment(), **self._variables}, stdin=pipe, stdout=pipe, text=True
        )

    def start(self, num_ranks: int, log: Path, *arguments: object) -> "Job":
        """Begin with `python ARGUMENTS` on ranks that find each other as supervised ones do."""
        stack, by = ExitStack(), By.TORCH if isinstance(num_ranks, TorchRanks) else By.HOROVOD
        reach = {"localhost": Reach(LOOPBACK, LOOPBACK)}
        each = stack.enter_context(environments(by, {"localhost": int(num_ranks)}, reach))
        job = self.start_with([{**PATIENT, **variables} for variables in each], log, *arguments)
        return replace(job, meeting=stack)

    def start_with(self, ranks: Sequence[Mapping[str, str]], log: Path, *arguments: object) -> "Job":
        """Begin with `python ARGUMENTS` on ranks with these variables beside ours, which print to `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        variables = [{**environment(), **self._variables, **each} for each in ranks]
        found = self.ask(words=list(map(str, arguments)), ranks=variables, log=str(log))
        assert isinstance(found, list)
        return Job(self, found, ExitStack())

    def ask(self, **asked: object) -> object:
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            print(json.dumps(asked), file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())

    def outcome(
        self, num_ranks: int, log: Path, *arguments: object, timeout_s: float = TIMEOUT_S
    ) -> tuple[list[int | None], str]:
        """Run `python ARGUMENTS`; return the exit code of each rank, None of those that had to be killed, and all that
        they printed."""
        job = self.start(num_ranks, log, *arguments)
        codes = job.wait(timeout_s)
        job.close()
        return codes, log.read_text()

    def run(self, num_ranks: int, log: Path, *arguments: object, timeout_s: float = TIMEOUT_S) -> None:
        """Run `python ARGUMENTS`, which has to end with exit code 0 on all ranks."""
        codes, said = self.outcome(num_ranks, log, *arguments, timeout_s=timeout_s)
        assert codes == [0] * num_ranks, f"{codes}\n{said[-3000:]}"

    def close(self) -> None:
        self._process.communicate(timeout=30)


@dataclass(frozen=True)
class Job:
    forks: Forks
    ranks: list[int]
    meeting: ExitStack

    def codes(self) -> list[int | None]:
        """The exit code of each rank, None while it runs."""
        codes = self.forks.ask(of=self.ranks)
        assert isinstance(codes, list)
        return codes

    def wait(self, timeout_s: float) -> list[int | None]:
        """Exit codes when all have ended, or the time has."""
        end_s = time.monotonic() + timeout_s
        while None in (codes := self.codes()) and time.monotonic() < end_s:
            time.sleep(0.02)
        return codes

    def close(self) -> None:
        for rank, code in zip(self.ranks, self.codes(), strict=True):
            if code is None:
                os.kill(rank, signal.SIGKILL)
        self.wait(30)
        self.meeting.close()


class StandingRanks:
    """Two ranks that run one command line after the other.

    For lines that end in order on every rank, well or with an error: a killed or hung rank takes all later lines along.
    Between two lines they are stopped: Horovod's threads meet a thousand times a second, also when there is no work.
    """

    def __init__(self, forks: Forks, folder: Path, num_ranks: int = 2) -> None:
        self._folder, self._numbers, self._log = folder, itertools.count(), folder / "log.txt"
        self._job = forks.start(num_ranks, self._log, STANDING, folder)
        self._ranks = [psutil.Process(each) for each in self._job.ranks]

    def run(self, *arguments: object, timeout_s: float = TIMEOUT_S) -> str:
        """Run `python ARGUMENTS`, which has to end with exit code 0 on both ranks; return what rank 0 prints."""
        (code, out), (other_code, other_out) = self.call(*arguments, timeout_s=timeout_s)
        assert (code, other_code) == (0, 0), f"{out[-3000:]}\nrank 1: {other_out[-3000:]}"
        return out

    def call(self, *arguments: object, timeout_s: float = TIMEOUT_S) -> list[tuple[int, str]]:
        """Run `python ARGUMENTS`; return exit code and output of each rank."""
        number = next(self._numbers)
        asked = self._folder / f"{number}.part"
        asked.write_text(json.dumps(list(map(str, arguments))))
        asked.rename(asked.with_suffix(".json"))
        self._resume()
        results = [self._result(f"{number}.{rank}.json", timeout_s) for rank in range(2)]
        for rank in self._ranks:
            rank.suspend()
        return results

    def close(self) -> None:
        self._resume()
        (self._folder / "end").touch()
        self._job.wait(30)
        self._job.close()

    def _resume(self) -> None:
        for rank in self._ranks:
            with contextlib.suppress(psutil.NoSuchProcess):  # a call, or the end, says what became of it
                rank.resume()

    def _result(self, name: str, timeout_s: float) -> tuple[int, str]:
        end = time.monotonic() + timeout_s
        while not (self._folder / name).exists():
            assert None in self._job.codes() and time.monotonic() < end, self._log.read_text()
            time.sleep(0.02)
        code, out = json.loads((self._folder / name).read_text())
        return code, out


def standing_ranks(forks: Forks, folder: Path, num_ranks: int = 2) -> closing[StandingRanks]:
    """Ranks that are closed at the end of a block."""
    return closing(StandingRanks(forks, folder, num_ranks))


def forks_of_ranks(variables: Mapping[str, str] | None = None) -> closing[Forks]:
    """Forks that are closed at the end of a block."""
    return closing(Forks(variables))
