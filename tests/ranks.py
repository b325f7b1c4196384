"""Real ranks for tests: a start of horovodrun, and two ranks that stay for many command lines."""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOROVODRUN = str(Path(sys.executable).with_name("horovodrun"))
TIMEOUT_S = 200
ROOT = Path(__file__).parent.parent
STANDING = ROOT / "tests" / "trainer" / "standing_ranks.py"


def command_of(num_ranks: int, *arguments: object) -> list[str]:
    """The command line that runs `python ARGUMENTS` on ranks of their own; without a launcher where it is one."""
    launcher = [HOROVODRUN, "-np", str(num_ranks)] if num_ranks > 1 else []
    return [*launcher, sys.executable, *map(str, arguments)]


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


class StandingRanks:
    """Two ranks that run one command line after the other.

    For lines that end in order on every rank, well or with an error: a killed or hung rank takes all later lines along.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, itertools.count()
        with (folder / "log.txt").open("wb") as log:
            command = command_of(2, STANDING, folder)
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment())

    def run(self, *arguments: object) -> str:
        """Run `python ARGUMENTS`, which has to end with exit code 0 on both ranks; return what rank 0 prints."""
        (code, out), (other_code, other_out) = self.call(*arguments)
        assert (code, other_code) == (0, 0), f"{out[-3000:]}\nrank 1: {other_out[-3000:]}"
        return out

    def call(self, *arguments: object) -> list[tuple[int, str]]:
        """Run `python ARGUMENTS`; return exit code and output of each rank."""
        number = next(self._numbers)
        asked = self._folder / f"{number}.part"
        asked.write_text(json.dumps(list(map(str, arguments))))
        asked.rename(asked.with_suffix(".json"))
        return [self._result(f"{number}.{rank}.json") for rank in range(2)]

    def close(self) -> None:
        (self._folder / "end").touch()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()

    def _result(self, name: str) -> tuple[int, str]:
        end = time.monotonic() + TIMEOUT_S
        while not (self._folder / name).exists():
            assert self._process.poll() is None and time.monotonic() < end, (self._folder / "log.txt").read_text()
            time.sleep(0.02)
        code, out = json.loads((self._folder / name).read_text())
        return code, out


@contextmanager
def standing_ranks(folder: Path) -> Iterator[StandingRanks]:
    ranks = StandingRanks(folder)
    try:
        yield ranks
    finally:
        ranks.close()
