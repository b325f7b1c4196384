"""Which places may hold a store: safe ones pass, and every way to be unsafe is named and refused."""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from featurestore import FeatureStore, StoreInfo
from featurestore.__main__ import app
from featurestore.errors import UnsafeBackendError
from featurestore.problems import Problem
from featurestore.storage import safety
from featurestore.storage.safety import check_backend, refuse_unsafe
from featurestore.storage.storage import Storage
from tests.cli import begun, invoke, ran, wait_until
from tests.faulty import FaultyStorage
from tests.proxy import Fault, Proxy
from tests.raised import raises, told
from tests.running import spared
from tests.servers import new_bucket


@pytest.fixture(autouse=True)
def no_known_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spared, "KNOWN_KINDS", set())


def test_safe_places_pass_the_short_check_and_stay_clean(place_url: str) -> None:
    storage = Storage(place_url)
    refuse_unsafe(storage)
    assert storage.entries() == []


@pytest.mark.long
@pytest.mark.parametrize("place", ["disk", pytest.param("seaweedfs", marks=pytest.mark.slow)])
def test_writers_race_and_the_command_says_so(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = str(tmp_path / "new" / "place") if place == "disk" else request.getfixturevalue("s3_url")
    command = [sys.executable, "-m", "featurestore", "check-backend", url, "--writers", "3", "--rounds", "12"]
    done = ran(*command)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("races: ") for line in done.stderr.splitlines()), "no more than how far it is"
    assert re.match(r"not disproved: [1-9]\d? of 12 races of 3 writers overlapped, each had one winner", done.stdout)
    assert Storage(url).entries() == []


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(Fault.DROP_CONDITION, Problem.CONDITION_IGNORED), (Fault.CHECK_THEN_PUT, Problem.SEVERAL_WON)],
    ids=lambda x: str(x)[:20],
)
def test_creates_that_race_are_refused(proxy: Proxy, info: StoreInfo, fault: Fault, reason: Problem) -> None:
    url = new_bucket()
    proxy.rule = lambda request: fault if request.is_create else None
    with raises(UnsafeBackendError, Problem.UNSAFE_BACKEND, where=url, reason=re.compile(told(reason))):
        FeatureStore.create(url, info)
    result = invoke(app, "check-backend", url, "--writers", "3", "--rounds", "5", code=1)
    assert re.search(told(reason), result.stderr) and result.stdout == ""
    assert re.search(told(Problem.UNSAFE_PLACE, where=url), result.stderr)
    assert Storage(url).entries() == [], "neither a store nor files of the check"
    assert proxy.faults


def test_races_that_do_not_overlap_disprove_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_line = threading.Barrier(1)
    with monkeypatch.context() as patched, ThreadPoolExecutor(1) as one_by_one:
        patched.setattr(safety.threading, "Barrier", lambda _: no_line)
        report = safety._race(Storage(tmp_path), "x", one_by_one, 2, 6, None, 10)
    assert (report.problems, report.num_rounds, report.num_overlapping) == ((), 6, 0)
    monkeypatch.setattr(safety, "check_backend", lambda storage, **options: report)
    result = invoke(app, "check-backend", tmp_path, code=3)
    assert result.stdout == ""
    assert "not tried: 0 of 6 races of 2 writers overlapped" in result.stderr


def test_a_race_counts_where_a_create_lost_that_began_in_time(tmp_path: Path) -> None:
    """On a server whose answers come when both have asked."""
    both = threading.Barrier(2)

    def slow(create: Callable[..., bool], path: str, data: bytes) -> bool:
        made = create(path, data)
        if "round" in path:
            both.wait(60)
        return made

    place = FaultyStorage(Storage(tmp_path), {"create_exclusive": slow})
    report = check_backend(place, num_writers=2, num_rounds=3, large_bytes=10)
    assert (report.problems, report.num_overlapping) == ((), 3)


FLAWS: dict[Problem, dict[str, Callable[..., Any]]] = {
    Problem.NEW_FILE_EXISTS: {
        "create_exclusive": lambda create, path, data: create(path, data) and not path.endswith("first")
    },
    Problem.CREATE_ANSWERS_WRONG: {"create_exclusive": lambda create, path, data: create(path, data) or True},
    Problem.OLD_CONTENT_READ: {"write_bytes": lambda write, path, data: None},
    Problem.NEW_FILE_UNREAD: {"read_bytes": Mock(side_effect=FileNotFoundError)},
    Problem.NEW_FILE_UNLISTED: {"list": lambda names, path="": []},
    Problem.DELETED_FILE_SEEN: {"delete": lambda delete, path: path.endswith("first") or delete(path)},
    Problem.CHANGED_AFTER_CREATION: {"read_bytes": lambda read, path: read(path) + b"changed" * ("round" in path)},
}


@pytest.mark.parametrize("reason", FLAWS)
def test_every_flaw_is_named(tmp_path: Path, reason: Problem) -> None:
    found = re.compile(told(reason, **{"number": 5, "rounds": 5}))
    with raises(UnsafeBackendError, Problem.UNSAFE_BACKEND, where=tmp_path, reason=found):
        refuse_unsafe(FaultyStorage(Storage(tmp_path), FLAWS[reason]))


@pytest.mark.long
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    check = begun(sys.executable, "-m", "featurestore", "check-backend", tmp_path, "--rounds", "100000")
    wait_until(lambda: len(list(tmp_path.glob(".tmp-check-*/*"))) >= 10, lambda: "no file", job=check, pause_s=0.01)
    os.killpg(check.pid, signal.SIGINT)  # as a terminal does: to the racers too
    _, said = check.communicate(timeout=20)
    assert check.returncode != 0 and "Traceback" not in said
    assert Storage(tmp_path).entries() == []
