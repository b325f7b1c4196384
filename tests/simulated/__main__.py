"""Play simulated histories of the store's protocols, or find out which planted bugs they notice."""

import os
import sys

if __name__ == "__main__" and os.environ.get("PYTHONHASHSEED") != "0":  # the order of a set is part of a history
    os.execve(sys.executable, sys.orig_argv, {**os.environ, "PYTHONHASHSEED": "0"})

import zlib
from collections import Counter

import typer

from featurestore.console.commandline import CommandApp
from tests.planted import hunt
from tests.simulated.play import BUGS, first_failed, history_of, shortened

LAST_REQUESTS = 40
app = CommandApp(help=__doc__, no_args_is_help=True)


@app.command(epilog="Examples: python -m tests.simulated play --seeds 200; one: play --first 17 --seeds 1")
def play(seeds: int = 1000, first: int = 0) -> None:
    """Play the histories of so many seeds; exit 1 where one fails, with the shortest that still does."""
    faults, failed, digest = Counter[str](), {}, 0
    for seed in range(first, first + seeds):
        history = history_of(seed).play()
        faults.update(history.world.faults)
        digest = zlib.crc32("\n".join(history.world.trace).encode(), digest)
        if history.world.failure:
            failed[seed] = history
            print(f"seed {seed} fails: {history.world.failure}", flush=True)
    shown = ", ".join(f"{count:,} {kind}" for kind, count in sorted(faults.items()) if kind)
    print(f"{seeds:,} histories, {faults.total():,} requests ({shown})")
    print(f"{len(failed)} failed; digest {digest:08x}; {sum(os.times()[:2]):.0f} s of a processor")
    for seed, history in list(failed.items())[:1]:
        shortest = shortened(seed, history)
        print(f"\nThe shortest history of seed {seed} ({type(shortest).__name__}) that still fails:")
        print("\n".join(f"  c{client}: {'; '.join(steps)}" for client, steps in enumerate(shortest.clients)))
        print("\n".join(["Its last requests:", *shortest.world.trace[-LAST_REQUESTS:], shortest.world.failure]))
    raise typer.Exit(len(failed) > 0)


@app.command(epilog="Examples: python -m tests.simulated bugs; those whose guards have a text: bugs --only channel")
def bugs(seeds: int = 200, first: int = 0, only: str = "") -> None:
    """Plant bugs, one at a time, and play so many histories until one fails; exit 1 where none does."""
    chosen = [bug for bug in BUGS if only in bug.guard]
    hunt(chosen, lambda bug: first_failed(range(first, first + seeds), bug.kind))


if __name__ == "__main__":
    app()
