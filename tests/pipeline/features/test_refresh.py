"""Refresh: what changed is computed, what moved is copied, what vanished goes; also after trouble."""

import contextlib
import json
import re
import shutil
from unittest.mock import Mock

import pyarrow.parquet as pq
import pytest

from featurestore.errors import ChannelError, SpecMismatchError, StorageError, StoreNotFoundError
from featurestore.problems import Problem as StoreProblem
from featurestore.published.versions import read_moves
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from featurestore.upkeep.verify import repair, verify
from pipeline.errors import BadImageError, SourceError, StoreRunError
from pipeline.features import refresh as refresh_module
from pipeline.images.source import files_below, read_image
from pipeline.problems import Problem
from tests.featurestore.contents import spoil
from tests.pipeline.features.conftest import change_everything, counts, rows_of, touch
from tests.raised import raises


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def num_staged(store):
    """Images that went through the network for the parts that are staged."""
    reports = [path for path in store.glob("staging/*/*.json") if path.with_suffix(".parquet").exists()]
    return sum(json.loads(path.read_text())["num_computed"] for path in reports)


def quarantine(tmp_path):
    return {row.uri: row.reason for row in FeatureStore.open(tmp_path / "features").quarantine_rows()}


def test_the_store_becomes_what_an_extraction_of_the_images_would_give(made, make, run, write, computed, tmp_path):
    folder = made(a=1, b=2, c=3, d=4, e=5, f=6)
    change_everything(folder, write)
    done = sum(computed)
    expected = (4, 1, 1, 2, 2, 1, 0, 3)
    summary = run(folder)
    assert counts(summary) == expected
    assert summary.num_images == sum(expected[:4]) + expected[5]
    assert (sum(computed) - done, summary.num_computed, summary.snapshot) == (2, 2, 2)
    make(folder, "anew")
    assert rows_of(tmp_path / "features") == rows_of(tmp_path / "anew")
    assert FeatureStore.open(tmp_path / "features").snapshot().manifest.operation == "refresh"
    assert not list((tmp_path / "features/staging").glob("*/*"))


def test_nothing_changed_is_no_commit_and_needs_no_network(made, run, write, monkeypatch, tmp_path):
    folder = made(a=1, b=2)
    monkeypatch.setattr(refresh_module, "describe_network", None)
    before = files_of(tmp_path / "features")
    assert counts(run(folder)) == (0, 0, 0, 2, 0, 0, 0, 0)
    assert files_of(tmp_path / "features") == before
    touch(folder / "a.jpg")
    (folder / "b.jpg").unlink()
    summary = run(folder)
    assert (counts(summary), summary.snapshot) == ((0, 0, 1, 0, 1, 0, 0, 0), 2)
    assert counts(run(folder)) == (0, 0, 0, 1, 0, 0, 0, 0)


def test_a_refresh_goes_to_its_channel(made, run, write, tmp_path):
    folder = made(a=1, b=2)
    store = FeatureStore.open(tmp_path / "features")
    with raises(ChannelError, StoreProblem.NOT_A_CHANNEL_NAME, value="19"):
        run(folder, channel="19")
    same = run(folder, channel="candidate")
    assert (same.snapshot, store.snapshot("candidate").version) == (1, 1)
    write(c=3)
    summary = run(folder, channel="candidate")
    assert (summary.snapshot, store.snapshot("candidate").version) == (2, 2)
    assert "channel      candidate points to snapshot 2" in str(summary)
    assert [move.reason for move in read_moves(store.storage, "candidate")] == ["refresh", "refresh"]


def test_bad_images_lose_their_feature_and_come_back(made, run, tmp_path):
    folder = made(a=1, b=2, c=3, never="never an image")
    good = (folder / "a.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(good[:300])
    first = run(folder)
    assert counts(first) == (0, 0, 0, 2, 0, 2, 0, 0)
    assert set(rows_of(tmp_path / "features")) == {"b.jpg", "c.jpg"}
    assert set(quarantine(tmp_path)) == {"a.jpg", "never.jpg"}
    assert FeatureStore.open(tmp_path / "features").snapshot().manifest.num_quarantined == 2
    again = run(folder)
    assert (counts(again), again.snapshot) == (counts(first), first.snapshot)

    (folder / "a.jpg").write_bytes(good)
    (folder / "never.jpg").unlink()
    assert counts(run(folder)) == (1, 0, 0, 2, 0, 0, 1, 0)
    assert quarantine(tmp_path) == {}
    assert not list((tmp_path / "features/quarantine").iterdir())
    assert set(rows_of(tmp_path / "features")) == {"a.jpg", "b.jpg", "c.jpg"}


def unreachable(location):
    """In the place of `read_image`, for a.jpg."""
    if location.endswith("a.jpg"):
        raise BadImageError("cannot be read: no route to host")
    return read_image(location)


def test_images_that_cannot_be_read_keep_their_feature_for_a_later_run(made, run, write, monkeypatch, tmp_path):
    folder = made(a=1, b=2)
    before = rows_of(tmp_path / "features")
    write(a=10)
    with monkeypatch.context() as network:
        network.setattr("pipeline.features.part.read_image", unreachable)
        summary = run(folder)
    assert (counts(summary), summary.snapshot) == ((0, 0, 0, 1, 0, 1, 0, 0), 1)
    assert rows_of(tmp_path / "features") == before
    assert quarantine(tmp_path) == {"a.jpg": "cannot be read: no route to host"}
    assert counts(run(folder)) == (0, 1, 0, 1, 0, 0, 1, 0)
    assert rows_of(tmp_path / "features")["a.jpg"] != before["a.jpg"]
    assert quarantine(tmp_path) == {}
    touch(folder / "a.jpg")
    with monkeypatch.context() as network:
        network.setattr("pipeline.features.part.read_image", Mock(side_effect=BadImageError("no answer")))
        assert counts(run(folder)) == (0, 0, 0, 1, 0, 1, 0, 0)
    touch(folder / "a.jpg", -100)
    assert counts(run(folder)) == (0, 0, 0, 2, 0, 0, 1, 0), "it did not change after all"
    assert quarantine(tmp_path) == {}


def test_a_store_that_would_lose_most_of_its_rows_is_left_alone(made, run, tmp_path):
    folder = made(a=1, b=2, c=3, d=4, old="a text")
    for name in "abc":
        (folder / f"{name}.jpg").unlink()
    (folder / "old.jpg").unlink()
    before = files_of(tmp_path / "features")
    with raises(StoreRunError, Problem.TOO_MANY_UNLISTED, value=3, stored=4, images=folder, limit=0.5):
        run(folder)
    assert files_of(tmp_path / "features") == before
    kept = run(folder, keep_missing=True)
    assert (counts(kept), kept.num_kept, kept.snapshot) == ((0, 0, 0, 1, 0, 0, 0, 0), 3, 1)
    assert set(quarantine(tmp_path)) == {"old.jpg"}
    assert counts(run(folder, max_gone=0.75)) == (0, 0, 0, 1, 3, 0, 0, 0)
    assert set(rows_of(tmp_path / "features")) == {"d.jpg"}
    assert quarantine(tmp_path) == {}


def test_images_that_all_became_garbage_do_not_empty_the_store(made, run, write, tmp_path):
    folder = made(a=1, b=2, c=3, d=4)
    write(**{name: f"disk trouble {name}" for name in "abc"})
    with raises(StoreRunError, Problem.TOO_MANY_GONE, value=3, stored=4, where=tmp_path / "features"):
        run(folder)
    assert len(rows_of(tmp_path / "features")) == 4
    write(d="disk trouble d")
    with raises(StoreRunError, Problem.NO_USABLE_IMAGE, count=4):
        run(folder, max_gone=1.0)
    assert len(rows_of(tmp_path / "features")) == 4
    (folder / "d.jpg").unlink()
    with raises(StoreRunError, Problem.NO_USABLE_IMAGE, count=3):
        run(folder, max_gone=1.0)
    shutil.rmtree(folder)
    with raises(SourceError, Problem.NO_IMAGES_THERE, where=folder):
        run(folder)


def test_the_network_is_the_stores_own(make, run, write, tmp_path):
    folder = write(a=1, b=2)
    with raises(StoreNotFoundError, Problem.NO_STORE_YET, where=tmp_path / "features"):
        run(folder)
    make(folder)
    for images in ({}, {"c": 3}):  # also where nothing is to compute
        write(**images)
        with raises(SpecMismatchError, StoreProblem.ANOTHER_KIND, value=re.compile("^extractor.weights_digest")):
            run(folder, weights="random:1")
    assert run(folder, weights="random:0").num_new == 1


def test_images_without_a_tag_are_compared_by_their_bytes(made, run, write, monkeypatch, tmp_path):
    def without_size_and_time(root):
        return [(path, None) for path, _ in files_below(root)]

    monkeypatch.setattr("pipeline.images.source.files_below", without_size_and_time)
    folder = made(a=1, b=2)
    assert counts(run(folder)) == (0, 0, 0, 2, 0, 0, 0, 0)
    write(a=10)
    assert counts(run(folder)) == (0, 1, 0, 1, 0, 0, 0, 0)


def test_images_and_store_on_s3_by_their_etags(make, run, write, s3_url, tmp_path):
    folder = write(a=1, b=2, c=3)
    photos = Storage(f"{s3_url}/photos")
    for path in folder.iterdir():
        photos.write_bytes(path.name, path.read_bytes())
    features = f"{s3_url}/features"
    make(photos.url, features)
    write(b=20, d=4)
    for name in ("a.jpg", "b.jpg", "d.jpg"):  # a is written again, the same: etags do not mind
        photos.write_bytes(name, (folder / name).read_bytes())
    photos.delete("c.jpg")
    (folder / "c.jpg").unlink()
    assert counts(run(photos.url, store=features)) == (1, 1, 0, 1, 1, 0, 0, 0)
    assert counts(run(photos.url, store=features)) == (0, 0, 0, 3, 0, 0, 0, 0)
    make(folder, "local")
    remote, local = (
        {uri: (row[2], row[-1]) for uri, row in rows_of(place).items()} for place in (features, tmp_path / "local")
    )
    assert remote == local


LOST = Mock(side_effect=StorageError("the power went out"))
"""In the place of a commit."""


def test_a_run_that_goes_on_leaves_unread_images_to_the_next_one(made, run, write, monkeypatch, computed, tmp_path):
    folder = made(a=1, b=2, c=3, d=4)
    write(a=10, b=20, c=30)
    done = sum(computed)
    with monkeypatch.context() as trouble:
        trouble.setattr("pipeline.features.part.read_image", unreachable)
        trouble.setattr(FeatureStore, "commit", LOST)
        with pytest.raises(StorageError, match="the power went out"):
            run(folder, part_size=1)
    assert counts(run(folder, part_size=1)) == (0, 2, 0, 1, 0, 1, 0, 0)
    assert counts(run(folder, part_size=1)) == (0, 1, 0, 3, 0, 0, 1, 0)
    assert sum(computed) - done == 3  # each once
    assert len(rows_of(tmp_path / "features")) == 4


@pytest.mark.parametrize(("again", "gone", "num_resumed"), [("", "", 4), ("a", "", 3), ("", "d", 3), ("abcd", "", 0)])
def test_a_part_counts_while_its_images_stay(again, gone, num_resumed, made, run, write, monkeypatch, computed):
    folder = made(a=1, b=2, c=3, d=4, e=5)
    write(a=10, b=20, c=30, d=40)
    with monkeypatch.context() as trouble:
        trouble.setattr(FeatureStore, "commit", LOST)
        with pytest.raises(StorageError, match="the power went out"):
            run(folder, part_size=1)
    for name in again:
        touch(folder / f"{name}.jpg")
    for name in gone:
        (folder / f"{name}.jpg").unlink()
    done = sum(computed)
    summary = run(folder, part_size=1)
    assert (summary.num_resumed, summary.num_unchanged) == (num_resumed, 1)
    assert (summary.num_changed, summary.num_gone) == ((3, 1) if gone else (4, 0))
    assert sum(computed) - done == summary.num_changed - num_resumed


@pytest.mark.parametrize("step", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_stopped_at_any_write_it_repeats_no_part(step, made, make, run, write, computed, monkeypatch, tmp_path):
    """At each second write, which meets each number of staged parts; at each of them in the slow."""
    folder, store = made(a=1, b=2, c=3, d=4, e=5, f=6), tmp_path / "features"
    store.rename(tmp_path / "before")
    change_everything(folder, write)
    write(x=40, y=41, z=42)
    make(folder, "anew")
    expected = rows_of(tmp_path / "anew")
    left, lefts, points, is_done = 0, set(), 0, False

    def limited(function):
        def write(self, *args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise StorageError("the power went out")
            return function(self, *args, **kwargs)

        return write

    while not is_done:
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(tmp_path / "before", store)
        left = points
        with monkeypatch.context() as power, contextlib.suppress(StorageError):
            for name in ("open_output", "create_exclusive", "delete"):
                power.setattr(Storage, name, limited(getattr(Storage, name)))
            run(folder, part_size=1)
            is_done = left >= 0
        is_committed = FeatureStore.open(store).snapshot().version == 2
        num_left = 0 if is_committed else 5 - num_staged(store)
        done = sum(computed)
        summary = run(folder, part_size=1)
        assert rows_of(store) == expected
        assert set(quarantine(tmp_path)) == {"text.jpg"}
        assert summary.snapshot == 2
        assert not list(store.glob("staging/*/*"))
        assert sum(computed) - done == num_left
        lefts.add(num_left)
        points += step
    assert points > 12
    assert {5, 0} < lefts


@pytest.mark.parametrize("damaged", [0, 1])
def test_after_a_repair_it_computes_what_was_lost(make, run, write, computed, tmp_path, damaged):
    """A base of which all keys are lost, or a delta whose keys older files hold too."""
    folder = write(**{f"i{n}": n for n in range(8)})
    make(folder, num_shards=1)
    for n in range(3):
        (folder / f"i{n}.jpg").write_bytes((folder / f"i{7 - n}.jpg").read_bytes() + b" ")
        touch(folder / f"i{n}.jpg")
    run(folder)
    store = FeatureStore.open(tmp_path / "features")
    expected = rows_of(store.url)
    path = store.snapshot().manifest.files(0)[damaged].path
    group = pq.ParquetFile(tmp_path / "features" / path).metadata.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    numbers = [each for each in columns if each.path_in_schema.startswith("feature")]
    spoil(store, path, numbers[0].data_page_offset + numbers[0].total_compressed_size // 2)
    assert repair(store).version == 3
    assert len(store.snapshot().keys()) < 8
    run(folder)
    assert rows_of(store.url) == expected
    assert verify(store).problems == [] and store.quarantine_rows() == []
