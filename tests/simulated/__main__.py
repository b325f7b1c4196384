"""Play simulated histories of the store's protocols, or find out which planted bugs they notice."""

import os
import sys

if __name__ == "__main__" and os.environ.get("PYTHONHASHSEED") != "0":  # the order of a set is part of a history
    os.environ["PYTHONHASHSEED"] = "0"
    os.execv(sys.executable, [sys.executable, "-m", "tests.simulated", *sys.argv[1:]])

import gc
from collections import Counter
from functools import partial
from multiprocessing import get_context
from typing import Annotated

import typer

from featurestore.console.commandline import CommandApp
from tests.planted import Bug
from tests.simulated.play import BUGS, kind_of, plan_of, shortened
from tests.simulated.play import play as play_one

LAST_REQUESTS = 40
app = CommandApp(help=__doc__, no_args_is_help=True)
Seeds = Annotated[int, typer.Option(min=1, help="Number of histories; of planted bugs the most for each.")]
First = Annotated[int, typer.Option(min=0, help="The first seed.")]
Only = Annotated[str, typer.Option(metavar="TEXT", help="Only guards that have this text.")]


@app.command(epilog="Examples: python -m tests.simulated play --seeds 200; one: play --first 17 --seeds 1")
def play(seeds: Seeds = 1000, first: First = 0) -> None:
    """Play histories; exit 1 where one fails, with the shortest that still does."""
    faults, failed = Counter[str](), list[int]()
    with get_context("fork").Pool(2, gc.freeze) as pool:  # what is imported is looked at no more
        for seed, befell, error in pool.imap(_played, range(first, first + seeds), 20):
            faults += befell
            if error:
                failed.append(seed)
                print(f"seed {seed} fails: {error}", flush=True)
    shown = ", ".join(f"{count:,} {kind}" for kind, count in sorted(faults.items()) if kind)
    print(f"{seeds:,} histories, {faults.total():,} requests ({shown})")
    print(f"{len(failed)} failed; {sum(os.times()[:4]):.0f} s of a processor")
    if failed:
        plan, world = shortened(failed[0], plan_of(failed[0])[0])
        print(f"\nThe shortest history of seed {failed[0]} ({kind_of(failed[0]).__name__}) that still fails:")
        print("\n".join(f"  c{client}: {'; '.join(steps)}" for client, steps in enumerate(plan)))
        print("\n".join(["Its last requests:", *world.trace[-LAST_REQUESTS:], str(world.failure)]))
        raise typer.Exit(1)


@app.command(epilog="Examples: python -m tests.simulated bugs; some of them: bugs --only channel")
def bugs(seeds: Seeds = 200, first: First = 0, only: Only = "") -> None:
    """Plant bugs, one at a time, and play histories until one fails; exit 1 where none does."""
    chosen, missed = [bug for bug in BUGS if only in bug.guard], 0
    with get_context("fork").Pool(2, gc.freeze) as pool:
        for bug, found in zip(chosen, pool.imap(partial(_found, range(first, first + seeds)), chosen), strict=True):
            missed += not found
            print(f"{found or 'NOT FOUND':<90.90}  {bug.guard}", flush=True)
    print(f"{len(chosen)} bugs, {len(chosen) - missed} found; {sum(os.times()[:4]):.0f} s of a processor")
    raise typer.Exit(missed > 0)


def _played(seed: int) -> tuple[int, Counter[str], str]:
    """Return a seed, what befell the requests of its history, and how it failed."""
    world = play_one(seed)
    return seed, world.faults, f"{type(world.failure).__name__}: {world.failure}" if world.failure else ""


def _found(seeds: range, bug: Bug) -> str:
    """Return the first history that fails with a bug, with the reason."""
    with bug.planted():
        errors = ((seed, _played(seed)[2]) for seed in seeds if kind_of(seed).__name__ == bug.kind)
        return next((f"seed {seed}: {error}" for seed, error in errors if error), "")


if __name__ == "__main__":
    app()
