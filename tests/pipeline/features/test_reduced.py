"""Compact stores of images: extraction by a basis gives what remake makes, a refresh knows its store's basis."""

import numpy as np
import pytest

from featurestore.errors import SpecMismatchError, StoreNotFoundError
from featurestore.format.rows import FeatureRows
from featurestore.store import FeatureStore
from featurestore.upkeep.remake import remake
from featurestore.upkeep.verify import verify
from tests.pipeline.features.conftest import change_everything, counts, rows_of

pytestmark = pytest.mark.filterwarnings("ignore:weights random")
DIMS = 4


@pytest.fixture
def folder(write):
    return write(a=1, b=2, c=3, d=4, e=5, f=6, g=7)


@pytest.fixture
def full(make, folder, tmp_path):
    """A store of all numbers, float32."""
    make(folder, "full")
    return FeatureStore.open(tmp_path / "full")


def numbers(path):
    store = FeatureStore.open(path)
    snapshot = store.snapshot()
    return store.codec.decode(snapshot.get(snapshot.keys()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_extraction_makes_the_rows_that_reduce_makes(make, folder, full, tmp_path, dtype):
    remake(full, tmp_path / "small", dims=DIMS, dtype=dtype)
    summary = make(folder, "direct", reduce=str(tmp_path / "small"), dtype=None)
    small, direct = (FeatureStore.open(tmp_path / name) for name in ("small", "direct"))
    assert summary.num_new == summary.num_computed == 7 and direct.snapshot().num_rows == 7
    assert direct.info.reduction == small.info.reduction and direct.info.dtype == dtype and direct.info.dim == DIMS
    assert verify(direct).problems == []
    made, expected = numbers(tmp_path / "direct"), numbers(tmp_path / "small")
    step = np.abs(expected) * (2**-7 if dtype == "bfloat16" else 1e-6)
    assert (np.abs(made - expected) <= step + 1e-6 * np.abs(expected).max()).all() and np.ptp(expected) > 0


def test_a_basis_file_serves_as_well_and_bad_ones_are_named(make, folder, full, tmp_path):
    remake(full, tmp_path / "small", dims=DIMS)
    small = FeatureStore.open(tmp_path / "small")
    file = str(tmp_path / "small" / small.info.reduction.path)
    make(folder, "direct", reduce=file, dtype=None)
    assert FeatureStore.open(tmp_path / "direct").info.dtype == "bfloat16"
    for wrong, error, match in (
        (str(tmp_path / "full"), SpecMismatchError, "is not compact"),
        (str(tmp_path / "none.safetensors"), StoreNotFoundError, "no basis at"),
        (str(tmp_path / "none"), StoreNotFoundError, "no store at"),
    ):
        with pytest.raises(error, match=match):
            make(folder, "more", reduce=wrong)
    with pytest.raises(SpecMismatchError, match=r"of another network; these rows have 512: backbone .*mobilenet"):
        make(folder, "more", reduce=file, backbone="resnet18:avgpool")
    with pytest.raises(SpecMismatchError, match=r"of another network; these rows have 576: weights_digest "):
        make(folder, "more", reduce=file, weights="random:1")
    assert not (tmp_path / "more").exists()


def test_a_compact_store_is_refreshed_by_its_own_basis(make, run, write, folder, full, computed, tmp_path):
    remake(full, tmp_path / "features", dims=DIMS, dtype="float32")
    change_everything(folder, write)
    before = sum(computed)
    summary = run(folder)
    assert counts(summary) == (4, 1, 1, 3, 2, 1, 0, 3) and sum(computed) - before == 2
    make(folder, "anew", reduce=str(tmp_path / "features"))
    assert {uri: row[:-1] for uri, row in rows_of(tmp_path / "features").items()} == {
        uri: row[:-1] for uri, row in rows_of(tmp_path / "anew").items()
    }
    np.testing.assert_allclose(numbers(tmp_path / "features"), numbers(tmp_path / "anew"), rtol=1e-5, atol=1e-5)
    write(later=40)
    assert make(folder, "features").num_computed == 1, "an extraction into it needs no --reduce either"
    assert verify(FeatureStore.open(tmp_path / "features")).problems == []


def test_another_basis_is_refused(make, run, folder, full, tmp_path):
    remake(full, tmp_path / "features", dims=DIMS)
    full.put(FeatureRows.of(["mine.jpg"], np.ones((1, full.info.dim), np.float32)))
    remake(full, tmp_path / "other", dims=DIMS)
    with pytest.raises(SpecMismatchError, match=r"reduction\.sha256 is .* instead of"):
        make(folder, "features", reduce=str(tmp_path / "other"))
    with pytest.raises(SpecMismatchError, match="takes rows of 576 numbers"):
        make(folder, "features", backbone="resnet18:avgpool", reduce=None)


def test_a_recoded_compact_store_is_refreshed_too(run, write, folder, full, tmp_path):
    remake(full, tmp_path / "small", dims=DIMS, dtype="float32")
    remake(FeatureStore.open(tmp_path / "small"), tmp_path / "features", dtype="float16")
    write(h=8)
    assert run(folder).num_new == 1
    store = FeatureStore.open(tmp_path / "features")
    assert store.info.dtype == "float16" and store.snapshot().num_rows == 8 and verify(store).problems == []
