"""The shop is what its file says: history, quarantine, duplicates, runs and a bundle."""

from featurestore.keys import key_of_uri
from featurestore.store import FeatureStore
from tests.explorer.world import (
    ADDED,
    BACK_IN,
    BROKEN,
    BROKEN_IN,
    COPIED,
    COPY,
    HISTORY,
    HOSTILE,
    HOSTILE_BROKEN,
    NO_IMAGE,
    PLAIN,
    REMOVED,
    UNKNOWN,
)
from tests.metadata import metadata_of


def uris_of(store, version):
    return set(metadata_of(store.snapshot(version))["uri"].to_pylist())


def test_the_store_has_the_history_that_the_constants_tell(shop):
    store = FeatureStore.open(shop.store)
    manifests = {version: store.snapshot(version).manifest for version in HISTORY}
    assert {version: manifest.operation for version, manifest in manifests.items()} == HISTORY
    assert store.snapshot().version == max(HISTORY)
    first = {*PLAIN, *HOSTILE}
    assert uris_of(store, 1) == first
    assert uris_of(store, 2) == first - {REMOVED} | {*ADDED, COPY}
    assert uris_of(store, BROKEN_IN) == uris_of(store, 2) - {BROKEN}
    assert uris_of(store, BACK_IN) == uris_of(store, 5) == uris_of(store, BROKEN_IN) | {REMOVED}
    assert {row.uri for row in store.quarantine_rows()} == {BROKEN, NO_IMAGE, HOSTILE_BROKEN}
    table = metadata_of(store.snapshot())
    digest_of = dict(zip(table["uri"].to_pylist(), table["content_digest"].to_pylist(), strict=True))
    assert digest_of[COPY] == digest_of[COPIED]
    assert all((shop.images / uri).is_file() for uri in uris_of(store, 5))


def test_samples_runs_and_bundle_are_there(world):
    from featurestore.storage.storage import Storage
    from serving.bundle.log import read_version

    assert len(list(world.samples.glob("train/*.parquet"))) == 4
    assert {path.parent.name for path in world.runs.glob("*/report.json")} == {"both", "ids-only", "both-longer"}
    assert {path.parents[1].name for path in world.runs.glob("*/evaluation/*.json")} == {"both", "ids-only"}
    assert read_version(Storage(str(world.model))).version == 1
    known = FeatureStore.open(world.store).snapshot().keys().tolist()
    assert key_of_uri(UNKNOWN) not in known
