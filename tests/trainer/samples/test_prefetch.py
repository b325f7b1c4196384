"""Preparing a call ahead: order, how many calls, errors, and the end."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from trainer.stages import ReadAhead, prepare_ahead


def test_calls_are_one_ahead_in_one_thread() -> None:
    begun: list[str] = []
    go_on = threading.Semaphore(0)

    def prepare() -> int:
        begun.append(threading.current_thread().name)
        go_on.acquire()
        return len(begun)

    ahead = prepare_ahead(3, prepare)
    go_on.release()
    assert next(ahead)() == 1  # the second call has been handed to the thread, and waits there
    go_on.release()
    assert next(ahead)() == 2
    go_on.release()
    assert next(ahead)() == 3
    assert list(ahead) == []
    assert len(begun) == 3 and len(set(begun)) == 1


def test_closing_waits_for_the_call_that_was_begun() -> None:
    done: list[int] = []
    with contextlib.closing(prepare_ahead(5, lambda: done.append(1))) as ahead:
        next(ahead)()
    assert len(done) == 2


def test_an_error_comes_where_its_result_would() -> None:
    numbers = iter([1, 2])
    with contextlib.closing(prepare_ahead(3, lambda: next(numbers))) as ahead:
        assert [next(ahead)(), next(ahead)()] == [1, 2]
        with pytest.raises(StopIteration):
            next(ahead)()


def test_nothing_to_prepare_begins_nothing() -> None:
    before = threading.active_count()
    assert list(prepare_ahead(0, lambda: 1)) == []
    assert threading.active_count() == before


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux alone")
class TestPriority:
    def test_work_ahead_steps_back_for_the_step(self) -> None:
        (ahead,) = prepare_ahead(1, niceness)
        (beside,) = prepare_ahead(1, niceness, in_background=False)
        assert (ahead(), beside()) == (19, niceness())

    def test_work_that_is_always_late_comes_forward(self) -> None:
        in_call = threading.Event()

        def slow() -> int:
            assert not in_call.is_set()  # never two calls at once
            in_call.set()
            time.sleep(0.02)
            in_call.clear()
            return niceness()

        found = [result() for result in prepare_ahead(30, slow)]
        assert found[0] == 19 and found[-1] == niceness()
        assert sorted(found, reverse=True) == found and found.count(19) >= 4

    def test_work_that_is_in_time_stays_back(self) -> None:
        found, ended = [], threading.Semaphore(0)

        def quick() -> int:
            ended.release()
            return niceness()

        for result in prepare_ahead(9, quick):
            assert ended.acquire(timeout=60)  # the lowest priority may have to wait for other processes
            time.sleep(0.02)
            found.append(result())
        assert found == [19] * 9

    def test_reading_keeps_the_priority_of_the_step_whoever_asks_first(self) -> None:
        found = []

        def batches() -> Iterator[Any]:
            while True:
                found.append(niceness())
                yield object()

        with contextlib.closing(ReadAhead(batches(), 1)) as ahead:
            for result in prepare_ahead(3, lambda: next(ahead)):
                result()
        assert set(found) == {niceness()}


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
