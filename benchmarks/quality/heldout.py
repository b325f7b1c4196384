"""Samples in which training has never seen a share of the items.

The items are shown in the test rows, and stand in histories there, as new items do in life: half
of them in the test split, by which a run may decide something (model.image_dropout), the others in a second one,
JUDGED, by which it is measured.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.quality.compare import Bench
from benchmarks.quality.data import DataSet
from benchmarks.quality.runs import Spec, curve_of
from benchmarks.report import Figure, Section
from benchmarks.seeds import seed_mean
from featurestore.keys import splitmix64
from trainer.comm import SoloComm
from trainer.samples.index import open_index
from trainer.schema.fields import load_schema

Kept = NDArray[np.bool_]
JUDGED = "judged"
"""Folder of samples below those with held-out items."""
_BEHAVIORS = ("behavior_item", "behavior_image", "behavior_category")
_IMPRESSIONS = ("ad_item", "ad_image", "ad_category", "ad_scene", "label")


def sampled(keys_N: NDArray[np.int64], share: float, seed: int) -> Kept:
    """Return which keys are in a random share of all keys, (N,): decided by key and seed alone."""
    salt = splitmix64(np.asarray([seed], np.int64))
    again_N = splitmix64((splitmix64(keys_N) ^ salt).view(np.int64))
    return (again_N >> np.uint64(11)) < np.uint64(round(share * 2**53))


def hold_out(samples: Path, out: Path, share: float, seed: int = 0) -> None:
    """Write `samples`, of the preset's schema, to `out` with `share` of all items, chosen by `seed`, not in train/.

    Half of these are shown in test/, the others in JUDGED/test/. Groups that lose all of their impressions are left
    out.
    """
    for file in _files(samples, "test"):
        item_N, seen_N = _items(file, "ad_item"), np.ones(len(_items(file, "behavior_item")), bool)
        is_known_N, is_first_N = ~sampled(item_N, share, seed), sampled(item_N, 0.5, seed + 1)
        _write(file, out / "test", is_known_N | is_first_N, seen_N)
        _write(file, out / JUDGED / "test", is_known_N | ~is_first_N, seen_N)
    for file in _files(samples, "train"):
        is_known_N = ~sampled(_items(file, "ad_item"), share, seed)
        _write(file, out / "train", is_known_N, ~sampled(_items(file, "behavior_item"), share, seed))


def _files(samples: Path, split: str) -> list[Path]:
    return sorted((samples / split).glob("*.parquet"))


def _items(file: Path, column: str) -> NDArray[np.int64]:
    """All values of a column of lists, one behind the other."""
    lists: Any = pq.read_table(file, columns=[column])[column].combine_chunks()
    found: NDArray[np.int64] = lists.flatten().to_numpy(zero_copy_only=False)
    return found


def _write(file: Path, folder: Path, shown_N: Kept, seen_N: Kept) -> None:
    """Copies a file with these of its impressions and behaviours, by row group; drops groups without impressions."""
    folder.mkdir(parents=True, exist_ok=True)
    source = pq.ParquetFile(file)
    shown, seen = 0, 0
    with pq.ParquetWriter(folder / file.name, source.schema_arrow) as writer:
        for number in range(source.num_row_groups):
            table = source.read_row_group(number)
            table, shown = _with(table, _IMPRESSIONS, shown_N, shown)
            table, seen = _with(table, _BEHAVIORS, seen_N, seen)
            has_any: Any = pc.list_value_length(table["label"]).to_numpy() > 0
            writer.write_table(table.filter(pa.array(has_any)))


def _with(table: pa.Table, columns: Sequence[str], is_kept_N: Kept, first: int) -> tuple[pa.Table, int]:
    """The table with the values kept in these lists, which lie side by side and begin at `first`; and their end."""
    sizes: Any = pc.list_value_length(table[columns[0]].combine_chunks())
    ends = np.cumsum(sizes.to_numpy(zero_copy_only=False))
    own_N = is_kept_N[first : first + ends[-1]]
    offsets = pa.array(np.r_[0, np.cumsum(own_N)][np.r_[0, ends]], pa.int32())
    for name in columns:
        kept: Any = table[name].combine_chunks()
        column = pa.ListArray.from_arrays(
            offsets, kept.flatten().filter(pa.array(own_N)), type=table.schema.field(name).type
        )
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
    return table, first + int(ends[-1])


SHARE, EPOCHS = 0.2, 2
METRIC = "judged_auc"
_DIGITS = 16


def cold_section(bench: Bench) -> list[Section]:
    """Measure the AUC of items held out with images and with IDs alone; of ours, Embedding&MLP."""
    data = [each for each in bench.data if each.store]
    task = bench.progress.add_task("items held out", total=2 * len(data) * len(bench.seeds))
    figures: dict[str, Figure] = {}
    grid: dict[str, dict[str, Figure]] = {}
    gains: list[float] = []
    key = "cold_auc_images_minus_ids"
    for each in data:
        aucs: dict[str, list[float]] = {}
        for name, spec in specs(bench, each).items():
            for seed in bench.seeds:
                bench.progress.update(task, description=f"{each.name}, {name}")
                aucs.setdefault(name, []).append(float(curve_of(replace(spec, seed=seed), bench.folder)[-1][METRIC]))
                bench.progress.advance(task)
        grid[f"cold_auc_{each.name}"] = {name: seed_mean(found).mean for name, found in aucs.items()}
        gain = seed_mean([a - b for a, b in zip(aucs["images"], aucs["ids"], strict=True)])
        gains.append(gain.mean)
        figures |= {f"{key}_{each.name}": gain.mean, f"{key}_{each.name}_half_width": gain.half_width}
    worst: dict[str, Figure] = {key: min(gains)} if gains else {}
    return [Section("items held out: AUC with images minus IDs only", worst | figures, grid)]


def specs(bench: Bench, data: DataSet) -> Mapping[str, Spec]:
    """List the runs of a data set by name; make their samples unless they are there."""
    index = open_index(SoloComm(), data.samples, "train", load_schema())  # other samples may have had this name
    folder = bench.folder / "held-out" / f"{data.name}-{index.layout_digest[:_DIGITS]}"
    if not folder.exists():
        part = folder.with_suffix(".part")  # what is there under its own name is whole
        shutil.rmtree(part, ignore_errors=True)
        hold_out(Path(data.samples), part, SHARE)
        part.rename(folder)
    spec = replace(bench.spec(data, "ours", "dnn", images=False), epochs=EPOCHS)
    ids = replace(spec, samples=str(folder), judged=str(folder / JUDGED))
    return {"ids": ids, "images": replace(ids, store=data.store)}
