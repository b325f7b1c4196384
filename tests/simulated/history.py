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


def play(seed: int, plan: Plan | None = None, schedule: int = 0) -> Played:
    """Play the history of a seed; of another plan where one is given, with another order of requests by `schedule`."""
    kind, world, error = kind_of(seed), World(seed + schedule * 1_000_003), None
    chosen = kind.plan(random.Random(f"plan {seed}")) if plan is None else plan
    gc.disable()  # what it would collect may have requests to make
    try:
        with simulated(world) as patch:
            history = kind(world)
            getattr(history, "modules", lambda patch: None)(patch)
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
    """List the plans with one client less, then those with one operation less."""
    fewer = [plan[:client] + plan[client + 1 :] for client in range(len(plan))]
    for client, operations in enumerate(plan):
        less = [operations[:place] + operations[place + 1 :] for place in range(len(operations))]
        fewer += [[*plan[:client], each, *plan[client + 1 :]] for each in less if each]
    return fewer


def _fails(seed: int, plan: Plan) -> Played | None:
    played = (play(seed, plan, schedule) for schedule in range(SCHEDULES))
    return next((each for each in played if each.error is not None), None)
