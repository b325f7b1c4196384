"""Play simulated histories of the store's protocols, or find out which planted bugs they notice."""

import os
import sys

if __name__ == "__main__" and os.environ.get("PYTHONHASHSEED") != "0":  # the order of a set is part of a history
    os.execve(sys.executable, sys.orig_argv, {**os.environ, "PYTHONHASHSEED": "0"})

import random
import re
import tomllib
import zlib
from collections import Counter
from pathlib import Path

import typer

from featurestore.console.commandline import CommandApp
from tests.planted import Bug, hunt
from tests.simulated.history import History
from tests.simulated.published import ModelHistory, RunHistory, SampleHistory
from tests.simulated.store import StoreHistory
from tests.simulated.world import ASLEEP, STEPS, Clients, World

KINDS = (StoreHistory, RunHistory, StoreHistory, SampleHistory, StoreHistory, ModelHistory)
"""Kinds of histories whose steps are drawn, in turn."""
SCENES = [(kind, scene) for kind in dict.fromkeys(KINDS) for scene in STEPS[kind.__name__]["scenes"].values()]
BUGS = [Bug(**each) for each in tomllib.loads(Path(__file__).with_name("planted.toml").read_text())["bug"]]
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
        print("\n".join(["Its last requests:", *shortest.world.trace[-40:], shortest.world.failure]))
    raise typer.Exit(len(failed) > 0)


@app.command(epilog="Examples: python -m tests.simulated bugs; those whose guards have a text: bugs --only channel")
def bugs(seeds: int = 200, first: int = 0, only: str = "") -> None:
    """Plant bugs, one at a time, and play so many histories until one fails; exit 1 where none does."""

    def find(bug: Bug) -> str:
        for seed in range(first, first + seeds):
            history = history_of(seed)
            if type(history).__name__ == bug.kind and history.play().world.failure:
                return f"seed {seed}: {history.world.failure}"
        return ""

    hunt([bug for bug in BUGS if only in bug.guard], find)


def history_of(seed: int, clients: Clients | None = None, schedule: int = 0) -> History:
    """Return the history of a seed: every other one has a scene, in turn, some with another client beside it.

    `clients`: what they do in the place of what is the seed's; `schedule`: another order of requests."""
    draw, (turn, is_drawn) = random.Random(f"plan {seed}"), divmod(seed, 2)
    if is_drawn:
        kind = KINDS[turn % len(KINDS)]
        own, is_calm = _drawn(kind, draw), False
    else:
        times, number = divmod(turn, len(SCENES))
        kind, scene = SCENES[number]
        is_calm = times % 3 == 0 or ASLEEP in str(scene)
        both = [*scene, *_drawn(kind, draw)[: draw.choice([0, 1])]]
        own = scene if is_calm or re.search("purge|mend", str(both)) else both
    return kind(World(seed + schedule * 1_000_003, is_calm), own if clients is None else clients)


def shortened(seed: int, failed: History) -> History:
    """Leave out steps, and what befalls them, one after another, as long as the history of the seed still fails."""
    for client, steps in enumerate(failed.clients):
        for place, step in enumerate(steps):
            words, *aims = step.split(" | ")
            for left in ([], [words]) if aims else ([],):
                fewer = [*steps[:place], *left, *steps[place + 1 :]]
                clients = [*failed.clients[:client], fewer, *failed.clients[client + 1 :]]
                for schedule in range(3):  # orders of requests
                    shorter = history_of(seed, clients, schedule).play()
                    if shorter.world.failure:
                        return shortened(seed, shorter)
    return failed


def _drawn(kind: type[History], draw: random.Random) -> Clients:
    """Draw what a few clients do; pauses are shorter or longer than what is removed is kept for.

    One step in six waits at one of the requests that decide."""
    known = STEPS[kind.__name__]
    (table,) = draw.choices(known["drawn"], [each["often"] for each in known["drawn"]])
    weights = {step: weight for step, weight in table["steps"].items() if draw.random() < 0.8} or table["steps"]
    pauses = draw.choice(known["pauses"])

    def step() -> str:
        text = f"{draw.choice(pauses)} {draw.choices(list(weights), list(weights.values()))[0]}"
        if draw.random() < 0.17:
            text += f" | stalled {draw.choice(known['stalls'])} {draw.choice(known['waits'])}"
        return re.sub(r"{(.*?)}", lambda choices: draw.choice(choices[1].split(",")), text)

    return [[step() for _ in range(draw.randint(1, 4))] for _ in range(draw.randint(2, 5))]


if __name__ == "__main__":
    app()
