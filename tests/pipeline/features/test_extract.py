"""Images to rows: equal to torchvision's forward for any network, nothing computed twice, compact stores."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from featurestore.errors import SpecMismatchError
from featurestore.keys import key_of_uri
from featurestore.lookup import VARIABLE
from featurestore.problems import Problem as StoreProblem
from featurestore.spec import StoreInfo
from featurestore.store import FeatureStore
from featurestore.upkeep.remake import remake
from featurestore.upkeep.verify import verify
from pipeline.errors import BackboneError, SourceError, StoreRunError, WeightsError
from pipeline.features.part import PartSettings, stage_part
from pipeline.features.refresh import describe_network
from pipeline.network import backbone as compute
from pipeline.network.backbone import _cached_backbone, backbone, load_weights, network_of
from pipeline.problems import Problem
from tests.featurestore.contents import metadata_of
from tests.pipeline.conftest import draw_photo, encode_image
from tests.pipeline.features.conftest import change_everything, counts, rows_of
from tests.pipeline.network.test_backbone import least_cosine, torchvision_features
from tests.pipeline.network.tiny import TINY
from tests.raised import raises, told

DIMS = 4


@pytest.fixture
def mixed(write):
    """Two good images and one of each kind that cannot be used."""
    folder = write(good=50, text="just a text", empty="")
    good = (folder / "good.jpg").read_bytes()
    half = good[: len(good) // 2]
    files = {
        "one_pixel.png": encode_image(Image.new("RGB", (1, 1), "red"), "PNG"), "notes.txt": b"", "truncated.jpg": half,
        "truncated_too.jpg": half, "huge.png": encode_image(Image.new("1", (9000, 9000)), "PNG"),
    }  # fmt: skip
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    return folder


def own_features(paths):
    """What torchvision's whole network and transform give, of images opened by Pillow as anyone would."""
    state = load_weights(network_of(TINY, "random:0"), "random:0")
    images = [Image.open(path).convert("RGB") for path in paths]
    return torchvision_features("tiny", state, nn.Module.__call__, images)


def test_stored_rows_are_those_of_torchvisions_own_forward(make, photos, tmp_path):
    grey = Image.open(photos / "0.jpg").convert("L")
    (photos / "sub").mkdir()
    (photos / "sub/grey.png").write_bytes(encode_image(grey, "PNG"))
    paths = sorted(path for path in photos.rglob("*.*"))
    uris = [path.relative_to(photos).as_posix() for path in paths]
    summary = make(photos, batch_size=3, part_size=4)
    assert (summary.num_images, summary.num_computed, summary.snapshot) == (5, 5, 1)
    expected_BD = own_features(paths)
    found_BD = numbers(tmp_path / "features", uris)
    np.testing.assert_allclose(found_BD, expected_BD, rtol=0, atol=1e-4 * expected_BD.max())
    metadata = metadata_of(FeatureStore.open(tmp_path / "features").snapshot()).to_pylist()
    sizes = {uri: Image.open(path).size for uri, path in zip(uris, paths, strict=True)}
    assert {row["uri"]: (row["width"], row["height"]) for row in metadata} == sizes
    statistics = FeatureStore.open(tmp_path / "features").snapshot().statistics()
    np.testing.assert_allclose(statistics.mean_D, expected_BD.mean(0), rtol=1e-3, atol=1e-4)


def test_bfloat16_is_close(make, photos, tmp_path):
    make(photos, dtype="bfloat16", precision="bfloat16")
    paths = sorted(photos.iterdir())
    found_BD = numbers(tmp_path / "features", [path.name for path in paths])
    assert least_cosine(found_BD, own_features(paths)) > 0.999


def test_int8_is_calibrated_once_and_new_images_get_the_same(make, run, photos, tmp_path, monkeypatch):
    with raises(BackboneError, Problem.INT8_TOO_COARSE, where="tiny:last", value=re.compile(r"^0\.\d"), least=1):
        make(photos, precision="int8", least_cosine=1)
    assert not (tmp_path / "features").exists()
    (photos / "bad.jpg").write_text("no image")
    summary = make(photos, precision="int8")
    store = FeatureStore.open(tmp_path / "features")
    spec = store.info.extractor.int8
    assert (spec.num_images, spec.num_held_out, store.info.extractor.compute_dtype) == (3, 1, "int8")
    assert f"precision    int8 (cosine {spec.mean_cosine:.4f} with float32, on 1 images)" in str(summary)
    (photos / "new.jpg").write_bytes(encode_image(draw_photo(70)))
    for precision in ("float32", "bfloat16"):
        with raises(SpecMismatchError, Problem.OTHER_PRECISION, value=precision, stored="int8"):
            make(photos, precision=precision)
    assert run(photos).num_computed == 1
    assert make(photos, precision="auto").num_unchanged == 5
    assert FeatureStore.open(tmp_path / "features").info.extractor.int8 == spec

    FeatureStore.open_or_create(tmp_path / "torch", store.info)  # of a machine that has no OpenVINO
    monkeypatch.setattr(compute, "can_compile", lambda precision: False)
    _cached_backbone.cache_clear()
    assert make(photos, "torch", precision="auto").num_new == 5
    make(photos, "single")
    int8, by_torch, single = (numbers(tmp_path / name) for name in ("features", "torch", "single"))
    np.testing.assert_allclose(by_torch, int8, rtol=0, atol=1e-2 * np.abs(int8).max())
    assert least_cosine(int8, single) > 0.99 and np.abs(int8 - single).max() > 1e-4


def test_auto_is_what_the_environment_names_else_what_the_workers_are_quick_at(client, monkeypatch):
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for quick, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda quick=quick: {"amx_bf16": quick})
        assert describe_network(client, TINY, "random:0", "auto").compute_dtype == dtype
    monkeypatch.setenv(VARIABLE, "bfloat16")
    assert describe_network(client, TINY, "random:0", "auto").compute_dtype == "bfloat16"
    monkeypatch.setenv(VARIABLE, "int8")
    with pytest.raises(BackboneError, match=told(StoreProblem.UNKNOWN_DTYPE, where=VARIABLE, value="int8")):
        describe_network(client, TINY, "random:0", "auto")


def test_equal_bytes_go_through_the_network_once(make, photos, computed, tmp_path):
    for number in range(4):
        shutil.copy(photos / f"{number % 2}.jpg", photos / f"copy{number}.jpg")
    summary = make(photos, part_size=2, batch_size=2)  # by order the copies would fall into other parts
    assert (sum(computed), summary.num_computed, summary.num_duplicates) == (4, 4, 4)
    equal = ["0.jpg", "copy0.jpg", "copy2.jpg", "1.jpg", "copy1.jpg", "copy3.jpg"]  # the first three, and the others
    rows_BD = numbers(tmp_path / "features", equal)
    assert (rows_BD == rows_BD[[0, 0, 0, 3, 3, 3]]).all() and (rows_BD[0] != rows_BD[3]).any()


def test_bad_images_are_quarantined_with_their_reason_and_counted(make, mixed, computed, tmp_path):
    summary = make(mixed)
    reasons = [
        ("empty.jpg", told(Problem.EMPTY_FILE)), ("gone.jpg", told(Problem.NO_SUCH_FILE)),
        ("huge.png", told(Problem.TOO_LARGE, width=9000, height=9000)), ("text.jpg", told(Problem.UNKNOWN_FORMAT)),
        ("truncated.jpg", cut := told(Problem.NOT_DECODABLE, reason=re.compile(".*truncated.*"))),
        ("truncated_too.jpg", cut),
    ]  # fmt: skip
    assert [bad.uri for bad in summary.bad] == [uri for uri, _ in reasons]
    assert all(re.fullmatch(part, bad.reason) for bad, (_, part) in zip(summary.bad, reasons, strict=True))
    assert summary.bad[-1].reason == summary.bad[-2].reason
    assert (summary.num_computed, summary.num_ignored) == (2, 1)
    store = FeatureStore.open(tmp_path / "features")
    assert {(row.key, row.uri, row.reason) for row in store.quarantine_rows()} == {bad[:3] for bad in summary.bad}
    assert store.snapshot().manifest.num_quarantined == 6
    assert store.snapshot().num_rows == 2

    again = make(mixed)  # what was bad is tried again, and said again; nothing else happens
    assert again.bad == summary.bad
    assert (sum(computed), again.num_computed, again.num_unchanged, again.snapshot) == (2, 0, 2, 1)
    assert len(list((tmp_path / "features/quarantine").iterdir())) == 1


def test_what_gives_no_row_is_an_error_and_no_commit(make, photos, tmp_path):
    folder, store = tmp_path / "bad", tmp_path / "features"
    folder.mkdir()
    with raises(SourceError, Problem.NO_IMAGES, where=folder):
        make(folder)
    with raises(WeightsError, Problem.WRONG_SEED, value="random:"):
        make(photos, weights="random:")
    assert not store.exists()
    (folder / "text.jpg").write_text("a text")
    reasons = re.compile(rf"^1 {told(Problem.UNKNOWN_FORMAT)} \(text.jpg\)$")
    with raises(StoreRunError, Problem.NO_USABLE_IMAGE, count=1, reasons=reasons):
        make(folder)
    assert FeatureStore.open(store).snapshot().version == 0
    assert [row.uri for row in FeatureStore.open(store).quarantine_rows()] == ["text.jpg"]
    assert not list(store.glob("staging/*/*"))


def test_features_of_another_network_or_dtype_are_refused_by_store_and_workers(make, photos, tmp_path):
    make(photos)
    for found, changes in (
        ("^extractor.weights_digest ", {"weights": "random:1"}),
        ("^dtype is 'float32' instead of 'bfloat16'$", {"dtype": "bfloat16"}),
        ("^num_shards is 4 instead of 8$", {"num_shards": 8}),
    ):
        with raises(SpecMismatchError, StoreProblem.ANOTHER_KIND, value=re.compile(found)):
            make(photos, **changes)
    assert make(photos, num_shards=None).num_unchanged == 4
    extractor = backbone(TINY, "random:1", "float32").spec
    store = FeatureStore.create(tmp_path / "other", StoreInfo(dim=12, extractor=extractor))
    settings = PartSettings(store.url, "run", TINY, "random:0", extractor, version=0, batch_size=2, part_size=2)
    with raises(WeightsError, Problem.WEIGHTS_DIFFER, where="random:0"):
        stage_part(settings, "part", [])
    assert store.staged_parts("run") == []


@pytest.fixture
def full(make, write, tmp_path):
    """A store of all numbers, float32."""
    make(write(a=1, b=2, c=3, d=4, e=5, f=6, g=7), "full")
    return FeatureStore.open(tmp_path / "full")


def numbers(path, uris=None):
    """Features of these images, or of all."""
    store = FeatureStore.open(path)
    snapshot = store.snapshot()
    return store.codec.decode(snapshot.get(snapshot.keys() if uris is None else [*map(key_of_uri, uris)]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_extraction_into_a_compact_store_makes_the_rows_that_remake_makes(make, write, full, tmp_path, dtype):
    remake(full, tmp_path / "small", dims=DIMS, dtype=dtype)
    folder = write(later=40, and_later=41)
    summary = make(folder, "small", dtype=None)
    assert summary.num_new == summary.num_computed == 2
    make(folder, "full")
    small = FeatureStore.open(tmp_path / "small")
    assert verify(small).problems == [] and small.snapshot().num_rows == 9
    made, expected = numbers(tmp_path / "small"), small.project(numbers(tmp_path / "full"))
    step = np.abs(expected) * (2**-7 if dtype == "bfloat16" else 1e-6)
    assert (np.abs(made - expected) <= step + 1e-6 * np.abs(expected).max()).all() and np.ptp(expected) > 0


def test_a_compact_store_is_refreshed_by_its_own_basis(make, run, write, full, computed, tmp_path):
    folder = write()
    remake(full, tmp_path / "features", dims=DIMS, dtype="float32")
    with raises(SpecMismatchError, Problem.WRONG_WIDTH, wanted=12, value=512):
        make(folder, dtype=None, backbone="resnet18:avgpool")
    with raises(SpecMismatchError, StoreProblem.ANOTHER_KIND, value=re.compile("weights_digest")):
        make(folder, dtype=None, weights="random:1")
    change_everything(folder, write)
    before = sum(computed)
    summary = run(folder)
    assert counts(summary) == (4, 1, 1, 3, 2, 1, 0, 3) and sum(computed) - before == 2
    make(folder, "anew")
    refreshed, anew = (rows_of(tmp_path / name) for name in ("features", "anew"))
    assert {uri: row[:-1] for uri, row in refreshed.items()} == {uri: row[:-1] for uri, row in anew.items()}
    store = FeatureStore.open(tmp_path / "features")
    expected = store.project(numbers(tmp_path / "anew"))
    np.testing.assert_allclose(numbers(tmp_path / "features"), expected, rtol=1e-5, atol=1e-5)
    assert verify(store).problems == []
