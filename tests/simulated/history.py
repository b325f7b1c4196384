"""One history: a kind of workload by its seed, played in a world of its own; and how a failed one is made shorter."""

import gc
import random
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.simulated.models import ModelHistory
from tests.simulated.published import PublishedHistory
from tests.simulated.runs import RunHistory
from tests.simulated.store import StoreHistory
from tests.simulated.world import Killed, Operation, Plan, World, simulated

KINDS: tuple[Any, ...] = (StoreHistory, RunHistory, StoreHistory, PublishedHistory, StoreHistory, ModelHistory)
"""By the seed modulo their number."""
SCHEDULES = 3
"""Orders of requests with which a shorter plan is tried."""


@dataclass
class Played:
    """A history that is over; `error`: why it failed."""

    seed: int
    plan: Plan
    world: World
    error: BaseException | None

    @property
    def kind(self) -> str:
        """The name of its workload."""
        return kind_of(self.seed).__name__


def kind_of(seed: int) -> Any:
    """Return the class of the workload of a seed."""
    return KINDS[seed % len(KINDS)]


def scene_of(seed: int) -> tuple[Plan, bool] | None:
    """Return the scene of a seed, and whether the world is calm; every other history of a kind has one, in turn."""
    kind, (rounds, place) = kind_of(seed), divmod(seed, len(KINDS))
    turn, is_drawn = divmod(rounds * KINDS.count(kind) + KINDS[:place].count(kind), 2)
    times, number = divmod(turn, len(kind.SCENES))
    return None if is_drawn else (kind.SCENES[number], times % 3 == 0)


def plan_of(seed: int) -> Plan:
    """Draw what the clients of a seed do; beside one in two scenes that are not calm another client is at work."""
    draw, found = random.Random(f"plan {seed}"), scene_of(seed)
    drawn: Plan = kind_of(seed).plan(draw)
    if found is None:
        return drawn
    scene, is_calm = found
    is_alone = is_calm or any(each.name == "purge" for operations in scene for each in operations)
    return [*scene, *drawn[: 0 if is_alone else draw.choice([0, 1])]]


def play(seed: int, plan: Plan | None = None, schedule: int = 0) -> Played:
    """Play the history of a seed; of another plan where one is given, with another order of requests by `schedule`."""
    kind, found, error = kind_of(seed), scene_of(seed), None
    world = World(seed + schedule * 1_000_003, found is not None and found[1])
    chosen = plan_of(seed) if plan is None else plan
    gc.disable()  # what it would collect may have requests to make
    try:
        with simulated(world) as patch:
            history = kind(world)
            history.modules(patch)
            history.prepare()
            world.play([partial(_perform, world, history, operations) for operations in chosen])
            history.finish()
    except Exception as failure:
        error = failure
    finally:
        gc.enable()
    return Played(seed, chosen, world, error)


def shortened(failed: Played) -> Played:
    """Leave out clients, then operations, one after another, as long as the history still fails."""
    shortest = failed
    while (shorter := next(filter(None, map(partial(_fails, failed.seed), _shorter(shortest.plan))), None)) is not None:
        shortest = shorter
    return shortest


def _perform(world: World, history: Any, operations: list[Operation]) -> None:
    for operation in operations:
        try:
            world.sleep(operation.pause_s)
            history.perform(operation)
        except Killed:
            if world.failure is not None:
                raise
            world.restart()


def _shorter(plan: Plan) -> list[Plan]:
    """List the plans with one client less, those with one operation less, and those with one that nothing befalls."""
    fewer = [plan[:client] + plan[client + 1 :] for client in range(len(plan))]
    for client, operations in enumerate(plan):
        less = [operations[:place] + operations[place + 1 :] for place in range(len(operations))]
        less += [
            [*operations[:place], each._replace(aims=()), *operations[place + 1 :]]
            for place, each in enumerate(operations)
            if each.aims
        ]
        fewer += [[*plan[:client], each, *plan[client + 1 :]] for each in less if each]
    return fewer


def _fails(seed: int, plan: Plan) -> Played | None:
    played = (play(seed, plan, schedule) for schedule in range(SCHEDULES))
    return next((each for each in played if each.error is not None), None)
