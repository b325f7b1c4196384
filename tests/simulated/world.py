"""A simulated world: clients of which one runs at a time, their clocks, an object store in memory, and what goes wrong.

Each request to the object store is a point at which a seeded draw says which client goes on and what becomes of the
request; nothing else is drawn, so the same seed gives the same history. Clients are greenlets in one thread. The
product's `Storage` and `RemoteFiles` are the real ones: what is simulated is the client that fsspec would give them.
"""

import contextlib
import hashlib
import heapq
import io
import random
import re
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, NoReturn

import pytest
from greenlet import getcurrent, greenlet

from featurestore import log, store
from featurestore.errors import StorageError
from featurestore.storage import remote
from featurestore.storage import storage as storage_module
from featurestore.storage.storage import Storage
from pipeline.samples import publish

HOUR_S, DAY_S = 3_600.0, 86_400.0
MOST_REQUESTS = 60_000
FAULTS = ("stalled", "killed", "cut", "lost", "repeated", "late", "offline")
"""A client waits, or is killed, before a request; the request never arrives; its answer is lost; it is done twice, or
much later; nothing of the client arrives for some minutes."""
_DECIDES = re.compile(r"/(log|expired|pins|channels|versions|use|\.run\.supervised)(/|$)")
_OFFLINE_S = (20.0, 200.0, 250.0, 280.0, 600.0)
_LONG_S = 30.0
_FAILING = ("cut", "lost", "late", "offline")
_PAUSES_S = (0.5, 20.0, 90.0, 1_000.0, 5 * HOUR_S, 15 * HOUR_S, 2 * DAY_S)
_NOTHING = ("", 0.0)


class Killed(BaseException):
    """The process of a client has been killed: nothing that it still does reaches anybody."""


class BrokenPromiseError(Exception):
    """The product broke a promise: the history has failed."""


class Aim(NamedTuple):
    """What becomes of the next request whose verb and path match: a fault, and for how long."""

    request: str
    for_s: float
    fate: str = "stalled"


class Operation(NamedTuple):
    """One thing that a client does, after a pause; each aim waits until those before it have had their requests."""

    name: str
    argument: int = 0
    pause_s: float = 0.0
    aims: tuple[Aim, ...] = ()


Plan = list[list[Operation]]
"""By client, its operations."""


def do(name: str, argument: int = 0, pause_s: float = 0.0, *aims: Aim) -> Operation:
    """Write an operation of a scene."""
    return Operation(name, argument, pause_s, aims)


def draw_plan(draw: random.Random, weights: Mapping[str, int], span_s: float, decides: Sequence[str]) -> Plan:
    """Draw what a few clients do; what is kept for a while is kept for `span_s`, and pauses are shorter and longer.

    One operation in six waits at one of the requests that decide."""
    names, counts = list(weights), list(weights.values())
    pauses_s = draw.choice([[0.0], [0.0, 0.0, 60.0, 0.6 * span_s], [0.0, 0.7 * span_s, 1.3 * span_s]])

    def aims() -> tuple[Aim, ...]:
        for_s = draw.choice([5.0, 60.0, 60.0, 1_000.0, 0.6 * span_s])
        return (Aim(draw.choice(decides), for_s),) if draw.random() < 0.17 else ()

    return [
        [
            Operation(name, draw.getrandbits(22), draw.choice(pauses_s), aims())
            for name in draw.choices(names, counts, k=draw.randint(1, 4))
        ]
        for _ in range(draw.randint(2, 5))
    ]


@dataclass
class Stored:
    """An object: its bytes, and the time of its last write by the store's clock."""

    data: bytes
    mtime_s: float


@dataclass(eq=False)
class Client:
    """One process at a time on one host; a killed one is followed by the next."""

    name: str
    skew_s: float = 0.0
    wake_s: float = 0.0
    patience_s: float = float("inf")
    """Up to when requests may stall or come late: what it does now has to end before a time that the product names."""
    offline_s: float = 0.0
    disturbed_s: float = 0.0
    """Up to when a fault was at work."""
    num_failed: int = 0
    """Requests that faults let fail."""
    aims: list[Aim] = field(default_factory=list)
    is_killed: bool = False
    is_done: bool = False
    process: int = 1
    told_to_stop: bool = False
    greenlet: Any = None
    parent: "Client | None" = None
    """Of a thread, the client that began it."""

    @property
    def main(self) -> "Client":
        """The client that is the process of this thread."""
        return self.parent.main if self.parent else self


class World:
    """All that is of one history."""

    def __init__(self, seed: int, is_calm: bool = False) -> None:
        """`is_calm`: nothing goes wrong but what is in the plan."""
        self.seed, self.random = seed, random.Random(f"schedule {seed}")
        self.now_s = 1_700_000_000.0
        self.objects: dict[str, Stored] = {}
        self.watchers: list[Callable[[str, str, bytes | None], None]] = []
        """Called at each change with what was done ("create", "write", "delete"), the path, and the bytes or None."""
        self.clients: list[Client] = []
        self.calm = Client("calm")
        self.current = self.calm
        self.failure: BaseException | None = None
        self.trace: list[str] = []
        self.faults: Counter[str] = Counter()
        self.requests = 0
        self._late: list[tuple[float, int, Callable[[], object]]] = []
        self._hub = getcurrent()
        draw = random.Random(f"kind of history {seed}")
        self._switching = draw.choice([0.15, 0.5, 0.9])
        self._fault_rate = draw.choice([0.0, 0.005, 0.015]) * (not is_calm)
        self._stall_rate = draw.choice([0.0, 0.02, 0.05]) * (not is_calm)
        self._kinds = draw.sample(FAULTS[1:], draw.randint(1, len(FAULTS) - 1))
        self._pages = draw.choice([0.0, 0.3])
        self._is_folder = draw.random() < 0.5  # whose listings miss what is replaced meanwhile, as POSIX allows
        self._kills_left = 3

    @property
    def digest(self) -> str:
        """The sha256 of the history."""
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()

    @property
    def has_late(self) -> bool:
        """Whether requests of the past have still to land."""
        return bool(self._late)

    def play(self, works: Sequence[Callable[[], None]]) -> None:
        """Run clients, each with its work, to the end of all; then what is late lands. Raises what a client raised."""
        skews = random.Random(f"clocks {self.seed}")
        self.clients = [Client(f"c{i}", skews.choice([0.0, -2 * DAY_S, 45.0, 9 * DAY_S])) for i in range(len(works))]
        for client, work in zip(self.clients, works, strict=True):
            self._begin(client, work)
        while chosen := self._next():
            self.current = chosen
            chosen.greenlet.switch()
        self.current = self.calm
        if self.failure is None:
            self._advance(self.now_s + 30 * DAY_S)
        if self.failure is not None:
            raise self.failure

    def thread(self, target: Callable[[], None], daemon: bool) -> SimpleNamespace:
        """Make another thread of the client that runs, with the methods of Python's."""
        me = self.current
        client = Client(f"{me.name}+", me.skew_s, self.now_s, process=me.process, parent=me)

        def start() -> None:
            self.clients.append(client)
            self._begin(client, target)

        def join() -> None:
            while not client.is_done:
                self.sleep(1.0)

        return SimpleNamespace(start=start, join=join)

    def event(self) -> SimpleNamespace:
        """Make an event, with the methods of Python's."""
        waiting, state = set[Client](), SimpleNamespace(is_set=False)

        def wait(seconds: float) -> bool:
            waiting.add(self.current)
            if not state.is_set:
                self.sleep(seconds)
            waiting.discard(self.current)
            return state.is_set

        def set_it() -> None:
            state.is_set = True
            for each in waiting:
                each.wake_s = self.now_s

        return SimpleNamespace(wait=wait, set=set_it)

    def request(self, verb: str, path: str, effect: Callable[[], Any], changes: bool = False) -> Any:
        """Let others go on, then do a request, or what a fault makes of it."""
        me = self.current
        if me is self.calm:
            return effect()
        if me.is_killed or self.failure is not None:
            raise Killed
        fate, for_s = self._aimed(me.main, f"{verb} {path}") or self._fate(me, verb, path, changes)
        if fate:
            me.main.disturbed_s = max(me.main.disturbed_s, self.now_s + for_s)
            me.main.num_failed += fate in _FAILING
        if fate == "stalled":
            self._stall(me, for_s)
        self._pass_on(me)
        self.requests += 1
        self.now_s += 0.02
        if fate:
            self.faults[fate] += 1
        self.trace.append(f"{self.now_s - 1.7e9:12.2f} {me.name}.{me.process} {verb} {path} {fate}".rstrip())
        if self.requests > MOST_REQUESTS:
            raise BrokenPromiseError("the history has no end")
        if fate == "killed":
            self._kills_left -= 1
            for each in self.clients:
                each.is_killed = each.is_killed or each.main is me.main
            raise Killed
        if fate == "late":
            heapq.heappush(self._late, (self.now_s + for_s, self.requests, effect))
        result = None if fate in ("cut", "late", "offline") else effect()
        if fate in _FAILING:
            raise ConnectionError(fate)
        return effect() if fate == "repeated" else result

    def sleep(self, seconds: float) -> None:
        """Let the running client wait."""
        me = self.current
        me.wake_s = self.now_s + seconds
        self._pass_on(me)

    def restart(self) -> None:
        """Let the killed client begin again as another process."""
        me = self.current
        me.is_killed, me.told_to_stop, me.aims = False, False, []
        me.process += 1
        me.wake_s = self.now_s

    def fail(self, text: str) -> NoReturn:
        """End the history: a promise is broken."""
        self.failure = self.failure or BrokenPromiseError(text)
        raise self.failure

    def expect(self, holds: object, otherwise: str) -> None:
        """Fail where a promise is broken."""
        if not holds:
            self.fail(otherwise)

    def _aimed(self, main: Client, request: str) -> tuple[str, float] | None:
        """Return what the plan has for a request; where its answer is lost, the client is cut off for a while."""
        if not main.aims or not re.search(main.aims[0].request, request):
            return None
        aim = main.aims.pop(0)
        for_s = self._within_patience(main, aim.for_s)
        if aim.fate == "lost":
            main.offline_s = self.now_s + for_s
        return aim.fate, for_s

    def _fate(self, me: Client, verb: str, path: str, changes: bool) -> tuple[str, float]:
        """Draw what becomes of a request, and for how long; most often something where the protocols decide."""
        main = me.main
        if self.now_s < main.offline_s:
            return "offline", 0.0
        weight = 1 if not _DECIDES.search(path) else 8 if verb == "create" else 3
        draw, rate = self.random.random(), self._fault_rate * weight
        if draw >= rate:
            is_stalled = draw < rate + self._stall_rate * weight
            return ("stalled", self._within_patience(main, self.random.choice(_PAUSES_S))) if is_stalled else _NOTHING
        kind = self.random.choice(self._kinds)
        if kind == "killed":
            return (kind, 0.0) if self._kills_left else _NOTHING
        if kind == "offline" or (verb == "create" and self.random.random() < 0.5):  # as the client is cut off
            main.offline_s = self.now_s + self._within_patience(main, self.random.choice(_OFFLINE_S))
        if kind == "offline":
            return (self.random.choice(["offline", "lost"]) if changes else kind), 0.0
        if kind == "late":
            return (kind, self._within_patience(main, self.random.choice(_PAUSES_S))) if changes else _NOTHING
        return (kind, 0.0) if changes or kind == "cut" else _NOTHING

    def _within_patience(self, main: Client, seconds: float) -> float:
        return max(0.0, min(seconds, main.patience_s - self.now_s))

    def _stall(self, me: Client, pause_s: float) -> None:
        """Let a thread wait or, for long, its whole process, as one that is suspended."""
        for each in self.clients:
            if each is me or (pause_s > _LONG_S and each.main is me.main):
                each.wake_s = max(each.wake_s, self.now_s + pause_s)

    def _begin(self, client: Client, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                if self.failure is None:
                    work()
            except Killed:
                pass
            except BaseException as error:
                self.failure = self.failure or error
            client.is_done = True

        client.greenlet = greenlet(run, self._hub)

    def _pass_on(self, me: Client) -> None:
        """Let a client that is drawn go on, and return when this one is drawn again."""
        if me.wake_s > self.now_s or self.random.random() < self._switching:
            chosen = self._next()
            if chosen is not me:
                self.current = chosen
                chosen.greenlet.switch()
        if self.failure is not None or me.is_killed:
            raise Killed

    def _next(self) -> Any:
        """Draw who goes on; None where all have ended."""
        left = [each for each in self.clients if not each.is_done]
        if self.failure is not None or not left:
            return left[0] if left else None
        if not any(each.wake_s <= self.now_s for each in left):
            self._advance(min(each.wake_s for each in left))
        return self.random.choice([each for each in left if each.wake_s <= self.now_s])

    def _advance(self, to_s: float) -> None:
        """Let time pass, and late requests land."""
        while self._late and self._late[0][0] <= to_s:
            self.now_s, _, effect = heapq.heappop(self._late)
            with contextlib.suppress(Exception):  # a broken promise is noted already
                self.trace.append(f"{self.now_s - 1.7e9:12.2f} a late request lands")
                effect()
        self.now_s = to_s

    def put(self, path: str, data: bytes, create: bool) -> None:
        """Write an object. Raises FileExistsError where it is to be created and is there."""
        if create and path in self.objects:
            raise FileExistsError(path)
        self._tell("create" if create else "write", path, data)
        self.objects[path] = Stored(data, self.now_s)

    def remove(self, path: str) -> None:
        """Remove an object. Raises FileNotFoundError."""
        if path not in self.objects:
            raise FileNotFoundError(path)
        self._tell("delete", path, None)
        del self.objects[path]

    def names(self, folder: str) -> list[str]:
        """List the paths below a folder, in two requests where the history has such listings. May miss or double."""
        start = f"{folder}/"

        def below() -> list[str]:
            return [path for path in self.objects if path.startswith(start)]

        if self.current is self.calm or self.random.random() >= self._pages:
            found: list[str] = self.request("list", folder, below)
            return found
        half = self._half if self._is_folder else (lambda path: path > middle)
        all_names = sorted(below())
        middle = self.random.choice(all_names) if all_names else ""
        began_s = self.now_s if self._is_folder else float("inf")
        first = self.request("list", folder, lambda: {p: self.objects[p].mtime_s for p in below() if not half(p)})
        second = self.request("list", folder, lambda: {p: self.objects[p].mtime_s for p in below() if half(p)})
        # A name that was written meanwhile may be missed.
        return [*first, *(path for path, mtime_s in second.items() if mtime_s <= began_s)]

    @staticmethod
    def _half(path: str) -> bool:
        return bool(zlib.crc32(path.encode()) & 1)

    def _tell(self, action: str, path: str, data: bytes | None) -> None:
        try:
            for watcher in self.watchers:
                watcher(action, path, data)
        except Exception as error:
            self.failure = self.failure or error
            raise


class History:
    """What all kinds have: how an operation is done, and how it may fail."""

    world: World
    PLACE: ClassVar[str]
    MOST_S: ClassVar[float] = float("inf")
    """Time that an operation may take."""
    GOOD: ClassVar[tuple[type[Exception], ...]] = (StorageError,)
    """Errors that the product names for what may be."""
    DECIDES: ClassVar[tuple[str, ...]] = ()
    """Requests at which others are let in."""
    SCENES: ClassVar[tuple[Plan, ...]] = ()
    """Plans that lead up to what is seldom drawn; every other history of a kind has one, in turn."""

    def perform(self, operation: Operation) -> None:
        """Do an operation; one that only reads fails only where a request of its own has failed."""
        me = self.world.current
        me.aims, num_failed = list(operation.aims), me.num_failed
        me.patience_s = self.world.now_s + self.patience_s(operation.name)
        try:
            getattr(self, operation.name)(self.opened(), operation.argument)
        except self.GOOD as error:
            may_fail = operation.name != "read" or me.num_failed > num_failed or not isinstance(error, StorageError)
            self.world.expect(may_fail, f"{operation.name} fails, though all of its requests were answered: {error}")

    def opened(self) -> Any:
        """Open what operations work on."""
        return Storage(f"sim://{self.PLACE}")

    def patience_s(self, operation: str) -> float:
        """Return how long an operation may take, from its begin on."""
        return self.MOST_S

    def modules(self, patch: pytest.MonkeyPatch) -> None:
        """Replace what the product's modules know of their process and machine."""


class SimulatedClient:
    """What `RemoteFiles` needs of fsspec's file systems; ranges of a file that is open are no requests of their own."""

    def __init__(self, world: World) -> None:
        self._world = world

    @staticmethod
    def _strip_protocol(url: str) -> str:
        return url.partition("://")[2]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        def read() -> bytes:
            return self._found(path).data

        return read()[start:end] if start is not None else self._world.request("read", path, read)

    def pipe_file(self, path: str, data: bytes, mode: str = "overwrite") -> None:
        create, content = mode == "create", bytes(data)
        self._world.request(mode, path, lambda: self._world.put(path, content, create), changes=True)

    def rm_file(self, path: str) -> None:
        self._world.request("delete", path, lambda: self._world.remove(path), changes=True)

    def info(self, path: str) -> dict[str, Any]:
        return self._world.request("look", path, lambda: self._info(path, self._found(path)))

    def ls(self, path: str, detail: bool) -> list[Any]:
        start, found = f"{path}/", dict[str, dict[str, Any]]()
        for place in self._world.names(path):
            name, *below = place.removeprefix(start).split("/")
            if below:
                found[name] = {"name": start + name, "type": "directory", "size": 0}
            elif place in self._world.objects:
                found[name] = self._info(place, self._world.objects[place])
        if not found:
            raise FileNotFoundError(path)
        return sorted(found.values(), key=lambda each: each["name"]) if detail else [start + name for name in found]

    def find(self, path: str, detail: bool) -> list[str]:
        return [path] if path in self._world.objects else sorted(self._world.names(path))

    def _found(self, path: str) -> Stored:
        if path not in self._world.objects:
            raise FileNotFoundError(path)
        return self._world.objects[path]

    @staticmethod
    def _info(path: str, stored: Stored) -> dict[str, Any]:
        return {"name": path, "type": "file", "size": len(stored.data), "mtime": stored.mtime_s}


class _OneByOne:
    """A pool without threads: work is done when its result is asked for."""

    def __init__(self, threads: int) -> None:
        self.map = map

    def __enter__(self) -> "_OneByOne":
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing waits."""


def _three_tries(work: Any, retry_if: Any = None, patience_s: Any = None) -> Any:
    from featurestore.storage.remote import RetriesExhaustedError, is_transient  # it runs with the globals of another

    for wait_s in (1.0, 59.0, 0.0):
        try:
            return work()
        except Exception as error:
            if not (retry_if or is_transient)(error):
                raise
            last = error
        time.sleep(wait_s)
    raise RetriesExhaustedError(last, 3) from last


def _is_fit(storage: Any) -> None:
    """The place is fit for a store."""


def _nobody() -> str:
    return "simulated"


@contextlib.contextmanager
def simulated(world: World) -> Iterator[pytest.MonkeyPatch]:
    """Let the product see this world: the object store at sim://, clocks and draws, threads one after another."""
    drawn, client = random.Random(f"ids {world.seed}"), SimulatedClient(world)
    with pytest.MonkeyPatch.context() as patch:
        # By their code, as other modules have these functions under names of their own.
        for function, instead in (
            (remote.with_retries, _three_tries),
            (log.writer_name, _nobody),
        ):
            patch.setattr(function, "__code__", instead.__code__)
        for module in (remote, storage_module):
            patch.setattr(module, "ThreadPoolExecutor", _OneByOne)
        for module in (store, publish):
            patch.setattr(module, "refuse_unsafe", _is_fit)
        patch.setattr(remote, "_client", lambda protocol, place: client)
        patch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=drawn.getrandbits(128), version=4))
        patch.setattr(time, "time", lambda: world.now_s + world.current.skew_s)
        patch.setattr(time, "monotonic", lambda: world.now_s)
        patch.setattr(time, "sleep", world.sleep)
        random.seed(world.seed)
        with contextlib.redirect_stderr(io.StringIO()):
            yield patch
