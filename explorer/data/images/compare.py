"""The neighbours of one image in several spaces, side by side: which of them each space alone has."""

from dataclasses import dataclass
from typing import Any

from explorer.data.background import Task
from explorer.data.images.neighbours import Neighbours


@dataclass(frozen=True, kw_only=True)
class Space:
    """The neighbours in one space, or a sentence that says why there are none, or how far they are."""

    name: str
    """features, visual, or codes."""
    title: str
    found: Neighbours | None = None
    how: str = ""
    """How they were found, in a sentence."""
    problem: str = ""
    task: Task[Any] | None = None
    """What computes that which they are found by, while it is not there yet."""


@dataclass(frozen=True)
class Shared:
    """How many of the nearest two spaces have in common."""

    one: str
    other: str
    count: int
    of: int


def only_in(spaces: list[Space]) -> dict[str, set[int]]:
    """Find for each space the keys that it has and no other one; nothing where fewer than two spaces have any."""
    keys = {space.name: keys_of(space) for space in spaces if space.found is not None}
    if len(keys) < 2:
        return {space.name: set() for space in spaces}
    return {
        space.name: keys.get(space.name, set()).difference(*(each for name, each in keys.items() if name != space.name))
        for space in spaces
    }


def shared(spaces: list[Space]) -> list[Shared]:
    """Count what each two spaces have in common; `of` is the length of the shorter list."""
    there = [space for space in spaces if space.found is not None]
    return [
        Shared(one.title, other.title, len(keys_of(one) & keys_of(other)), min(len(keys_of(one)), len(keys_of(other))))
        for number, one in enumerate(there)
        for other in there[number + 1 :]
    ]


def keys_of(space: Space) -> set[int]:
    """List the keys of a space."""
    return {image.key for image in space.found.images} if space.found else set()
