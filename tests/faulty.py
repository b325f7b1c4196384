"""A storage whose calls go wrong as a test plans it, and a disk that is full."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Event
from typing import Any

import pytest

from featurestore import FeatureStore
from featurestore.errors import StorageError
from featurestore.storage.storage import Storage

Fault = Callable[..., Any]  # takes the real call, and what it was called with


class FaultyStorage(Storage):
    """The files of `inner`; a method that the plan names does what the plan says, with the real one at hand."""

    def __init__(self, inner: Storage, plan: dict[str, Fault]) -> None:
        super().__init__(inner.url, keep_inside=True)
        for name, fault in plan.items():
            setattr(self, name, partial(fault, getattr(inner, name)))


def faulty(store: FeatureStore, **plan: Fault) -> FeatureStore:
    """Open a store through a FaultyStorage."""
    return FeatureStore(FaultyStorage(store.storage, plan), store.info)


def opened_faulty(patch: pytest.MonkeyPatch, plan: dict[str, Fault], *modules: str) -> None:
    """Let modules that open a place by its address open it through a FaultyStorage."""

    def opened(url: str, keep_inside: bool = False) -> Storage:
        return FaultyStorage(Storage(url, keep_inside), plan)

    for module in modules:
        patch.setattr(f"{module}.Storage", opened)


def fails(message: str) -> Fault:
    """Plan that a call raises an error, and does nothing."""

    def fault(call: Fault, *arguments: Any) -> Any:
        raise StorageError(message)

    return fault


def while_set(on: Event, fault: Fault) -> Fault:
    """Plan a fault for as long as an event is set."""

    def planned(call: Fault, *arguments: Any) -> Any:
        return fault(call, *arguments) if on.is_set() else call(*arguments)

    return planned


def preceded_by(work: Callable[[], object]) -> Fault:
    """Plan that something happens before the first call."""
    left = [work]

    def fault(call: Fault, *arguments: Any) -> Any:
        if left:
            left.pop()()
        return call(*arguments)

    return fault


def made_but_lost(call: Fault, *arguments: Any) -> Any:
    """The call does its work, and its answer is lost."""
    call(*arguments)
    raise StorageError("connection reset")


@contextmanager
def full_from(size_bytes: int) -> Iterator[None]:
    """Let no file get longer; what is written beyond that is cut, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
