"""A history by its seed: what clients do, drawn or as a scene has it; and the shortest one that still fails."""

import random
import re
import tomllib
from pathlib import Path

from tests.planted import Bug
from tests.simulated.history import History
from tests.simulated.published import ModelHistory, RunHistory, SampleHistory
from tests.simulated.store import StoreHistory
from tests.simulated.world import ASLEEP, STEPS, Clients, World

KINDS = (StoreHistory, RunHistory, StoreHistory, SampleHistory, StoreHistory, ModelHistory)
"""Kinds of histories whose steps are drawn, in turn."""
SCENES = [(kind, scene) for kind in dict.fromkeys(KINDS) for scene in STEPS[kind.__name__]["scenes"].values()]
BUGS = [Bug(**each) for each in tomllib.loads(Path(__file__).with_name("planted.toml").read_text())["bug"]]
SCHEDULES = 3
"""Orders of requests with which a shorter history is tried."""


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


def first_failed(seeds: range, kind: str) -> str:
    """Return the first seed of this kind of histories that fails, and why; empty where none does."""
    for seed in seeds:
        history = history_of(seed)
        if type(history).__name__ == kind and history.play().world.failure:
            return f"seed {seed}: {history.world.failure}"
    return ""


def shortened(seed: int, failed: History) -> History:
    """Leave out steps, and what befalls them, one after another, as long as the history of the seed still fails."""
    for client, steps in enumerate(failed.clients):
        for place, step in enumerate(steps):
            words, *aims = step.split(" | ")
            for left in ([], [words]) if aims else ([],):
                fewer = [*steps[:place], *left, *steps[place + 1 :]]
                clients = [*failed.clients[:client], fewer, *failed.clients[client + 1 :]]
                for schedule in range(SCHEDULES):
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
