"""What to do next: which hosts, how many ranks, how long to wait, and when to give up. Pure functions.

A generation is one start of all ranks; it made progress if the run's newest checkpoint is of a later step afterwards.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from featurestore.console.commandline import OK, STOPPED
from featurestore.errors import USAGE

SUSPICIOUS = 2
"""Fruitless generations that the same host began to end, after which it is left out if there are enough others."""


@dataclass(frozen=True)
class HostSlots:
    """A host that answers, and how many ranks it may have."""

    host: str
    count: int


@dataclass(frozen=True, kw_only=True)
class RankEnd:
    """How one rank ended, in the order in which the supervisor heard of it."""

    rank: int
    host: str
    code: int | None
    """As of subprocess: below 0 the signal; None where its host is out of reach."""
    error: str | None = None
    """What it said last on stderr, see `trainer.supervise.supervisor.LastWords`."""
    was_killed: bool = False
    """Whether the supervisor sent SIGKILL, as the rank did not end by itself."""

    @property
    def gave_up(self) -> bool:
        """Whether the rank ended itself, maybe because of another one.

        SIGABRT is a program's own: C++ sends it to itself for an error that nobody takes, as Gloo's of a rank that does
        not come while they connect.
        """
        return self.code is not None and (self.code > 0 or self.code == -signal.SIGABRT)


@dataclass(frozen=True, kw_only=True)
class Past:
    """One generation that is over."""

    hosts: tuple[HostSlots, ...]
    """With the number of ranks of each."""
    step_before: int
    step_after: int
    ends: tuple[RankEnd, ...]
    asked: bool = False
    """Whether the supervisor ended it to continue with more hosts."""

    @property
    def made_progress(self) -> bool:
        return self.step_after > self.step_before

    @property
    def first(self) -> RankEnd | None:
        """The first end that was neither a good one nor a stop."""
        return next((end for end in self.ends if end.code not in (OK, STOPPED)), None)

    @property
    def culprit(self) -> RankEnd | None:
        """The rank whose end, or hanging, ended the others: one that waited in vain for another says so and fails."""
        first = self.first
        stuck = next((end for end in self.ends if end.was_killed), None)
        return stuck if stuck and first and first.gave_up else first

    @property
    def suspect(self) -> str | None:
        """The host whose rank died, hung or was lost; a rank that gives up may do so because of another one."""
        end = self.culprit
        return end.host if end and (end.was_killed or not end.gave_up) else None


def place(available: Sequence[HostSlots], min_ranks: int, max_ranks: int) -> tuple[HostSlots, ...] | None:
    """Fill the hosts in their order, each up to its slots; None where they have fewer than `min_ranks`.

    Nothing of a run has to be divisible by the number of ranks.
    """
    chosen: list[HostSlots] = []
    left = max_ranks
    for each in available:
        if take := min(each.count, left):
            chosen.append(HostSlots(each.host, take))
            left -= take
    return tuple(chosen) if max_ranks - left >= min_ranks else None


def trusted(available: Sequence[HostSlots], past: Sequence[Past], min_ranks: int) -> list[HostSlots]:
    """Leave out hosts that ended the last generations again and again before a checkpoint, if the others suffice."""
    blamed = [each.suspect for each in fruitless(past)]
    suspects = {host for host in blamed if blamed.count(host) >= SUSPICIOUS}
    others = [each for each in available if each.host not in suspects]
    return others if sum(each.count for each in others) >= min_ranks else list(available)


def fruitless(past: Sequence[Past]) -> list[Past]:
    """Return the last generations without progress, but for those that were ended to take more hosts."""
    found: list[Past] = []
    for each in reversed(past):
        if each.made_progress:
            break
        if not each.asked:
            found.append(each)
    return found[::-1]


def exit_code(last: Past, asked_to_stop: bool) -> int | None:
    """Return the code to end with after a generation; None where the run is to be started again.

    Wrong settings are wrong the next time too. A stop that nobody asked the supervisor for is a host that goes down.
    """
    codes = [end.code for end in last.ends]
    if all(code == OK for code in codes):
        return OK
    if USAGE in codes:
        return USAGE
    return STOPPED if asked_to_stop else None


def back_off_s(past: Sequence[Past], base_s: float, most_s: float, drawn: float) -> float:
    """Return how long to wait before the next start: nothing after progress, else longer each time.

    `drawn` in [0, 1) takes up to half of it away, so that several supervisors do not come back at the same moment.
    """
    count = len(fruitless(past))
    return 0.0 if count == 0 else min(most_s, base_s * 2 ** (count - 1)) * (1 - drawn / 2)


def is_over(past: Sequence[Past], most: int) -> bool:
    """Return whether this number of restarts has brought no newer checkpoint that another one would not either."""
    return len(fruitless(past)) > most
