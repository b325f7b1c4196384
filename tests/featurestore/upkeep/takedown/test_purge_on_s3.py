"""A purge by keys on S3, killed at each write: the store is the one before or after, and the next run completes it."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from featurestore import FeatureRows, FeatureStore, QuarantineRow, StoreInfo, key_of_uri
from featurestore.storage.storage import Storage
from featurestore.storage.threads import in_threads
from featurestore.upkeep.history import move_channel
from featurestore.upkeep.purge import read_images
from featurestore.upkeep.verify import verify
from tests.faulty import FaultyStorage
from tests.featurestore.upkeep.takedown.test_purge import GONE, Killed, contents, purge, run, without


def dying_halfway(store: FeatureStore, write: int, seen: list[str]) -> FeatureStore:
    """A store on S3, where a file is written as a whole, whose process dies as it begins a write; at 0 it lives.

    Of files that one call deletes, half are gone by then. `seen` gets the kind and the place of each write.
    """

    def dies(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        places = [arguments[0]] if isinstance(arguments[0], str) else list(arguments[0])
        seen.append(" ".join([name, *sorted({re.sub(r"/.*|-[0-9a-f]{32}$", "", place) for place in places})]))
        if len(seen) == write and name == "delete_files":
            call(places[: len(places) // 2])
        if 0 < write <= len(seen):
            raise Killed
        return call(*(arguments if isinstance(arguments[0], str) else (places, *arguments[1:])))

    names = ("write_bytes", "create_exclusive", "create_or_read", "delete", "delete_files", "open_output")
    return FeatureStore(FaultyStorage(store.storage, {name: partial(dies, name) for name in names}), store.info)


@pytest.mark.long
@pytest.mark.services
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["ends", "every write"])
def test_on_s3_killed_at_any_write_the_command_completes_it(
    every: bool, s3_url: str, info: StoreInfo, make_rows: Callable[..., FeatureRows], tmp_path: Path
) -> None:
    """Unless `every`, at the last write of each kind; on a disk it dies at more of them."""
    first = FeatureStore.create(f"{s3_url}/first", info.model_copy(update={"num_shards": 1}))
    first.put(make_rows(10, first.info, first=100))
    first.put(make_rows(40, first.info))
    first.put(make_rows(5, first.info, seed=5, first=30))
    first.add_quarantine([QuarantineRow(key_of_uri(GONE[1]), GONE[1], "truncated", 1.0)])
    first.stage_part("refresh", "part-1", make_rows(20, first.info, seed=9))
    move_channel(first, "stable", 3)
    files = {each.path: first.storage.read_bytes(each.path) for each in first.storage.entries()}
    before = contents(first)
    keys = tmp_path / "keys.txt"
    keys.write_text("".join(f"{key_of_uri(uri)}\n" for uri in GONE))
    images = read_images(keys, "key")
    whole: list[str] = []
    purge(dying_halfway(first, 0, whole), images)
    assert len(whole) > 12, "it was not killed often"
    last_of_kind = {each.partition(" ")[0]: place for place, each in enumerate(whole)}
    for place in range(len(whole)) if every else sorted(last_of_kind.values()):
        url, seen = f"{s3_url}/killed-{place}", list[str]()
        list(in_threads(lambda path, to=Storage(url): to.write_bytes(path, files[path]), files, 8))
        store = FeatureStore.open(url)
        with pytest.raises(Killed):
            purge(dying_halfway(store, place + 1, seen), images)
        assert seen[: place + 1] == whole[: place + 1]
        for which in (None, "stable"):
            assert contents(store, which) in (before, without(before)), f"killed at {seen}: another row"
        again = run("purge", url, "--keys", keys, "--writer-hours", 0)
        assert again.exit_code == 0, (seen, again.output)
        assert "proof        no row of 2 keys is in" in again.output
        if place % 4 == 0:  # the purge itself has ended with the same proof
            assert run("verify", url, "--absent", keys).exit_code == 0, seen
        assert contents(store) == without(before) == contents(store, "stable")
        assert verify(store).problems == []
