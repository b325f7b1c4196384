"""A model without a bundle, for tests of what surrounds a model: it is slow, broken or replaced when a test says so."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from serving.bundle.log import BundleIdentity
from serving.errors import BrokenBundleError, RequestError
from serving.http.live import BundleSource
from serving.network import Steps
from serving.scoring.request import Decoded, Request, Scored, Sizes
from serving.settings import ServerSettings
from trainer.samples.columns import Rule, rules_of
from trainer.schema import Field, load_schema

SLOW = ("score_s", "slow_item", "begun")


@dataclass
class FakeModel:
    """Scores a candidate by its item and the model's version: logit = version + item / 1000."""

    identity: BundleIdentity
    score_s: float = 0.0
    slow_item: int | None = None
    """Where it is given, requests with this item alone take `score_s`: not those that warm the model up."""
    begun: str | None = None
    """A file that is made when the first of those that take `score_s` begins."""
    closed: bool = False

    @cached_property
    def columns(self) -> Mapping[str, Rule]:
        schema = load_schema()
        return {name: rule for name, rule in rules_of(schema).items() if name != schema.label}

    @cached_property
    def fields(self) -> Sequence[Field]:
        return load_schema().fields

    @property
    def vectors_time_s(self) -> Mapping[str, float]:
        return {store: time.time() - 60 for store in self.identity.vectors}

    def score(self, decoded: Decoded) -> list[Scored]:
        assert not self.closed
        if isinstance(decoded, pa.Table):
            return self._score_table(decoded)
        if self.slow_item is None or any(self.slow_item in each.candidates["ad_item"] for each in decoded):
            if self.begun is not None:
                Path(self.begun).touch()
            time.sleep(self.score_s)
        return [self._score(request) for request in decoded]

    def steps(self, decoded: Decoded, sizes: Sizes) -> Steps[list[Scored]]:
        scored: list[Scored] = []
        for piece in sizes.pieces():
            is_table = isinstance(decoded, pa.Table)
            scored += self.score(decoded.slice(piece.start, piece.stop - piece.start) if is_table else decoded[piece])
            yield
        return scored

    def sample(self) -> pa.Table | None:
        return None

    def close(self) -> None:
        self.closed = True

    def _score_table(self, table: pa.Table) -> list[Scored]:
        if "ad_item" not in table.column_names:
            raise RequestError("column ad_item is missing; send it")
        return [
            self._score(Request(user={}, candidates={"ad_item": row})) for row in table.column("ad_item").to_pylist()
        ]

    def _score(self, request: Request) -> Scored:
        items = request.candidates.get("ad_item")
        if not isinstance(items, list):
            raise RequestError("candidates.ad_item is missing; send a list with the item of each candidate")
        for place, item in enumerate(items):
            if type(item) not in (int, str) or (type(item) is int and not -(2**63) <= item < 2**63):
                raise RequestError(f"candidates.ad_item[{place}] is {item!r}; it has to be an integer or a string")
        numbers = np.array([item if isinstance(item, int) else 7 for item in items], np.float64)
        logits_C = (self.identity.version + numbers / 1000).astype(np.float32)
        unknown = np.flatnonzero(numbers >= 1000)
        return Scored(logits_C=logits_C, unknown={"ad_item": unknown}, missing={})


@dataclass
class FakeSource(BundleSource):
    """Reads which version is in use from a file that tests write: {"version", "vectors", "broken", "score_s",
    "slow_item"}."""

    file: Path
    opened: list[FakeModel] = field(default_factory=list)

    def newest(self) -> BundleIdentity:
        value = json.loads(self.file.read_text())
        return BundleIdentity(value["version"], value.get("vectors", {}))

    def open(self, identity: BundleIdentity, current: object) -> FakeModel:
        value = json.loads(self.file.read_text())
        if value.get("broken"):
            raise BrokenBundleError(f"bundle {identity.version}: network.pt2 is not what was published")
        self.opened.append(FakeModel(identity, **{key: value[key] for key in SLOW if key in value}))
        return self.opened[-1]


def write_state(folder: Path, **state: object) -> Path:
    """Put a version in use, in the file that the sources of this folder read."""
    file, temporary = folder / "fake.json", folder / "fake.json.new"
    temporary.write_text(json.dumps(state))
    temporary.replace(file)
    return file


def fake_source(settings: ServerSettings) -> FakeSource:
    """Make the source of a server process; `settings.model` is the file."""
    return FakeSource(Path(settings.model))
