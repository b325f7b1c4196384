"""Synthetic sample groups in Parquet, in the form that the samples job writes, a feature store for them, and runs."""

import functools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore.format.datafile import FeatureRows
from featurestore.published.paths import RunPath, run_path
from featurestore.spec import ExtractorSpec, StoreInfo
from featurestore.store import FeatureStore


def lists(values: np.ndarray, offsets: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


def sample_table(groups: int, seed: int = 0, *, items: int = 40, users: int = 25, first_serial: int = 0) -> pa.Table:
    """`groups` sample groups with 1 to 6 impressions and 0 to 5 behaviours each; `ad_serial` numbers the impressions.

    An image's key is its item's number plus 1,000; a click is likelier on an even item.
    """
    random = np.random.default_rng(seed)
    ads, behaviors = random.integers(1, 7, groups), random.integers(0, 6, groups)
    ad_offsets, behavior_offsets = np.r_[0, np.cumsum(ads)], np.r_[0, np.cumsum(behaviors)]
    ad_item, behavior_item = random.integers(0, items, ads.sum()), random.integers(0, items, behaviors.sum())
    label = (random.random(ads.sum()) < np.where(ad_item % 2 == 0, 0.6, 0.2)).astype(np.int8)
    return pa.table(
        {
            "user": random.integers(0, users, groups),
            "session": np.arange(groups),
            "timestamp": 1_700_000_000 + np.arange(groups),
            "behavior_item": lists(behavior_item, behavior_offsets),
            "behavior_image": lists(behavior_item + 1_000, behavior_offsets),
            "behavior_category": lists(behavior_item % 5, behavior_offsets),
            "ad_item": lists(ad_item, ad_offsets),
            "ad_image": lists(ad_item + 1_000, ad_offsets),
            "ad_category": lists(ad_item % 5, ad_offsets),
            "ad_scene": lists(random.integers(0, 3, ads.sum()), ad_offsets),
            "ad_serial": lists(np.arange(first_serial, first_serial + ads.sum()), ad_offsets),
            "label": lists(label, ad_offsets),
        }
    )


def write_samples(folder: Path, groups_of_file: list[int], row_group: int = 7, **options: Any) -> list[pa.Table]:
    """Write files of sample groups, one for each day, and return their tables."""
    folder.mkdir(parents=True)
    tables: list[pa.Table] = []
    serial, seed = options.pop("first_serial", 0), options.pop("seed", 0)
    for number, groups in enumerate(groups_of_file):
        tables.append(sample_table(groups, seed + number, first_serial=serial, **options))
        serial += len(tables[-1].column("label").combine_chunks().flatten())
        pq.write_table(tables[-1], folder / f"day=2026-01-{number + 1:02}.parquet", row_group_size=row_group)
    return tables


def values_of(files: Path, name: str) -> list[Any]:
    """The values of a column of a file of samples, or of all below a folder; those of lists one after the other."""
    column = pq.read_table(files, columns=[name], partitioning=None)[name].combine_chunks()
    return (column.flatten() if isinstance(column, pa.ListArray) else column).to_pylist()


def change_column(file: Path, name: str, change: Callable[[list[Any]], list[Any]], kind: Any = None) -> None:
    """Write a file of samples again with other values in a column, of its type unless `kind` is another one."""
    table = pq.read_table(file, partitioning=None)
    at = table.schema.get_field_index(name)
    values = pa.array(change(table.column(at).to_pylist()), kind or table.schema.field(at).type)
    pq.write_table(table.set_column(at, name, values), file, row_group_size=7)


@dataclass(frozen=True)
class Places:
    """Samples and a feature store below one folder, and the settings of a small, quick run on them."""

    folder: Path

    def settings(self, **changes: Any) -> list[str]:
        """`section.field=value` of every setting; a change is written `section__field`."""
        settings: dict[str, Any] = {
            "data.samples": self.folder / "samples",
            "data.store": self.folder / "features",
            "data.cache_dir": self.folder / "cache",
            "data.global_batch_size": 32,
            "data.shuffle_window": 100,
            "model.embed_hidden": [8, 4],
            "model.mlp": [8, 4],
            "model.tables": "{user: 64, item: 64, image: 64, category: 16, scene: 16}",
            "model.table_shards": 4,
            "train.epochs": 2,
            "optim.lr": 0.01,
            "train.eval_batch_size": 128,
            "run.dir": self.folder / "runs",
            "run.threads": 1,
        }
        settings |= {name.replace("__", "."): value for name, value in changes.items()}
        return [f"{name}={value}" for name, value in settings.items()]


def make_places(folder: Path) -> Places:
    """200 training groups (items 0 to 39) and 60 test groups (items 0 to 49, the last ten new), features 16 wide.

    A copy of what this process has made once.
    """
    shutil.copytree(_made_once().name, folder, copy_function=shutil.copy, dirs_exist_ok=True)
    return Places(folder)


def make_days(folder: Path) -> Places:
    """The same with the third day before the last in train/, and the fourth in test/, as trainer.daily takes them."""
    places, test = make_places(folder), folder / "samples" / "test"
    (test / "day=2026-01-01.parquet").rename(test / "day=2026-01-04.parquet")
    return places


def drawn_store(folder: Path, features_ND: np.ndarray, first_key: int = 0, **info: Any) -> FeatureStore:
    """A store of features of the keys from the first one on, whose uris are item/0, item/1 and so on."""
    spec = ExtractorSpec(
        backbone="drawn", layer="none", weights_digest="0", preprocessing="none", compute_dtype="float32"
    )
    own = {"num_shards": 4, "dim": features_ND.shape[1], "dtype": "float32", "extractor": spec, **info}
    store, uris = FeatureStore.create(folder, StoreInfo(**own)), [f"item/{n}" for n in range(len(features_ND))]
    store.put(FeatureRows.of(uris, features_ND.astype(np.float32), keys=first_key + np.arange(len(uris))))
    return store


def remade(
    folder: Path, change: Callable[[np.ndarray], np.ndarray] = np.copy, like: Path | None = None, **info: Any
) -> FeatureStore:
    """Another store, of the same network, in a folder or in the place of the one there: `change` makes its features of
    those of the store there, or of that in `like`."""
    old = FeatureStore.open(like or folder)
    features_ND = change(old.snapshot().get(1_000 + np.arange(50)))
    shutil.rmtree(folder, ignore_errors=True)
    return drawn_store(folder, features_ND, 1_000, **{**dict(old.info.kind), **info})


def permuted(features_ND: np.ndarray) -> np.ndarray:
    """The same features, each of another key."""
    return np.random.default_rng(1).permutation(features_ND)


def add_a_row(store: FeatureStore) -> None:
    """Commit a feature that no sample names: the store has another snapshot."""
    store.put(FeatureRows.of(["more"], np.ones((1, store.info.dim), np.float32), keys=[7]))


@functools.cache
def _made_once() -> "TemporaryDirectory[str]":
    made = TemporaryDirectory(prefix="places-")
    folder = Path(made.name)
    write_samples(folder / "samples" / "train", [90, 60, 50])
    write_samples(folder / "samples" / "test", [60], seed=90, items=50)
    drawn_store(folder / "features", np.random.default_rng(5).normal(size=(50, 16)), first_key=1_000)
    return made


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """One set of samples and features for all tests that only read them."""
    return make_places(tmp_path_factory.mktemp("places"))


@pytest.fixture(scope="module")
def lasting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Places with a run `a` by the settings that the module calls RUN, of which there is a copy beside them."""
    from tests.trainer.whole_runs import run_alone

    places = make_places(tmp_path_factory.mktemp("lasting") / "places")
    run_alone(places, run__name="a", **request.module.RUN)
    shutil.copytree(places.folder, places.folder.with_name("copy"))
    return places


@pytest.fixture
def own(lasting: Places) -> Iterator[Places]:
    """The same; what a test changes of them is put back, at the address that the run has recorded of its store."""
    yield lasting
    shutil.rmtree(lasting.folder)
    shutil.copytree(lasting.folder.with_name("copy"), lasting.folder)


@contextmanager
def nothing_drawn() -> Iterator[None]:
    """Within the block the plot becomes an empty file: to draw it takes most of an evaluation's time."""
    from trainer.evaluation import report

    plot = SimpleNamespace(savefig=lambda path, **_: path.touch())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "reliability", lambda *_: plot)
        yield


@pytest.fixture
def undrawn() -> Iterator[None]:
    """`nothing_drawn`, but for the fixtures of a module."""
    with nothing_drawn():
        yield


@pytest.fixture(scope="session")
def settings_of(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Settings in which much depends on the step and on each row's own count; no number of ranks divides a batch."""
    from tests.trainer.runs.resumed.legs import comparable_settings, write_schema_with_serials

    return functools.partial(comparable_settings, places, write_schema_with_serials(tmp_path_factory.mktemp("schema")))


@pytest.fixture(params=["disk", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPath:
    """Where a run may be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "a" if request.param == "disk" else run_path(f"{request.getfixturevalue('s3_url')}/runs/a")
