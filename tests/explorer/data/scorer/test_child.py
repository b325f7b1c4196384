"""The explorer's own scorer: it answers nobody else, ends with the explorer however that ends, and says why."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from explorer.data.scorer.child import ChildScorer
from tests.explorer.world import World

pytestmark = pytest.mark.timeout(300)
PARENT = """
import sys, time
from explorer.data.scorer.child import ChildScorer
child = ChildScorer(sys.argv[1])
child.state()
while child.pid is None:
    time.sleep(0.05)
print(child.pid, flush=True)
time.sleep(600)
"""


def wait_until(what: Callable[[], bool], seconds: float = 200) -> None:
    end_s = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end_s, "it took too long"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_starts_when_asked_and_ends(world: World) -> None:
    """What it answers, and that it is seen to be killed: tests/explorer/pages/test_scorer.py."""
    child = ChildScorer(str(world.model))
    assert child.pid is None
    assert child.scorer() is None
    assert child.state().phase == "starting"
    wait_until(lambda: child.pid is not None)
    pid = child.pid
    assert pid is not None and is_alive(pid)
    child.close()
    wait_until(lambda: child.pid is None and not is_alive(pid))
    assert child.state().phase == "starting"  # asked for again
    child.close()
    wait_until(lambda: child.pid is None)


def test_it_ends_when_the_explorer_is_killed(world: World) -> None:
    command = [sys.executable, "-c", PARENT, str(world.model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
        wait_until(lambda: not is_alive(pid), 60)


def test_a_model_that_cannot_be_served_says_why(tmp_path: Path) -> None:
    child = ChildScorer(str(tmp_path / "nothing"))
    child.state()
    wait_until(lambda: child.state().phase == "ended")
    assert "has no published model" in child.state().said
    child.close()
