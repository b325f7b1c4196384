"""verify and repair: damage is found and named; it leaves in one commit, and its keys are missing, never stale."""

import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from featurestore import FeaturePartition, FeatureRows, FeatureStore, QuarantineRow, StoreInfo, errors, shard_of
from featurestore.format.datafile import encode, schema_of, table_of
from featurestore.format.shard import newest_rows
from featurestore.log import EXPIRED, manifest_path, versions
from featurestore.problems import Problem
from featurestore.spec import FileEntry, Manifest, Sealed, seal, unseal
from featurestore.storage.local import DiskFiles
from featurestore.upkeep import verify as verify_module
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import expire
from featurestore.upkeep.history import pin, restore
from featurestore.upkeep.verify import RepairReport, readable_keys, repair, verify
from tests.faulty import Fault, faulty, preceded_by
from tests.featurestore.conftest import make_rows, put
from tests.featurestore.contents import SHARD, check_whole, everything, files_of, leave_in_expired, run, spoil
from tests.raised import compare, raises, told


def has(store: FeatureStore, problem: Problem, **values: object) -> bool:
    """Whether this is among the problems that verify finds, with these values."""
    found = [each.error for each in verify(store).problems if each.error.problem is problem]
    return any({name: error.values[name] for name in values} == values for error in found)


def test_a_whole_store_has_no_problem(filled: FeatureStore) -> None:
    steps: list[tuple[int, int]] = []
    report = verify(filled, progress=lambda done, total: steps.append((done, total)))
    manifest = filled.snapshot().manifest
    assert report.problems == report.known == []
    assert (report.num_manifests, report.num_files, report.num_bytes) == (3, manifest.num_files, manifest.file_bytes)
    assert steps[-1] == (manifest.num_files, manifest.num_files) and len(steps) == 8


def test_files_of_older_snapshots_are_checked_once_and_told_apart(filled: FeatureStore) -> None:
    old = files_of(filled)[0]
    compact(filled, force=True)
    filled.put(FeatureRows.of(["new.jpg"], np.zeros((1, 8), np.uint16)))
    each = {e.path for v in range(1, 6) for files in filled.snapshot(v).manifest.shards.values() for e in files}
    assert verify(filled).num_files == len(each)
    spoil(filled, old.path)
    report = verify(filled)
    (problem,) = report.problems
    assert problem.path == old.path and problem.versions[0] == 1 and 5 not in problem.versions
    compare(problem.error, Problem.DIGEST_DIFFERS, where=filled.storage.full(old.path))
    assert "The newest snapshot is whole" in problem.way_out
    assert [found.path for found in verify(filled, 1).problems] == [old.path]
    assert verify(filled, 5).problems == []
    run("verify", filled.url, "--version", 5, code=0)
    with raises(errors.SnapshotNotFoundError, Problem.NO_SNAPSHOT_TO_VERIFY, where=filled.url, value=9):
        verify(filled, 9)


def test_files_that_expire_meanwhile_are_no_problem(filled: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    old, check = files_of(filled)[0], verify_module.check_file
    compact(filled, force=True)
    assert verify(filled).problems == []

    def expired_before(*arguments: Any) -> object:
        monkeypatch.undo()
        expire(filled, keep_last=1, keep_days=0)
        (Path(filled.url) / old.path).unlink(missing_ok=True)
        return check(*arguments)

    monkeypatch.setattr(verify_module, "check_file", expired_before)
    assert verify(filled, threads=1).problems == []


@pytest.mark.parametrize("name", ["a data file", "store.json", manifest_path(1), manifest_path(3)])
def test_an_unreadable_sector_is_damage(filled: FeatureStore, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A person's own mistake is no damage: nothing may be moved away for it."""
    entry = files_of(filled)[0]
    place = Path(filled.url) / (entry.path if name == "a data file" else name)
    broken, code = place.stat().st_ino, errno.EACCES

    def failing(read: Callable[..., Any]) -> Callable[..., Any]:
        def read_or_fail(disk: DiskFiles, path: str, *out: memoryview) -> Any:
            if disk.path(path) == place and place.stat().st_ino == broken:
                raise OSError(code, os.strerror(code))
            return read(disk, path, *out)

        return read_or_fail

    for method in ("read_bytes", "read_into"):
        monkeypatch.setattr(DiskFiles, method, failing(getattr(DiskFiles, method)))
    for look in (verify, repair):
        with raises(errors.StorageError, Problem.REFUSED, where=place, reason="Permission denied"):
            look(filled)
    code = errno.EIO
    assert str(place.relative_to(filled.url)) in {problem.path for problem in verify(filled).problems}
    repair(filled)
    assert verify(filled).problems == [] and FeatureStore.open(filled.url).snapshot().num_rows > 0
    if name == "a data file":
        assert entry.path not in {file.path for file in filled.snapshot().manifest.files(3)}
        assert filled.snapshot().version == 4 and len(filled.quarantine_rows()) > 0
    else:
        assert [file.size_bytes for file in filled.storage.entries("damaged")] == [0]


def test_pins_of_nothing_and_of_another_name_are_found(filled: FeatureStore) -> None:
    pin(filled, "mine", 1)
    pins = Path(filled.url) / "pins"
    (pins / "other.json").write_bytes((pins / "mine.json").read_bytes())
    assert has(filled, Problem.ANOTHER_PIN, where=str(pins / "other.json"), value="mine")
    assert all("unpin" in problem.way_out for problem in verify(filled).problems)
    (pins / "other.json").unlink()
    (Path(filled.url) / manifest_path(1)).unlink()
    assert has(filled, Problem.PIN_OF_NOTHING, where=str(pins / "mine.json"), version=1)


def test_a_gap_is_no_problem_but_a_foreign_manifest_is(filled: FeatureStore) -> None:
    put(filled, 1)
    second = Path(filled.url) / manifest_path(2)
    whole = second.read_bytes()
    second.unlink()  # as an expiry with a pin on 1 leaves it
    assert verify(filled).problems == []
    manifest = unseal(whole, Manifest, "x")
    second.write_bytes(seal(manifest.model_copy(update={"commit_id": "50e0" * 8})))
    assert has(filled, Problem.FOLLOWS_ANOTHER, where=filled.storage.full(manifest_path(3)))
    second.write_bytes(seal(manifest.model_copy(update={"file_rows": 1})))
    assert has(filled, Problem.WRONG_COUNTS, where=str(second))


@pytest.mark.parametrize(("name", "model"), [("store.json", StoreInfo), (manifest_path(3), Manifest)])
def test_a_file_of_a_newer_program_asks_for_an_update(filled: FeatureStore, name: str, model: type[Sealed]) -> None:
    path = Path(filled.url) / name
    path.write_bytes(seal(unseal(path.read_bytes(), model, "x").model_copy(update={"format_version": 2})))
    for look in (verify, repair):
        with raises(errors.FormatVersionError, Problem.FORMAT_TOO_NEW, where=path, value=2):
            look(filled)
    path.write_bytes(json.dumps({**json.loads(path.read_bytes()), "format_version": 1}).encode())
    assert [problem.kind for problem in verify(filled).problems] == [{"store.json": "info"}.get(name, "manifest")]


def rewritten(store: FeatureStore, change: Callable[[pa.Table], pa.Table], shard: int = 3, **counts: int) -> None:
    """Replace the data file of a shard and the manifest by ones that fit each other, but break a promise."""
    manifest = store.snapshot().manifest
    entry = manifest.files(shard)[0]
    path = Path(store.url) / entry.path
    data = bytes(encode(change(pq.read_table(path)).cast(schema_of(store.info)), store.info))
    path.write_bytes(data)
    table = pq.read_table(io.BytesIO(data))
    digests = {"sha256": hashlib.sha256(data).hexdigest(), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    fixed = entry.model_copy(update={"bytes": len(data), "rows": len(table), **digests, **counts})
    shards = {**manifest.shards, shard: (fixed, *manifest.files(shard)[1:])}
    files = [file for each in shards.values() for file in each]
    sums = {"file_rows": sum(file.rows for file in files), "file_bytes": sum(file.bytes for file in files)}
    log = Path(store.url) / manifest_path(manifest.version)
    log.write_bytes(seal(manifest.model_copy(update={"shards": shards, **sums})))


BROKEN_PROMISES: dict[Problem, Callable[[pa.Table], pa.Table]] = {
    Problem.HOLDS_NO_ORDER: lambda table: table.take(list(range(len(table)))[::-1]),
    Problem.HOLDS_KEY_TWICE: lambda table: table.take([0, *range(len(table))]),
    Problem.WRONG_NUMBER: lambda table: table.set_column(6, "deleted", pa.array([True] * len(table))),
}


@pytest.mark.parametrize("promise", BROKEN_PROMISES)
def test_broken_promises_are_found_where_all_digests_fit(store: FeatureStore, promise: Problem, tmp_path: Path) -> None:
    put(store, 200)
    rewritten(store, BROKEN_PROMISES[promise])
    (found,) = verify(store).problems
    wanted = {"unit": "tombstones", "wanted": 0} if promise is Problem.WRONG_NUMBER else {}
    compare(found.error, promise, where=store.storage.full(files_of(store)[0].path), **wanted)
    if not wanted:
        with raises(errors.CorruptFileError, Problem.SHARD_OUT_OF_ORDER, shard=3, where=store.url):
            FeaturePartition.load(store, cache_dir=tmp_path / "cache")


def test_a_foreign_shard_and_values_that_are_not_finite_are_found(store: FeatureStore) -> None:
    rows = put(store, 200)
    strange = rows.take(np.flatnonzero(shard_of(rows.keys_N, 8) == 4))
    strange = strange.take(newest_rows(strange.keys_N))
    rewritten(store, lambda table: table_of(strange, store.info))
    assert has(store, Problem.HOLDS_STRAY_KEYS, value=len(strange), shard=3)
    infinite = replace(strange, features_ND=np.full_like(strange.features_ND, 0x7F80))
    rewritten(store, lambda table: table_of(infinite, store.info), shard=4)
    assert has(store, Problem.HOLDS_NOT_FINITE, value=len(strange))


def test_two_uris_of_one_key_without_a_delete_are_found(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(1, store.info)
    other = FeatureRows.of(["other"], rows.features_ND, keys=rows.keys_N)
    store.put(rows)
    store.delete(rows.keys_N)
    store.put(other)
    assert verify(store).problems == []
    monkeypatch.setattr("featurestore.format.shard.ShardReader.check_uris", lambda *_: None)
    store.put(rows)
    store.put(rows)
    (found,) = verify(store).problems
    compare(found.error, Problem.KEYS_OF_TWO_URIS, where=store.url, number=1, value=rows.keys_N[0])


def test_the_command_exits_with_1_and_names_file_and_command(filled: FeatureStore) -> None:
    assert "0 problems in 3 manifests" in run("verify", filled.url, code=0).output
    spoil(filled, files_of(filled)[0].path)
    done = run("verify", filled.url, code=1)
    assert done.output.count("broken: ") == 1 and "1 problem in" in done.output
    where = filled.storage.full(files_of(filled)[0].path)
    assert re.search(told(Problem.DIGEST_DIFFERS, where=where), done.output) and f"repair {filled.url}`" in done.output
    (Path(filled.url) / "store.json").write_bytes(b"{}")
    done = run("verify", filled.url, code=1)
    assert "broken: " in done.output and "rebuilds it from a data file" in done.output


def spoil_features(store: FeatureStore, entry: FileEntry) -> None:
    """The other columns stay readable."""
    column = pq.read_metadata(Path(store.url) / entry.path).row_group(0).column(7)
    assert column.path_in_schema == "feature"
    spoil(store, entry.path, column.data_page_offset + column.total_compressed_size - 1)


def keys_in(store: FeatureStore, entry: FileEntry) -> set[int]:
    return set(pq.read_table(Path(store.url) / entry.path)["key"].to_pylist())


@pytest.mark.parametrize("place", [0, 1, 2], ids=["base", "delta", "tombstones"])
def test_keys_of_a_damaged_file_are_missing_and_none_is_stale(filled: FeatureStore, tmp_path: Path, place: int) -> None:
    """Where older files have rows of them too: a refresh must see them missing. What newer files say of them counts."""
    before, files = everything(filled), files_of(filled)
    damaged, newer = files[place], [keys_in(filled, entry) for entry in files[place + 1 :]]
    decided = keys_in(filled, damaged) - set[int]().union(*newer)
    lost = decided & set(before)
    assert bool(lost) == (place < 2) and (place == 0 or decided & keys_in(filled, files[0]))
    spoil_features(filled, damaged)
    report = repair(filled)
    assert report.version == 4 and report.left == [] and report.num_quarantined == len(lost)
    assert everything(filled) == {key: row for key, row in before.items() if key not in lost}
    noted = filled.quarantine_rows()
    assert {row.key for row in noted} == lost
    assert all(damaged.path in row.reason and row.uri.startswith("images/") for row in noted)
    if place:
        assert [entry.kind for entry in files_of(filled)] == ["base", "delta", "delta"]
        assert files_of(filled)[place].num_deleted == len(decided)
    check_whole(filled, tmp_path)
    assert [problem.path for problem in verify(filled).known] == [damaged.path]
    assert repair(filled) == RepairReport()


@pytest.mark.parametrize("damage", ["gone", "footer", "empty"])
def test_a_file_without_readable_keys_is_dropped_too(filled: FeatureStore, tmp_path: Path, damage: str) -> None:
    before, (base, delta, *_) = everything(filled), files_of(filled)
    gone = keys_in(filled, base) - keys_in(filled, delta)
    path = Path(filled.url) / base.path
    data = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes({"footer": data[:-20] + bytes(20), "empty": b""}[damage])
    report = repair(filled)
    assert any(f"0 of its {base.rows} keys can be read" in action for action in report.actions)
    assert everything(filled) == {key: row for key, row in before.items() if key not in gone}
    check_whole(filled, tmp_path)


def test_all_damaged_files_are_mended_in_one_commit(filled: FeatureStore, tmp_path: Path) -> None:
    before = everything(filled)
    lost: set[int] = set()
    for shard in (1, 5):
        spoil_features(filled, files_of(filled, shard)[0])
        spoil_features(filled, files_of(filled, shard)[1])
        lost |= {key for key in before if shard_of([key], 8)[0] == shard}
    report = repair(filled)
    assert report.version == 4 == filled.snapshot().version
    assert everything(filled) == {key: row for key, row in before.items() if key not in lost}
    assert {row.key for row in filled.quarantine_rows()} == lost
    check_whole(filled, tmp_path)


def test_a_dry_run_changes_nothing(filled: FeatureStore) -> None:
    spoil(filled, files_of(filled)[1].path)
    spoil(filled, manifest_path(1))
    filled.add_quarantine([QuarantineRow(1, "a", "b", 1.0)])
    spoil(filled, f"quarantine/{filled.storage.list('quarantine')[0]}")
    before = {entry.path: entry for entry in filled.storage.entries()}
    report = repair(filled, dry_run=True)
    assert {entry.path: entry for entry in filled.storage.entries()} == before
    assert len(report.actions) == 4 and report.version is None
    done = repair(filled)
    assert done.actions == report.actions and done.version == 4
    assert versions(filled.storage) == [2, 3, 4] and filled.snapshot(4).manifest.operation == "repair"
    assert verify(filled).problems == [] and repair(filled) == RepairReport()


def test_a_commit_that_a_repair_took_as_the_newest_good_one_stays(filled: FeatureStore) -> None:
    """Its writer was away from the creation on; the commit after it was damaged, and a repair moved that away."""
    mine = make_rows(10, filled.info, first=1000)

    def others() -> None:
        spoil(filled, manifest_path(filled.put(make_rows(5, filled.info, first=2000)).version))
        repair(filled)

    left = [others]

    def made(call: Fault, *arguments: object) -> object:
        answer = call(*arguments)
        if left:
            left.pop()()
        return answer

    with raises(errors.StorageError, Problem.UNKNOWN_IF_LOGGED, where=filled.storage.full(manifest_path(4))):
        faulty(filled, create_exclusive=made).put(mine)
    assert set(mine.keys_N.tolist()) <= set(everything(filled)) and filled.snapshot(4).version == 4


def test_a_restore_meanwhile_makes_it_begin_again(filled: FeatureStore) -> None:
    """What newer files decided is no longer decided: the damaged file's keys need other tombstones."""
    spoil_features(filled, files_of(filled)[1])
    with raises(errors.CommitConflictError, Problem.REPLACED_MEANWHILE, where=re.compile("data/0003/")):
        repair(faulty(filled, create_exclusive=preceded_by(lambda: restore(filled, 2))))
    assert repair(filled).version == 5 and verify(filled).problems == []


@pytest.mark.parametrize("other_shard", [SHARD, SHARD + 1])
def test_a_file_in_the_place_of_another_has_no_say(filled: FeatureStore, other_shard: int) -> None:
    """Its keys are not those of the lost file: none of them may be deleted."""
    before = set(everything(filled))
    lost = files_of(filled)[2]
    tombstones = keys_in(filled, lost)
    shutil.copy(Path(filled.url) / files_of(filled, other_shard)[0].path, Path(filled.url) / lost.path)
    report = repair(filled)
    assert any(f"0 of its {lost.rows} keys can be read" in action for action in report.actions)
    assert report.num_quarantined == 0 and filled.quarantine_rows() == []
    assert set(everything(filled)) == before | tombstones


def test_keys_of_another_shard_have_no_say_though_size_and_rows_fit(filled: FeatureStore) -> None:
    entry = files_of(filled, SHARD + 1)[0]
    assert len(readable_keys(filled.storage, filled.info, SHARD + 1, entry)[1]) == entry.rows
    keys, uris = readable_keys(filled.storage, filled.info, SHARD, entry)
    assert len(keys.keys_N) == len(uris) == 0


def test_a_damaged_file_of_old_snapshots_is_noted(filled: FeatureStore, tmp_path: Path) -> None:
    base = files_of(filled)[0]
    data = (Path(filled.url) / base.path).read_bytes()
    compact(filled, force=True)
    spoil(filled, base.path)
    assert len(verify(filled).problems) == 1
    assert repair(filled).version is None and filled.snapshot().version == 4
    report = verify(filled)
    assert report.problems == [] and [known.path for known in report.known] == [base.path]
    with raises(errors.CorruptFileError, Problem.DIGEST_DIFFERS, where=filled.storage.full(base.path)):
        FeaturePartition.load(filled, version=1, cache_dir=tmp_path)
    spoil(filled, f"damaged/{filled.storage.list('damaged')[0]}")
    assert len(verify(filled).problems) == 1  # a note that is damaged counts for nothing
    (Path(filled.url) / base.path).write_bytes(data)  # from a backup
    assert verify(filled).problems == verify(filled).known == []


def test_damaged_statistics_are_dropped(store: FeatureStore, tmp_path: Path) -> None:
    put(store, 600)
    expected, entry = store.snapshot().statistics(), files_of(store)[0]
    spoil(store, str(entry.statistics_path))
    before = everything(store)
    assert repair(store).version == 2
    assert files_of(store)[0].statistics_path is None and files_of(store)[0].path == entry.path
    np.testing.assert_allclose(store.snapshot().statistics().mean_D, expected.mean_D, rtol=1e-6, atol=1e-7)
    assert everything(store) == before
    check_whole(store, tmp_path)


def test_without_a_good_manifest_a_backup_is_asked_for(store: FeatureStore) -> None:
    put(store, 10)
    spoil(store, manifest_path(1))
    with raises(errors.CorruptFileError, Problem.NO_GOOD_MANIFEST, where=store.url):
        repair(store)


@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_store_json_is_rebuilt_from_a_data_file(filled: FeatureStore, tmp_path: Path, damage: str) -> None:
    path = Path(filled.url) / "store.json"
    before = everything(filled)
    spoil(filled, files_of(filled, 0)[0].path)  # the first file that it would ask
    path.unlink() if damage == "gone" else spoil(filled, "store.json")
    assert "rebuild store.json" in repair(filled.url, dry_run=True).actions[0]
    assert len(verify(filled.url).problems) == 1
    report = repair(filled.url)
    again = FeatureStore.open(filled.url)
    assert again.info == filled.info and again.info.store_id and report.version == 4
    assert everything(again).items() <= before.items()
    check_whole(again, tmp_path)


def test_small_files_move_away_and_pins_are_left_to_a_person(filled: FeatureStore) -> None:
    filled.add_quarantine([QuarantineRow(1, "a", "b", 1.0)])
    spoil(filled, f"quarantine/{filled.storage.list('quarantine')[0]}")
    pin(filled, "best", 3)
    spoil(filled, "pins/best.json")
    report = repair(filled)
    assert [problem.kind for problem in report.left] == ["pin"]
    assert filled.quarantine_rows() == [] and len(filled.storage.list("damaged")) == 1
    (Path(filled.url) / "pins" / "best.json").unlink()
    expire(filled, keep_last=1, keep_days=0)
    spoil(filled, manifest_path(1, "expired"))
    assert len(verify(filled).problems) == 1
    repair(filled)
    assert verify(filled).problems == [] and len(filled.storage.list("expired")) == 1


def test_the_command_prints_what_it_does(filled: FeatureStore) -> None:
    assert "nothing to repair" in run("repair", filled.url).output
    spoil(filled, files_of(filled)[0].path)
    dry = run("repair", filled.url, "--dry-run", code=0)
    assert dry.output.count("would ") == 2 and "committed" not in dry.output
    assert "committed snapshot 4; " in run("repair", filled.url, code=0).output
    pin(filled, "best", 3)
    spoil(filled, "pins/best.json")
    left = run("repair", filled.url, code=1)
    assert "left: " in left.output and "unpin" in left.output


def test_a_damaged_newest_manifest_gives_way_to_the_one_before(filled: FeatureStore, tmp_path: Path) -> None:
    before = everything(filled, 2)
    spoil(filled, manifest_path(3))
    with raises(errors.CorruptFileError, Problem.WRONG_DIGEST, where=filled.storage.full(manifest_path(3))):
        filled.snapshot()
    report = repair(filled)
    assert report.version == 4 and "what 3 had changed is lost" in report.actions[0]
    assert everything(filled) == before and filled.snapshot().version == 4
    assert filled.storage.list("damaged") == [f"log-{3:020d}.json"]
    check_whole(filled, tmp_path)
    put(filled, 1, first=5000)
    assert filled.snapshot().version == 5 and verify(filled).problems == []


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


def test_what_came_back_from_expired_is_repaired_from(filled: FeatureStore) -> None:
    before = everything(filled)
    leave_in_expired(filled, [3], [3])
    filled.storage.write_bytes(f"damaged/log-{3:020d}.json", b"")  # another repair was killed as it moved it away
    repair(filled)
    put(filled, 1, first=5000)
    spoil(filled, manifest_path(4))
    repair(filled)
    assert versions(filled.storage) == [1, 2, 3, 5] and everything(filled) == before


def test_a_manifest_that_comes_late_to_the_number_of_a_damaged_one_is_not_repaired_from(filled: FeatureStore) -> None:
    """Its writer was away until a repair had moved the damaged one away, and was killed then."""
    before = everything(filled, 2)
    late = filled.snapshot(3).manifest.model_copy(update={"commit_id": "0" * 32})
    spoil(filled, manifest_path(3))
    repair(filled)
    filled.storage.write_bytes(manifest_path(3), seal(late))
    (found,) = verify(filled).problems
    compare(found.error, Problem.NUMBER_GIVEN_AWAY, where=filled.storage.full(manifest_path(3)))
    spoil(filled, manifest_path(4))
    repair(filled)
    assert versions(filled.storage) == [1, 2, 5] and everything(filled) == before


def test_a_manifest_that_was_moved_away_may_come_back_from_a_backup(filled: FeatureStore) -> None:
    backup = filled.storage.read_bytes(manifest_path(2))
    spoil(filled, manifest_path(2))
    repair(filled)
    filled.storage.write_bytes(manifest_path(2), backup)
    assert verify(filled).problems == [] and filled.snapshot(2).version == 2


def test_a_manifest_whose_files_are_gone_stays_in_expired(filled: FeatureStore) -> None:
    """A purge deletes files at once: its rows must not come back with an old manifest."""
    before, gone = everything(filled, 1), filled.snapshot(2).manifest.files(SHARD)[1]
    leave_in_expired(filled, [3], [2])
    filled.storage.delete(gone.path)
    repair(filled)
    assert (versions(filled.storage), versions(filled.storage, EXPIRED)) == ([1, 4], [2])
    assert everything(filled) == before


@pytest.mark.parametrize("version", [5, 2**40])
def test_numbers_continue_behind_a_stray_manifest(filled: FeatureStore, version: int) -> None:
    filled.storage.write_bytes(manifest_path(version), filled.storage.read_bytes(manifest_path(3)))
    stray = {"where": filled.storage.full(manifest_path(version)), "value": 3}
    with raises(errors.CorruptFileError, Problem.ANOTHER_MANIFEST, **stray):
        filled.snapshot()
    with raises(errors.CorruptFileError, Problem.ANOTHER_MANIFEST, **stray):  # no commit goes behind it
        put(filled, 5)
    assert versions(filled.storage) == [1, 2, 3, version]
    before = filled.snapshot(3).manifest.shards
    assert repair(filled).version == version + 1
    assert verify(filled).problems == [] and filled.snapshot().manifest.shards == before
    assert filled.put(make_rows(5, filled.info)).version == version + 2


def test_a_manifest_whose_counts_are_wrong_is_not_committed_again(filled: FeatureStore) -> None:
    """Sealed well, so that readers take it; what it names is right, what it counts is not."""
    manifest = filled.snapshot().manifest.model_copy(update={"num_files": 0})
    filled.storage.write_bytes(manifest_path(3), seal(manifest))
    assert [problem.kind for problem in verify(filled).problems] == ["manifest"]
    assert repair(filled).version == 4
    assert verify(filled).problems == [] and versions(filled.storage) == [1, 2, 4]


@pytest.fixture
def layered(store: FeatureStore) -> FeatureStore:
    """Four files in each shard."""
    for seed in range(4):
        put(store, 60, seed=seed)
    return store


def test_none_goes_from_above_an_older_file_whose_rows_it_may_delete(layered: FeatureStore) -> None:
    """As where a restore brings the older one back while a compaction finds that no row lives in the others."""
    layered.delete(make_rows(60, layered.info).keys_N)
    files = layered.snapshot().manifest.files(2)
    for gone in (files[1:], [files[0], files[2]], files[-1:]):
        with raises(errors.CommitConflictError, Problem.REPLACED_MEANWHILE):
            layered.commit({}, "x", replaces={2: gone})
    assert layered.snapshot().manifest.files(2) == files and layered.snapshot().num_rows == 0


def test_a_new_one_in_the_middle_keeps_its_place(layered: FeatureStore) -> None:
    files = layered.snapshot().manifest.files(2)
    entry = layered.write(make_rows(80, layered.info, seed=6))[2]
    assert len(files) == 4
    with raises(errors.CommitConflictError, Problem.REPLACED_MEANWHILE):
        layered.commit({2: entry.model_copy(update={"kind": "base"})}, "x", replaces={2: files[1:3]})
    with raises(errors.CommitConflictError, Problem.REPLACED_MEANWHILE):
        layered.commit({2: entry}, "x", replaces={2: [files[1], files[3]]})
    found = layered.commit({2: entry}, "x", replaces={2: files[1:3]}).manifest.files(2)
    assert [file.path for file in found] == [files[0].path, entry.path, files[3].path]
    assert [file.kind for file in found] == ["base", "delta", "delta"]
