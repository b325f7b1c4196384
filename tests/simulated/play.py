"""A history by its seed: what clients do, drawn or as a scene has it; played in a world of its own; made shorter."""

import contextlib
import gc
import random
import re
import tomllib
from pathlib import Path
from typing import Any

from tests.planted import Bug
from tests.simulated.history import History
from tests.simulated.models import ModelHistory
from tests.simulated.published import RunHistory, SampleHistory
from tests.simulated.store import StoreHistory
from tests.simulated.world import ASLEEP, Killed, World, simulated

KINDS = (StoreHistory, RunHistory, StoreHistory, SampleHistory, StoreHistory, ModelHistory)
"""By the seed modulo their number."""
Plan = list[list[str]]
"""By client, its steps."""
STEPS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("steps.toml").read_text())
BUGS = [Bug(**each) for each in tomllib.loads(Path(__file__).with_name("planted.toml").read_text())["bug"]]
SCHEDULES = 3
"""Orders of requests with which a shorter plan is tried."""


def kind_of(seed: int) -> type[History]:
    """Return the kind of history of a seed."""
    return KINDS[seed % len(KINDS)]


def plan_of(seed: int) -> tuple[Plan, bool]:
    """Return what the clients of a seed do, and whether nothing goes wrong but what its steps say.

    Every other history of a kind has a scene, in turn; beside one in two that are not calm another client is at work.
    """
    draw, kind, (rounds, place) = random.Random(f"plan {seed}"), kind_of(seed), divmod(seed, len(KINDS))
    plan = _drawn(kind, draw)
    turn, is_drawn = divmod(rounds * KINDS.count(kind) + KINDS[:place].count(kind), 2)
    if is_drawn:
        return plan, False
    scenes: list[Plan] = list(STEPS[kind.__name__]["scenes"].values())
    times, number = divmod(turn, len(scenes))
    is_calm = times % 3 == 0 or ASLEEP in str(scenes[number])
    both = [*scenes[number], *plan[: draw.choice([0, 1])]]
    is_alone = is_calm or re.search("purge|mend", str(both))
    return scenes[number] if is_alone else both, is_calm


def play(seed: int, plan: Plan | None = None, schedule: int = 0) -> World:
    """Play the history of a seed, or another plan, with another order of requests by `schedule`.

    The world's `failure` says why it failed."""
    own_plan, is_calm = plan_of(seed)
    world = World(seed + schedule * 1_000_003, is_calm)
    history = kind_of(seed)(world, str(own_plan))
    gc.disable()  # what it would collect may have requests to make
    with contextlib.suppress(Killed), world.failing(), simulated(world, history.store) as patch:
        history.prepare(patch)
        world.play(own_plan if plan is None else plan, history.perform)
        if world.failure is None:
            history.finish()
    gc.enable()
    return world


def shortened(seed: int, plan: Plan) -> tuple[Plan, World]:
    """Leave out steps, and what befalls them, one after another, as long as the history still fails."""
    for client, steps in enumerate(plan):
        for place, step in enumerate(steps):
            for left in ([], [step.partition(" | ")[0]]):
                fewer = [*steps[:place], *left, *steps[place + 1 :]]
                shorter = [each for each in (*plan[:client], fewer, *plan[client + 1 :]) if each]
                if shorter != plan and any(play(seed, shorter, each).failure for each in range(SCHEDULES)):
                    return shortened(seed, shorter)
    return plan, next(world for each in range(SCHEDULES) if (world := play(seed, plan, each)).failure)


def _drawn(kind: type[History], draw: random.Random) -> Plan:
    """Draw what a few clients do; pauses are shorter or longer than what is removed is kept for.

    One step in six waits at one of the requests that decide."""
    known = STEPS[kind.__name__]
    (table,) = draw.choices([each["steps"] for each in known["drawn"]], [each["often"] for each in known["drawn"]])
    weights = {step: weight for step, weight in table.items() if draw.random() < 0.8} or table
    pauses_s = draw.choice([(0.0,), (0.0, 0.0, 60.0, 0.6 * kind.SPAN_S), (0.0, 0.7 * kind.SPAN_S, 1.3 * kind.SPAN_S)])

    def step() -> str:
        text = f"{draw.choice(pauses_s):g}s {draw.choices(list(weights), list(weights.values()))[0]}"
        if draw.random() < 0.17:
            for_s = draw.choice([5.0, 60.0, 60.0, 1_000.0, 0.6 * kind.SPAN_S])
            text += f" | stalled {for_s:g}s {draw.choice(known['waits'])}"
        return re.sub(r"{(.*?)}", lambda choices: draw.choice(choices[1].split(",")), text)

    return [[step() for _ in range(draw.randint(1, 4))] for _ in range(draw.randint(2, 5))]
