"""Computations beside the server: once for each name, telling how far they are, failing again only after a while."""

import threading
import time
from concurrent.futures import CancelledError
from functools import partial
from types import SimpleNamespace

import pytest

from explorer.data import background
from explorer.data.background import Background, Task


def test_work_is_done_once_and_tells_how_far_it_is() -> None:
    work, go, told = Background(), threading.Event(), threading.Event()
    calls = []

    def add(task: Task[int]) -> int:
        calls.append(1)
        task.tell("adds", 3, 7)
        told.set()
        assert go.wait(10)
        return 42

    first = work.task("sum", add)
    assert told.wait(10)
    assert (first.doing, first.done, first.total, first.is_ended) == ("adds", 3, 7, False)
    assert work.task("sum", add) is first
    go.set()
    assert first.result() == 42
    assert first.is_ended
    assert work.task("sum", add).result() == 42
    assert len(calls) == 1
    assert work.task("another", add).result() == 42
    work.close()


def test_an_error_is_that_of_the_result_and_is_tried_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    work, calls = Background(), []

    def fail(task: Task[int]) -> int:
        calls.append(1)
        raise ValueError("no")

    for retry_s, expected in ((60.0, 1), (60.0, 1), (0.0, 2)):
        monkeypatch.setattr(background, "_RETRY_S", retry_s)
        time.sleep(0.01)
        with pytest.raises(ValueError, match="no"):
            work.task("fails", fail).result()
        assert len(calls) == expected
    work.close()


def test_results_are_bounded_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "KEPT_BYTES", 3_000_000 + 3 * background._LEAST_BYTES)
    work, made = Background(), list[int]()

    def make(task: Task[SimpleNamespace], number: int) -> SimpleNamespace:
        made.append(number)
        return SimpleNamespace(size_bytes=5_000_000 if number == 20 else 1_000_000)

    for number in (*range(10), 9, 8, 7, 6, 20, 20):
        work.task(str(number), partial(make, number=number)).result()
        while work._running:
            time.sleep(0.001)
    assert made == [*range(10), 6, 20], "three have room; the newest stays, as its page asks for it again"
    work.close()


def test_closing_ends_what_looks_at_it() -> None:
    work, begun = Background(), threading.Event()

    def forever(task: Task[int]) -> int:
        while True:
            begun.set()
            task.tell("turns")
            time.sleep(0.001)

    task = work.task("forever", forever)
    waiting = work.task("never begun", forever)
    assert begun.wait(10)
    work.close()
    assert isinstance(task.error, Exception)
    assert not isinstance(task.error, CancelledError)
    assert waiting.is_ended


def test_what_is_to_be_alone_runs_one_at_a_time_and_holds_up_nothing_else() -> None:
    work, go, at_once = Background(), threading.Event(), []

    def alone(task: Task[int]) -> int:
        at_once.append(1)
        assert go.wait(10)
        return at_once.pop()

    several = [work.task(f"alone {number}", alone, alone=True) for number in range(3)]
    assert not several[0].wait(0.05)
    assert len(at_once) == 1
    assert work.task("other", lambda task: 7).result() == 7
    go.set()
    assert [each.result() for each in several] == [1, 1, 1]
    work.close()
