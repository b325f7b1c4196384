"""Figures of compact features: speed and bytes against the full width, and what a table of experiments says of GAUC."""

from functools import partial
from pathlib import Path

from rich.progress import Progress

from benchmarks.report import Figure, Section
from benchmarks.train.launch import Launcher
from benchmarks.train.rounds import Run, check_losses, interleaved
from benchmarks.train.sections import FUXICTR, fuxictr_python
from benchmarks.workload import Workload
from featurestore.errors import UserError
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from featurestore.text import DType
from featurestore.upkeep.remake import read_report, remake
from trainer.experiments.grid import experiments
from trainer.experiments.results import read
from trainer.experiments.tables import SeedMean, seed_mean

SAME_STEPS = ("compute", "compute_from_numbers")
"""E and the worker model in isolation: what no step can be shorter than."""
_CHECKED_STEPS = 3
MOST_BYTES = 1 / 8  # of the full width's: the gap of GAUC is that of rows which take no more


def speed_sections(
    workload: Workload, scratch: Path, dims: int, rounds: int, steps: int, progress: Progress
) -> list[Section]:
    """Reduce the workload's store, and train on it and on the compact one in turn."""
    full = FeatureStore.open(workload.store)
    place = workload.folder / f"features-{dims}-bfloat16"
    report = remake(full, place, dims=dims, dtype="bfloat16")
    launcher = Launcher(workload, scratch)
    compact = [f"data.store={place}"]
    variants: dict[str, Run] = {
        "full": partial(launcher.trainer, "full", steps),
        "bfloat16": partial(launcher.trainer, "bfloat16", steps, compact),
    }
    for name in SAME_STEPS:
        variants[name] = partial(launcher.peer, name, max(3, steps // 2), compact)
    if (python := fuxictr_python()).exists():
        for name in FUXICTR:
            variants[name] = partial(launcher.peer, name, max(3, steps // 2), compact, python=str(python))
    checked = launcher.trainer("check", _CHECKED_STEPS, [*compact, "train.log_every=1"])
    timed = interleaved(variants, rounds, progress, "train")
    check_losses({**timed.outcomes, "bfloat16": [checked]}, ("bfloat16", *SAME_STEPS))
    figures: dict[str, Figure] = {
        "compact_vs_full": timed.ratio("bfloat16", "full"),
        "step_vs_compute_compact": timed.ratio("compute", "bfloat16"),
        "step_vs_compute_compact_from_numbers": timed.ratio("compute_from_numbers", "bfloat16"),
        "samples_per_s_compact": timed.speed("bfloat16"),
        "vs_fuxictr_compact": timed.ratio("bfloat16", "fuxictr"),
        "vs_fuxictr_compact_grouped": timed.ratio("bfloat16", "fuxictr_grouped"),
        "compact_bytes_share": report.row_bytes_share,
        "compact_files_share": report.bytes / report.source_bytes,
    }
    return [Section("speed and bytes", figures, timed.grid())]


def gauc_section(path: Path) -> Section:
    """Compare GAUC of compact features with that of the full width, paired by seed, from a table of experiments.

    The gap is what the best width loses among those whose rows take at most an eighth of the bytes, with half of its
    95 % interval beside it. Raises UserError where the table is not there.
    """
    runs = read(path.parent).get("compact")
    if runs is None:
        raise UserError(f"{path} has no table compact: make it with `python -m trainer.experiments compact`")
    name, full = path.absolute().parent.parent.name, [each["gauc"] for each in runs["full width"]]
    grid: dict[str, dict[str, Figure]] = {}
    small: dict[str, SeedMean] = {}
    for variant in experiments()["compact"].variants:
        if variant.name not in runs:
            continue
        gauc = [each["gauc"] for each in runs[variant.name]]
        gap = seed_mean([a - b for a, b in zip(full, gauc, strict=True)])
        share = 1.0 if variant.reduced is None else _share(path.parent, *variant.reduced)
        grid[variant.name] = {"gauc": seed_mean(gauc).mean, "gap": gap.mean, "interval": gap.half_width, "bytes": share}
        if share <= MOST_BYTES:
            small[variant.name] = gap
    if not small:
        return Section(f"GAUC, {name}", {}, grid, f"{name}_")
    best = min(small, key=lambda each: small[each].mean)
    figures: dict[str, Figure] = {
        f"compact_gauc_gap_{name}": small[best].mean,
        f"compact_gauc_gap_interval_{name}": small[best].half_width,
        f"compact_gauc_gap_of_{name}": best,
    }
    return Section(f"GAUC, {name}", figures, grid, f"{name}_")


def _share(folder: Path, dims: int, dtype: DType) -> float:
    """Divide the bytes of a compact row by those of a full one, as the store of the experiments has it."""
    for place in sorted((folder / "stores").glob(f"*-{dims}-{dtype}")):
        if (report := read_report(Storage(place))) is not None:
            return report.row_bytes_share
    raise UserError(f"{folder}/stores lacks the store of {dims} components in {dtype} that the table was made of")
