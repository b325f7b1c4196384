"""Small batches: the trainer against FuxiCTR's DNN and DIN on the same rows, one rank, one thread for products.

Both sides are those of benchmarks.quality, each with a model of its own. With images, our E trains on the features;
FuxiCTR projects them linearly: each occurrence, as its class does, or (`projected_once`) the whole table once a step.
"""

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.progress import Progress

from benchmarks.quality.runs import Spec, run_spec
from benchmarks.report import Figure, Section
from benchmarks.timing import in_turns
from trainer.comm import SoloComm
from trainer.samples.index import open_index
from trainer.schema.fields import load_schema

KINDS, BATCHES = ("ids", "images"), (512, 2048)
_NETS = ("dnn", "din")


class Cell(NamedTuple):
    """What is measured: one side of a comparison."""

    kind: str
    net: str
    batch: int
    side: str

    @property
    def name(self) -> str:
        """Name it in the JSON."""
        return f"{self.kind}_{self.net}_{self.batch}_{self.side}"

    def spec(self, demo: Path) -> Spec:
        """Describe the run: one epoch of the demo's samples."""
        return Spec(
            side="ours" if self.side == "ours" else "fuxictr",
            net=self.net,
            samples=str(demo / "samples"),
            store=str(demo / "features") if self.kind == "images" else None,
            batch_size=self.batch,
            epochs=1,
            seed=1,
            settings={} if self.side == "ours" else {"project_once": self.side == "projected_once"},
        )


def small_section(
    demo: Path, scratch: Path, kinds: Sequence[str], batches: Sequence[int], rounds: int, progress: Progress
) -> Section:
    """Measure training samples/s of the demo in `demo`, by the clock. Raises QualityRunError, DataError."""
    count = open_index(SoloComm(), str(demo / "samples"), "train", load_schema()).num_samples
    cells = {
        cell.name: cell
        for cell in map(Cell._make, itertools.product(kinds, _NETS, batches, ("ours", "fuxictr", "projected_once")))
        if cell.kind == "images" or cell.side != "projected_once"
    }
    speeds: dict[str, list[float]] = {name: [] for name in cells}
    task = progress.add_task("small batches", total=rounds * len(cells))
    for _, name in in_turns(cells, rounds):
        progress.update(task, description=f"small batches: {name}")
        curve = run_spec(cells[name].spec(demo), scratch, name)
        speeds[name].append(count / float(curve[-1]["seconds"]))
        progress.advance(task)
    speed = {name: statistics.median(each) for name, each in speeds.items()}
    grid: dict[str, dict[str, Figure]] = {}
    for name, cell in cells.items():
        grid.setdefault(f"{cell.kind}_{cell.net}_{cell.batch}", {})[cell.side] = speed[name]
    return Section("small batches: samples per second", ratios(cells.values(), speed), grid, prefix="small_")


def ratios(cells: Iterable[Cell], speed: Mapping[str, float]) -> dict[str, Figure]:
    """Compare ours with each other side; KIND_small_vs_SIDE is the lowest ratio of the nets at 512 samples."""
    found: dict[str, dict[str, float]] = {}
    for cell in cells:
        if cell.side != "ours":
            ratio = speed[cell._replace(side="ours").name] / speed[cell.name]
            suffix = "" if cell.batch == BATCHES[0] else f"_{cell.batch}"
            found.setdefault(f"{cell.kind}_small_vs_{cell.side}{suffix}", {})[cell.net] = ratio
    lowest: dict[str, Figure] = {name: min(of_nets.values()) for name, of_nets in found.items()}
    return lowest | {f"{name}_{net}": ratio for name, of_nets in found.items() for net, ratio in of_nets.items()}
