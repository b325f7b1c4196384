"""Takedowns: rows leave all snapshots and files, on S3 too, wherever it is cut off; the proof finds what is left."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featurestore import FeaturePartition, FeatureRows, FeatureStore, QuarantineRow, StoreInfo, key_of_uri, log
from featurestore.errors import CorruptFileError, KeyFileError, PinError, SnapshotNotFoundError
from featurestore.problems import Problem
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import move_aside
from featurestore.upkeep.history import move_channel, pin, read_pins, restore, unpin
from featurestore.upkeep.purge import Images, PurgeReport, find_traces, read_images
from featurestore.upkeep.purge import purge as purge_store
from featurestore.upkeep.verify import verify
from tests.faulty import Fault, FaultyStorage, faulty
from tests.featurestore.conftest import make_rows, put
from tests.featurestore.contents import GONE, IMAGES, contents, run, without
from tests.raised import raises, told

pytestmark = pytest.mark.long
NUM_SHARDS = 4


def purge(store: FeatureStore, images: Images = IMAGES, **options: Any) -> PurgeReport:
    return purge_store(store, images, writer_hours=0, **options)


def fill(store: FeatureStore) -> FeatureStore:
    """Five snapshots: 1 has none of the images, 2 and 4 write them, 3 deletes one, 5 is of others."""
    put(store, 40, first=100)
    put(store, 40)
    store.delete([key_of_uri(GONE[0])])
    put(store, 20, seed=4)
    put(store, 5, seed=5, first=30)
    store.add_quarantine([QuarantineRow(key_of_uri(GONE[1]), GONE[1], "truncated", 1.0)])
    store.add_quarantine([QuarantineRow(7, "other.jpg", "truncated", 2.0)])
    store.stage_part("refresh", "part-1", make_rows(20, store.info, seed=9))
    store.stage_part("other", "part-1", make_rows(5, store.info, first=500))
    store.write(make_rows(20, store.info, seed=8))  # of a writer that died before its commit
    return store


@pytest.fixture
def filled(filled_by: Callable[..., FeatureStore]) -> FeatureStore:
    return filled_by(fill)


def test_no_file_has_a_row_and_all_others_stay_on_every_place(place_url: str, info: StoreInfo) -> None:
    few = info.model_copy(update={"num_shards": 2})  # on S3 each file of each snapshot is read over and over
    takendown = fill(FeatureStore.create(place_url, few))
    before, oldest = contents(takendown), contents(takendown, 1)
    move_channel(takendown, "stable", 5)
    assert all(trace.rows for trace in find_traces(takendown.storage, IMAGES).traces)
    report = purge(takendown)
    assert report.is_complete and report.version == 6 and report.expired == (2, 3, 4, 5)
    assert contents(takendown) == without(before) and contents(takendown, 1) == oldest
    assert takendown.snapshot("stable").version == 6 and report.moved == ["stable"]
    assert log.versions(takendown.storage) == [1, 6] and verify(takendown).problems == []
    assert [row.uri for row in takendown.quarantine_rows()] == ["other.jpg"]
    assert (takendown.staged_parts("refresh"), takendown.staged_parts("other")) == ([], ["part-1"])
    assert find_traces(takendown.storage, IMAGES).is_absent
    again = purge(takendown)
    assert again.is_complete and (again.version, again.num_rows, again.expired) == (None, 0, ())


def test_writers_in_between_are_seen(filled: FeatureStore) -> None:
    """One that restores an old snapshot, and one that brings the rows back, when new snapshots are to be made."""
    others: list[Callable[[], object]] = [lambda: put(filled, 20, seed=11), lambda: restore(filled, 2)]

    def created(create: Fault, path: str, data: bytes) -> Any:
        if others:
            others.pop()()
        return create(path, data)

    assert purge(faulty(filled, create_exclusive=created)).is_complete and others == []
    assert set(contents(filled)).isdisjoint(GONE) and verify(filled).problems == []
    assert len(contents(filled)) == 78


def test_snapshots_that_an_expiry_takes_away_meanwhile_are_passed_over(filled: FeatureStore) -> None:
    others = [lambda: move_aside(filled, [1]), lambda: None, lambda: move_aside(filled, [2])]

    def listed(names: Fault, path: str = "") -> Any:
        found = names(path)
        if path == log.LOG and others:
            others.pop(0)()
        return found

    assert purge(faulty(filled, list=listed)).is_complete and others == []
    assert log.versions(filled.storage) == [6]


def test_files_of_a_writer_at_work_stay_and_the_proof_says_so(filled: FeatureStore) -> None:
    report = purge_store(filled, IMAGES, writer_hours=1.0)
    assert not report.is_complete and report.version == 6
    assert "staging/refresh" in report.young and any(path.startswith("data/") for path in report.young)
    assert report.proof is not None
    assert {trace.path for trace in report.proof.traces if trace.path.startswith("data/")} <= set(report.young)
    assert purge(filled).is_complete


class TestReaders:
    def test_who_holds_an_old_snapshot_gets_no_other_row(self, filled: FeatureStore, tmp_path: Path) -> None:
        old = filled.snapshot(4)
        before = contents(filled, 4)
        cached = FeaturePartition.load(filled.url, cache_dir=tmp_path / "cache", version=4)
        key = key_of_uri(GONE[1])
        purge(filled)
        with raises(CorruptFileError, Problem.MISSING):
            old.get([key])
        with raises(SnapshotNotFoundError, Problem.EXPIRED, where=filled.url, value=4):
            filled.snapshot(4)
        with cached:
            assert cached.lookup(np.array([key])).features_UD[0].tobytes() == before[GONE[1]]  # docs: empty the caches

    def test_pins_and_channels_of_older_snapshots_are_refused_first(self, filled: FeatureStore) -> None:
        pin(filled, "model", 2)
        move_channel(filled, "stable", 4)
        files = [entry.path for entry in filled.storage.entries()]
        keepers = "pin model (snapshot 2), channel stable (snapshot 4)"
        with raises(PinError, Problem.ROWS_KEPT, where=filled.url, keepers=keepers):
            purge(filled)
        unpin(filled, "model")
        with raises(PinError, Problem.ROWS_KEPT, where=filled.url, keepers="channel stable (snapshot 4)"):
            purge(filled, dry_run=True)
        move_channel(filled, "stable", 5)
        assert {entry.path for entry in filled.storage.entries()} - {*files} == {f"channels/stable/{2:020}.json"}
        report = purge(filled)
        assert report.is_complete and report.moved == ["stable"]
        assert filled.snapshot("stable").version == 6 and read_pins(filled.storage) == []

    def test_a_pin_of_a_snapshot_without_the_rows_stays(self, filled: FeatureStore) -> None:
        pin(filled, "before", 1)
        assert purge(filled).is_complete
        assert [each.version for each in read_pins(filled.storage)] == [1]


class TestRows:
    def test_a_row_under_another_key_than_that_of_its_uri_goes_too(self, store: FeatureStore) -> None:
        rows = make_rows(40, store.info)
        store.put(FeatureRows.of(rows.uris, rows.features_ND, keys=np.arange(1000, 1040)))
        assert purge(store).is_complete
        assert set(contents(store)) == set(rows.uris) - set(GONE)

    def test_a_store_of_which_nothing_is_left(self, store: FeatureStore) -> None:
        put(store, GONE)
        report = purge(store)
        assert report.is_complete and contents(store) == {} and store.snapshot().manifest.num_files == 0

    def test_where_history_alone_has_them_nothing_is_committed(self, store: FeatureStore) -> None:
        put(store, 40)
        store.delete([key_of_uri(uri) for uri in GONE])
        compact(store, force=True)
        move_channel(store, "stable", 3)
        report = purge(store)
        assert report.is_complete and (report.version, report.expired, report.moved) == (None, (1, 2), [])
        assert store.snapshot().version == 3 == store.snapshot("stable").version and len(contents(store)) == 38

    def test_statistics_are_those_of_the_rows_that_stay(self, store: FeatureStore) -> None:
        put(store, 2000)
        purge(store)
        snapshot = store.snapshot()
        values = store.codec.decode(snapshot.get(snapshot.keys()))
        assert snapshot.statistics().count == 1998
        np.testing.assert_allclose(snapshot.statistics().mean_D, values.mean(axis=0), atol=1e-6)

    def test_a_damaged_file_of_the_newest_snapshot_stops_it(self, filled: FeatureStore) -> None:
        entry = filled.snapshot().manifest.entries[0]
        (Path(filled.url) / entry.path).write_bytes(b"PAR1 no parquet")
        found = {"reason": re.compile(entry.path), "hint": re.compile(f"repair {filled.url}, and purge again")}
        with raises(CorruptFileError, Problem.BROKEN_UNTIL_MENDED, **found):
            purge(filled)
        assert filled.snapshot().version == 5


class TestProof:
    @pytest.mark.parametrize("where", ["data/0001/x.parquet", "staging/a/x.parquet", "damaged/x.parquet", "x.parquet"])
    def test_a_file_that_no_snapshot_names_is_found(self, filled: FeatureStore, where: str) -> None:
        holder = next(trace.path for trace in find_traces(filled.storage, IMAGES).traces if "data/" in trace.path)
        data = filled.storage.read_bytes(holder)
        purge(filled)
        assert find_traces(filled.storage, IMAGES).is_absent
        filled.storage.write_bytes(where, data)
        (trace,) = find_traces(filled.storage, IMAGES).traces
        assert trace.path == where and trace.rows
        is_ours = where != "x.parquet"  # a file of somebody else's stays
        assert purge(filled).is_complete == is_ours != Path(filled.url, where).exists()

    def test_tombstones_and_what_cannot_be_read_count(self, filled: FeatureStore) -> None:
        purge(filled)
        filled.delete([key_of_uri(GONE[0])])
        filled.storage.write_bytes("data/0000/.tmp-dead", b"PAR1 half a file")
        rows = {trace.path: trace.rows for trace in find_traces(filled.storage, IMAGES).traces}
        assert rows.pop("data/0000/.tmp-dead") is None and list(rows.values()) == [1]
        assert purge(filled).is_complete

    def test_commands(self, filled: FeatureStore, tmp_path: Path) -> None:
        file, keys = tmp_path / "takedown.txt", tmp_path / "keys.txt"
        file.write_text("".join(f"{uri}\n" for uri in GONE))
        keys.write_text("".join(f"{key_of_uri(uri)}\n" for uri in GONE))
        found = run("verify", filled.url, "--absent", file, code=1)
        assert "of their rows" in found.output and "not absent: " in found.output
        dry = run("purge", filled.url, "--uris", file, "--dry-run", code=0)
        assert "4 snapshots would be gone: 2 to 5" in dry.output and "no row  " not in dry.output
        assert filled.snapshot().version == 5
        done = run("purge", filled.url, "--uris", file, "--writer-hours", 0, code=0)
        assert "proof        no row of 2 uris is in" in done.output
        for names in (file, keys):
            assert "proof        no row of 2 " in run("verify", filled.url, "--absent", names, code=0).output
        run("purge", filled.url, "--keys", keys, code=0)


def test_a_purge_names_what_had_no_row_in_any_file(filled: FeatureStore, tmp_path: Path) -> None:
    file = tmp_path / "takedown.txt"
    file.write_text("images/17.jpg\nnope.jpg\n")
    sentence = "no row       1 of 2 uris had no row in any file: nope.jpg; check the spelling"
    assert sentence in run("purge", filled.url, "--uris", file, "--dry-run").output
    assert sentence in run("purge", filled.url, "--uris", file, "--writer-hours", 0, code=0).output
    again = run("purge", filled.url, "--uris", file, "--writer-hours", 0, code=0)
    assert "2 of 2 uris had no row in any file: images/17.jpg, nope.jpg;" in again.output
    file.write_text("".join(f"{number}\n" for number in range(1, 13)))  # 7 is in quarantine
    many = run("purge", filled.url, "--keys", file, "--dry-run")
    assert "11 of 12 keys had no row in any file: 1, 2, 3, 4, 5, 6, 8, 9, 10, 11 and 1 more;" in many.output
    file.write_text("\n5\nbag/1.jpg\n")
    wrong = run("purge", filled.url, "--keys", file, code=2).output
    reason = re.compile(told(Problem.NOT_WHOLE, value="bag/1.jpg"))
    assert re.search(told(Problem.NOT_A_LIST, where=file, reason=reason), wrong)


def test_a_file_that_vanishes_meanwhile_is_no_trace(filled: FeatureStore) -> None:
    def vanished(open_input: Fault, path: str) -> Any:
        if path.startswith("staging/"):
            raise FileNotFoundError(path)
        return open_input(path)

    storage = FaultyStorage(filled.storage, {"open_input": vanished})
    assert not any(trace.path.startswith("staging/") for trace in find_traces(storage, IMAGES).traces)


def test_keys_and_uris(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("5\n-3\n\n5\n0\n")
    assert read_images(file, "key").keys_N.tolist() == read_images(file).keys_N.tolist() == [-3, 0, 5]
    assert not read_images(file).uris and read_images(file, "uri").uris == {"5", "-3", "0"}
    file.write_text("a.jpg\n5\na.jpg\n")
    assert read_images(file, "uri").uris == read_images(file).uris == {"a.jpg", "5"}
    for text in ("", "x\n", "1.5\n", f"{2**63}\n"):
        file.write_text(text)
        with raises(KeyFileError, Problem.NOT_A_LIST, where=file, wanted="keys"):
            read_images(file, "key")
