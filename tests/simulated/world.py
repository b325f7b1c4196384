"""A simulated world: clients of which one runs at a time, an object store, clocks, and what goes wrong.

Each request to the object store is a point at which a seeded draw says which client goes on and what becomes of the
request; nothing else is drawn, so the same seed gives the same history. Clients are greenlets in one thread.
"""

import contextlib
import io
import pkgutil
import random
import re
import tomllib
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import get_ident
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest
from greenlet import getcurrent, greenlet

STEPS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("steps.toml").read_text())
FAULTS = STEPS.pop("faults")  # how often a request is done before its answer, whether that comes, how long it lasts
ASLEEP = "asleep"  # a fault of the steps alone: a client is stalled for longer than the product allows
BEGIN_S, MOST_REQUESTS = 1.7e9, 60_000
Clients = list[list[str]]  # by client, its steps


def seconds(text: str) -> float:
    """Read a time, e.g. 1.5d."""
    return float(text[:-1]) * {"s": 1.0, "h": 3_600.0, "d": 86_400.0}[text[-1]]


class Killed(BaseException):
    """The process of a client has been killed, or the history has ended."""


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
    aims: Sequence[str] = ()
    """Faults, for how long, at which request; each waits until those before it have had theirs."""
    greenlet: Any = None


class World:
    """The clients of one history, and its time."""

    def __init__(self, seed: int, is_calm: bool = False) -> None:
        """`is_calm`: nothing goes wrong but what the steps say."""
        self.random, self.now_s, self._hub = random.Random(seed), BEGIN_S, getcurrent()
        self._clients: list[Client] = []
        self.calm = self.current = Client("calm")
        self.failure = ""  # why the history has failed
        self.trace, self.faults = list[str](), Counter[str]()
        self._switching = self.random.choice([0.15, 0.5, 0.9])
        self._fault_rate, self._stall_rate, self.lag_rate = (
            0.0 if is_calm else self.random.choice(rates) for rates in ([0, 0.005, 0.015], [0, 0.02, 0.05], [0, 0.3])
        )
        self._kinds = self.random.sample(list(FAULTS), self.random.randint(1, len(FAULTS)))

    def play(self, clients: Clients, perform: Callable[[str], None]) -> None:
        """Let clients perform their steps, to the end of all and of what is late, or to the first failure."""
        for number, steps in enumerate(clients):
            skew_s = self.random.choice([0.0, 45.0, seconds("-2d"), seconds("9d")])
            work = greenlet(lambda steps=steps: [perform(each) for each in steps], self._hub)
            self._clients.append(Client(f"c{number}", skew_s, greenlet=work))
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
        if not self.failure and (for_s > 0 or self.random.random() < self._switching):
            self._hub.switch()
        if self.failure:
            raise Killed

    def request(self, verb: str, path: str, effect: Callable[[], Any]) -> Any:
        """Let others go on, then do a request, or what a fault makes of it."""
        me = self.current
        if me is self.calm:
            return effect()
        kind, for_s = self._befalling(me, verb, path)
        times, is_answered, _ = FAULTS.get(kind, (1, True, ()))
        until_s = self.now_s + for_s
        me.num_failed += not is_answered
        self.sleep(for_s if kind in ("stalled", ASLEEP) else 0.0)
        self.now_s += 0.02
        self._note(f"{me.name}.{me.process} {verb} {path} {kind}")
        self.faults[kind] += 1
        if kind == "killed":
            raise Killed
        if kind == "late":
            landing = greenlet(lambda: self._land(path, effect), self._hub)
            self._clients.append(Client(me.name, process=me.process, wake_s=until_s, greenlet=landing))
        elif not is_answered:
            me.away_s = max(me.away_s, until_s)
        for _ in range(times):
            answer = effect()
        if not is_answered:
            raise ConnectionError(kind)
        return answer

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """End the history by an error of the block, which the product does not see."""
        try:
            yield
        except Exception as error:
            self.failure = self.failure or f"{type(error).__name__}: {error}"
            raise Killed from error

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
        decides = re.search(r"/(log|expired|pins|channels|versions|use)(/|$)", path)
        weight = 1 if not decides else 8 if verb == "create" else 3
        draw = self.random.random() / weight
        if draw >= self._fault_rate + self._stall_rate:
            return "", 0.0
        kind = self.random.choice(self._kinds) if draw < self._fault_rate else "stalled"
        return kind, min(seconds(self.random.choice(FAULTS[kind][2])), for_most_s)

    def _land(self, path: str, effect: Callable[[], Any]) -> None:
        self._note(f"{self.current.name} a late request of {path} lands")
        with contextlib.suppress(OSError):
            effect()

    def _note(self, text: str) -> None:
        self.trace.append(f"{self.now_s - BEGIN_S:12.2f} {text}".rstrip())
        with self.failing():
            assert len(self.trace) < MOST_REQUESTS, "the history has no end"


@dataclass(eq=False)
class Stored:
    """An object: its bytes, and the time of its last write by the store's clock."""

    data: bytes
    mtime_s: float = 0.0


class ObjectStore:
    """What `RemoteFiles` needs of fsspec's file systems; ranges of a file that is open are no requests of their own."""

    def __init__(self, world: World, watch: Callable[[str, str, bytes | None], None]) -> None:
        """`watch` is called before each change: what is done, the path, and the new bytes, None where it is deleted."""
        self.objects: dict[str, Stored] = {}
        self.first: dict[str, Stored] = {}
        """By path, the object that was the first one there; it stays the same while its bytes do."""
        self._world, self._watch = world, watch

    @staticmethod
    def _strip_protocol(url: str) -> str:
        return url.partition("://")[2]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> Any:
        def data() -> bytes:
            if path not in self.objects:
                raise FileNotFoundError(path)
            return self.objects[path].data[start:end]

        return data() if start is not None else self._world.request("read", path, data)

    def pipe_file(self, path: str, data: bytes, mode: str = "overwrite") -> None:
        self._world.request(mode, path, lambda: self._change(mode, path, bytes(data)))

    def rm_file(self, path: str) -> None:
        self._world.request("delete", path, lambda: self._change("delete", path, None))

    def info(self, path: str) -> Any:
        return self._world.request("look", path, lambda: self._about(path))

    def ls(self, path: str, detail: bool) -> list[Any]:
        below = [each.removeprefix(f"{path}/") for each in self.find(path, detail=False)]
        names = dict.fromkeys(f"{path}/{each.partition('/')[0]}" for each in below)
        if not names:
            raise FileNotFoundError(path)
        return [self._about(each) for each in names] if detail else list(names)

    def find(self, path: str, detail: bool) -> list[str]:
        """List the paths of a file, or below a folder; now and then in two requests, each for half of them.

        So clients do that list page by page; what is written between the two may be missed, as POSIX allows."""

        def names() -> dict[str, float]:
            return {each: of.mtime_s for each, of in self.objects.items() if f"{each}/".startswith(f"{path}/")}

        world = self._world
        found, listed_s = world.request("list", path, names), world.now_s
        if world.random.random() < world.lag_rate:
            before_s = world.random.choice([listed_s, float("inf")])
            later = {each for each, at_s in world.request("list", path, names).items() if at_s <= before_s}
            found = {each for each in {*found, *later} if each in (found if zlib.crc32(each.encode()) & 1 else later)}
        return sorted(found)

    def _about(self, path: str) -> dict[str, Any]:
        stored = self.objects.get(path)
        about = {"type": "file", "size": len(stored.data), "mtime": stored.mtime_s} if stored else {"type": "directory"}
        return {"name": path, **about}

    def _change(self, verb: str, path: str, data: bytes | None) -> None:
        if verb == "create" and path in self.objects:
            raise FileExistsError(path)
        with self._world.failing():
            self._watch(verb, path, data)
        stored = self.objects.pop(path, None)
        if data is not None:
            self.objects[path] = stored if stored and stored.data == data else Stored(data)
            self.objects[path].mtime_s = self._world.now_s
            self.first.setdefault(path, self.objects[path])


@contextlib.contextmanager
def simulated(world: World, objects: ObjectStore) -> Iterator[None]:
    """Let this thread see this world: the object store at sim://, clocks and draws; threads of it work at once."""

    def here(ours: Callable[..., Any], theirs: Any, thread: int = get_ident()) -> Callable[..., Any]:
        return lambda *given, **options: (ours if get_ident() == thread else theirs)(*given, **options)  # noqa: PLW0108

    pool = SimpleNamespace(
        map=map, submit=lambda work, item: SimpleNamespace(result=lambda: work(item)), shutdown=lambda **options: None
    )
    seen: dict[str, Any] = {
        "featurestore.storage.remote._client": lambda protocol, place: objects,
        "featurestore.storage.safety.check_backend": lambda *place, **options: SimpleNamespace(problems=()),
        "featurestore.storage.remote.ThreadPoolExecutor": lambda threads: contextlib.nullcontext(pool),
        "featurestore.storage.storage.ThreadPoolExecutor": lambda threads: contextlib.nullcontext(pool),
        "featurestore.storage.storage.wait": lambda futures, timeout: SimpleNamespace(done=futures),
        "serving.http.live.asyncio.to_thread": AsyncMock(side_effect=lambda work, *given: work(*given)),
        "uuid.uuid4": lambda: uuid.UUID(int=random.getrandbits(128), version=4),
        "time.time": lambda: world.now_s + world.current.skew_s,
        "time.monotonic": lambda: world.now_s,
        "time.sleep": world.sleep,
    }
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        for name, value in seen.items():
            patch.setattr(name, here(value, pkgutil.resolve_name(name)))
        random.seed(world.random.random())
        yield
