"""A refresh after trouble: a broken decoder, lost power at any write, a repair."""

import json
import shutil

import pytest
import xxhash

from featurestore.errors import StorageError
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from featurestore.upkeep.repair import repair
from featurestore.upkeep.verify import verify
from pipeline.errors import BadImageError, StoreRunError
from pipeline.features.refresh import ImageRun
from pipeline.images.source import list_images, read_image
from tests.pipeline.features.conftest import change_everything, counts, num_staged, quarantine, rows_of, touch

pytestmark = pytest.mark.filterwarnings("ignore:weights random")


def test_a_broken_decoder_is_forgotten_once_it_works_again(make, run, write, monkeypatch, tmp_path):
    folder = write(a=1, b=2, c=3, d=4)
    make(folder)
    write(a=10, b=20, c=30)

    def broken(data, preset):
        raise BadImageError("no decoder on this worker")

    with monkeypatch.context() as worker:
        worker.setattr("pipeline.features.part.prepare", broken)
        with pytest.raises(StoreRunError, match=r"3 of the 4 rows in .* cannot be decoded any more"):
            run(folder)
    assert counts(run(folder)) == (0, 3, 0, 1, 0, 0, 3, 0)
    assert len(rows_of(tmp_path / "features")) == 4


@pytest.mark.parametrize("part_size", [1, 4])  # alone in its part, and with others that are not computed again
def test_a_run_that_goes_on_tries_images_that_could_not_be_read_again(
    part_size, make, run, write, monkeypatch, computed, tmp_path
):
    folder = write(a=1, b=2, c=3, d=4)
    make(folder)
    write(a=10, b=20, c=30)

    def unreachable(location):
        if location.endswith("a.jpg"):
            raise BadImageError("cannot be read: no route to host")
        return read_image(location)

    def lost(self, *args, **kwargs):
        raise StorageError("the power went out")

    done = sum(computed)
    with monkeypatch.context() as trouble:
        trouble.setattr("pipeline.features.part.read_image", unreachable)
        trouble.setattr(FeatureStore, "commit", lost)
        with pytest.raises(StorageError, match="the power went out"):
            run(folder, part_size=part_size)
    assert counts(run(folder, part_size=part_size)) == (0, 3, 0, 1, 0, 0, 1, 0)
    assert sum(computed) - done == 3  # each once
    assert len(rows_of(tmp_path / "features")) == 4


@pytest.mark.parametrize(("change", "num_resumed"), [("none", 4), ("written", 2), ("gone", 2), ("all", 0)])
def test_a_run_that_an_earlier_version_staged_is_continued(
    change, num_resumed, make, run, write, monkeypatch, computed, tmp_path
):
    """Names of parts and their reports are as ever, and a part counts while each of its images is as it was."""
    folder = write(a=1, b=2, c=3, d=4, e=5)
    make(folder)
    write(a=10, b=20, c=30, d=40)

    def lost(self, *args, **kwargs):
        raise StorageError("the power went out")

    with monkeypatch.context() as trouble:
        trouble.setattr(FeatureStore, "commit", lost)
        with pytest.raises(StorageError, match="the power went out"):
            run(folder, part_size=2)
    images = [[ref.key, ref.source_tag] for ref in list_images(str(folder)).images][:4]
    reports = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "features/staging").glob("*/*.json")}
    assert reports == {
        xxhash.xxh3_128_hexdigest(json.dumps([part]).encode()): {
            "num_rows": 2, "num_computed": 2, "num_duplicates": 0, "bad": [], "images": part
        }
        for part in (images[:2], images[2:])
    }  # fmt: skip

    if change == "written":
        write(a=11)
        touch(folder / "a.jpg")
    elif change == "gone":
        (folder / "d.jpg").unlink()
    elif change == "all":
        for name in "abcd":
            touch(folder / f"{name}.jpg")
    done, reported, compute = sum(computed), [], ImageRun.compute
    monkeypatch.setattr(ImageRun, "compute", lambda *args: reported.append(compute(*args)) or reported[-1])
    summary = run(folder, part_size=2)
    assert {report.images for report in reported[0]} == {()}, "names of all images would stay in memory"
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
            run(folder, part_size=2)
            is_done = left[0] >= 0
        except StorageError:
            pass
        finally:
            context.__exit__(None, None, None)
        is_committed = FeatureStore.open(tmp_path / "features").snapshot().version == 2
        num_left = 0 if is_committed else 5 - num_staged(tmp_path / "features")
        done = sum(computed)
        summary = run(folder, part_size=2)
        assert rows_of(tmp_path / "features") == expected
        assert set(quarantine(tmp_path)) == {"text.jpg"}
        assert summary.snapshot == 2
        assert not list((tmp_path / "features/staging").glob("*/*"))
        assert sum(computed) - done == num_left
        lefts.add(num_left)
        points += step
    assert points > 12
    assert lefts == {5, 3, 2, 0}


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
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
    assert repair(store).version == 3
    assert len(store.snapshot().keys()) < 8
    run(folder)
    assert rows_of(store.url) == expected
    assert verify(store).problems == [] and store.quarantine_rows() == []
