"""One rank of one variant: trains a number of steps and writes what all ranks saw as JSON.

python -m benchmarks.train.peer compute --config WORKLOAD/config.yaml --steps 20 --json out.json
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import typer

from featurestore.console.commandline import CommandApp, run_app
from trainer.comm import connect
from trainer.config import load_config
from trainer.engine.machine import objects_frozen
from trainer.runs.open import Run, open_run
from trainer.stages import prepare_ahead


class Variant(Protocol):
    """A way to train the model."""

    ahead: bool
    """Whether `prepare` runs in a thread during the step before."""

    def prepare(self) -> Any:
        """Prepare the next batch, and everything of it that needs no weights. Every rank calls it equally often."""

    def step(self, prepared: Any) -> tuple[float, float | None]:
        """Train on one batch.

        Returns the loss, and the seconds to count where they are not those of the whole step.
        """


@dataclass
class Seen:
    """What one rank saw; the first step, which also pays for buffers, counts in the losses alone."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


Name = Literal["compute", "server", "fuxictr", "fuxictr_grouped"]


def variant_of(name: Name, run: Run) -> Variant:
    """Make the variant of this name; FuxiCTR is in an environment of its own."""
    if name in ("fuxictr", "fuxictr_grouped"):
        from benchmarks.train.fuxi import FuxiCtr

        return FuxiCtr(run, grouped=name == "fuxictr_grouped")
    from benchmarks.train import rivals

    return rivals.Compute(run) if name == "compute" else rivals.StoreInServer(run)


def train(variant: Variant, steps: int, run: Run) -> Seen:
    """Train all steps of one variant on this rank."""
    seen, started = Seen(), 0.0
    for number, item in enumerate(_prepared(variant, steps)):
        if number == 1:
            started = time.perf_counter()
        loss, seconds = variant.step(item())
        seen.losses.append(loss)
        if number and seconds is not None:
            seen.seconds += seconds
    seen.seconds = seen.seconds or time.perf_counter() - started
    return seen


def _prepared(variant: Variant, steps: int) -> Iterator[Callable[[], Any]]:
    if variant.ahead:
        yield from prepare_ahead(steps, variant.prepare, in_background=False)
    else:
        yield from itertools.repeat(variant.prepare, steps)


def summed(ranks: list[Seen], steps: int, global_batch_size: int) -> dict[str, Any]:
    """Sum figures over all ranks: samples of all steps but the first, by the time of the slowest rank."""
    return {
        "losses": ranks[0].losses,
        "samples_per_s": (steps - 1) * global_batch_size / max(each.seconds for each in ranks),
    }


app = CommandApp()


@app.command()
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
        with closing(open_run(load_config(config, settings or []), comm)) as run:
            variant = variant_of(name, run)
            with objects_frozen():
                seen = train(variant, steps, run)
            size = run.config.data.global_batch_size
        ranks = [Seen(**values) for values in comm.allgather_object(asdict(seen))]
        if comm.rank == 0:
            json_path.write_text(json.dumps(summed(ranks, steps, size)))


if __name__ == "__main__":
    run_app(app)
