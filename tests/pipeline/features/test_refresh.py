"""Refresh: what changed is computed, what moved is copied, what vanished goes; also after trouble."""

import shutil
from unittest.mock import Mock

import pyarrow.parquet as pq
import pytest

from featurestore.errors import ChannelError, SpecMismatchError, StorageError, StoreNotFoundError
from featurestore.published.versions import read_moves
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from featurestore.upkeep.verify import repair, verify
from pipeline.errors import BadImageError, SourceError, StoreRunError
from pipeline.features import refresh as refresh_module
from pipeline.features.refresh import extract, refresh
from pipeline.images.source import files_below, read_image
from pipeline.options import ExtractOptions, RefreshOptions
from tests.pipeline.features.conftest import (
    change_everything,
    counts,
    files_of,
    num_staged,
    quarantine,
    rows_of,
    touch,
)
from tests.pipeline.network.tiny import TINY


def test_the_store_becomes_what_an_extraction_of_the_images_would_give(make, run, write, computed, tmp_path):
    folder = write(a=1, b=2, c=3, d=4, e=5, f=6)
    make(folder)
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


def test_nothing_changed_is_no_commit_and_needs_no_network(make, run, write, monkeypatch, tmp_path):
    folder = write(a=1, b=2)
    make(folder)
    monkeypatch.setattr(refresh_module, "describe_network", None)
    before = files_of(tmp_path / "features")
    assert counts(run(folder)) == (0, 0, 0, 2, 0, 0, 0, 0)
    assert files_of(tmp_path / "features") == before
    touch(folder / "a.jpg")
    (folder / "b.jpg").unlink()
    summary = run(folder)
    assert (counts(summary), summary.snapshot) == ((0, 0, 1, 0, 1, 0, 0, 0), 2)
    assert counts(run(folder)) == (0, 0, 0, 1, 0, 0, 0, 0)


def test_a_refresh_goes_to_its_channel(make, run, write, tmp_path):
    folder = write(a=1, b=2)
    make(folder)
    store = FeatureStore.open(tmp_path / "features")
    with pytest.raises(ChannelError, match="not the name of a channel"):
        run(folder, channel="19")
    same = run(folder, channel="candidate")
    assert (same.snapshot, store.snapshot("candidate").version) == (1, 1)
    write(c=3)
    summary = run(folder, channel="candidate")
    assert (summary.snapshot, store.snapshot("candidate").version) == (2, 2)
    assert "channel      candidate points to snapshot 2" in str(summary)
    assert [move.reason for move in read_moves(store.storage, "candidate")] == ["refresh", "refresh"]


def test_bad_images_lose_their_feature_and_come_back(make, run, write, encode, draw, tmp_path):
    folder = write(a=1, b=2, c=3)
    (folder / "never.jpg").write_text("never an image")
    make(folder)
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


def test_changed_images_that_cannot_be_read_keep_their_feature(make, run, write, monkeypatch, tmp_path):
    folder = write(a=1, b=2)
    make(folder)
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


def test_an_image_that_did_not_change_after_all_leaves_the_quarantine(make, run, write, monkeypatch, tmp_path):
    folder = write(a=1, b=2)
    make(folder)
    touch(folder / "a.jpg")
    with monkeypatch.context() as network:
        network.setattr("pipeline.features.part.read_image", Mock(side_effect=BadImageError("no answer")))
        assert counts(run(folder)) == (0, 0, 0, 1, 0, 1, 0, 0)
    touch(folder / "a.jpg", -100)
    assert counts(run(folder)) == (0, 0, 0, 2, 0, 0, 1, 0)
    assert quarantine(tmp_path) == {}


def test_a_store_that_would_lose_most_of_its_rows_is_left_alone(make, run, write, tmp_path):
    folder = write(a=1, b=2, c=3, d=4)
    (folder / "old.jpg").write_text("a text")
    make(folder)
    for name in "abc":
        (folder / f"{name}.jpg").unlink()
    (folder / "old.jpg").unlink()
    before = files_of(tmp_path / "features")
    with pytest.raises(StoreRunError, match=r"3 of the 4 rows in .* are not in .*--keep-missing.*--max-gone 1"):
        run(folder)
    assert files_of(tmp_path / "features") == before
    kept = run(folder, keep_missing=True)
    assert (counts(kept), kept.num_kept, kept.snapshot) == ((0, 0, 0, 1, 0, 0, 0, 0), 3, 1)
    assert set(quarantine(tmp_path)) == {"old.jpg"}
    assert counts(run(folder, max_gone=0.75)) == (0, 0, 0, 1, 3, 0, 0, 0)
    assert set(rows_of(tmp_path / "features")) == {"d.jpg"}
    assert quarantine(tmp_path) == {}


def test_images_that_all_became_garbage_do_not_empty_the_store(make, run, write, tmp_path):
    folder = write(a=1, b=2, c=3, d=4)
    make(folder)
    for name in "abc":
        (folder / f"{name}.jpg").write_text(f"disk trouble {name}")
    with pytest.raises(StoreRunError, match=r"3 of the 4 rows in .* cannot be decoded any more"):
        run(folder)
    assert len(rows_of(tmp_path / "features")) == 4
    (folder / "d.jpg").write_text("disk trouble d")
    with pytest.raises(StoreRunError, match="none of the 4 images can be used"):
        run(folder, max_gone=1.0)
    assert len(rows_of(tmp_path / "features")) == 4
    (folder / "d.jpg").unlink()
    with pytest.raises(StoreRunError, match="none of the 3 images"):
        run(folder, max_gone=1.0)
    shutil.rmtree(folder)
    with pytest.raises(SourceError, match="there is no folder"):
        run(folder)


def test_the_network_is_the_stores_own(make, run, write, tmp_path, client):
    folder = write(a=1, b=2)
    with pytest.raises(StoreNotFoundError, match=r"no store at .*crossmedia extract makes one"):
        run(folder)
    make(folder)
    write(c=3)
    with pytest.raises(SpecMismatchError, match=r"extractor.weights_digest"):
        run(folder, weights="random:1")
    assert run(folder, weights="random:0").num_new == 1


def test_images_without_a_tag_are_compared_by_their_bytes(make, run, write, monkeypatch, tmp_path):
    def without_size_and_time(root):
        return [(path, None) for path, _ in files_below(root)]

    monkeypatch.setattr("pipeline.images.source.files_below", without_size_and_time)
    folder = write(a=1, b=2)
    make(folder)
    assert counts(run(folder)) == (0, 0, 0, 2, 0, 0, 0, 0)
    write(a=10)
    assert counts(run(folder)) == (0, 1, 0, 1, 0, 0, 0, 0)


def test_images_and_store_on_s3_by_their_etags(client, make, write, s3_url, tmp_path):
    folder = write(a=1, b=2, c=3)
    photos = Storage(f"{s3_url}/photos")
    for path in folder.iterdir():
        photos.write_bytes(path.name, path.read_bytes())
    own = {"weights": "random:0", "dtype": "float32", "precision": "float32", "num_shards": 4, "backbone": TINY}
    extract(ExtractOptions(images=f"{s3_url}/photos", store=f"{s3_url}/features", **own), client)
    options = RefreshOptions(images=f"{s3_url}/photos", store=f"{s3_url}/features")
    write(b=20, d=4)
    for name in ("a.jpg", "b.jpg", "d.jpg"):  # a is written again, the same: etags do not mind
        photos.write_bytes(name, (folder / name).read_bytes())
    photos.delete("c.jpg")
    (folder / "c.jpg").unlink()
    assert counts(refresh(options, client)) == (1, 1, 0, 1, 1, 0, 0, 0)
    assert counts(refresh(options, client)) == (0, 0, 0, 3, 0, 0, 0, 0)
    make(folder, "local")
    remote, local = (
        {uri: (row[2], row[-1]) for uri, row in rows_of(place).items()}
        for place in (f"{s3_url}/features", tmp_path / "local")
    )
    assert remote == local


def lost(self, *args, **kwargs):
    """In the place of a commit."""
    raise StorageError("the power went out")


def test_a_run_that_goes_on_keeps_images_that_could_not_be_read_for_the_next_one(
    make, run, write, monkeypatch, computed, tmp_path
):
    folder = write(a=1, b=2, c=3, d=4)
    make(folder)
    write(a=10, b=20, c=30)
    done = sum(computed)
    with monkeypatch.context() as trouble:
        trouble.setattr("pipeline.features.part.read_image", unreachable)
        trouble.setattr(FeatureStore, "commit", lost)
        with pytest.raises(StorageError, match="the power went out"):
            run(folder, part_size=1)
    assert counts(run(folder, part_size=1)) == (0, 2, 0, 1, 0, 1, 0, 0)
    assert counts(run(folder, part_size=1)) == (0, 1, 0, 3, 0, 0, 1, 0)
    assert sum(computed) - done == 3  # each once
    assert len(rows_of(tmp_path / "features")) == 4


@pytest.mark.parametrize(("change", "num_resumed"), [("none", 4), ("written", 3), ("gone", 3), ("all", 0)])
def test_a_part_counts_while_each_of_its_images_is_as_it_was(
    change, num_resumed, make, run, write, monkeypatch, computed, tmp_path
):
    folder = write(a=1, b=2, c=3, d=4, e=5)
    make(folder)
    write(a=10, b=20, c=30, d=40)
    with monkeypatch.context() as trouble:
        trouble.setattr(FeatureStore, "commit", lost)
        with pytest.raises(StorageError, match="the power went out"):
            run(folder, part_size=1)
    if change == "written":
        write(a=11)
        touch(folder / "a.jpg")
    elif change == "gone":
        (folder / "d.jpg").unlink()
    elif change == "all":
        for name in "abcd":
            touch(folder / f"{name}.jpg")
    done = sum(computed)
    summary = run(folder, part_size=1)
    assert (summary.num_resumed, summary.num_unchanged) == (num_resumed, 1)
    assert (summary.num_changed, summary.num_gone) == ((3, 1) if change == "gone" else (4, 0))
    assert sum(computed) - done == summary.num_changed - num_resumed


@pytest.fixture
def failing_after(monkeypatch):
    """Lets so many writes of the store and its parts succeed, and no later one."""

    def failing_after(count):
        left = [count]

        def limited(function):
            def write(self, *args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    raise StorageError("the power went out")
                return function(self, *args, **kwargs)

            return write

        context = monkeypatch.context()
        patch = context.__enter__()
        for name in ("open_output", "create_exclusive", "delete"):
            patch.setattr(Storage, name, limited(getattr(Storage, name)))
        return context, left

    return failing_after


@pytest.mark.parametrize("step", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_stopped_at_any_write_it_goes_on_without_repeating_a_part(
    step, make, run, write, computed, failing_after, tmp_path
):
    """At each second write, which meets each number of staged parts; at each of them in the slow."""
    folder = write(a=1, b=2, c=3, d=4, e=5, f=6)
    make(folder)
    (tmp_path / "features").rename(tmp_path / "before")
    change_everything(folder, write)
    write(x=40, y=41, z=42)
    make(folder, "anew")
    expected = rows_of(tmp_path / "anew")
    points, is_done, lefts = 0, False, set()
    while not is_done:
        shutil.rmtree(tmp_path / "features", ignore_errors=True)
        shutil.copytree(tmp_path / "before", tmp_path / "features")
        context, left = failing_after(points)
        try:
            run(folder, part_size=1)
            is_done = left[0] >= 0
        except StorageError:
            pass
        finally:
            context.__exit__(None, None, None)
        is_committed = FeatureStore.open(tmp_path / "features").snapshot().version == 2
        num_left = 0 if is_committed else 5 - num_staged(tmp_path / "features")
        done = sum(computed)
        summary = run(folder, part_size=1)
        assert rows_of(tmp_path / "features") == expected
        assert set(quarantine(tmp_path)) == {"text.jpg"}
        assert summary.snapshot == 2
        assert not list((tmp_path / "features/staging").glob("*/*"))
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
    files = store.snapshot().manifest.files(0)
    path = tmp_path / "features" / files[damaged].path
    group = pq.ParquetFile(path).metadata.row_group(0)
    numbers = [
        group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema.startswith("feature")
    ]
    at, data = numbers[0].data_page_offset + numbers[0].total_compressed_size // 2, bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert repair(store).version == 3
    assert len(store.snapshot().keys()) < 8
    run(folder)
    assert rows_of(store.url) == expected
    assert verify(store).problems == [] and store.quarantine_rows() == []
