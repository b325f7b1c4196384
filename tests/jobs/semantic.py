"""A store, samples, and the job that makes semantic IDs of them, for its tests."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from typer.testing import CliRunner

from featurestore.format.rows import FeatureRows
from featurestore.spec import ExtractorSpec, StoreInfo
from featurestore.store import FeatureStore
from jobs.build_semantic_ids import app

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


def make_place(tmp_path, monkeypatch):
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
