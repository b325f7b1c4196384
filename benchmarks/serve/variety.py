"""Bodies of requests of all kinds: sizes, users and ids that vary, empty histories, and broken ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import orjson

from benchmarks.serve.world import World

_TEMPLATES = 2_000
_MOST_CANDIDATES = 1_000
_BROKEN = 0.02
_RARE = 0.1
_NEW = 900_000_000_000
"""Stands in a template for an id that each request has for itself, so that the model knows none of them."""


@dataclass(frozen=True)
class VariedBodies(Sequence[bytes]):
    """The bodies numbered `begin` to `end`, made when they are asked for."""

    templates: Sequence[bytes]
    is_broken: Sequence[bool]
    begin: int
    end: int

    @classmethod
    def of(cls, world: World, count: int) -> "VariedBodies":
        """Draw `count` bodies by users and ads of the test samples; two in a hundred are no request."""
        users, ads = world.logged()
        draw = np.random.default_rng(5)
        is_broken = (draw.random(_TEMPLATES) < _BROKEN).tolist()
        return cls([_template(users, ads, draw, broken) for broken in is_broken], is_broken, 0, count)

    def refused(self, begin: int, end: int) -> int:
        """Count the broken ones among some."""
        return sum(self.is_broken[number % len(self.templates)] for number in range(begin, end))

    def __len__(self) -> int:
        return self.end - self.begin

    @overload
    def __getitem__(self, number: int) -> bytes: ...

    @overload
    def __getitem__(self, number: slice) -> "VariedBodies": ...

    def __getitem__(self, number: int | slice) -> "bytes | VariedBodies":
        if isinstance(number, slice):
            begin, end, _ = number.indices(len(self))
            return VariedBodies(self.templates, self.is_broken, self.begin + begin, self.begin + end)
        if not 0 <= number < len(self):
            raise IndexError(number)
        own = self.begin + number
        return self.templates[own % len(self.templates)].replace(b"%d" % _NEW, b"%d" % (_NEW + 1 + own))


def _template(users: Sequence[dict[str, Any]], ads: dict[str, Any], draw: np.random.Generator, broken: bool) -> bytes:
    user = dict(users[int(draw.integers(0, len(users)))])
    count = int(np.exp(draw.uniform(0, np.log(_MOST_CANDIDATES + 1))))
    shown = draw.integers(0, len(ads["ad_item"]), count)
    candidates = {name: values[shown].tolist() for name, values in ads.items()}
    if draw.random() < 0.5:
        user["user"] = _NEW
    if draw.random() < _RARE:
        user |= {name: [] for name in user if name.startswith("behavior_")}
    for name, values in candidates.items():
        for place in np.flatnonzero(draw.random(count) < _RARE):
            values[place] = None if name == "ad_image" and draw.random() < 0.5 else _NEW
    request = {"user": user, "candidates": candidates}
    return _broken(request, draw) if broken else orjson.dumps(request)


def _broken(request: dict[str, Any], draw: np.random.Generator) -> bytes:
    """Make a body that is refused: no JSON, a column too few, a list too short, a text or a number that is no id."""
    candidates = request["candidates"]
    match int(draw.integers(0, 5)):
        case 0:
            return orjson.dumps(request)[:-5]
        case 1:
            del candidates["ad_item"]
        case 2:
            candidates["ad_item"] = candidates["ad_item"][1:]
        case 3:
            candidates["ad_category"][0] = {"no": "id"}
        case _:
            candidates["ad_scene"][0] = 0.5
    return orjson.dumps(request)
