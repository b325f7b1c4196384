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
    times, number = divmod(turn, len(SCENES))
    kind, scene = (KINDS[turn % len(KINDS)], []) if is_drawn else SCENES[number]
    is_calm = not is_drawn and (times % 3 == 0 or ASLEEP in str(scene))
    drawn = _drawn(kind, draw)
    beside = drawn if is_drawn else drawn[: draw.choice([0, 1])]
    is_alone = is_calm or (scene and re.search("purge|mend", str([scene, beside])))
    own = scene if is_alone else [*scene, *beside]
    return kind(World(seed + schedule * 1_000_003, is_calm), own if clients is None else clients)


def first_failed(seeds: range, kind: str) -> str:
    """Return the first seed of this kind of histories that fails, and why; empty where none does."""
    histories = ((seed, history_of(seed)) for seed in seeds)
    failures = (f"seed {seed}: {each.play().world.failure}" for seed, each in histories if type(each).__name__ == kind)
    return next((each for each in failures if not each.endswith(": ")), "")


def shortened(seed: int, failed: History) -> History:
    """Leave out steps, and what befalls them, one after another, as long as the history of the seed still fails."""
    for client, steps in enumerate(failed.clients):
        for place, step in enumerate(steps):
            for left in ([], [step.partition(" | ")[0]]):
                fewer = [*steps[:place], *left, *steps[place + 1 :]]
                clients = [*failed.clients[:client], fewer, *failed.clients[client + 1 :]]
                for schedule in range(SCHEDULES if clients != failed.clients else 0):
                    if (shorter := history_of(seed, clients, schedule).play()).world.failure:
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
