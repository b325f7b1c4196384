"""One history: a kind of workload by its seed, played in a world of its own; and how a failed one is made shorter."""

import gc
import random
import tomllib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.simulated.history import History, Plan, drawn
from tests.simulated.models import ModelHistory
from tests.simulated.objects import simulated
from tests.simulated.published import RunHistory, SampleHistory
from tests.simulated.store import StoreHistory
from tests.simulated.world import World

CLASSES: dict[str, type[History]] = {
    "store": StoreHistory,
    "runs": RunHistory,
    "samples": SampleHistory,
    "models": ModelHistory,
}
KINDS = ("store", "runs", "store", "samples", "store", "models")
"""By the seed modulo their number."""
SCENES = tomllib.loads(Path(__file__).with_name("scenes.toml").read_text())
SCHEDULES = 3
"""Orders of requests with which a shorter plan is tried."""


@dataclass
class Played:
    """A history that is over; `error`: why it failed."""

    seed: int
    plan: Plan
    world: World
    error: BaseException | None


def kind_of(seed: int) -> str:
    """Return the kind of workload of a seed."""
    return KINDS[seed % len(KINDS)]


def plan_of(seed: int) -> tuple[Plan, bool]:
    """Return what the clients of a seed do, and whether nothing goes wrong but what its steps say.

    Every other history of a kind has a scene, in turn; beside one in two that are not calm another client is at work.
    """
    draw, kind, (rounds, place) = random.Random(f"plan {seed}"), kind_of(seed), divmod(seed, len(KINDS))
    plan = drawn(CLASSES[kind], draw)
    turn, is_drawn = divmod(rounds * KINDS.count(kind) + KINDS[:place].count(kind), 2)
    if is_drawn:
        return plan, False
    scenes: list[Plan] = list(SCENES[kind].values())
    times, number = divmod(turn, len(scenes))
    is_calm = times % 3 == 0
    is_alone = is_calm or "purge" in str(scenes[number])
    return [*scenes[number], *plan[: 0 if is_alone else draw.choice([0, 1])]], is_calm


def play(seed: int, plan: Plan | None = None, schedule: int = 0) -> Played:
    """Play the history of a seed; of another plan where one is given, with another order of requests by `schedule`."""
    own_plan, is_calm = plan_of(seed)
    chosen, error = own_plan if plan is None else plan, None
    world = World(seed + schedule * 1_000_003, is_calm)
    history = CLASSES[kind_of(seed)](world)

    def work(steps: list[str]) -> None:
        for step in steps:
            history.perform(step)

    gc.disable()  # what it would collect may have requests to make
    try:
        with simulated(world, history.store) as patch:
            history.prepare(patch)
            world.play([partial(work, steps) for steps in chosen])
            history.finish()
    except Exception as failure:
        error = failure
    finally:
        gc.enable()
    return Played(seed, chosen, world, error)


def shortened(failed: Played) -> Played:
    """Leave out steps, and what befalls them, one after another, as long as the history still fails."""
    for client, steps in enumerate(failed.plan):
        for place, step in enumerate(steps):
            for left in ([], [step.partition(" | ")[0]]):
                shorter = [*steps[:place], *left, *steps[place + 1 :]]
                plan = [each for each in (*failed.plan[:client], shorter, *failed.plan[client + 1 :]) if each]
                if shorter != steps and (found := _failing(failed.seed, plan)):
                    return shortened(found)
    return failed


def _failing(seed: int, plan: Plan) -> Played | None:
    played = (play(seed, plan, schedule) for schedule in range(SCHEDULES))
    return next((each for each in played if each.error is not None), None)
