"""Nearest neighbours against the cosines of all rows at once, for every dtype; ties, zeros, and large stores."""

import numpy as np
import pytest

from explorer.data import neighbours
from explorer.data.neighbours import Neighbour, Neighbours, Space, cosines, nearest_features, nearest_vectors
from featurestore import FeatureStore, key_of_uri
from featurestore.upkeep.remake import remake
from tests.explorer.stores import DIM, make_store, rows, storied


def plainly(snapshot, query_D, most, without):
    table = snapshot.to_arrow(["key", "uri", "feature"]).to_pylist()
    near = []
    for row in table:
        feature_D = np.array(row["feature"], np.float64)
        length = np.linalg.norm(feature_D) * np.linalg.norm(query_D)
        near.append((-(feature_D @ query_D) / length if length else -0.0, row["key"], row["uri"]))
    return [(uri, -cosine) for cosine, key, uri in sorted(near) if key != without][:most]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "compact"])
@pytest.mark.parametrize("most", [1, 5, 43, 100])
def test_neighbours_are_those_of_all_rows_at_once(tmp_path, kind, most):
    store = storied(tmp_path / "store", "bfloat16" if kind == "bfloat16" else "float32")
    if kind == "compact":
        remake(store, tmp_path / "compact", dims=3)
        store = FeatureStore.open(tmp_path / "compact")
    snapshot, key = store.snapshot(), key_of_uri("a/5.jpg")
    query_D = store.codec.decode(snapshot.get([key]))[0]
    found = nearest_features(snapshot, query_D, most, key)
    expected = plainly(snapshot, query_D.astype(np.float64), most, key)
    assert [image.uri for image in found.images] == [uri for uri, _ in expected]
    np.testing.assert_allclose([image.nearness for image in found.images], [near for _, near in expected], rtol=1e-4)
    assert found.is_exact
    assert found.num_rows == 44


def test_of_equally_near_ones_the_smaller_key_comes_first(tmp_path):
    store = make_store(tmp_path / "store")
    made = rows([f"{number}" for number in range(50)], 1)
    made.features_ND[:] = 1
    store.put(made)
    found = nearest_features(store.snapshot(), np.ones(DIM, np.float32), 7)
    assert [image.key for image in found.images] == sorted(made.keys_N.tolist())[:7]


def test_rows_of_zeros_are_far_from_all():
    values_KD = np.array([[0, 0], [1, 0], [-1, 0]], np.float32)
    assert cosines(values_KD, np.array([2, 0], np.float32)).tolist() == [0, 1, -1]
    assert cosines(values_KD, np.zeros(2, np.float32)).tolist() == [0, 0, 0]


def test_of_a_store_that_is_too_large_a_part_is_searched_and_said(tmp_path, monkeypatch):
    store = storied(tmp_path / "store")
    monkeypatch.setattr(neighbours, "READ_BYTES", 20 * DIM * 4)
    found, again = (nearest_features(store.snapshot(), np.ones(DIM, np.float32), 3) for _ in range(2))
    assert not found.is_exact
    assert 0 < found.num_searched < found.num_rows == 44
    assert again.images == found.images


def test_vectors_in_blocks_give_the_same_as_in_one(tmp_path):
    snapshot = storied(tmp_path / "store").snapshot()
    table = snapshot.to_arrow(["key", "feature"])
    keys_N = table["key"].to_numpy()
    vectors_NV = np.array(table["feature"].to_pylist(), np.float32)
    query_V = np.arange(DIM, dtype=np.float32)
    one = nearest_vectors(snapshot, [(keys_N, vectors_NV)], query_V, 9)
    blocks = ((keys_N[start : start + 4], vectors_NV[start : start + 4]) for start in range(0, 44, 4))
    other = nearest_vectors(snapshot, blocks, query_V, 9)
    assert [image.uri for image in other.images] == [image.uri for image in one.images]
    assert [image.uri for image in one.images] == [uri for uri, _ in plainly(snapshot, query_V, 9, None)]


def space(name, keys):
    images = tuple(Neighbour(key, f"{key}", 1.0) for key in keys)
    return Space(name=name, title=name, found=Neighbours(images=images, num_searched=9, num_rows=9, seconds=0))


def test_what_one_space_alone_has_is_marked():
    spaces = [space("features", [1, 2, 3]), space("visual", [2, 4])]
    assert neighbours.only_in(spaces) == {"features": {1, 3}, "visual": {4}}
    assert neighbours.shared(spaces) == (1, 2)
    alone = [spaces[0], Space(name="visual", title="visual", problem="none")]
    assert neighbours.only_in(alone) == {"features": set(), "visual": set()}
    assert neighbours.shared(alone) is None
