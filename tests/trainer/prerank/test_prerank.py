"""A two-tower run, an index of its ads, additions to it, and a search.

The index on disk: versions, additions, what is refused, and that nothing half written is ever seen.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import Result

from featurestore import FeatureRows, FeatureStore
from featurestore.errors import CommitConflictError, CorruptFileError, InvalidRowsError
from featurestore.index import VectorIndex
from featurestore.problems import Problem as StoreProblem
from featurestore.published.versions import open_published, publish, write_part
from featurestore.storage.storage import Storage
from tests.cli import invoke
from tests.faulty import Fault, opened_faulty
from tests.raised import raises, told
from tests.trainer.conftest import Places, make_days, make_places, write_samples
from tests.trainer.whole_runs import run_alone
from trainer.comm import SoloComm
from trainer.errors import AdIndexError, DataNotFoundError
from trainer.prerank.__main__ import app
from trainer.prerank.adindex import AdIndex, IndexOrigin, recall_at, user_queries, user_vectors
from trainer.problems import Problem
from trainer.runs import open as opening
from trainer.runs.saved import TrainedRun, open_test, open_trained
from trainer.samples.reader import Batch

TOWERS = {"model__base": "two_tower", "model__tower_width": 6}


@pytest.fixture(scope="module")
def run(places: Places) -> Path:
    exact = {"model__compute_dtype": "float32"}  # batches of other make-ups are compared
    return run_alone(places, run__name="towers", train__max_steps=15, **TOWERS, **exact)


@pytest.fixture(scope="module")
def index(run: Path, places: Places) -> str:
    """Its ads under a flat index."""
    url = str(places.folder / "ad-index")
    done(run, "--out", url)
    return url


def vectors_of_users(trained: TrainedRun) -> Iterator[tuple[Batch, Any]]:
    """Those of the run's test impressions."""
    index = open_test(trained.comm, trained.config, trained.schema, None)
    return user_vectors(trained, opening.test_reader(trained.config, trained.comm, index, trained.schema).batches())


def test_recall_is_the_share_of_the_best_that_an_index_finds(index: str) -> None:
    keys, vectors = AdIndex.open(index).vectors()
    half, exact = np.arange(len(keys)) % 2 == 0, VectorIndex.build("flat", keys, vectors)
    of_half = VectorIndex.build("flat", keys[half], vectors[half])  # as if it had lost the others
    queries = np.random.default_rng(0).normal(size=(40, vectors.shape[1])).astype(np.float32)
    for count in (5, 20):
        best = np.argsort(-(queries @ vectors.T), axis=1)[:, :count]
        assert recall_at(of_half, exact, queries, count) == pytest.approx(half[best].mean())
        assert 0.2 < half[best].mean() < 0.8
    forth, back = (VectorIndex.build("flat", each.copy(), np.ones_like(vectors)) for each in (keys, keys[::-1]))
    queries = np.ones((4, vectors.shape[1]), np.float32)
    assert recall_at(back, forth, queries, 5) == 1.0, "ads of equal vectors are no misses"


def test_search_for_a_user(run: Path, index: str) -> None:
    user, vector = 0, None
    with contextlib.closing(open_trained(run, SoloComm())) as trained:
        for batch, users in vectors_of_users(trained):
            for sample in np.flatnonzero(batch.group_id_B == user):
                vector = users[batch.group_of_sample_B[sample]]
    keys, vectors = AdIndex.open(index).vectors()
    expected = keys[np.argsort(-(vectors @ vector))[:4]]
    done = invoke(app, "search", "--run", run, "--index", index, "--user", user, "--k", 4, code=0)
    found = [int(line.split()[0]) for line in done.stdout.splitlines()[1:]]
    assert found == expected.tolist()


@pytest.mark.long
def test_users_are_of_the_run_s_own_test_days_and_the_newest_day_takes_others(tmp_path: Path) -> None:
    """Runs on days, as trainer.daily makes them: a day's file may be in train/ or in test/."""
    days, index = make_days(tmp_path), tmp_path / "ad-index"

    def trained_on(day: str, test_days: str) -> Path:
        settings = {"data__train_days": f"[{day}]", "data__test_days": test_days, "run__name": day}
        return run_alone(days, **TOWERS, train__max_steps=3, **settings)

    run = trained_on("2026-01-02", "[2026-01-03,2026-01-04]")
    with contextlib.closing(open_trained(run, SoloComm())) as trained:
        drawn = user_queries(trained)
        every = [users for _, users in vectors_of_users(trained)]
    assert np.array_equal(np.unique(drawn, axis=0), np.unique(np.concatenate(every), axis=0))
    newest = trained_on("2026-01-04", "[]")
    done(newest, "--out", index)
    command = ("search", "--run", newest, "--index", index, "--user")
    assert re.search(told(Problem.RUN_WITHOUT_TEST), invoke(app, *command, 1, code=2).stderr)
    tomorrow = tmp_path / "tomorrow"
    (table,) = write_samples(tomorrow / "test", [30], seed=70, items=60)  # items 50 to 59 have no feature
    found = invoke(app, *command, table["user"][0].as_py(), "--samples", tomorrow, code=0)
    assert "note: " in found.stdout and "its model has never met an image without a feature" in found.stdout


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "ad-index")


def job(run: Path, *options: object, code: int | None = None) -> Result:
    return invoke(app, "build", "--run", run, *options, code=code)


def done(run: Path, *options: object) -> str:
    return job(run, *options, code=0).stdout


def ads_table(items: list[int], path: Path, **changes: object) -> Path:
    """Ads as the samples have them: category item % 5, image item + 1,000."""
    item = np.array(items, np.int64)
    columns = {"ad_item": item, "ad_image": item + 1_000, "ad_category": item % 5, **changes}
    pq.write_table(pa.table({name: value for name, value in columns.items() if value is not None}), path)
    return path


def by_key(url: str) -> dict[int, np.ndarray]:
    return dict(zip(*(part.tolist() for part in AdIndex.open(url).vectors()), strict=True))


def items_of(folder: Path) -> set[int]:
    """Distinct ads of train and test samples."""
    files = (folder / "samples").glob("*/*.parquet")
    return {item for file in files for row in pq.read_table(file)["ad_item"].to_pylist() for item in row}


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_the_ads_of_the_run_s_samples(kind: str, run: Path, places: Places, out: str) -> None:
    text = done(run, "--out", out, "--index", kind)
    ads = AdIndex.open(out)
    assert ads.index.kind == ads.state.kind == kind
    if kind == "hnsw":
        assert ads.state.queries == "users"
        said = f"recall@10    {ads.state.recall:.4f} for vectors of users, effort {ads.index.effort}"
        assert said in text
    assert set(by_key(out)) == items_of(places.folder)
    assert f"index        {kind}, {len(items_of(places.folder))} ads, 6 numbers each, inner product" in text
    assert f"written to   {out}, version 1" in text


def test_a_changed_ad_is_as_its_last_impression_has_it(run: Path, places: Places, out: str, tmp_path: Path) -> None:
    """Item 5 has image 1,005 in training and 1,017 in the last row of the last test file."""
    for split in ("train", "test"):
        (tmp_path / "samples" / split).mkdir(parents=True)
        for file in sorted((places.folder / "samples" / split).iterdir()):
            table = pq.read_table(file).slice(0, 20)
            rows = table.to_pylist()
            if split == "test":
                rows[-1] |= {"ad_item": [5], "ad_image": [1_017], "ad_category": [2], "ad_scene": [0]}
                rows[-1] |= {"ad_serial": [0], "label": [0]}
            pq.write_table(pa.Table.from_pylist(rows, table.schema), tmp_path / "samples" / split / file.name)
    done(run, "--out", out, "--samples", tmp_path / "samples")
    same = ads_table([5], tmp_path / "ad.parquet", ad_image=np.array([1_017]), ad_category=np.array([2]))
    done(run, "--out", f"{out}-2", "--ads", same)
    np.testing.assert_allclose(by_key(out)[5], by_key(f"{out}-2")[5], rtol=1e-4, atol=1e-6)


def test_a_sync_leaves_the_ads_of_the_table(run: Path, out: str, tmp_path: Path) -> None:
    """And new ads are added."""
    done(run, "--out", out, "--ads", ads_table(list(range(20)), tmp_path / "a.parquet"), "--index", "hnsw")
    before = by_key(out)
    # 20 and 21 are new, 3 has another category and image now, 4 is as it was.
    table = {"ad_image": np.array([1_020, 1_021, 1_030, 1_004]), "ad_category": np.array([0, 1, 0, 4])}
    text = done(run, "--out", out, "--add", "--ads", ads_table([20, 21, 3, 4], tmp_path / "b.parquet", **table))
    assert "ads          2 new, 1 changed, 1 unchanged, 0 removed" in text
    after = by_key(out)
    assert set(after) == set(range(22)) and AdIndex.open(out).version == 2
    assert [key for key in before if not np.array_equal(before[key], after[key])] == [3]
    live = ads_table(list(range(4, 24)), tmp_path / "live.parquet")
    text = done(run, "--out", out, "--sync", live)
    assert "ads          2 new, 0 changed, 18 unchanged, 4 removed" in text
    assert "hnsw, 20 ads, 6 numbers each, inner product\n" in text
    assert set(by_key(out)) == set(range(4, 24))
    (found, *_), _ = AdIndex.open(out).index.search(np.ones((3, 6), np.float32), 20)
    assert set(found.tolist()) == set(range(4, 24))
    cut = ads_table([4, 5], tmp_path / "cut.parquet")
    refused = told(Problem.TOO_MANY_GONE, value=18, known=20, where=out)
    assert re.search(refused, job(run, "--out", out, "--sync", cut, code=1).stderr)
    assert "2 unchanged, 18 removed" in done(run, "--out", out, "--sync", cut, "--max-gone", 1)


def test_a_low_recall_is_one_line_on_stderr(run: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.prerank.adindex.reach", lambda *_: 0.41)
    last = job(run, "--out", out, "--index", "hnsw", "--min-recall", 0.8, code=0).stderr.splitlines()[-1]
    assert last.startswith("warning: recall@10 of this hnsw index is 0.410, below the limit of 0.8,")


def test_images_that_came_after_the_training_are_known(tmp_path: Path) -> None:
    places = make_places(tmp_path / "places")
    run = run_alone(places, **TOWERS, run__name="towers", train__max_steps=1)
    rows = FeatureRows.of(["item/77"], np.ones((1, 16), np.float32), keys=np.array([1_077]))
    FeatureStore.open(places.folder / "features").put(rows)
    table, out = ads_table([77], tmp_path / "a.parquet"), tmp_path / "index"
    old = done(run, "--out", out, "--ads", table, "--store-version", 1)
    assert "features     snapshot 1; 1 lookups of images that have none\n" in old
    assert "note         the run was trained with data.missing=learned, and its model has never met an image" in old
    as_zeros = by_key(out)[77]
    new = done(run, "--out", out, "--ads", table)
    assert "features     snapshot 2\n" in new
    assert "note" not in new
    assert by_key(out)[77] != as_zeros


ID, NULL = "integer (or string)", told(Problem.NULL_IN_COLUMN, where=re.compile(".*, row 1"), column="ad_category")


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"ad_image": None}, 2, told(Problem.COLUMN_MISSING, column="ad_image", wanted=ID)),
        ({"ad_image": [0.5, 1.5]}, 2, told(Problem.COLUMN_OF_OTHER_TYPE, column="ad_image", value="double", wanted=ID)),
        ({"ad_item": [1, 1]}, 1, told(Problem.AD_TWICE, column="ad_item", value=1)),
        ({"ad_category": [1, None]}, 1, NULL),
    ],
)
def test_wrong_tables(changes: dict[str, object], code: int, message: str, run: Path, out: str, tmp_path: Path) -> None:
    changes = {name: value and pa.array(value) for name, value in changes.items()}
    result = job(run, "--out", out, "--ads", ads_table([1, 2], tmp_path / "ads.parquet", **changes), code=code)
    assert result.stderr.startswith("error: ") and re.search(message, result.stderr)
    assert not Path(out).exists()


def test_a_table_of_one_row_none_or_not_there(run: Path, out: str, tmp_path: Path) -> None:
    for kind in ("flat", "hnsw"):
        text = done(run, "--out", f"{out}-{kind}", "--index", kind, "--ads", ads_table([7], tmp_path / "ad.parquet"))
        assert f"{kind}, 1 ads" in text
    for table in (ads_table([], tmp_path / "ads.parquet"), tmp_path / "none.parquet", tmp_path / "nowhere"):
        result = job(run, "--out", out, "--ads", table, code=2)
        assert re.search(told(Problem.ADS_WITHOUT_ROWS, where=table), result.stderr)


WIDTH = 4
ORIGIN = IndexOrigin(run="a", checkpoint="step-1", checkpoint_digest="d1", key_column="ad_item", bias=0.5)
KEYS = np.array([7, -3, 9_000_000_000_000, 0])


def vectors(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Four ads under a flat index."""
    AdIndex.build(str(tmp_path / "index"), "flat", KEYS, vectors(4), ORIGIN)
    return str(tmp_path / "index")


def test_what_is_written_is_read(url: str) -> None:
    ads = AdIndex.open(url)
    assert (ads.version, ads.state.num_ads, ads.state.dim, ads.state.kind) == (1, 4, WIDTH, "flat")
    assert ads.state.origin == ORIGIN
    keys, found = ads.vectors()
    order = np.argsort(KEYS)
    np.testing.assert_array_equal(keys, KEYS[order])
    np.testing.assert_array_equal(found, vectors(4)[order])
    best, scores = ads.index.search(vectors(1, seed=5), 1)
    products = vectors(4) @ vectors(1, seed=5)[0]
    assert best[0, 0] == KEYS[products.argmax()]
    np.testing.assert_allclose(scores[0, 0], products.max(), rtol=1e-6)
    table = pq.read_table(next(Path(url, "files").glob("ads-*.parquet")))  # as others can read them
    assert table.column_names == ["key", "vector"]
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 4)


@pytest.mark.parametrize("name", ["versions", "samples.txt"])
def test_a_place_with_other_files_is_refused(tmp_path: Path, name: str) -> None:
    storage = Storage(tmp_path)
    if name == "versions":
        publish(storage, {"train/a.parquet": write_part(storage, "train/a.parquet", b"rows")})
    else:
        (tmp_path / name).write_text("rows")
    before = open_published(tmp_path).list()
    with raises(AdIndexError, Problem.NOT_ONLY_AN_INDEX, where=tmp_path, value=name.replace("versions", "train")):
        AdIndex.build(str(tmp_path), "flat", KEYS, vectors(4), ORIGIN)
    with pytest.raises(DataNotFoundError):
        AdIndex.open(str(tmp_path))
    assert open_published(tmp_path).list() == before


def test_nothing_new_and_what_is_refused_make_no_version(url: str) -> None:
    before = names(Path(url))
    ads, added = AdIndex.open(url).update(KEYS[:2], vectors(4)[:2], ORIGIN)
    assert (added, ads.version) == ({"new": 0, "changed": 0, "unchanged": 2, "removed": 0}, 1)
    other = ORIGIN.model_copy(update={"checkpoint": "step-2", "checkpoint_digest": "d2"})
    names_of = {"value": "step-1", "run": "a", "wanted": "step-2", "wanted_run": "a"}
    with raises(AdIndexError, Problem.INDEX_OF_OTHER_CHECKPOINT, where=url, **names_of):
        AdIndex.open(url).update(KEYS, vectors(4), other)
    with pytest.raises(InvalidRowsError):
        AdIndex.open(url).update(KEYS, np.full((4, WIDTH), np.inf, np.float32), ORIGIN)
    assert names(Path(url)) == before


def test_a_build_takes_the_place_of_another_one_in_one_moment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = AdIndex.open(url)
    other = ORIGIN.model_copy(update={"checkpoint_digest": "d2"})
    AdIndex.build(url, "hnsw", KEYS[:2], vectors(2, seed=1), other)
    ads = AdIndex.open(url)
    assert (ads.version, ads.state.kind, ads.state.num_ads) == (2, "hnsw", 2)
    assert len(held.vectors()[0]) == 4  # a reader of the version before can go on
    monkeypatch.setattr("trainer.prerank.adindex.KEEP_REPLACED_S", -1.0)
    AdIndex.build(url, "flat", KEYS[:1], vectors(1), other)
    assert (AdIndex.open(url).version, len(names(Path(url, "versions"))), len(names(Path(url, "files")))) == (3, 1, 3)
    with raises(CorruptFileError, Problem.MISSING, where=re.compile(r"/ads-.*\.parquet$")):
        held.vectors()


def test_two_additions_at_once_do_not_lose_one(url: str) -> None:
    first, second = AdIndex.open(url), AdIndex.open(url)
    first.update(np.array([1]), vectors(1), ORIGIN)
    with raises(CommitConflictError, StoreProblem.ANOTHER_PUBLISHED_FIRST, newest=2, wanted=1):
        second.update(np.array([2]), vectors(1), ORIGIN)
    assert (AdIndex.open(url).version, AdIndex.open(url).state.num_ads) == (2, 5)


def test_what_a_killed_build_left_is_removed_by_a_later_one(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(call: Fault, path: str, data: bytes) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        opened_faulty(patch, {"create_or_read": killed}, "trainer.prerank.adindex")
        with pytest.raises(KeyboardInterrupt):
            AdIndex.build(url, "flat", KEYS, vectors(4, seed=2), ORIGIN)
    assert len(names(Path(url, "files"))) == 6
    np.testing.assert_array_equal(np.sort(AdIndex.open(url).vectors()[1], axis=0), np.sort(vectors(4), axis=0))
    monkeypatch.setattr("trainer.prerank.adindex.KEEP_REPLACED_S", -1.0)
    AdIndex.build(url, "flat", KEYS, vectors(4, seed=3), ORIGIN)
    assert len(names(Path(url, "files"))) == 3


def found_by(ads: AdIndex, count: int) -> set[int]:
    return set(ads.index.search(vectors(20, seed=8), count)[0].ravel().tolist())


def test_a_sync_adds_changes_and_removes_in_one_version_but_for_most(url: str) -> None:
    table = vectors(4)
    table[1] += 1
    keys = np.array([7, -3, 55, 9_000_000_000_000])
    expected = dict(zip(keys.tolist(), table.tolist(), strict=True))
    table[0] += 1e-7  # the last bits of a sum in another order: that of before is kept
    ads, changes = AdIndex.open(url).update(keys, table, ORIGIN, max_gone=0.5)
    assert changes == {"new": 1, "changed": 2, "unchanged": 1, "removed": 1}
    for each in (ads, again := AdIndex.open(url)):
        assert (each.version, each.state, by_key(url)) == (2, again.state, expected)
        assert found_by(each, 9) == set(keys.tolist())
    with raises(AdIndexError, Problem.TOO_MANY_GONE, value=3, known=4, where=url, limit=0.5):
        AdIndex.open(url).update(keys[:1], table[:1], ORIGIN, max_gone=0.5)
    assert AdIndex.open(url).state.num_ads == 4
    ads, changes = AdIndex.open(url).update(keys[:1], table[:1], ORIGIN, max_gone=1)
    assert (changes["removed"], ads.state.num_ads, found_by(ads, 4)) == (3, 1, {7})


def test_recall_is_kept_reached_and_measured_again_with_the_limit_of_the_index(tmp_path: Path) -> None:
    """Of users; without them it is of ads."""
    keys, numbers, users = np.arange(3_000), vectors(3_000), vectors(50, seed=3)
    AdIndex.build(str(tmp_path), "hnsw", keys, numbers, ORIGIN, users, min_recall=0.9)
    ads = AdIndex.open(str(tmp_path))
    assert (ads.state.queries, ads.warning) == ("users", None)
    exact = np.argsort(-(users @ numbers.T), axis=1)[:, :10]
    found = ads.index.search(users, 10)[0]
    share = np.mean([np.isin(e, f).mean() for e, f in zip(exact, found, strict=True)])
    assert ads.state.recall == pytest.approx(share, abs=0.01)
    assert ads.state.recall >= 0.95
    ads, _ = ads.update(np.array([5_000]), vectors(1, seed=4), ORIGIN, users)
    assert (ads.state.kind, ads.state.queries, ads.state.min_recall) == ("hnsw", "users", 0.9)
    assert ads.state.recall >= 0.9
    assert AdIndex.build(str(tmp_path), "hnsw", keys, numbers, ORIGIN).state.queries == "ads"


def test_more_effort_is_taken_where_recall_is_too_low(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featurestore.index._SEARCH_EFFORT", 10)
    numbers = np.random.default_rng(0).normal(size=(1_000, 32)).astype(np.float32)  # hard: no kinds at all
    users = np.random.default_rng(1).normal(size=(50, 32)).astype(np.float32)
    plain = VectorIndex.build("hnsw", np.arange(1_000), numbers)
    ads = AdIndex.build(str(tmp_path), "hnsw", np.arange(1_000), numbers, ORIGIN, users, min_recall=1.0)
    assert ads.index.effort and plain.effort and ads.index.effort > plain.effort
    assert ads.state.recall == 1
    assert AdIndex.open(str(tmp_path)).index.effort == ads.index.effort
