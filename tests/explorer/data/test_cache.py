"""Cached values: computed once for all who ask, let go when there is no room, and never an error."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from explorer.data import cache as module
from explorer.data.cache import LruCache, TableCache, about_of, described


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
    assert ([cache.peek(name) for name in "abc"], cache.size) == ([bytes(5), None, bytes(4)], 9)
    cache.put("d", bytes(40))
    assert ([cache.peek(name) for name in "acd"], cache.size) == ([None, None, bytes(40)], 40)
    cache.put("e", bytes(3))
    assert ([cache.peek(name) for name in "de"], cache.size) == ([None, bytes(3)], 3)


@pytest.fixture(params=[".arrow", ".parquet"])
def tables(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TableCache:
    monkeypatch.setattr(module, "explorer_cache", lambda: tmp_path)
    return TableCache("kind-", request.param, most=2)


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
    tables.path("a").write_bytes(b"ARROW1PAR1")
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
    (tables.path("a").parent / f"another-{tables.suffix}").touch()
    assert [tables.path(digest).exists() for digest in "abc"] == [True, False, True]
    assert (tables.path("a").parent / f"another-{tables.suffix}").exists()
