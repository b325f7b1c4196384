"""Values that take long to compute, kept while there is room: each is computed once, for all who ask for it."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

ValueT = TypeVar("ValueT")


class Kept(Generic[ValueT]):
    """The `most` values used last, by name. A name says all that decides the value. For several threads."""

    def __init__(self, most: int) -> None:
        """`most`: values at the same time; the one unused for longest goes first."""
        self._most, self._lock = most, Lock()
        self._values: OrderedDict[Hashable, ValueT] = OrderedDict()
        self._gates: dict[Hashable, Lock] = {}

    def peek(self, name: Hashable) -> ValueT | None:
        """Return the value where it is there, without waiting."""
        with self._lock:
            if name in self._values:
                self._values.move_to_end(name)
            return self._values.get(name)

    def get(self, name: Hashable, make: Callable[[], ValueT]) -> ValueT:
        """Return the value, made first where it is not there; an error of `make` is not kept."""
        if (found := self.peek(name)) is not None:
            return found
        with self._lock:
            gate = self._gates.setdefault(name, Lock())
        with gate:
            try:
                if (found := self.peek(name)) is None:
                    found = make()
                    self._keep(name, found)
                return found
            finally:
                with self._lock:
                    self._gates.pop(name, None)

    def _keep(self, name: Hashable, value: ValueT) -> None:
        with self._lock:
            self._values[name] = value
            while len(self._values) > self._most:
                self._values.popitem(last=False)
