"""Real ranks for tests: starts of horovodrun and torchrun, and two ranks that stay for many command lines."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

HOROVODRUN, TORCHRUN = (str(Path(sys.executable).with_name(name)) for name in ("horovodrun", "torchrun"))
TIMEOUT_S = 200
ROOT = Path(__file__).parent.parent
QUICK_HOROVODRUN = ROOT / "tests" / "horovodrun.py"
STANDING = ROOT / "tests" / "trainer" / "standing_ranks.py"


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


def run_ranks(num_ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` on ranks of their own to the end, and return what they printed."""
    return subprocess.run(
        command_of(num_ranks, *arguments),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def environment() -> dict[str, str]:
    """The variables of ranks: one thread each, and modules below tests/ can be imported."""
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search}


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


class StandingRanks:
    """Two ranks that run one command line after the other.

    For lines that end in order on every rank, well or with an error: a killed or hung rank takes all later lines along.
    Between two lines they are stopped: Horovod's threads meet a thousand times a second, also when there is no work.
    """

    def __init__(self, folder: Path, num_ranks: int = 2, variables: Mapping[str, str] | None = None) -> None:
        self._folder, self._numbers = folder, itertools.count()
        self._ranks: list[psutil.Process] = []
        patient = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "86400"}  # the time that they are stopped counts too
        with (folder / "log.txt").open("wb") as log:
            command = command_of(num_ranks, STANDING, folder)
            variables = {**environment(), **patient, **(variables or {})}
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=variables)

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
        # Looked for once: they stay, and to find them all processes of the machine are read.
        self._ranks = self._ranks or ranks_of(self._process, str(STANDING))
        for rank in self._ranks:
            rank.suspend()
        return results

    def close(self) -> None:
        self._resume()
        (self._folder / "end").touch()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()

    def _resume(self) -> None:
        for rank in self._ranks:
            with contextlib.suppress(psutil.NoSuchProcess):  # a call, or the end, says what became of it
                rank.resume()

    def _result(self, name: str, timeout_s: float) -> tuple[int, str]:
        end = time.monotonic() + timeout_s
        while not (self._folder / name).exists():
            assert self._process.poll() is None and time.monotonic() < end, (self._folder / "log.txt").read_text()
            time.sleep(0.02)
        code, out = json.loads((self._folder / name).read_text())
        return code, out


@contextmanager
def standing_ranks(
    folder: Path, num_ranks: int = 2, variables: Mapping[str, str] | None = None
) -> Iterator[StandingRanks]:
    ranks = StandingRanks(folder, num_ranks, variables)
    try:
        yield ranks
    finally:
        ranks.close()
