"""Items that training has never seen: what images bring there, and what features that say nothing take away."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from benchmarks.quality.compare import Bench
from benchmarks.quality.data import DataSet
from benchmarks.quality.heldout import hold_out, make_noise
from benchmarks.quality.runs import Spec, curve_of
from benchmarks.report import Figure, Section
from trainer.comm import SoloComm
from trainer.experiments.tables import seed_mean
from trainer.samples.reader import open_index
from trainer.schema import load_schema

SHARE, EPOCHS = 0.2, 2
_DIGITS = 16


def cold_section(bench: Bench) -> list[Section]:
    """AUC of held-out items, with images, with features that are drawn, and with IDs alone; ours, Embedding&MLP."""
    data = [each for each in bench.data if each.store]
    task = bench.progress.add_task("held-out items", total=3 * len(data) * len(bench.seeds))
    figures: dict[str, Figure] = {}
    grid: dict[str, dict[str, Figure]] = {}
    gains: dict[str, list[float]] = {"images": [], "noise": []}
    for each in data:
        aucs: dict[str, list[float]] = {}
        for name, spec in specs(bench, each).items():
            for seed in bench.seeds:
                bench.progress.update(task, description=f"{each.name}, held-out items, {name}")
                last = curve_of(replace(spec, seed=seed), bench.folder)[-1]
                aucs.setdefault(name, []).append(float(last["new_ad_auc"]))
                bench.progress.advance(task)
        grid[each.name] = {name: seed_mean(values).mean for name, values in aucs.items()}
        for name, found in gains.items():
            gain = seed_mean([a - b for a, b in zip(aucs[name], aucs["ids"], strict=True)])
            found.append(gain.mean)
            figures[f"cold_auc_{name}_minus_ids_{each.name}"] = gain.mean
            figures[f"cold_auc_{name}_minus_ids_{each.name}_half_width"] = gain.half_width
    worst: dict[str, Figure] = {f"cold_auc_{name}_minus_ids": min(found, default=None) for name, found in gains.items()}
    return [Section("held-out items: AUC with images minus IDs only", worst | figures, grid, "cold_auc_")]


def specs(bench: Bench, data: DataSet) -> Mapping[str, Spec]:
    """The runs of a data set by name; makes its held-out samples and its store of noise unless they are there."""
    index = open_index(SoloComm(), data.samples, "train", load_schema())  # other samples may have had this name
    folder = bench.folder / "heldout" / f"{data.name}-{index.layout_digest[:_DIGITS]}"
    samples, noise = _made(Path(data.samples), folder)
    held_out = replace(data, samples=str(samples))
    spec = replace(bench.spec(held_out, "ours", "dnn", images=False), epochs=EPOCHS)
    stores = {"ids": None, "images": data.store, "noise": str(noise)}
    return {name: replace(spec, store=store) for name, store in stores.items()}


def _made(samples: Path, folder: Path) -> tuple[Path, Path]:
    """Both are written under another name first: what is there is whole."""
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        hold_out(samples, part / "samples", SHARE)
        make_noise(samples, part / "noise")
        part.rename(folder)
    return folder / "samples", folder / "noise"
