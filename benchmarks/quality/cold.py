"""Items that training has never or seldom seen: what images bring there."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from benchmarks.quality.compare import Bench
from benchmarks.quality.data import DataSet
from benchmarks.quality.heldout import JUDGED, hold_out, make_rare
from benchmarks.quality.runs import Spec, curve_of
from benchmarks.report import Figure, Section
from benchmarks.seeds import seed_mean
from trainer.comm import SoloComm
from trainer.samples.index import open_index
from trainer.schema import load_schema

SHARE, EPOCHS, RARE = 0.2, 2, 10
METRICS = {"cold": "judged_auc", "rare": "auc"}
"""Of the items held out, and of those with 1 to RARE training impressions."""
_DIGITS = 16


def cold_section(bench: Bench) -> list[Section]:
    """Measure the AUC of items held out, and of seldom seen ones, with images and with IDs alone.

    Ours, Embedding&MLP.
    """
    data = [each for each in bench.data if each.store]
    task = bench.progress.add_task("items held out", total=2 * len(METRICS) * len(data) * len(bench.seeds))
    figures: dict[str, Figure] = {}
    grid: dict[str, dict[str, Figure]] = {}
    gains: dict[str, list[float]] = {}
    for each in data:
        aucs: dict[tuple[str, str], list[float]] = {}
        for (case, name), spec in specs(bench, each).items():
            for seed in bench.seeds:
                bench.progress.update(task, description=f"{each.name}, {case} items, {name}")
                last = curve_of(replace(spec, seed=seed), bench.folder)[-1]
                aucs.setdefault((case, name), []).append(float(last[METRICS[case]]))
                bench.progress.advance(task)
        for (case, name), found in aucs.items():
            grid.setdefault(f"{case}_auc_{each.name}", {})[name] = seed_mean(found).mean
            if name != "ids":
                gain = seed_mean([a - b for a, b in zip(found, aucs[case, "ids"], strict=True)])
                key = f"{case}_auc_{name}_minus_ids"
                gains.setdefault(key, []).append(gain.mean)
                figures |= {f"{key}_{each.name}": gain.mean, f"{key}_{each.name}_half_width": gain.half_width}
    worst: dict[str, Figure] = {key: min(found) for key, found in gains.items()}
    return [Section("items held out, or seldom seen: AUC with images minus IDs only", worst | figures, grid)]


def specs(bench: Bench, data: DataSet) -> Mapping[tuple[str, str], Spec]:
    """List the runs of a data set by case and name; make their samples unless they are there."""
    index = open_index(SoloComm(), data.samples, "train", load_schema())  # other samples may have had this name
    folder = bench.folder / "held-out" / f"{data.name}-{index.layout_digest[:_DIGITS]}"
    made = _made(Path(data.samples), folder)
    spec = replace(bench.spec(data, "ours", "dnn", images=False), epochs=EPOCHS)
    cold, rare = (replace(spec, samples=str(made[case])) for case in METRICS)
    cold = replace(cold, judged=str(made["cold"] / JUDGED))
    return {
        ("cold", "ids"): cold,
        ("cold", "images"): replace(cold, store=data.store),
        ("rare", "ids"): rare,
        ("rare", "images"): replace(rare, store=data.store),
    }


def _made(samples: Path, folder: Path) -> Mapping[str, Path]:
    """Each is written under another name first: what is there is whole."""
    makers: Mapping[str, Callable[[Path], None]] = {
        "cold": lambda out: hold_out(samples, out, SHARE),
        "rare": lambda out: make_rare(samples, out, SHARE, RARE),
    }
    for name, make in makers.items():
        if not (folder / name).exists():
            part = folder / f"{name}.part"
            shutil.rmtree(part, ignore_errors=True)
            make(part)
            part.rename(folder / name)
    return {name: folder / name for name in makers}
