"""A purge by keys on S3, killed at each write: the store is the one before or after, and the next run completes it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from featurestore import FeatureRows, FeatureStore, QuarantineRow, StoreInfo, key_of_uri
from featurestore.storage.storage import Storage
from featurestore.storage.threads import in_threads
from featurestore.upkeep.keyfiles import read_keys
from featurestore.upkeep.promotion.moving import move_channel
from featurestore.upkeep.takedown.absence import Images
from featurestore.upkeep.verify import verify
from tests.featurestore.faulty import FaultyStorage
from tests.featurestore.upkeep.test_purge import GONE, Killed, contents, purge, run, without


def dying_halfway(store: FeatureStore, writes: int) -> FeatureStore:
    """A store on S3, where a file is written as a whole, whose process dies as it begins the n-th write.

    Of files that one call deletes, half are gone by then.
    """
    left = [writes]

    def dies(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and name == "delete_files":
            paths = list(arguments[0])
            call(paths[: len(paths) // 2])
        if left[0] <= 0:
            raise Killed
        return call(*arguments)

    names = ("write_bytes", "create_exclusive", "create_or_read", "delete", "delete_files", "open_output")
    return FeatureStore(FaultyStorage(store.storage, {name: partial(dies, name) for name in names}), store.info)


@pytest.mark.long
@pytest.mark.services
def test_on_s3_killed_at_any_write_the_command_completes_it(
    s3_url: str, info: StoreInfo, make_rows: Callable[..., FeatureRows], tmp_path: Path
) -> None:
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
    for writes in range(1, 100):
        url = f"{s3_url}/killed-{writes}"
        list(in_threads(lambda path, to=Storage(url): to.write_bytes(path, files[path]), files, 8))
        store = FeatureStore.open(url)
        try:
            purge(dying_halfway(store, writes), Images.of_keys(read_keys(keys)))
        except Killed:
            pass
        else:
            assert writes > 12, "it was not killed often"
            break
        for which in (None, "stable"):
            assert contents(store, which) in (before, without(before)), f"killed at write {writes}: another row"
        again = run("purge", url, "--keys", keys, "--writer-hours", 0)
        assert again.exit_code == 0, (writes, again.output)
        assert "proof        no row of 2 keys is in" in again.output
        if writes % 4 == 1:  # the purge itself has ended with the same proof
            assert run("verify", url, "--absent", keys).exit_code == 0, writes
        assert contents(store) == without(before) == contents(store, "stable")
        assert verify(store).problems == []
    else:
        pytest.fail("it never came to its end")
