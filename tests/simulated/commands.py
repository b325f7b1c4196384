"""Play simulated histories of the store's protocols, or find out which planted bugs they notice."""

import gc
import multiprocessing
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial
from typing import Annotated, TypeVar

import typer

from featurestore.console.commandline import CommandApp
from tests.simulated import kinds
from tests.simulated.planted import BUGS, Bug

ItemT, ResultT = TypeVar("ItemT"), TypeVar("ResultT")
LAST_REQUESTS = 40
app = CommandApp(help=__doc__, no_args_is_help=True)
Seeds = Annotated[int, typer.Option(min=1, help="Number of histories; of planted bugs the most for each.")]
First = Annotated[int, typer.Option(min=0, help="The first seed.")]
Processes = Annotated[int, typer.Option(min=1, help="Processes that play at once.")]
Only = Annotated[str, typer.Option(metavar="TEXT", help="Only guards that have this text.")]
Drawn = Annotated[int, typer.Option(min=0, help="Plant so many bugs, drawn by the day; 0: all.")]


@app.command(epilog="Examples: python -m tests.simulated play --seeds 200; one: play --first 17 --seeds 1")
def play(seeds: Seeds = 1000, first: First = 0, processes: Processes = 2) -> None:
    """Play histories; exit 1 where one fails, with the shortest that still does."""
    faults, failed = Counter[str](), list[int]()
    for seed, (befell, error) in _in_processes(_played, range(first, first + seeds), processes, 20):
        faults += befell
        if error:
            failed.append(seed)
            print(f"seed {seed} fails: {error}", flush=True)
    shown = ", ".join(f"{count:,} {kind}" for kind, count in sorted(faults.items()) if kind)
    print(f"{seeds:,} histories, {faults.total():,} requests ({shown}), {len(failed)} failed; {_spent()}")
    if failed:
        _show(failed[0])
        raise typer.Exit(1)


@app.command(epilog="Examples: python -m tests.simulated bugs; some of them: bugs --only channel; bugs --drawn 12")
def bugs(seeds: Seeds = 200, first: First = 0, processes: Processes = 2, only: Only = "", drawn: Drawn = 0) -> None:
    """Plant bugs, one at a time, and play histories until one fails; exit 1 where none does."""
    chosen, missed = [bug for bug in BUGS if only in bug.guard], 0
    if drawn:
        chosen = random.Random(f"{date.today()}").sample(chosen, min(drawn, len(chosen)))
    for bug, found in _in_processes(partial(_found, range(first, first + seeds)), chosen, processes, 1):
        missed += not found
        print(f"{found or 'NOT FOUND':<90.90}  {bug.guard}", flush=True)
    print(f"{len(chosen)} bugs, {len(chosen) - missed} found; {_spent()}")
    raise typer.Exit(missed > 0)


def _in_processes(
    work: Callable[[ItemT], ResultT], items: Sequence[ItemT], processes: int, at_once: int
) -> Iterator[tuple[ItemT, ResultT]]:
    """Yield items, in their order, with the results of the work on them."""
    gc.freeze()  # what is imported is looked at no more
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from zip(items, pool.imap(work, items, at_once), strict=True)


def _played(seed: int) -> tuple[Counter[str], str]:
    """Return what befell the requests of a history, and how it failed."""
    played = kinds.play(seed)
    return played.world.faults, f"{type(played.error).__name__}: {played.error}" if played.error else ""


def _found(seeds: range, bug: Bug) -> str:
    """Return the first history that fails with a bug, with the reason."""
    with bug.planted():
        errors = ((seed, _played(seed)[1]) for seed in seeds if kinds.kind_of(seed) == bug.kind)
        return next((f"seed {seed}: {error}" for seed, error in errors if error), "")


def _show(seed: int) -> None:
    """Print the shortest history that still fails."""
    shortest = kinds.shortened(kinds.play(seed))
    print(f"\nThe shortest history of seed {seed} ({kinds.kind_of(seed)}) that still fails:")
    for number, steps in enumerate(shortest.plan):
        print(f"  c{number}: {'; '.join(steps)}")
    print("\n".join(["Its last requests:", *shortest.world.trace[-LAST_REQUESTS:], str(shortest.error)]))


def _spent() -> str:
    """Say the time of the processors."""
    return f"{sum(os.times()[:4]):.0f} s of a processor"
