"""One rank of one variant: trains so many steps and writes what all ranks saw as JSON.

python -m benchmarks.train.peer compute --config WORKLOAD/config.yaml --steps 20 --json out.json
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import typer

from featurestore.errors import FeatureStoreError
from trainer.comm import Comm, connect
from trainer.config import load_config
from trainer.errors import TrainerError
from trainer.run import Run, open_run


class Variant(Protocol):
    """A way to train the model."""

    def batches(self) -> Iterator[Any]:
        """Batches without end; each has `num_samples`."""

    def step(self, batch: Any) -> tuple[float, float | None]:
        """Trains on one. The loss, and the seconds to count where they are not those of the whole step."""


@dataclass
class Seen:
    """What one rank saw; the first step, which also pays for buffers, counts in the losses alone."""

    losses: list[float] = field(default_factory=list)
    samples: int = 0
    seconds: float = 0.0
    bytes_sent: int = 0
    figures: dict[str, float] = field(default_factory=dict)


Name = Literal["compute", "worker", "worker_grouped", "server", "server_ahead", "fuxictr"]


def variant_of(name: Name, run: Run, folder: Path) -> Variant:
    """The variant of this name, which may keep files in `folder`; each imports what it alone needs."""
    match name:
        case "compute":
            from benchmarks.train.compute import Compute

            return Compute(run)
        case "worker" | "worker_grouped":
            from benchmarks.train.worker import StoreInWorker

            return StoreInWorker(run, folder / "batches", grouped=name == "worker_grouped")
        case "server" | "server_ahead":
            from benchmarks.train.server import StoreInServer

            return StoreInServer(run, ahead=name == "server_ahead")
        case "fuxictr":
            from benchmarks.train.fuxi import FuxiCtr

            return FuxiCtr(run, num_batches=2)


def train(variant: Variant, steps: int, comm: Comm) -> Seen:
    """All steps of one variant on this rank."""
    seen, batches = Seen(), variant.batches()
    for number in range(steps):
        sent, started = comm.bytes_sent, time.perf_counter()
        batch = next(batches)
        loss, seconds = variant.step(batch)
        elapsed = time.perf_counter() - started
        seen.losses.append(loss)
        if number:
            seen.seconds += elapsed if seconds is None else seconds
            seen.samples += batch.num_samples
            seen.bytes_sent += comm.bytes_sent - sent
    return seen


def summed(ranks: list[Seen], steps: int) -> dict[str, Any]:
    """Figures over all ranks: samples by the time of the slowest one."""
    return {
        "losses": ranks[0].losses,
        "samples_per_s": sum(each.samples for each in ranks) / max(each.seconds for each in ranks),
        "bytes_sent_per_step": sum(each.bytes_sent for each in ranks) / (steps - 1),
        **ranks[0].figures,
    }


def main(
    name: Annotated[Name, typer.Argument(metavar="VARIANT")],
    config: Annotated[Path, typer.Option()],
    json_path: Annotated[Path, typer.Option("--json")],
    steps: Annotated[int, typer.Option(min=2)],
    settings: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    """Train on this rank; `horovodrun` starts several."""
    comm = connect()
    with closing(comm):
        try:
            with closing(open_run(load_config(config, settings or []), comm)) as run:
                seen = train(variant_of(name, run, config.parent), steps, comm)
        except (TrainerError, FeatureStoreError) as failure:
            print(f"error: {failure}", file=sys.stderr, flush=True)
            raise typer.Exit(1) from failure
        ranks = [Seen(**values) for values in comm.allgather_object(asdict(seen))]
        if comm.rank == 0:
            json_path.write_text(json.dumps(summed(ranks, steps)))


if __name__ == "__main__":
    typer.run(main)
