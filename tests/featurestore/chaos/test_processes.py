"""Processes of their own write to one store at once, beside compactions and expiries, and the first of them is killed.

Each commit says in its operation what it did: so the log alone tells what the store holds. What only happens in one
order of calls in a million is found by histories in a simulated world (tests/simulated).
"""

import contextlib
import itertools
import random
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash

from featurestore import FeatureRows, FeatureStore, StoreInfo, key_of_uri, keys_of_uris, log
from featurestore import store as store_module
from featurestore.errors import CommitConflictError
from featurestore.spec import Manifest
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import expire
from tests.featurestore.staged import metadata_of
from tests.fuse import small_process

WRITERS, HOT = 4, [f"hot-{number}" for number in range(6)]


def feature_of(name: str, uri: str) -> np.ndarray:
    """A row tells which commit wrote it: bfloat16 bits (D,), finite."""
    return np.frombuffer(xxhash.xxh3_128_digest(f"{name} {uri}".encode()), np.uint16) & np.uint16(0x3FFF)


def write(url: str, name: str, notes: Path, count: int) -> None:
    """Put keys that all writers put, and keys of its own, and delete some; note each version when it is told."""
    store_module.refuse_unsafe = lambda storage: None
    store, chance = FeatureStore.open(url), random.Random(name)
    for number in range(count):
        uris, commit = [*chance.sample(HOT, 3), f"{name}-{number % 3}"], f"{name}.{number}"
        if number % 4 == 3:
            text = " ".join(["delete", commit, *uris])
            snapshot = store.delete(keys_of_uris(uris), text)
        else:
            text = " ".join(["put", commit, *uris])
            rows = FeatureRows.of(uris, np.stack([feature_of(commit, uri) for uri in uris]))
            snapshot = store.put(rows, text)
        with (notes / name).open("a") as file:
            file.write(f"{snapshot.version} {text}\n")


def tidy(url: str) -> None:
    """Compact and expire, for ever; another compaction may be first."""
    store = FeatureStore.open(url)
    while True:
        with contextlib.suppress(CommitConflictError):
            compact(store, force=True, threads=1)
        expire(store, keep_last=10_000, keep_days=0, grace_days=1)


def manifests_of(store: FeatureStore) -> list[Manifest]:
    return [log.read_manifest(store.storage, version) for version in log.versions(store.storage)]


@pytest.mark.services
@pytest.mark.parametrize("count", [6, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_the_log_tells_what_the_store_holds_and_has_all_that_was_acknowledged(
    count: int, tmp_path: Path, info: StoreInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "refuse_unsafe", lambda storage: None)  # a race of seconds, tested elsewhere
    store = FeatureStore.create(tmp_path / "store", info.model_copy(update={"num_shards": 2}))
    names, notes = [f"w{number}" for number in range(WRITERS)], tmp_path / "notes"
    notes.mkdir()
    counts = dict.fromkeys(names, count) | {"w0": 10**6}
    writers = {name: small_process(write, store.url, name, notes, counts[name]) for name in names}
    beside = small_process(tidy, store.url)
    for process in (*writers.values(), beside):
        process.start()
    try:
        for name in names[1:]:
            writers[name].join(400)
            assert writers[name].exitcode == 0
        while not any(each.operation.startswith("compact") for each in manifests_of(store)):
            assert beside.is_alive() and writers["w0"].is_alive()  # the test's own limit ends it
            time.sleep(0.05)
    finally:
        for process in (*writers.values(), beside):
            process.kill()
            process.join()

    manifests = manifests_of(store)
    assert [each.version for each in manifests] == list(range(1, len(manifests) + 1))
    for before, after in itertools.pairwise(manifests):
        assert after.parent == before.commit_id and after.time_s >= before.time_s
    operations = [each.operation for each in manifests]
    commits = [each for each in operations if not each.startswith("compact")]
    assert len(set(commits)) == len(commits) < len(operations)
    told = {name: (notes / name).read_text().splitlines() for name in names}
    assert [len(told[name]) for name in names[1:]] == [count] * (WRITERS - 1) and told["w0"]
    for line in itertools.chain(*told.values()):
        version, _, text = line.partition(" ")
        assert operations[int(version) - 1] == text
    held: dict[int, bytes] = {}
    for operation in commits:
        kind, commit, *uris = operation.split()
        for uri in uris:
            held.pop(key_of_uri(uri), None)
            if kind == "put":
                held[key_of_uri(uri)] = feature_of(commit, uri).tobytes()
    snapshot = store.snapshot()
    assert snapshot.keys().tolist() == sorted(held) and metadata_of(snapshot).num_rows == len(held)
    assert [row.tobytes() for row in snapshot.get(sorted(held))] == [held[key] for key in sorted(held)]
