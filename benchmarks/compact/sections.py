"""Figures of compact features: speed and bytes against the full width."""

from functools import partial
from pathlib import Path

from rich.progress import Progress

from benchmarks.report import Figure, Section
from benchmarks.train.launch import Launcher
from benchmarks.train.rounds import Run, check_losses, interleaved
from benchmarks.train.sections import FUXICTR, fuxictr_python
from benchmarks.workload import Workload
from featurestore.store import FeatureStore
from featurestore.upkeep.remake import remake

SAME_STEPS = ("compute", "compute_from_numbers")
"""E and the worker model in isolation: what no step can be shorter than."""
_CHECKED_STEPS = 3


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
