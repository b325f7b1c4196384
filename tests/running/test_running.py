"""What test runs rest on: no test starts a service without the mark, and shared folders are made once."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from tests.cli import ran
from tests.ranks import ROOT
from tests.running.shared import made_once

CONFTEST = """
from tests.running.guard import Guard
def pytest_configure(config):
    config.addinivalue_line("markers", "services: allowed")
    config.pluginmanager.register(Guard())
"""
TESTS = """
import contextlib, socket, subprocess, pytest
def start(*command):
    with contextlib.suppress(OSError):
        subprocess.run(command)
def test_ranks(): start("/nowhere/horovodrun", "-np", "2", "python")
def test_job(): start("/nowhere/python", "jobs/build_samples.py")
def test_server(): socket.create_server(("127.0.0.1", 0)).close()
@pytest.mark.services
def test_marked(): start("/nowhere/horovodrun")
def test_nothing(): start("/nowhere/python", "-m", "trainer.main")
"""


def test_starts_without_the_mark_fail(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_starts.py").write_text(TESTS)
    words = (sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "--rootdir", tmp_path)
    done = ran(*words, tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, timeout=100)
    assert "3 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    for started in ("horovodrun", "build_samples.py", "a server on 127.0.0.1"):
        assert f"without the mark `services` this test started {started}" in done.stdout


def test_processes_of_tests_have_no_pandas_and_tests_have() -> None:
    pytest.importorskip("pandas")
    code = "import pyarrow as pa; assert pa.array([1]).to_pylist() == [1]; import pandas"
    done = ran(sys.executable, "-c", code)
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'pandas'\n")


def test_one_makes_it_all_others_wait_and_what_fails_is_tried_again(tmp_path: Path) -> None:
    made: list[int] = []
    together = Barrier(4)

    def want(number: int) -> list[int]:
        together.wait()
        made_once(tmp_path / "shared", "it", lambda: made.append(number))
        return list(made)

    with ThreadPoolExecutor(4) as threads:
        seen = list(threads.map(want, range(4)))
    assert len(made) == 1
    assert seen == [made] * 4
    with pytest.raises(ZeroDivisionError):
        made_once(tmp_path / "shared", "other", lambda: 1 / 0)
    for name, number in (("other", 4), ("third", 5), ("other", 6)):
        made_once(tmp_path / "shared", name, lambda number=number: made.append(number))
    assert made[1:] == [4, 5]
