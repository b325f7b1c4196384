"""What is measured: the variants, where and for how long each of them runs, and the figures that come of it."""

import statistics
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.report import Figure, Section
from benchmarks.train.runs import Launcher, Outcome, Rounds, Run, check_losses, rounds_of
from benchmarks.workload import Workload

_CHECKED_STEPS = 3
_SAME_MODEL = (("ours", "compute", "worker", "worker_grouped"), ("ours_2_ranks", "server"))
_MEMORY_SAMPLES = 600  # the steps continue into a third epoch
FUXICTR = ("fuxictr", "fuxictr_grouped")
SECTIONS = ("traffic", "memory", "compact")
VARIANTS = (*_SAME_MODEL[0], "ours_large_batch", *_SAME_MODEL[1], *FUXICTR)
PAPER_RANKS = 20
_KEY_BYTES = 8
_BF16_BYTES = 2
_PARTS = ("step.keys", "step.vectors", "step.gradients", "step.dense")


@dataclass(frozen=True)
class Bench:
    """What all sections share.

    `steps`: of a run of the trainer at one rank; slower variants make fewer. `dims`: numbers of a compact row.
    """

    workload: Workload
    scratch: Path
    rounds: int
    steps: int
    memory_steps: int
    dims: int
    settings: Sequence[str]
    progress: Progress

    def launcher(self, ranks: int) -> Launcher:
        """Return what starts a number of ranks on this host."""
        return Launcher(self.workload, self.scratch, ranks)

    @property
    def steps_2_ranks(self) -> int:
        """The steps of the trainer on two ranks: as many samples as at one rank."""
        return max(3, self.steps // 2)

    def variants(self) -> dict[str, Run]:
        """Return all variants that take part in the rounds, by name."""
        one, two, few = self.launcher(1), self.launcher(2), max(3, self.steps // 3)
        large = [*self.workload.settings(2), *self.settings]
        runs: dict[str, Run] = {
            "ours": lambda: one.trainer("ours", self.steps, self.settings),
            "ours_large_batch": lambda: one.trainer("ours", self.steps_2_ranks, large),
            "compute": lambda: one.peer("compute", max(3, self.steps // 2), self.settings),
            "worker": lambda: one.peer("worker", few, self.settings),
            "worker_grouped": lambda: one.peer("worker_grouped", few, self.settings),
            "ours_2_ranks": lambda: two.trainer("ours", self.steps_2_ranks, self.settings),
            "server": lambda: two.peer("server", self.steps_2_ranks, self.settings),
        }
        if (python := fuxictr_python()).exists():
            runs |= {name: partial(one.peer, name, few, self.settings, python=str(python)) for name in FUXICTR}
        return runs


def fuxictr_python() -> Path:
    """Find the interpreter of the environment that tools/install_for.sh makes for FuxiCTR."""
    return Path(sys.prefix) / "fuxictr" / "bin" / f"python{sysconfig.get_python_version()}"


def measure(bench: Bench, only: Sequence[str]) -> list[Section]:
    """Measure all sections, or those of `only`, the headline first. Raises RunFailedError, DifferentLossesError."""
    chosen = {name: run for name, run in bench.variants().items() if not only or name in only}
    checked = _checked(bench, chosen)
    rounds = rounds_of(chosen, bench.rounds, bench.progress, "rounds")
    for same in _SAME_MODEL:
        check_losses(rounds.outcomes | checked, same)
    sections = [Section("samples per second", beside(rounds), rounds.grid())]
    wanted = [name for name in SECTIONS if not only or name in only]
    if "traffic" in wanted:
        sections.append(_traffic(bench))
    if "memory" in wanted:
        sections.append(memory_section(bench, rounds))
    if "compact" in wanted:
        sections.append(compact_section(bench))
    found = {name: value for section in sections for name, value in section.flat().items()}
    return [Section("headline", headline(rounds, found)), *sections]


def headline(rounds: Rounds, found: Mapping[str, Figure]) -> dict[str, Figure]:
    """Return the figures that have a target."""
    return {
        "step_vs_compute": rounds.ratio("compute", "ours"),
        "two_ranks_vs_one": rounds.ratio("ours_2_ranks", "ours"),
        "vs_store_in_worker": rounds.ratio("ours", "worker"),
        "vs_store_in_server": rounds.ratio("ours_2_ranks", "server"),
        "vs_fuxictr": rounds.ratio("ours", "fuxictr"),
        "image_bytes_reduction": found.get("image_bytes_reduction"),
        "rss_over_features_gb": found.get("rss_over_features_gb"),
        "samples_per_s": rounds.speed("ours") if "ours" in rounds else None,
    }


def beside(rounds: Rounds) -> dict[str, Figure]:
    """Return what to read next to the headline: the same ratios under conditions that are less kind to us."""
    figures = {
        "two_ranks_vs_one_of_the_same_batch": rounds.ratio("ours_2_ranks", "ours_large_batch"),
        "vs_store_in_worker_grouped": rounds.ratio("ours", "worker_grouped"),
        "vs_fuxictr_grouped": rounds.ratio("ours", "fuxictr_grouped"),
    }
    return {name: value for name, value in figures.items() if value is not None}


def memory_section(bench: Bench, rounds: Rounds) -> Section:
    """Measure the memory of the largest rank, without its features, and what it grows by in many small steps."""
    steps = bench.memory_steps
    small = [*bench.settings, f"data.global_batch_size={_MEMORY_SAMPLES}"]
    task = bench.progress.add_task("memory", total=None)
    sizes = bench.launcher(1).trainer("memory", steps, small).resident_bytes
    bench.progress.update(task, total=1, completed=1)
    fifth = max(1, len(sizes) // 5)
    growth = statistics.mean(sizes[-fifth:]) - statistics.mean(sizes[2 * fifth : 3 * fifth] or sizes)
    over = [
        max(outcome.resident_bytes) - bench.workload.store_bytes / ranks
        for name, ranks in (("ours", 1), ("ours_2_ranks", 2))
        for outcome in (rounds.outcomes[name] if name in rounds else ())
    ]
    worst = max([*over, max(sizes) - bench.workload.store_bytes])
    return Section("memory", {"rss_over_features_gb": worst / 1e9, f"rss_growth_mb_{steps}_steps": growth / 1e6})


def compact_section(bench: Bench) -> Section:
    """Measure the trainer on compact rows over the full width, and over its own products and FuxiCTR on the same rows.

    What compact rows keep of GAUC is a table of stores (benchmarks/tables/beyond.yaml).
    """
    from featurestore.store import FeatureStore
    from featurestore.upkeep.remake import remake

    place = bench.workload.folder / f"features-{bench.dims}-bfloat16"
    report = remake(FeatureStore.open(bench.workload.store), place, dims=bench.dims, dtype="bfloat16")
    one, few, compact = bench.launcher(1), max(3, bench.steps // 2), [*bench.settings, f"data.store={place}"]
    runs: dict[str, Run] = {
        "full": partial(one.trainer, "full", bench.steps, bench.settings),
        "compact": partial(one.trainer, "compact", bench.steps, compact),
        "compute": partial(one.peer, "compute", few, compact),
    }
    if (python := fuxictr_python()).exists():
        runs |= {name: partial(one.peer, name, few, compact, python=str(python)) for name in FUXICTR}
    checked = one.trainer("check", _CHECKED_STEPS, [*compact, "train.log_every=1"])
    rounds = rounds_of(runs, bench.rounds, bench.progress, "compact rows")
    check_losses({**rounds.outcomes, "compact": [checked]}, ("compact", "compute"))
    figures: dict[str, Figure] = {
        "compact_vs_full": rounds.ratio("compact", "full"),
        "step_vs_compute_compact": rounds.ratio("compute", "compact"),
        "samples_per_s_compact": rounds.speed("compact"),
        "vs_fuxictr_compact": rounds.ratio("compact", "fuxictr"),
        "vs_fuxictr_compact_grouped": rounds.ratio("compact", "fuxictr_grouped"),
        "compact_bytes_share": report.row_bytes_share,
        "compact_files_share": report.bytes / report.source_bytes,
    }
    return Section(f"rows of {bench.dims} numbers", figures, rounds.grid(), prefix="compact_rows_")


def _traffic(bench: Bench) -> Section:
    two = bench.launcher(2)
    task = bench.progress.add_task("bytes on the wire", total=None)
    both = two.trainer("both", 3, bench.settings).report
    none = two.trainer("none", 3, [*bench.settings, "model.images=none"]).report
    bench.progress.update(task, total=1, completed=1)
    return traffic_section(both, none, bench.workload.knobs.dim)


def traffic_section(both: Mapping[str, Any], none: Mapping[str, Any], dim: int) -> Section:
    """Make the table of bytes of a global batch of 20 ranks (the paper's table 2) of what two ranks sent by collective.

    `both`, `none`: reports of a run with images, and of one that differs in having IDs alone: the keys asked, the
    vectors that came, their gradients. All are counted at the ranks' Comm.

    An image that a rank asks of another costs our exchange a key, a vector and a gradient. The paper counts keys with
    the IDs, so `image_bytes_reduction` leaves them out on both sides; `..._with_keys` has them on both. Dense gradients
    go around the ranks in a ring, whatever the alternative.
    """
    ranks = int(both["num_ranks"])
    assert ranks == int(none["num_ranks"]) > 1
    with_images, ids = _parts(both), _parts(none)
    images = {part: with_images[part] - ids[part] for part in _PARTS}
    asked = images["step.keys"] / _KEY_BYTES  # of others, over all ranks
    vector_bytes = (images["step.vectors"] + images["step.gradients"]) / asked
    # A rank asks others for (P - 1) / P of its different images, and there are more ranks.
    scale = PAPER_RANKS / ranks * ((PAPER_RANKS - 1) / PAPER_RANKS) / ((ranks - 1) / ranks)
    asked_20, references_20 = asked * scale, both["image_references_per_step"] / ranks * PAPER_RANKS
    feature_bytes = dim * _BF16_BYTES
    id_bytes = scale * sum(ids[part] for part in ("step.keys", "step.vectors", "step.gradients"))
    dense_bytes = with_images["step.dense"] * (PAPER_RANKS - 1) / (ranks - 1)  # a ring: 2 (P - 1) times, over all ranks
    figures: dict[str, Figure] = {
        "image_bytes_reduction": feature_bytes / vector_bytes,
        "image_bytes_reduction_with_keys": (feature_bytes + _KEY_BYTES) / (vector_bytes + _KEY_BYTES),
        "images_asked_of_others_per_rank": asked_20 / PAPER_RANKS,
        "measured_bytes_per_step_2_ranks": sum(with_images.values()),
    }
    grid: dict[str, dict[str, Figure]] = {
        "ours": _row(asked_20 * vector_bytes, asked_20, id_bytes, dense_bytes),
        "store_in_server": _row(asked_20 * feature_bytes, asked_20, id_bytes, dense_bytes),
        "store_in_worker": _row(references_20 * feature_bytes, 0, id_bytes, dense_bytes),
    }
    return Section(f"MB of one global batch of {PAPER_RANKS} ranks", figures, grid, prefix="mb_20_ranks_")


def _row(image_bytes: float, asked: float, id_bytes: float, dense_bytes: float) -> dict[str, Figure]:
    return {
        "images": image_bytes / 1e6,
        "image_keys": asked * _KEY_BYTES / 1e6,
        "ids": id_bytes / 1e6,
        "dense": dense_bytes / 1e6,
        "all": (image_bytes + asked * _KEY_BYTES + id_bytes + dense_bytes) / 1e6,
    }


def _parts(report: Mapping[str, Any]) -> dict[str, float]:
    """Bytes per step by the first two parts of the collectives' names."""
    sums = dict.fromkeys(_PARTS, 0.0)
    for name, sent in report["bytes_by_collective_per_step"].items():
        part = ".".join(name.split(".")[:2])
        if part in sums:
            sums[part] += sent
    return sums


def _checked(bench: Bench, chosen: Mapping[str, Run]) -> dict[str, list[Outcome]]:
    """Short runs of the trainer that log every loss; the first also builds the cache of the store."""
    every, checked = [*bench.settings, "train.log_every=1"], {}
    task = bench.progress.add_task("first losses, and the cache of the store", total=2)
    for name, ranks in (("ours", 1), ("ours_2_ranks", 2)):
        if ranks == 1 or any(other in chosen for other in _SAME_MODEL[1]):
            checked[name] = [bench.launcher(ranks).trainer("check", _CHECKED_STEPS, every)]
        bench.progress.advance(task)
    return checked
