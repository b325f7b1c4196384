"""Values that take long: computed once for all who ask, beside the server, and kept while there is room.

An error is tried again only after a while; a damaged file is made again.
"""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from explorer.data import background
from explorer.data import cache as module
from explorer.data.background import Background, Task
from explorer.data.cache import LruCache, TableCache, about_of, described


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


def test_a_value_is_computed_once_however_many_ask_at_the_same_time(tables: TableCache) -> None:
    kept, calls = LruCache(3), []

    def slow() -> Iterator[pa.Table]:
        calls.append(1)
        time.sleep(0.05)
        yield from parts(1)

    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(lambda _: kept.get("one", lambda: [*slow()]), range(8))]
        assert len(calls) == len({*map(id, found)}) == 1
        found = [*pool.map(lambda _: values_of(tables.get("a", slow)), range(8))]
    assert (len(calls), found) == (2, [[1]] * 8)


def test_what_was_unused_for_longest_goes_first():
    kept = LruCache(2)
    for name in "ab":
        kept.get(name, lambda name=name: name)
    assert kept.peek("a") == "a"
    kept.get("c", lambda: "c")
    assert [kept.peek(name) for name in "abc"] == ["a", None, "c"]


def test_an_error_is_not_kept():
    kept = LruCache(2)
    with pytest.raises(KeyError, match="not yet"):
        kept.get("one", lambda: {}["not yet"])
    assert kept.get("one", lambda: "now") == "now"


def test_locks_are_bounded_like_the_values():
    kept: LruCache[int] = LruCache(2)
    for name in range(100):
        kept.get(name, lambda: 1)
        kept.get(name, lambda: 1)
    assert not kept._gates


def test_the_sizes_of_the_values_are_bounded_but_the_newest_stays():
    cache: LruCache[bytes] = LruCache(10, len)
    for name, size in (("a", 4), ("b", 4), ("a", 5), ("c", 4)):
        cache.put(name, bytes(size))
    assert [cache.peek(name) for name in "abc"] == [bytes(5), None, bytes(4)]
    cache.put("d", bytes(40))
    assert [cache.peek(name) for name in "acd"] == [None, None, bytes(40)]
    cache.put("e", bytes(3))
    assert [cache.peek(name) for name in "de"] == [None, bytes(3)]


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TableCache:
    monkeypatch.setattr(module, "explorer_cache", lambda: tmp_path)
    return TableCache("kind-", most=2)


def parts(*values: int) -> Iterator[pa.Table]:
    for value in values:
        table = pa.table({"value": [value]})
        yield table.cast(described(table.schema, {"of": "numbers"}))


def values_of(table: pa.Table) -> list[int]:
    assert about_of(table) == {"of": "numbers"}
    return table["value"].to_pylist()


def test_a_table_is_made_once_and_again_where_its_file_is_damaged(tables: TableCache) -> None:
    assert values_of(tables.get("a", lambda: parts(1, 2))) == [1, 2]
    assert values_of(tables.get("a", lambda: parts(3))) == [1, 2]
    tables.path("a").unlink()  # what is mapped stays
    tables.path("a").write_bytes(b"ARROW1")
    assert values_of(tables.get("a", lambda: parts(3))) == [3]


def test_a_table_that_cannot_be_made_leaves_no_file(tables: TableCache) -> None:
    def fails() -> Iterator[pa.Table]:
        yield from parts(1)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        tables.get("a", fails)
    assert [each.name for each in tables.path("a").parent.iterdir()] == ["kind-lock"]


def test_tables_unused_for_longest_go(tables: TableCache) -> None:
    for used_s, digest in enumerate("abc"):
        tables.get(digest, lambda: parts(1))
        os.utime(tables.path(digest), (used_s, used_s))
        if digest == "b":
            os.utime(tables.path("a"), (9, 9))
    (tables.path("a").parent / "another-.arrow").touch()
    assert [tables.path(digest).exists() for digest in "abc"] == [True, False, True]
    assert (tables.path("a").parent / "another-.arrow").exists()
