"""Semantic IDs through the job: right codes in every sample, figures that are true, equal runs, and mistakes told."""

import hashlib
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from featurestore.format.rows import FeatureRows
from featurestore.published.versions import open_published
from featurestore.spec import ExtractorSpec, StoreInfo
from featurestore.store import FeatureStore
from featurestore.upkeep.remake import remake
from jobs.build_semantic_ids import app
from pipeline.semantic.codes import load
from trainer.comm import SoloComm
from trainer.config.config import load_config
from trainer.main import train
from trainer.schema import load_schema

NUM_IMAGES, DIM, LEVELS, CODES = 60, 8, 3, 4


def draw_features() -> np.ndarray:
    """Four clusters with three inside each, and one image twice."""
    random = np.random.default_rng(0)
    coarse, fine = random.normal(scale=20, size=(4, DIM)), random.normal(scale=4, size=(3, DIM))
    number = np.arange(NUM_IMAGES)
    vectors_ND = coarse[number % 4] + fine[number // 4 % 3] + random.normal(scale=0.3, size=(NUM_IMAGES, DIM))
    vectors_ND[1] = vectors_ND[5]
    return vectors_ND.astype(np.float32)


def lists(values):
    return pa.array(values, pa.list_(pa.int64()))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A store of keys 100 to 159, and samples in which image 7 is unknown, in a folder without data/."""
    monkeypatch.chdir(tmp_path)
    spec = dict.fromkeys(ExtractorSpec.model_fields, "drawn")
    info = StoreInfo(num_shards=4, dim=DIM, dtype="float32", extractor=ExtractorSpec.model_validate(spec))
    store = FeatureStore.create(tmp_path / "store", info)
    uris = [f"{n}.jpg" for n in range(NUM_IMAGES)]
    store.put(FeatureRows.of(uris, draw_features(), keys=np.arange(100, 100 + NUM_IMAGES)))
    random = np.random.default_rng(1)
    for split, groups in (("train", 40), ("test", 10)):
        (tmp_path / "samples" / split).mkdir(parents=True)
        behaviors = [random.integers(100, 160, random.integers(0, 6)).tolist() for _ in range(groups)]
        behaviors[0] = [7, 101, 105]
        ads = [random.integers(100, 160, random.integers(1, 4)).tolist() for _ in range(groups)]
        table = {"user": np.arange(groups) % 5, "behavior_image": lists(behaviors), "ad_image": lists(ads)}
        table |= {f"behavior_{name}": lists(behaviors) for name in ("item", "category")}
        table |= {f"ad_{name}": lists(ads) for name in ("item", "category", "scene")}
        table["label"] = lists([[key % 2 for key in row] for row in ads])
        pq.write_table(pa.table(table), tmp_path / "samples" / split / "a.parquet", row_group_size=7)
    return tmp_path


def run(place, *args, code=0, out="sid"):
    options = ["--out", str(place / out), "--levels", str(LEVELS), "--codes", str(CODES), *map(str, args)]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == code, result.output
    assert code == 0 or isinstance(result.exception, SystemExit)
    return " ".join(result.output.split())


def from_store(place):
    return "--store", place / "store"


def with_samples(place):
    return *from_store(place), "--samples", place / "samples"


def write_vectors(place, vectors_ND, keys_N):
    pq.write_table(pa.table({"key": keys_N, "vector": vectors_ND.tolist()}), place / "v.parquet")
    return "--vectors", place / "v.parquet"


def codes_of(place, out="sid") -> dict[int, tuple[int, ...]]:
    rows = [row for path in (place / out / "codes").iterdir() for row in pq.read_table(path).to_pylist()]
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: tuple(row[f"sid{level}"] for level in range(LEVELS)) for row in rows}


def read(folder: Path, split="train"):
    return pq.read_table(folder / split / "a.parquet").to_pylist()


def digests(folder: Path):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}  # fmt: skip


def test_codes_are_the_nearest_ones_level_by_level(place):
    run(place, *from_store(place))
    book = load(place / "sid/codebook.safetensors")
    expected = {}
    for key, vector_D in enumerate(draw_features(), 100):
        left_D, codes = (vector_D - book.mean_D) / book.std_D, []
        for codebook_CD in book.codebooks_LCD:
            codes.append(int(np.argmin(((codebook_CD - left_D) ** 2).sum(axis=1))))
            left_D = left_D - codebook_CD[codes[-1]]
        expected[key] = tuple(codes)
    assert codes_of(place) == expected
    assert len({codes[0] for codes in expected.values()}) == CODES
    assert expected[101] == expected[105]


def test_the_report_is_what_the_codes_say(place):
    text = run(place, *from_store(place))
    summary = json.loads((place / "sid/summary.json").read_text())
    codes = codes_of(place)
    for level, figures in enumerate(summary["levels"]):
        counts = Counter(code[level] for code in codes.values())
        shares = [count / NUM_IMAGES for count in counts.values()]
        assert figures["used"] == len(counts)
        assert figures["entropy_bits"] == pytest.approx(-sum(share * math.log2(share) for share in shares))
        assert figures["largest_share"] == pytest.approx(max(shares))
        assert figures["distinct_prefixes"] == len({code[: level + 1] for code in codes.values()})
    errors = [figures["reconstruction_error"] for figures in summary["levels"]]
    assert 1 > errors[0] > errors[1] > errors[2] > 0
    book = load(place / "sid/codebook.safetensors")
    rows_ND = (draw_features() - book.mean_D) / book.std_D
    coded_ND = np.stack([sum(book.codebooks_LCD[level, code[level]] for level in range(LEVELS))
                         for _, code in sorted(codes.items())])  # fmt: skip
    assert errors[-1] == pytest.approx(((rows_ND - coded_ND) ** 2).sum() / (rows_ND**2).sum(), rel=1e-4)
    full = Counter(codes.values())
    assert summary["full_codes"] == len(full)
    assert summary["images_that_share_their_code"] == sum(count for count in full.values() if count > 1) >= 2
    assert summary["most_images_of_a_code"] == max(full.values())
    assert summary["source"]["snapshot"] == 1
    assert summary["codebook"]["sha256"] == digests(place / "sid")["codebook.safetensors"]
    assert "images 60" in text


def test_samples_get_the_codes_of_their_images(place):
    text = run(place, *with_samples(place))
    codes = codes_of(place) | {7: (-1,) * LEVELS}
    for split in ("train", "test"):
        for row, before in zip(read(place / "sid", split), read(place / "samples", split), strict=True):
            assert {name: row[name] for name in before} == before
            for column in ("behavior_image", "ad_image"):
                for level in range(LEVELS):
                    assert row[f"{column}_sid{level}"] == [codes[key][level] for key in row[column]]
                for length in (2, 3):
                    assert row[f"{column}_sid_prefix{length}"] == [
                        -1 if key == 7 else int("".join(map(str, codes[key][:length])), CODES) for key in row[column]
                    ]
    assert "2 without a code (of 1 images)" in text
    groups = [pq.ParquetFile(place / name / "train/a.parquet").metadata.num_row_groups for name in ("samples", "sid")]
    assert groups == [6, 6]


def test_a_run_on_semantic_ids(place):
    run(place, *with_samples(place))
    schema = load_schema(place / "sid/schema.yaml")
    added = {field.name: (field.side, field.kind, field.table_name) for field in schema.fields if "_sid" in field.name}
    assert len(added) == 10
    assert added["behavior_image_sid0"] == ("user", "multi_id", "images_sid0")
    assert added["ad_image_sid_prefix3"] == ("ad", "id", "images_sid_prefix3")
    settings = [
        f"data.cache_dir={place / 'cache'}", f"run.dir={place / 'runs'}", "run.name=a", "run.threads=1",
        "data.global_batch_size=32", "train.max_steps=2", "model.embed_hidden=[8]", "data.missing=zeros",
        "model.compute_dtype=float32", "model.table_shards=4",
    ]  # fmt: skip
    train(load_config(place / "sid/settings.yaml", settings), SoloComm())
    report = json.loads((place / "runs/a/report.json").read_text())
    assert report["global_step"] == 2
    assert np.isfinite(report["metrics"]["logloss"])


def test_equal_runs_give_equal_files_and_another_seed_other_codes(place):
    run(place, *with_samples(place))
    first = digests(place / "sid")
    run(place, *with_samples(place))
    assert digests(place / "sid") == first
    run(place, *with_samples(place), "--seed", 3, "--sample-rows", 30)
    assert digests(place / "sid")["codebook.safetensors"] != first["codebook.safetensors"]


def test_a_codebook_is_used_again_for_new_images(place):
    run(place, *from_store(place))
    before = codes_of(place)
    store = FeatureStore.open(place / "store")
    store.put(FeatureRows.of(["new.jpg"], draw_features()[3:4], keys=[999]))
    text = run(place, *from_store(place), "--codebook", place / "sid/codebook.safetensors", out="tuesday")
    assert "as it was" in text
    assert codes_of(place, "tuesday") == before | {999: before[103]}
    assert (place / "tuesday/codebook.safetensors").read_bytes() == (place / "sid/codebook.safetensors").read_bytes()


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_a_new_day_leaves_the_bytes_of_the_others(place, where, request):
    """With the codebook that is there, as the line for cron has it: a run continues on the days that it has read."""
    out = str(place / "sid") if where == "disk" else f"{request.getfixturevalue('s3_url')}/sid"

    def made(*args, code=0):
        options = ["--out", out, "--levels", str(LEVELS), "--codes", str(CODES), *map(str, with_samples(place))]
        result = CliRunner().invoke(app, [*options, *args])
        assert result.exit_code == code, result.output
        storage = open_published(out)
        return {each.path: storage.read_bytes(each.path) for each in storage.entries() if each.path != "summary.json"}

    first = made()
    (place / "samples" / "test" / "a.parquet").rename(place / "samples" / "train" / "b.parquet")
    shutil.copy(place / "samples" / "train" / "a.parquet", place / "samples" / "test" / "c.parquet")
    second = made("--codebook", f"{out}/codebook.safetensors")
    assert second["train/b.parquet"] == first["test/a.parquet"]
    assert second["test/c.parquet"] == first["train/a.parquet"]
    same = first.keys() - {"test/a.parquet"}
    assert {name: second[name] for name in same} == {name: first[name] for name in same}
    assert made("--codebook", f"{out}/none.safetensors", code=1) == second


def test_a_codebook_is_not_used_for_another_store(place):
    run(place, *from_store(place))
    store = FeatureStore.open(place / "store")
    source = json.loads((place / "sid/summary.json").read_text())["source"]
    snapshot = store.snapshot()
    assert (source["store_id"], source["commit_id"]) == (store.info.store_id, snapshot.manifest.commit_id)
    book = ("--codebook", place / "sid/codebook.safetensors")
    shutil.rmtree(place / "store")
    made = FeatureStore.create(place / "store", store.info.kind)
    uris = [f"{n}.jpg" for n in range(NUM_IMAGES)]
    made.put(FeatureRows.of(uris, draw_features()[::-1].copy(), keys=np.arange(100, 100 + NUM_IMAGES)))
    text = run(place, *from_store(place), *book, out="tuesday", code=1)
    assert f"of store {store.info.store_id[:8]} at" in text and f"of store {made.info.store_id[:8]} at" in text
    assert "fit a new one, without --codebook" in text and not (place / "tuesday").exists()
    run(place, *from_store(place), *book, "--accept-store", out="tuesday")
    shutil.rmtree(place / "store")
    extractor = store.info.extractor.model_copy(update={"weights_digest": "another"})
    other = FeatureStore.create(place / "store", store.info.kind.model_copy(update={"extractor": extractor}))
    other.put(FeatureRows.of(uris, draw_features(), keys=np.arange(100, 100 + NUM_IMAGES)))
    text = run(place, *from_store(place), *book, "--accept-store", out="wednesday", code=1)
    assert "was fitted to vectors of another extractor" in text


def test_a_codebook_of_exported_vectors_is_of_one_checkpoint(place):
    def export(name, **about):
        origin = {"checkpoint": "step-1", "checkpoint_digest": "d1", "network": "images:shared", "store": "s"}
        origin |= {"snapshot": 3, "store_id": "a" * 32, "commit_id": "c" * 32, **about}
        table = pa.table({"key": np.arange(100, 160), "vector": draw_features().tolist()})
        pq.write_table(table.replace_schema_metadata({"visual_vectors": json.dumps(origin)}), place / f"{name}.parquet")

    def of(name):
        return "--vectors", place / f"{name}.parquet"

    export("a")
    run(place, *of("a"), out="a")
    assert json.loads((place / "a/summary.json").read_text())["source"]["of"]["checkpoint_digest"] == "d1"
    book = ("--codebook", place / "a/codebook.safetensors")
    run(place, *of("a"), *book, out="same")
    export("b", checkpoint="step-2", checkpoint_digest="d2")
    text = run(place, *of("b"), *book, out="x", code=1)
    assert "was fitted to vectors of another checkpoint: step-1, these are of step-2" in text
    export("c", commit_id="e" * 32)
    assert "belongs to snapshot 3 (commit cccccccc)" in run(place, *of("c"), *book, out="x", code=1)


def test_vectors_of_a_file_get_the_codes_of_the_same_vectors_in_a_store(place):
    run(place, *from_store(place))
    book = place / "sid/codebook.safetensors"
    vectors_ND = np.concatenate([draw_features(), np.full((1, DIM), np.nan, np.float32)])
    vectors = write_vectors(place, vectors_ND, np.arange(100, 161))
    run(place, *vectors, "--codebook", book, out="same")
    assert codes_of(place, "same") == codes_of(place)
    assert json.loads((place / "same/summary.json").read_text())["source"]["unusable_rows"] == 1
    run(place, *vectors, "--sample-rows", 30, out="fitted")
    assert len(codes_of(place, "fitted")) == NUM_IMAGES


def test_fewer_vectors_than_dimensions(place):
    """They have no main directions for all dimensions to begin with."""
    vectors_ND = np.random.default_rng(0).normal(size=(NUM_IMAGES, NUM_IMAGES + 1)).astype(np.float32)
    run(place, *write_vectors(place, vectors_ND, np.arange(NUM_IMAGES)))
    errors = [level["reconstruction_error"] for level in json.loads((place / "sid/summary.json").read_text())["levels"]]
    assert 1 > errors[0] > errors[1] > errors[2] > 0


def test_without_arguments_it_takes_the_default_places(place):
    def job(*options, code=0):
        result = CliRunner().invoke(app, ["--codes", "4", *options])
        assert result.exit_code == code, result.output
        return " ".join(result.output.split())

    assert "data/features: store.json is not there" in job(code=2)
    (place / "data").mkdir()
    (place / "store").rename(place / "data/features")
    assert "folder data/samples-sid" in job()
    assert not (place / "data/samples-sid/train").exists()
    (place / "samples").rename(place / "data/samples")
    assert "samples 50 groups" in job()
    assert len(read(place / "data/samples-sid")) == 40
    job("--no-samples", "--out", "data/sid")
    assert not (place / "data/sid/train").exists()


def test_a_failed_run_leaves_what_was_there(place):
    run(place, *with_samples(place))
    before = digests(place / "sid")
    pq.write_table(
        pq.read_table(place / "samples/test/a.parquet").drop_columns(["ad_image"]), place / "samples/test/b.parquet"
    )
    assert "test/b.parquet: column 'ad_image' is missing" in run(place, *with_samples(place), code=1)
    assert digests(place / "sid") == before
    assert sorted(path.name for path in place.iterdir()) == ["samples", "sid", "store"]


def test_mistakes_are_one_message(place):
    store = from_store(place)
    assert "no store at" in run(place, "--store", place / "no", code=2)
    assert "--codes 3 is not a power of two" in run(place, *store, "--codes", 3, code=2)
    assert "60 vectors are too few for 64 codes" in run(place, *store, "--codes", 64, code=1)
    assert "do not fit into 62 bits" in run(place, *store, "--codes", 65536, "--levels", 4, code=2)
    assert "no codebook of this job" in run(place, *store, "--codebook", place / "samples/train/a.parquet", code=1)
    assert "no train/*.parquet" in run(place, *store, "--samples", place / "store", code=2)
    assert "its stores: images" in run(place, *with_samples(place), "--store-name", "text", code=2)
    assert "give one of --store and --vectors" in run(place, *store, "--vectors", "v.npy", code=2)
    assert "give one of --samples and --no-samples" in run(place, *with_samples(place), "--no-samples", code=2)
    one = write_vectors(place, draw_features()[:1], np.arange(1))
    assert "1 vectors are too few for 4 codes" in run(place, *one, code=1)
    run(place, *store)
    file = write_vectors(place, draw_features()[:, :5], np.arange(60) // 2)
    book = ["--codebook", place / "sid/codebook.safetensors"]
    assert "is for vectors of 8 numbers, these have 5" in run(place, *file, *book, out="x", code=1)
    assert "key 0 has several vectors" in run(place, *file, out="x", code=1)
    run(place, *with_samples(place))
    again = run(place, *store, "--samples", place / "sid", out="twice", code=1)
    assert "column 'behavior_image_sid0' is there already" in again


def test_components_of_a_compact_store_are_taken_as_they_are(place):
    remake(FeatureStore.open(place / "store"), place / "compact", dims=4, dtype="float32")
    fitted = {}
    for name, options in {"auto": [], "raw": ["--raw"], "each": ["--standardize"]}.items():
        run(place, "--store", place / "compact", "--no-samples", *options, out=name)
        fitted[name] = load(place / name / "codebook.safetensors")
    assert fitted["auto"].digest == fitted["raw"].digest != fitted["each"].digest
    assert (fitted["auto"].std_D == 1).all() and (fitted["each"].std_D != 1).all()
    run(place, "--store", place / "store", "--no-samples", out="full")
    assert (load(place / "full/codebook.safetensors").std_D != 1).any()
