"""repair of manifests: the newest good one takes the place of a damaged one, also from expired/."""

import shutil
from pathlib import Path

import pytest

from featurestore import FeatureStore
from featurestore.errors import CorruptFileError
from featurestore.log import EXPIRED, manifest_path, versions
from featurestore.upkeep.repair import repair
from featurestore.upkeep.verify import verify
from tests.featurestore.upkeep.damaged import SHARD, check_whole, everything, repair_until, spoil


def test_a_damaged_newest_manifest_gives_way_to_the_one_before(filled: FeatureStore, make_rows, tmp_path: Path) -> None:
    before = everything(filled, 2)
    spoil(filled, manifest_path(3))
    with pytest.raises(CorruptFileError):
        filled.snapshot()
    report = repair(filled)
    assert report.version == 4 and "what 3 had changed is lost" in report.actions[0]
    assert everything(filled) == before and filled.snapshot().version == 4
    assert filled.storage.list("damaged") == [f"log-{3:020d}.json"]
    check_whole(filled, tmp_path)
    filled.put(make_rows(1, filled.info, first=5000))
    assert filled.snapshot().version == 5 and verify(filled).problems == []


def test_readers_never_find_a_damaged_newest_manifest_gone(
    filled: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The good one is committed before the damaged one moves: a writer in between would take its number."""
    spoil(filled, manifest_path(3))
    seen: list[int] = []
    monkeypatch.setattr(
        "featurestore.upkeep.repair._put_aside", lambda storage, path: seen.append(filled.snapshot().version)
    )
    repair(filled)
    assert seen == [4]


def test_a_damaged_old_manifest_moves_away(filled: FeatureStore) -> None:
    spoil(filled, manifest_path(1))
    before = everything(filled)
    assert repair(filled).version is None
    assert everything(filled) == before and verify(filled).problems == []
    assert filled.storage.list("log") == [f"{2:020d}.json", f"{3:020d}.json"]


def leave_in_expired(store: FeatureStore, damaged: list[int], aside: list[int]) -> None:
    """Damage manifests, and move others to expired/, as an expiry does."""
    for version in aside:
        store.storage.write_bytes(manifest_path(version, EXPIRED), store.storage.read_bytes(manifest_path(version)))
        if version not in damaged:
            store.storage.delete(manifest_path(version))
    for version in damaged:
        spoil(store, manifest_path(version))


@pytest.mark.parametrize(
    ("damaged", "aside", "left", "rows_of"),
    [
        ([3], [1, 2], [1, 2, 4], 2),  # all that was kept
        ([3], [2], [1, 2, 4], 2),  # 1 is kept by a pin
        ([2, 3], [1], [1, 4], 1),
        ([2], [2], [1, 2, 3], 3),  # an expiry was killed between its two steps
        ([2], [1], [3], 3),  # the newest is good: 1 has expired
        ([1], [2], [3], 3),
    ],
)
def test_manifests_come_back_from_expired(
    filled: FeatureStore, tmp_path: Path, damaged: list[int], aside: list[int], left: list[int], rows_of: int
) -> None:
    before = everything(filled, rows_of)
    leave_in_expired(filled, damaged, aside)
    would = repair(filled, dry_run=True)
    actions = repair(filled).actions
    assert actions[: len(would.actions)] == would.actions
    assert versions(filled.storage) == left and everything(filled) == before
    assert not set(versions(filled.storage, EXPIRED)) & set(left)
    check_whole(filled, tmp_path)


def test_a_manifest_whose_files_are_gone_stays_in_expired(filled: FeatureStore) -> None:
    """A purge deletes files at once: its rows must not come back with an old manifest."""
    before, gone = everything(filled, 1), filled.snapshot(2).manifest.files(SHARD)[1]
    leave_in_expired(filled, [3], [2])
    filled.storage.delete(gone.path)
    repair(filled)
    assert (versions(filled.storage), versions(filled.storage, EXPIRED)) == ([1, 4], [2])
    assert everything(filled) == before


@pytest.mark.long
def test_killed_before_any_write_the_next_run_puts_the_others_back(filled: FeatureStore, tmp_path: Path) -> None:
    before = everything(filled, 2)
    leave_in_expired(filled, [3], [1, 2])
    for num_writes in range(100):
        store = FeatureStore.open(shutil.copytree(filled.url, tmp_path / str(num_writes)))
        done = repair_until(store, num_writes)
        repair(store)
        assert everything(store) == before
        assert (versions(store.storage), verify(store).problems) == ([1, 2, 4], [])
        if done:
            break
    assert 5 < num_writes < 99
