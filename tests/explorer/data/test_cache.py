"""Cached values: computed once for all who ask, let go when there is no room, and never an error."""

import os
import threading
import time
from pathlib import Path

import pytest

from explorer.data import cache as module
from explorer.data.cache import FileCache, LruCache


def test_a_value_is_computed_once_however_many_ask_at_the_same_time():
    kept, calls = LruCache(3), []

    def slow():
        calls.append(1)
        time.sleep(0.05)
        return object()

    found = []
    threads = [threading.Thread(target=lambda: found.append(kept.get("one", slow))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len({*map(id, found)}) == 1


def test_what_was_unused_for_longest_goes_first():
    kept = LruCache(2)
    for name in "ab":
        kept.get(name, lambda name=name: name)
    assert kept.peek("a") == "a"
    kept.get("c", lambda: "c")
    assert [kept.peek(name) for name in "abc"] == ["a", None, "c"]


def test_an_error_is_not_kept():
    kept, answers = LruCache(2), iter([ValueError("not yet"), "now"])

    def make():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(ValueError, match="not yet"):
        kept.get("one", make)
    assert kept.get("one", make) == "now"


def test_locks_are_bounded_like_the_values():
    kept: LruCache[int] = LruCache(2)
    for name in range(100):
        kept.get(name, lambda: 1)
        kept.get(name, lambda: 1)
    assert not kept._gates


def test_the_sizes_of_the_values_are_bounded():
    cache: LruCache[bytes] = LruCache(10, len)
    for name, size in (("a", 4), ("b", 4), ("a", 5), ("c", 4)):
        cache.put(name, bytes(size))
    assert [cache.peek(name) for name in "abc"] == [bytes(5), None, bytes(4)]
    assert cache.size == 9


def test_files_and_folders_unused_for_longest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "explorer_cache", lambda: tmp_path)
    files = FileCache("kind-", "", most=2)
    for used_s, digest in enumerate(["a", "b", "c", "d"]):
        place = files.path(digest)
        place.mkdir() if digest in "ac" else place.touch()
        os.utime(place, (used_s, used_s))
    os.utime(files.path("a"), (9, 9))
    (tmp_path / "another-kind").touch()
    files.prune()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["another-kind", "kind-a", "kind-d"]
