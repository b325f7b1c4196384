"""An index of ads on disk: versions, additions, what is refused, and that nothing half written is ever seen."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore.errors import CommitConflictError, CorruptFileError, InvalidRowsError
from featurestore.index import VectorIndex
from featurestore.published.versions import open_published, publish, write_part
from featurestore.storage.storage import Storage
from tests.faulty import Fault, opened_faulty
from trainer.errors import AdIndexError, DataNotFoundError
from trainer.prerank.adindex import AdIndex, IndexOrigin

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
    np.testing.assert_array_equal(table["key"].to_numpy(), KEYS[order])
    np.testing.assert_array_equal(np.stack(table["vector"].to_numpy()), vectors(4)[order])


def test_an_addition_has_new_changed_and_unchanged_ads(url: str) -> None:
    changed = vectors(4)
    changed[1] += 1
    changed[2] += 1e-7  # the last bits of a sum in another order
    keys = np.concatenate([KEYS, [55]])
    ads, added = AdIndex.open(url).update(keys, np.concatenate([changed, vectors(1, seed=9)]), ORIGIN)
    assert added == {"new": 1, "changed": 1, "unchanged": 3, "removed": 0}
    assert (ads.version, ads.state.num_ads) == (2, 5)
    again = AdIndex.open(url)
    assert again.state == ads.state
    found = dict(zip(again.vectors()[0].tolist(), again.vectors()[1], strict=True))
    np.testing.assert_array_equal(found[-3], changed[1])
    np.testing.assert_array_equal(found[KEYS[2]], vectors(4)[2])
    np.testing.assert_array_equal(found[55], vectors(1, seed=9)[0])
    assert again.index.search(10 * changed[1:2], 5)[0].shape == (1, 5)


@pytest.mark.parametrize("name", ["versions", "samples.txt"])
def test_a_place_with_other_files_is_refused(tmp_path: Path, name: str) -> None:
    storage = Storage(tmp_path)
    if name == "versions":
        publish(storage, {"train/a.parquet": write_part(storage, "train/a.parquet", b"rows")})
    else:
        (tmp_path / name).write_text("rows")
    before = open_published(tmp_path).list()
    with pytest.raises(AdIndexError, match=r"has files that are not of an index of ads \((train|samples\.txt)\)"):
        AdIndex.build(str(tmp_path), "flat", KEYS, vectors(4), ORIGIN)
    with pytest.raises(DataNotFoundError):
        AdIndex.open(str(tmp_path))
    assert open_published(tmp_path).list() == before


def test_nothing_new_and_what_is_refused_make_no_version(url: str) -> None:
    before = names(Path(url))
    ads, added = AdIndex.open(url).update(KEYS[:2], vectors(4)[:2], ORIGIN)
    assert (added, ads.version) == ({"new": 0, "changed": 0, "unchanged": 2, "removed": 0}, 1)
    other = ORIGIN.model_copy(update={"checkpoint": "step-2", "checkpoint_digest": "d2"})
    with pytest.raises(AdIndexError, match="has vectors of checkpoint step-1 of run a, and not of step-2 of run a"):
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
    assert AdIndex.open(url).version == 3
    assert len(names(Path(url, "versions"))) == 1
    assert len(names(Path(url, "files"))) == 3
    with pytest.raises(CorruptFileError, match="is missing"):
        held.vectors()


def test_two_additions_at_once_do_not_lose_one(url: str) -> None:
    first, second = AdIndex.open(url), AdIndex.open(url)
    first.update(np.array([1]), vectors(1), ORIGIN)
    with pytest.raises(CommitConflictError, match="has number 2 by now, and not 1; run it again"):
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


@pytest.mark.parametrize("pattern", ["versions/*.json", "files/*.json", "files/*.npz", "files/*.parquet"])
def test_damage_is_told(url: str, pattern: str) -> None:
    file = next(Path(url).glob(pattern))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptFileError, match=rf"{file.name} is damaged"):
        AdIndex.open(url).vectors()


def found_by(ads: AdIndex, count: int) -> set[int]:
    return set(ads.index.search(vectors(20, seed=8), count)[0].ravel().tolist())


def test_removed_ads_are_in_no_search_and_no_vectors(url: str) -> None:
    ads, changes = AdIndex.open(url).update(KEYS[1:], vectors(4)[1:], ORIGIN, max_gone=0.5)
    assert (changes["removed"], changes["unchanged"]) == (1, 3)
    for each in (ads, AdIndex.open(url)):
        assert (each.version, each.state.num_ads) == (2, 3)
        assert each.vectors()[0].tolist() == [-3, 0, 9_000_000_000_000]
        assert found_by(each, 4) == {-3, 0, 9_000_000_000_000}
    ads, _ = AdIndex.open(url).update(np.array([7]), vectors(1, seed=9), ORIGIN)
    assert dict(zip(*(part.tolist() for part in ads.vectors()), strict=True))[7] == vectors(1, seed=9)[0].tolist()
    assert found_by(AdIndex.open(url), 4) == set(KEYS.tolist())


def test_a_sync_adds_changes_and_removes_in_one_version_but_for_most(url: str) -> None:
    table = vectors(4)
    table[1] += 1
    keys = np.array([7, -3, 55, 9_000_000_000_000])
    ads, changes = AdIndex.open(url).update(keys, table, ORIGIN, max_gone=0.5)
    assert changes == {"new": 1, "changed": 2, "unchanged": 1, "removed": 1}
    assert ads.version == AdIndex.open(url).version == 2
    found = dict(zip(*(part.tolist() for part in AdIndex.open(url).vectors()), strict=True))
    assert found == dict(zip(keys.tolist(), table.tolist(), strict=True))
    assert found_by(AdIndex.open(url), 9) == set(keys.tolist())
    with pytest.raises(AdIndexError, match=r"3 of the 4 ads in .* are not in the table, more than a share of 0\.5"):
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
