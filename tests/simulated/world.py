"""A simulated world: clients of which one runs at a time, their clocks, and what becomes of their requests.

Each request to the object store is a point at which a seeded draw says which client goes on and what becomes of the
request; nothing else is drawn, so the same seed gives the same history. Clients are greenlets in one thread.
"""

import contextlib
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

from greenlet import getcurrent, greenlet

MOST_REQUESTS = 60_000
UNITS_S = {"s": 1.0, "h": 3_600.0, "d": 86_400.0}
_DECIDES = re.compile(r"/(log|expired|pins|channels|versions|use|\.run\.supervised)(/|$)")
_LONG_S = 30.0


def seconds(text: str) -> float:
    """Read a time, e.g. 1.5d."""
    return float(text[:-1]) * UNITS_S[text[-1]]


class Fault(NamedTuple):
    """What may befall a request: how often it is done before its answer, whether that comes, and how long it lasts."""

    times: int
    is_answered: bool
    durations: str


_AWAY, _PAUSES = "0s 0s 20s 70s 90s 110s 600s", "0.5s 20s 90s 1000s 5h 15h 2d"
FAULTS = {
    "": Fault(1, True, ""),
    "stalled": Fault(1, True, _PAUSES),  # the client waits before it; for long, all of its threads
    "killed": Fault(0, False, "0s"),  # the client is, before it
    "cut": Fault(0, False, _AWAY),  # it never arrives, nor does what follows for a while
    "lost": Fault(1, False, _AWAY),  # its answer, and what follows
    "repeated": Fault(2, True, "0s"),
    "late": Fault(0, False, _PAUSES),  # it is done much later
}


class Killed(BaseException):
    """The process of a client has been killed: nothing that it still does reaches anybody."""


class BrokenPromiseError(Exception):
    """The product broke a promise: the history has failed."""


@dataclass(eq=False)
class Client:
    """One machine that runs a process after another; a thread of it; or a request of it that is late."""

    name: str
    skew_s: float = 0.0
    wake_s: float = 0.0
    parent: "Client | None" = None
    """Of a thread and of a request, the client that began it."""
    process: int = 0
    is_killed: bool = False
    patience_s: float = float("inf")
    """Up to when requests may stall or come late: what it does now has to end before a time that the product names."""
    away_s: float = 0.0
    disturbed_s: float = 0.0
    """Up to when a fault was at work."""
    num_failed: int = 0
    aims: tuple[str, ...] = ()
    """Faults, for how long, at which request; each waits until those before it have had theirs."""
    greenlet: Any = None

    @property
    def main(self) -> "Client":
        """The client that is the machine of this thread."""
        return self.parent.main if self.parent else self


class World:
    """The clients of one history, and its time."""

    def __init__(self, seed: int, is_calm: bool = False) -> None:
        """`is_calm`: nothing goes wrong but what the steps say."""
        self.seed, self.random, self.now_s = seed, random.Random(f"schedule {seed}"), 1_700_000_000.0
        self.clients: list[Client] = []
        self.calm = self.current = Client("calm")
        self.failure: BaseException | None = None
        self.trace: list[str] = []
        self.asked_s: dict[tuple[Client, str], float] = {}
        """When a machine last made a request."""
        self.faults: Counter[str] = Counter()
        self._hub = getcurrent()
        draw = random.Random(f"kind of history {seed}")
        self._switching = draw.choice([0.15, 0.5, 0.9])
        self._fault_rate = 0.0 if is_calm else draw.choice([0.0, 0.005, 0.015])
        self._stall_rate = 0.0 if is_calm else draw.choice([0.0, 0.02, 0.05])
        self._kinds = draw.sample(list(FAULTS)[1:], draw.randint(1, len(FAULTS) - 1))

    def play(self, works: Sequence[Callable[[], None]]) -> None:
        """Run clients, each with its work, to the end of all and of what is late. Raises what a client raised."""
        draw = random.Random(f"clocks {self.seed}")
        for number, work in enumerate(works):
            self.begin(Client(f"c{number}", draw.choice([0.0, 45.0, seconds("-2d"), seconds("9d")])), work)
        while self.clients:
            self.now_s = max(self.now_s, min(each.wake_s for each in self.clients))
            self.current = self.random.choice([each for each in self.clients if each.wake_s <= self.now_s])
            try:
                self.current.greenlet.switch()
            except Killed:
                pass
            except Exception as error:
                self.failure = self.failure or error
            self.clients = [each for each in self.clients if not each.greenlet.dead]
        self.current = self.calm
        if self.failure is not None:
            raise self.failure

    def begin(self, client: Client, work: Callable[[], None]) -> None:
        """Let a client work from now on."""
        client.greenlet = greenlet(work, self._hub)
        self.clients.append(client)

    def thread(self, target: Callable[[], None], daemon: bool) -> SimpleNamespace:
        """Make another thread of the client that runs, with the methods of Python's."""
        me = self.current
        client = Client(f"{me.name}+", wake_s=self.now_s, parent=me, process=me.process)

        def join() -> None:
            while not client.greenlet.dead:
                self.sleep(10.0)

        return SimpleNamespace(start=lambda: self.begin(client, target), join=join)

    def event(self) -> SimpleNamespace:
        """Make an event, with the methods of Python's; who waits finds out at the end of the time."""
        told: list[bool] = []

        def wait(for_s: float) -> bool:
            if not told:
                self.sleep(for_s)
            return bool(told)

        return SimpleNamespace(wait=wait, set=lambda: told.append(True))

    def sleep(self, for_s: float) -> None:
        """Let the running client wait."""
        self.current.wake_s = self.now_s + for_s
        self._pass_on(self.current)

    def request(self, verb: str, path: str, effect: Callable[[], Any]) -> Any:
        """Let others go on, then do a request, or what a fault makes of it."""
        me, main = self.current, self.current.main
        if me is self.calm:
            return effect()
        kind, for_s = self._aimed(main, f"{verb} {path}") or self._drawn(main, verb, path)
        times, is_answered, _ = FAULTS[kind]
        for_s = max(0.0, min(for_s, main.patience_s - self.now_s))
        if kind:
            main.disturbed_s = max(main.disturbed_s, self.now_s + for_s)
            main.num_failed += not is_answered
        for each in self.clients if kind == "stalled" else ():
            if each is me or (for_s > _LONG_S and each.main is main and each.process == me.process):
                each.wake_s = max(each.wake_s, self.now_s + for_s)
        self._pass_on(me)
        self.now_s += 0.02
        self.asked_s[main, f"{verb} {path}"] = self.now_s
        self._note(f"{me.name}.{me.process} {verb} {path} {kind}")
        self.faults[kind] += 1
        if kind == "killed":
            main.is_killed = True
            raise Killed
        if kind == "late":
            self._send_late(me, for_s, effect)
        elif not is_answered:
            main.away_s = max(main.away_s, self.now_s + for_s)
        for _ in range(times):
            answer = effect()
        if not is_answered:
            raise ConnectionError(kind)
        return answer

    def expect(self, holds: object, otherwise: str) -> None:
        """End the history where a promise is broken."""
        if not holds:
            self.failure = self.failure or BrokenPromiseError(otherwise)
            raise self.failure

    def _aimed(self, main: Client, request: str) -> tuple[str, float] | None:
        """Return what the steps have for a request."""
        for aim in main.aims[:1]:
            kind, duration, pattern = aim.split(maxsplit=2)
            if re.search(pattern, request):
                main.aims = main.aims[1:]
                return kind, seconds(duration)
        return None

    def _drawn(self, main: Client, verb: str, path: str) -> tuple[str, float]:
        """Draw what befalls a request, and for how long; most often something where the protocols decide."""
        if self.now_s < main.away_s:
            return "cut", 0.0
        weight = 1 if not _DECIDES.search(path) else 8 if verb == "create" else 3
        draw = self.random.random() / weight
        if draw >= self._fault_rate + self._stall_rate:
            return "", 0.0
        kind = self.random.choice(self._kinds) if draw < self._fault_rate else "stalled"
        return kind, seconds(self.random.choice(FAULTS[kind].durations.split()))

    def _send_late(self, me: Client, for_s: float, effect: Callable[[], Any]) -> None:
        def land() -> None:
            self._note(f"{me.name} a late request lands")
            with contextlib.suppress(OSError):
                effect()

        self.begin(Client("late", wake_s=self.now_s + for_s, parent=me, process=me.process), land)

    def _note(self, text: str) -> None:
        self.trace.append(f"{self.now_s - 1.7e9:12.2f} {text}".rstrip())
        self.expect(len(self.trace) < MOST_REQUESTS, "the history has no end")

    def _pass_on(self, me: Client) -> None:
        """Let others go on, and return when this client is drawn again. Raises Killed where it is dead by then."""
        if not self._is_over(me) and (me.wake_s > self.now_s or self.random.random() < self._switching):
            self._hub.switch()
        if self._is_over(me):
            raise Killed

    def _is_over(self, me: Client) -> bool:
        return self.failure is not None or me.main.is_killed or me.process != me.main.process
