"""The paper-shaped workload: sample groups in Parquet, a schema with 27 ID fields, and a feature store, made once.

python -m benchmarks.workload --out data/bench/workload

A group is a user with the images that they looked at and a few impressions that share them. Images are as popular as
Zipf's law says. Features are drawn; a number hidden in the feature of an ad's image makes a click likelier, so that
there is something to learn. Letters of shapes: N images, G groups, B impressions, L behaviours, F ID fields.
"""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from numpy.typing import NDArray
from rich.progress import Progress

from benchmarks.problems import Problem
from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import print_summary, progress_bars
from featurestore.keys import keys_of_uris, shard_of
from trainer.errors import TrainerError

Int64 = NDArray[np.int64]

_SIGNAL_DIMS = 256
_CATEGORIES, _SCENES = 2000, 40
# Four ID fields of each side are in every log; the attributes make 27 of them.
_USER_ATTRIBUTES, _AD_ATTRIBUTES = 10, 9


class WorkloadError(TrainerError):
    """The folder cannot take the workload."""


@dataclass(frozen=True)
class Knobs:
    """Everything that the files depend on; the defaults are the paper's proportions for a small machine."""

    images: int = 100_000
    dim: int = 4096
    samples_per_rank: int = 3000
    steps: int = 40
    """Steps of one rank that an epoch of the training samples has."""
    test_samples: int = 3000
    behaviors: int = 33
    impressions: int = 5
    """Of a group."""
    zipf: float = 0.8
    """Image number i, from 1, is seen in proportion to i to the power of minus this."""
    users: int = 40_000
    shards: int = 64
    row_group: int = 600
    """Groups of a Parquet row group."""
    seed: int = 0


@dataclass(frozen=True)
class Workload:
    """Where the files of a workload lie."""

    folder: Path
    knobs: Knobs

    @property
    def samples(self) -> Path:
        """With train/*.parquet and test/*.parquet."""
        return self.folder / "samples"

    @property
    def store(self) -> Path:
        return self.folder / "features"

    @property
    def config(self) -> Path:
        """Settings of the trainer for one rank; more ranks take `settings`."""
        return self.folder / "config.yaml"

    def settings(self, num_ranks: int) -> list[str]:
        """List the settings over `config`: the global batch of that number of ranks."""
        return [f"data.global_batch_size={self.knobs.samples_per_rank * num_ranks}"]

    @cached_property
    def keys(self) -> Int64:
        """The key of each image, (N,), the most popular first."""
        return keys_of_uris([f"{number}.jpg" for number in range(self.knobs.images)])


def make(folder: Path, knobs: Knobs, progress: Progress) -> Workload:
    """Write the workload, or take the one that is there with the same knobs; one with others is replaced.

    Memory: two shards of features, and a file of samples. Raises WorkloadError where the folder holds other things.
    """
    workload, mark = Workload(folder.absolute(), knobs), folder / "workload.json"
    wanted = json.dumps(asdict(knobs), indent=2) + "\n"
    if mark.exists() and mark.read_text() == wanted:
        return workload
    if mark.exists():
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise WorkloadError(Problem.NOT_A_WORKLOAD, folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text("{}\n")  # what a killed run left is made again
    _write_store(workload, progress)
    _write_samples(workload, progress)
    (folder / "schema.yaml").write_text(yaml.safe_dump(_schema(), sort_keys=False))
    workload.config.write_text(yaml.safe_dump(_config(workload), sort_keys=False))
    mark.write_text(wanted)
    return workload


def _schema() -> dict[str, Any]:
    """27 ID fields, the ids of images among them, and the images of both sides."""

    def field(name: str, side: str, kind: str = "id", **more: str) -> dict[str, str]:
        return {"name": name, "side": side, "kind": kind, **more}

    return {
        "label": "label",
        "group": "user",
        "new_ad_field": "ad_item",
        "fields": [
            field("user", "user"),
            field("behavior_item", "user", "multi_id", table="item"),
            field("behavior_category", "user", "multi_id", table="category"),
            field("behavior_image_id", "user", "multi_id", table="image", column="behavior_image"),
            *(field(f"user_{each}", "user") for each in range(_USER_ATTRIBUTES)),
            field("ad_item", "ad", table="item"),
            field("ad_category", "ad", table="category"),
            field("ad_scene", "ad", table="scene"),
            field("ad_image_id", "ad", table="image", column="ad_image"),
            *(field(f"ad_{each}", "ad") for each in range(_AD_ATTRIBUTES)),
            field("behavior_image", "user", "content", store="images"),
            field("ad_image", "ad", "content", store="images"),
        ],
    }


def _config(workload: Workload) -> dict[str, Any]:
    """The preset's model with sum pooling; every attribute has a table of its own."""
    knobs = workload.knobs
    attributes = {f"user_{n}": _values_of(n) for n in range(_USER_ATTRIBUTES)}
    attributes |= {f"ad_{n}": _values_of(n) for n in range(_AD_ATTRIBUTES)}
    tables = {
        "user": knobs.users,
        "item": knobs.images,
        "image": knobs.images,
        "category": _CATEGORIES,
        "scene": _SCENES,
    }
    return {
        "data": {
            "samples": str(workload.samples),
            "store": str(workload.store),
            "cache_dir": str(workload.folder / "cache"),
            "schema_file": str(workload.folder / "schema.yaml"),
            "global_batch_size": knobs.samples_per_rank,
            "shuffle_window": 8 * knobs.samples_per_rank,
        },
        "model": {"pooling": "sum", "tables": {name: 2 * rows for name, rows in (tables | attributes).items()}},
        "train": {"eval_batch_size": knobs.samples_per_rank},
        "run": {"dir": str(workload.folder / "runs"), "device": "cpu"},
    }


def _values_of(attribute: int) -> int:
    """Distinct values of an attribute: few of some, thousands of others."""
    return 4 * int(3**attribute)


def _write_store(workload: Workload, progress: Progress) -> None:
    from featurestore import ExtractorSpec, FeatureRows, FeatureStore, StoreInfo, to_bits

    knobs = workload.knobs
    drawn = ExtractorSpec(
        backbone="drawn", layer="none", weights_digest="none", preprocessing="none", compute_dtype="bfloat16"
    )
    store = FeatureStore.create(str(workload.store), StoreInfo(num_shards=knobs.shards, dim=knobs.dim, extractor=drawn))
    shard_N, hidden_N = shard_of(workload.keys, knobs.shards), _hidden(knobs)

    def put(shard: int) -> None:
        numbers_M = np.flatnonzero(shard_N == shard)
        draw = np.random.default_rng([knobs.seed, 1, shard])
        values_MD = draw.standard_normal((len(numbers_M), knobs.dim), dtype=np.float32)
        values_MD[:, :_SIGNAL_DIMS] += hidden_N[numbers_M, None]
        np.maximum(values_MD, 0, out=values_MD)  # half of the numbers are 0, as behind a ReLU
        uris = [f"{number}.jpg" for number in numbers_M]
        store.put(FeatureRows.of(uris, to_bits(values_MD, "bfloat16"), keys=workload.keys[numbers_M]))

    shards = np.unique(shard_N).tolist()
    with ThreadPoolExecutor(2) as pool:
        for _ in progress.track(pool.map(put, shards), total=len(shards), description="write features"):
            pass


def _hidden(knobs: Knobs) -> NDArray[np.float32]:
    """What the feature of an image says of its clicks, (N,)."""
    return np.random.default_rng([knobs.seed, 2]).standard_normal(knobs.images, dtype=np.float32)


def _write_samples(workload: Workload, progress: Progress) -> None:
    import pyarrow.parquet as pq

    knobs = workload.knobs
    for split, samples in (("train", knobs.samples_per_rank * knobs.steps), ("test", knobs.test_samples)):
        folder = workload.samples / split
        folder.mkdir(parents=True)
        pieces = list(_pieces(-(-samples // knobs.impressions), 8 * knobs.row_group))
        for number, groups in enumerate(progress.track(pieces, description=f"write {split} samples")):
            table = _sample_table(workload, groups, np.random.default_rng([knobs.seed, 3, len(split), number]))
            pq.write_table(table, folder / f"part-{number:04d}.parquet", row_group_size=knobs.row_group)


def _pieces(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)


def _sample_table(workload: Workload, groups: int, draw: np.random.Generator) -> Any:
    import pyarrow as pa

    knobs = workload.knobs
    popularity = np.cumsum(np.arange(1, knobs.images + 1, dtype=np.float64) ** -knobs.zipf)

    def images(count: int) -> Any:
        return np.searchsorted(popularity, draw.random(count) * popularity[-1])

    seen, ads = images(groups * knobs.behaviors), images(groups * knobs.impressions)
    chance_B = 1 / (1 + np.exp(1.0 - 1.5 * _hidden(knobs)[ads]))

    def lists(values: Any, size: int) -> Any:
        return pa.ListArray.from_arrays(pa.array(np.arange(groups + 1) * size, pa.int32()), pa.array(values))

    of_user = {f"user_{n}": draw.integers(0, _values_of(n), groups) for n in range(_USER_ATTRIBUTES)}
    of_ad = {
        f"ad_{n}": lists(draw.integers(0, _values_of(n), len(ads)), knobs.impressions) for n in range(_AD_ATTRIBUTES)
    }
    columns: dict[str, Any] = {
        "user": draw.integers(0, knobs.users, groups),
        **of_user,
        "behavior_item": lists(seen, knobs.behaviors),
        "behavior_image": lists(workload.keys[seen], knobs.behaviors),
        "behavior_category": lists(seen % _CATEGORIES, knobs.behaviors),
        "ad_item": lists(ads, knobs.impressions),
        "ad_image": lists(workload.keys[ads], knobs.impressions),
        "ad_category": lists(ads % _CATEGORIES, knobs.impressions),
        "ad_scene": lists(draw.integers(0, _SCENES, len(ads)), knobs.impressions),
        **of_ad,
        "label": lists((draw.random(len(ads)) < chance_B).astype(np.int8), knobs.impressions),
    }
    return pa.table(columns)


app = CommandApp(report=True, failures=(OSError,))


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for the workload; about 9 kB per image, twice once it was used.")],
    images: Annotated[int, typer.Option(min=100)] = Knobs.images,
    dim: Annotated[int, typer.Option(help="Width of a feature.", min=2)] = Knobs.dim,
    samples_per_rank: Annotated[int, typer.Option(help="Of a step.", min=1)] = Knobs.samples_per_rank,
    steps: Annotated[int, typer.Option(help="Of one rank in an epoch.", min=1)] = Knobs.steps,
    test_samples: Annotated[int, typer.Option(min=1)] = Knobs.test_samples,
    seed: Annotated[int, typer.Option(min=0)] = Knobs.seed,
) -> None:
    """Write a paper-shaped workload, or find that it is there.

    Then: python -m trainer.main --config OUT/config.yaml
    """
    knobs = Knobs(images, dim, samples_per_rank, steps, test_samples, seed=seed)
    with progress_bars() as progress:
        workload = make(out, knobs, progress)
    print_summary(f"{workload.config}")


if __name__ == "__main__":
    run_app(app)
