"""An index of ads on disk: versions, additions, what is refused, and that nothing half written is ever seen."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from featurestore.errors import CorruptFileError, InvalidRowsError
from featurestore.storage import Storage
from trainer.errors import AdIndexError
from trainer.prerank.artifact import AdIndex, IndexOrigin

WIDTH = 4
ORIGIN = IndexOrigin(run="a", checkpoint="step-1", checkpoint_digest="d1", key_column="ad_item", bias=0.5)
KEYS = np.array([7, -3, 9_000_000_000_000, 0])


def vectors(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Four ads under a flat index."""
    AdIndex.build(str(tmp_path / "index"), "flat", KEYS, vectors(4), ORIGIN)
    return str(tmp_path / "index")


def test_what_is_written_is_read(url: str) -> None:
    ads = AdIndex.open(url)
    assert (ads.state.version, ads.state.num_ads, ads.state.dim, ads.state.kind) == (1, 4, WIDTH, "flat")
    assert ads.state.origin == ORIGIN
    keys, found = ads.vectors()
    order = np.argsort(KEYS)
    np.testing.assert_array_equal(keys, KEYS[order])
    np.testing.assert_array_equal(found, vectors(4)[order])
    best, scores = ads.index.search(vectors(1, seed=5), 1)
    products = vectors(4) @ vectors(1, seed=5)[0]
    assert best[0, 0] == KEYS[products.argmax()]
    np.testing.assert_allclose(scores[0, 0], products.max(), rtol=1e-6)


def test_others_can_read_the_vectors(url: str) -> None:
    table = pq.read_table(next(Path(url).glob("*.parquet")))
    assert table.column_names == ["key", "vector"]
    assert table.schema.field("vector").metadata == {b"dtype": b"float32", b"shape": b"[4]"}
    read = np.stack([np.frombuffer(value, np.float32) for value in table["vector"].to_pylist()])
    np.testing.assert_array_equal(read, vectors(4))


def test_an_addition_has_new_changed_and_unchanged_ads(url: str) -> None:
    changed = vectors(4)
    changed[1] += 1
    changed[2] += 1e-7  # the last bits of a sum in another order
    keys = np.concatenate([KEYS, [55]])
    ads, added = AdIndex.open(url).add(keys, np.concatenate([changed, vectors(1, seed=9)]), ORIGIN)
    assert (added.num_new, added.num_replaced, added.num_unchanged) == (1, 1, 3)
    assert (ads.state.version, ads.state.num_ads, ads.state.num_replaced) == (2, 5, 1)
    again = AdIndex.open(url)
    assert again.state == ads.state
    found = dict(zip(again.vectors()[0].tolist(), again.vectors()[1], strict=True))
    np.testing.assert_array_equal(found[-3], changed[1])
    np.testing.assert_array_equal(found[KEYS[2]], vectors(4)[2])
    np.testing.assert_array_equal(found[55], vectors(1, seed=9)[0])
    assert again.index.search(10 * changed[1:2], 5)[0].shape == (1, 5)
    # The first build's vectors were not written again.
    assert [pq.read_table(path).num_rows for path in sorted(Path(url).glob("*.parquet"))] == [4, 2]


def test_nothing_new_makes_no_version(url: str) -> None:
    before = names(Path(url))
    ads, added = AdIndex.open(url).add(KEYS[:2], vectors(4)[:2], ORIGIN)
    assert (added.num_new, added.num_replaced, added.num_unchanged, ads.state.version) == (0, 0, 2, 1)
    assert names(Path(url)) == before


def test_vectors_of_another_checkpoint_are_refused(url: str) -> None:
    other = ORIGIN.model_copy(update={"checkpoint": "step-2", "checkpoint_digest": "d2"})
    with pytest.raises(AdIndexError, match="has vectors of checkpoint step-1 of run a, and not of step-2 of run a"):
        AdIndex.open(url).add(KEYS, vectors(4), other)
    assert AdIndex.open(url).state.version == 1


@pytest.mark.parametrize("wrong", [vectors(4)[:, :3], np.full((4, WIDTH), np.inf, np.float32)])
def test_vectors_that_do_not_fit_are_refused(url: str, wrong: np.ndarray) -> None:
    with pytest.raises(InvalidRowsError):
        AdIndex.open(url).add(KEYS, wrong, ORIGIN)
    assert AdIndex.open(url).state.version == 1


def test_a_build_takes_the_place_of_another_one_in_one_moment(url: str) -> None:
    held = AdIndex.open(url)
    other = ORIGIN.model_copy(update={"checkpoint_digest": "d2"})
    AdIndex.build(url, "hnsw", KEYS[:2], vectors(2, seed=1), other)
    ads = AdIndex.open(url)
    assert (ads.state.version, ads.state.kind, ads.state.num_ads) == (2, "hnsw", 2)
    assert len(held.vectors()[0]) == 4  # a reader of the version before can go on
    AdIndex.build(url, "flat", KEYS[:1], vectors(1), other)
    assert [name for name in names(Path(url)) if name.endswith(".json")] == [
        "index-00000002.json",
        "index-00000003.json",
    ]
    assert len(names(Path(url))) == 6
    with pytest.raises(CorruptFileError, match="is missing"):
        held.vectors()


def test_two_additions_at_once_do_not_lose_one(url: str) -> None:
    first, second = AdIndex.open(url), AdIndex.open(url)
    first.add(np.array([1]), vectors(1), ORIGIN)
    before = names(Path(url))
    with pytest.raises(AdIndexError, match=r"index-00000002\.json was written by another build meanwhile; run again"):
        second.add(np.array([2]), vectors(1), ORIGIN)
    assert names(Path(url)) == before
    assert AdIndex.open(url).state.num_ads == 5


def test_what_a_killed_build_left_is_removed_by_a_later_one(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Storage, path: str, data: bytes) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "create_or_read", killed)
        with pytest.raises(KeyboardInterrupt):
            AdIndex.build(url, "flat", KEYS, vectors(4, seed=2), ORIGIN)
    assert len(names(Path(url))) == 5
    np.testing.assert_array_equal(np.sort(AdIndex.open(url).vectors()[1], axis=0), np.sort(vectors(4), axis=0))
    AdIndex.build(url, "flat", KEYS, vectors(4, seed=3), ORIGIN)
    assert len(names(Path(url))) == 6


@pytest.mark.parametrize("pattern", ["*.json", "*.faiss", "*.parquet"])
def test_damage_is_told(url: str, pattern: str) -> None:
    file = next(Path(url).glob(pattern))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptFileError, match=rf"{file.name} is damaged"):
        AdIndex.open(url).vectors()


def test_a_place_without_an_index(tmp_path: Path) -> None:
    with pytest.raises(AdIndexError, match=r"is no index of ads; make it with: python jobs/build_ad_index\.py"):
        AdIndex.open(str(tmp_path / "nothing"))
