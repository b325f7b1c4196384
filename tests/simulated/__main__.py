"""Play simulated histories of the store's protocols, or find out which planted bugs they notice."""

import gc
import multiprocessing
import os
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from tests.simulated.world import Operation

ResultT = TypeVar("ResultT")
LAST_REQUESTS = 40
app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)
Seeds = Annotated[int, typer.Option(min=1, help="Number of histories; of planted bugs the most for each.")]
First = Annotated[int, typer.Option(min=0, help="The first seed.")]
Processes = Annotated[int, typer.Option(min=1, help="Processes that play at once.")]
Only = Annotated[str, typer.Option(metavar="TEXT", help="Only guards that have this text.")]
Drawn = Annotated[int, typer.Option(min=0, help="Plant so many bugs, drawn by the day; 0: all.")]


@app.command(epilog="Examples: python -m tests.simulated play --seeds 200; one: play --first 17 --seeds 1")
def play(seeds: Seeds = 1000, first: First = 0, processes: Processes = 2) -> None:
    """Play histories; exit 1 where one fails, with the shortest that still does."""
    begin_s, faults, requests, failed = time.monotonic(), Counter[str](), 0, list[int]()
    for seed, count, injected, error in _in_processes(_played, range(first, first + seeds), processes):
        requests, faults = requests + count, faults + injected
        if error:
            failed.append(seed)
            print(f"seed {seed} fails: {error}", flush=True)
    shown = ", ".join(f"{count:,} {kind}" for kind, count in sorted(faults.items()))
    print(f"{seeds:,} histories, {requests:,} requests ({shown}), {len(failed)} failed; {_spent(begin_s)}")
    if failed:
        _show(min(failed))
        raise typer.Exit(1)


@app.command(epilog="Examples: python -m tests.simulated bugs; some of them: bugs --only channel; bugs --drawn 12")
def bugs(seeds: Seeds = 200, first: First = 0, processes: Processes = 2, only: Only = "", drawn: Drawn = 0) -> None:
    """Plant bugs, one at a time, and play histories until one fails; exit 1 where none does."""
    from tests.simulated.planted import BUGS

    begin_s, missed = time.monotonic(), 0
    chosen = [(number, first, seeds) for number, bug in enumerate(BUGS) if only in bug.guard]
    if drawn:
        chosen = random.Random(f"{date.today()}").sample(chosen, min(drawn, len(chosen)))
    for number, found in _in_processes(_hunted, chosen, processes):
        missed += found is None
        where = "NOT FOUND" if found is None else f"seed {found[0]:3}"
        print(f"{number:2} {where:9}  {BUGS[number].guard}" + (f": {found[1][:90]}" if found else ""), flush=True)
    print(f"{len(chosen)} bugs, {len(chosen) - missed} found; {_spent(begin_s)}")
    raise typer.Exit(missed > 0)


def _in_processes(work: Callable[[Any], ResultT], items: Sequence[Any], processes: int) -> Iterator[ResultT]:
    from tests.simulated import history  # before the fork, once for all

    assert history.KINDS
    gc.freeze()  # what is imported is looked at no more
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap_unordered(work, items, chunksize=20 if isinstance(items, range) else 1)


def _played(seed: int) -> tuple[int, int, Counter[str], str]:
    from tests.simulated.history import play

    played = play(seed)
    error = f"{type(played.error).__name__}: {played.error}" if played.error else ""
    return seed, played.world.requests, played.world.faults, error


def _hunted(what: tuple[int, int, int]) -> tuple[int, tuple[int, str] | None]:
    """Return the number of a planted bug, and the first seed of its kind that fails, with the reason."""
    from tests.simulated.history import kind_of
    from tests.simulated.planted import BUGS

    number, first, seeds = what
    with BUGS[number].planted():
        for seed in range(first, first + seeds):
            if kind_of(seed).__name__ == BUGS[number].kind and (error := _played(seed)[3]):
                return number, (seed, error)
    return number, None


def _show(seed: int) -> None:
    """Print the shortest history that still fails."""
    from tests.simulated import history

    shortest = history.shortened(history.play(seed))
    print(f"\nThe shortest history of seed {seed} ({shortest.kind}) that still fails:")
    for number, operations in enumerate(shortest.plan):
        print(f"  c{number}: {', '.join(map(_shown, operations))}")
    print("\n".join(["Its last requests:", *shortest.world.trace[-LAST_REQUESTS:], str(shortest.error)]))


def _shown(operation: "Operation") -> str:
    aims = "".join(f", {aim.fate} for {aim.for_s:g} s at {aim.request!r}" for aim in operation.aims)
    return f"{operation.name} {operation.argument} after {operation.pause_s:g} s{aims}"


def _spent(begin_s: float) -> str:
    """Say the time on the clock, and that of the processors."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return f"{time.monotonic() - begin_s:.0f} s, {sum(each.ru_utime for each in used):.0f} s of a processor"


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of a set of texts is part of a history
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulated", *sys.argv[1:]])
    app()
