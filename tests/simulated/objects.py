"""The object store of a simulated world, in memory, and the product that sees this world.

The product's `Storage` and `RemoteFiles` are the real ones: simulated is the client that fsspec would give them.
"""

import contextlib
import io
import random
import time
import uuid
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from featurestore import store
from featurestore.storage import remote, storage
from pipeline.samples import publish
from tests.simulated.world import World


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
        self._world.request(mode, path, partial(self._change, mode, path, bytes(data)))

    def rm_file(self, path: str) -> None:
        self._world.request("delete", path, partial(self._change, "delete", path, None))

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
        """List the paths below a folder; now and then in two requests.

        So clients do that list page by page; what is written between the two may be missed, as POSIX allows."""
        if path in self.objects:
            return [path]
        if self._world.current is self._world.calm or self._random.random() >= self._lagging:
            return self._listed(path, (0, 1), float("inf"))
        before_s = self._world.now_s if self._misses_new else float("inf")
        return sorted([*self._listed(path, (0,), float("inf")), *self._listed(path, (1,), before_s)])

    def _listed(self, folder: str, halves: Collection[int], before_s: float) -> Any:
        def names() -> list[str]:
            below = [(path, each.mtime_s) for path, each in self.objects.items() if path.startswith(f"{folder}/")]
            return sorted(path for path, at_s in below if zlib.crc32(path.encode()) & 1 in halves and at_s <= before_s)

        return self._world.request("list", folder, names)

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
        if verb == "delete":
            self._found(path)
        try:
            self._watch(verb, path, data)
        except Exception as error:  # which the product may take for an answer
            self._world.failure = self._world.failure or error
            raise
        if data is None:
            del self.objects[path]
        else:
            self.objects[path] = Stored(data, self._world.now_s)


def _with_retries(work: Callable[[], Any], retry_if: Any = remote.is_transient, patience_s: Any = None) -> Any:
    """Do as the product's own function, without tenacity, which would take a fifth of the time of a history."""
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
        for module in (store, publish):
            patch.setattr(module, "refuse_unsafe", lambda place: None)
        patch.setattr(remote, "with_retries", _with_retries)
        patch.setattr(remote, "_client", lambda protocol, place: objects)
        patch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=drawn.getrandbits(128), version=4))
        patch.setattr(time, "time", lambda: world.now_s + world.current.main.skew_s)
        patch.setattr(time, "monotonic", lambda: world.now_s)
        patch.setattr(time, "sleep", world.sleep)
        random.seed(world.seed)
        yield patch
