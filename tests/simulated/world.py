"""A simulated world: clients of which one runs at a time, an object store, clocks, and what goes wrong.

Each request to the object store is a point at which a seeded draw says which client goes on and what becomes of the
request; nothing else is drawn, so the same seed gives the same history. Clients are greenlets in one thread.
"""

import contextlib
import io
import random
import re
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from greenlet import getcurrent, greenlet

from featurestore.storage import remote, safety, storage

MOST_REQUESTS = 60_000
UNITS_S = {"s": 1.0, "h": 3_600.0, "d": 86_400.0}
_DECIDES = re.compile(r"/(log|expired|pins|channels|versions|use)(/|$)")
_AWAY, _PAUSES = "0s 0s 20s 70s 90s 110s 600s", "0.5s 20s 90s 1000s 5h 15h 2d"
FAULTS = {
    "stalled": (1, True, _PAUSES),  # the client waits before it
    "killed": (0, False, "0s"),  # the client is, before it
    "cut": (0, False, _AWAY),  # it never arrives, nor does what follows for a while
    "lost": (1, False, _AWAY),  # its answer, and what follows
    "repeated": (2, True, "0s"),
    "late": (0, False, _PAUSES),  # it is done much later
}
"""What may befall a request: how often it is done before its answer, whether that comes, and how long it lasts."""
ASLEEP = "asleep"
"""A fault of the steps alone: a client is stalled for longer than the product allows."""


def seconds(text: str) -> float:
    """Read a time, e.g. 1.5d."""
    return float(text[:-1]) * UNITS_S[text[-1]]


class Killed(BaseException):
    """The process of a client has been killed, or the history has ended."""


class BrokenPromiseError(Exception):
    """The product broke a promise: the history has failed."""


@dataclass(eq=False)
class Client:
    """A machine that runs one process after another, or a request of one that is late."""

    name: str
    skew_s: float = 0.0
    process: int = 0
    wake_s: float = 0.0
    patience_s: float = float("inf")
    """Up to when requests may stall or come late: what it does now has to end before a time that the product names."""
    away_s: float = 0.0
    num_failed: int = 0
    aims: tuple[str, ...] = ()
    """Faults, for how long, at which request; each waits until those before it have had theirs."""
    greenlet: Any = None


class World:
    """The clients of one history, and its time."""

    def __init__(self, seed: int, is_calm: bool = False) -> None:
        """`is_calm`: nothing goes wrong but what the steps say."""
        self.seed, self.random, self.now_s, self._hub = seed, random.Random(f"schedule {seed}"), 1.7e9, getcurrent()
        self._clients: list[Client] = []
        self.calm = self.current = Client("calm")
        self.failure: BaseException | None = None
        self.trace: list[str] = []
        self.faults: Counter[str] = Counter()
        draw = random.Random(f"kind of history {seed}")
        self._switching = draw.choice([0.15, 0.5, 0.9])
        self._fault_rate = 0.0 if is_calm else draw.choice([0.0, 0.005, 0.015])
        self._stall_rate = 0.0 if is_calm else draw.choice([0.0, 0.02, 0.05])
        self._kinds = draw.sample(list(FAULTS), draw.randint(1, len(FAULTS)))

    def play(self, plan: Sequence[Sequence[str]], perform: Callable[[str], None]) -> None:
        """Let clients perform their steps, to the end of all and of what is late, or to the first failure."""
        draw = random.Random(f"clocks {self.seed}")
        for number, steps in enumerate(plan):
            skew_s = draw.choice([0.0, 45.0, seconds("-2d"), seconds("9d")])
            self._begin(Client(f"c{number}", skew_s), lambda steps=steps: [perform(each) for each in steps])
        while self._clients:
            self.now_s = max(self.now_s, min(each.wake_s for each in self._clients))
            self.current = self.random.choice([each for each in self._clients if each.wake_s <= self.now_s])
            with contextlib.suppress(Killed), self.failing():
                self.current.greenlet.switch()
            self._clients = [each for each in self._clients if not each.greenlet.dead]
        self.current = self.calm

    def sleep(self, for_s: float) -> None:
        """Let the running client wait, and others go on. Raises Killed where the history has ended by then."""
        self.current.wake_s = self.now_s + for_s
        if self.failure is None and (for_s > 0 or self.random.random() < self._switching):
            self._hub.switch()
        if self.failure is not None:
            raise Killed

    def request(self, verb: str, path: str, effect: Callable[[], Any]) -> Any:
        """Let others go on, then do a request, or what a fault makes of it."""
        me = self.current
        if me is self.calm:
            return effect()
        kind, for_s = self._befalling(me, verb, path)
        times, is_answered, _ = FAULTS.get(kind, (1, True, ""))
        until_s = self.now_s + for_s
        me.num_failed += not is_answered
        self.sleep(for_s if kind in ("stalled", ASLEEP) else 0.0)
        self.now_s += 0.02
        self._note(f"{me.name}.{me.process} {verb} {path} {kind}")
        self.faults[kind] += 1
        if kind == "killed":
            raise Killed
        if kind == "late":
            self._begin(Client(me.name, process=me.process, wake_s=until_s), lambda: self._land(path, effect))
        elif not is_answered:
            me.away_s = max(me.away_s, until_s)
        for _ in range(times):
            answer = effect()
        if not is_answered:
            raise ConnectionError(kind)
        return answer

    def expect(self, holds: object, otherwise: str) -> None:
        """End the history where a promise is broken."""
        if not holds:
            with self.failing():
                raise BrokenPromiseError(otherwise)

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """End the history by an error of the block, which the product does not see."""
        try:
            yield
        except Exception as error:
            self.failure = self.failure or error
            raise Killed from error

    def _begin(self, client: Client, work: Callable[[], object]) -> None:
        client.greenlet = greenlet(work, self._hub)
        self._clients.append(client)

    def _befalling(self, me: Client, verb: str, path: str) -> tuple[str, float]:
        """Return what befalls a request, and for how long: by the steps or drawn, mostly where protocols decide."""
        for_most_s = max(0.0, me.patience_s - self.now_s)
        for aim in me.aims[:1]:
            kind, duration, pattern = aim.split(maxsplit=2)
            if re.search(pattern, f"{verb} {path}"):
                me.aims = me.aims[1:]
                return kind, seconds(duration) if kind == ASLEEP else min(seconds(duration), for_most_s)
        if self.now_s < me.away_s:
            return "cut", 0.0
        weight = 1 if not _DECIDES.search(path) else 8 if verb == "create" else 3
        draw = self.random.random() / weight
        if draw >= self._fault_rate + self._stall_rate:
            return "", 0.0
        kind = self.random.choice(self._kinds) if draw < self._fault_rate else "stalled"
        return kind, min(seconds(self.random.choice(FAULTS[kind][2].split())), for_most_s)

    def _land(self, path: str, effect: Callable[[], Any]) -> None:
        self._note(f"{self.current.name} a late request of {path} lands")
        with contextlib.suppress(OSError):
            effect()

    def _note(self, text: str) -> None:
        self.trace.append(f"{self.now_s - 1.7e9:12.2f} {text}".rstrip())
        self.expect(len(self.trace) < MOST_REQUESTS, "the history has no end")


@dataclass
class Stored:
    """An object: its bytes, and the time of its last write by the store's clock."""

    data: bytes
    mtime_s: float


class ObjectStore:
    """What `RemoteFiles` needs of fsspec's file systems; ranges of a file that is open are no requests of their own."""

    def __init__(self, world: World, watch: Callable[[str, str, bytes | None], None]) -> None:
        """`watch` is called before each change: what is done, the path, and the new bytes, None where it is deleted."""
        self.objects: dict[str, Stored] = {}
        self.first: dict[str, Stored] = {}
        """By path, the object that was the first one there; it stays the same while its bytes do."""
        self._world, self._watch, self._random = world, watch, random.Random(f"listings {world.seed}")
        self._lagging, self._misses_new = self._random.choice([0.0, 0.3]), self._random.random() < 0.5

    @staticmethod
    def _strip_protocol(url: str) -> str:
        return url.partition("://")[2]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> Any:
        if start is not None:
            return self._found(path).data[start:end]
        return self._world.request("read", path, lambda: self._found(path).data)

    def pipe_file(self, path: str, data: bytes, mode: str = "overwrite") -> None:
        self._world.request(mode, path, lambda: self._change(mode, path, bytes(data)))

    def rm_file(self, path: str) -> None:
        self._world.request("delete", path, lambda: self._found(path) and self._change("delete", path, None))

    def info(self, path: str) -> Any:
        return self._world.request("look", path, lambda: self._about(path))

    def ls(self, path: str, detail: bool) -> list[Any]:
        found: dict[str, dict[str, Any]] = {}
        for place in self.find(path, detail=False):
            name = f"{path}/{place.removeprefix(f'{path}/').partition('/')[0]}"
            if name != place:
                found[name] = {"name": name, "type": "directory", "size": 0}
            elif place in self.objects:
                found[name] = self._about(place)
        if not found:
            raise FileNotFoundError(path)
        return list(found.values() if detail else found)

    def find(self, path: str, detail: bool) -> list[str]:
        """List the paths of a file, or below a folder; now and then in two requests, each for half of them.

        So clients do that list page by page; what is written between the two may be missed, as POSIX allows."""

        def names() -> dict[str, float]:
            return {each: of.mtime_s for each, of in self.objects.items() if f"{each}/".startswith(f"{path}/")}

        found, listed_s = self._world.request("list", path, names), self._world.now_s
        if self._world.current is not self._world.calm and self._random.random() < self._lagging:
            before_s = listed_s if self._misses_new else float("inf")
            later = {each for each, at_s in self._world.request("list", path, names).items() if at_s <= before_s}
            found = {each for each in {*found, *later} if each in (found if zlib.crc32(each.encode()) & 1 else later)}
        return sorted(found)

    def _found(self, path: str) -> Stored:
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path]

    def _about(self, path: str) -> dict[str, Any]:
        stored = self._found(path)
        return {"name": path, "type": "file", "size": len(stored.data), "mtime": stored.mtime_s}

    def _change(self, verb: str, path: str, data: bytes | None) -> None:
        if verb == "create" and path in self.objects:
            raise FileExistsError(path)
        with self._world.failing():
            self._watch(verb, path, data)
        stored = self.objects.pop(path, None)
        if data is not None:
            self.objects[path] = stored if stored and stored.data == data else Stored(data, 0.0)
            self.objects[path].mtime_s = self._world.now_s
            self.first.setdefault(path, self.objects[path])


def _with_retries(work: Callable[[], Any], retry_if: Any = remote.is_transient, patience_s: Any = None) -> Any:
    """Do as the product's own function, without tenacity, which would take a third of the time of a history."""
    end_s = time.monotonic() + remote.PATIENCE_S
    while True:
        try:
            return work()
        except Exception as error:
            if not retry_if(error):
                raise
            if time.monotonic() > end_s:
                raise remote.RetriesExhaustedError(error, 1) from error
        time.sleep(5.0)


@contextlib.contextmanager
def simulated(world: World, objects: ObjectStore) -> Iterator[pytest.MonkeyPatch]:
    """Let the product see this world: the object store at sim://, clocks and draws, threads one after another."""
    drawn, pool = random.Random(f"ids {world.seed}"), contextlib.nullcontext(SimpleNamespace(map=map))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        for module in (remote, storage):
            patch.setattr(module, "ThreadPoolExecutor", lambda threads: pool)
        patch.setattr(safety, "check_backend", lambda *place, **options: SimpleNamespace(problems=()))
        patch.setattr(remote, "with_retries", _with_retries)
        patch.setattr(remote, "_client", lambda protocol, place: objects)
        patch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=drawn.getrandbits(128), version=4))
        patch.setattr(time, "time", lambda: world.now_s + world.current.skew_s)
        patch.setattr(time, "monotonic", lambda: world.now_s)
        patch.setattr(time, "sleep", world.sleep)
        random.seed(world.seed)
        yield patch
