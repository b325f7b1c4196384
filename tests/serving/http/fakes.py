"""A model without a bundle, for tests of what surrounds a model: it is slow, broken or replaced when a test says so.

And the server's application without sockets: an httpx2 client that calls it in this process; and a server process:
python -m tests.serving.http.fakes STATE_FILE NAME=VALUE ..."""

import ast
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import pyarrow as pa
from starlette.applications import Starlette

from featurestore.errors import UserError
from serving.bundle.log import BundleIdentity
from serving.errors import BrokenBundleError
from serving.http.app import Scoring
from serving.http.live import BundleSource
from serving.http.workers import serve
from serving.network import Steps, run_steps
from serving.scoring.decode import decode
from serving.scoring.request import RequestColumns, Scored
from serving.scoring.sent import SentTable, Sizes, sent_table
from serving.settings import ServerSettings
from trainer.schema.fields import Field, load_schema

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
    def inputs(self) -> RequestColumns:
        return RequestColumns(load_schema(), self.fields)

    @cached_property
    def fields(self) -> Sequence[Field]:
        return load_schema().fields

    @property
    def vectors(self) -> Mapping[str, Any]:
        return {store: SimpleNamespace(time_s=time.time() - 60) for store in self.identity.vectors}

    def score(self, table: pa.Table) -> list[Scored]:
        sent = run_steps(sent_table(self.inputs, table))
        return run_steps(self.steps(sent, sent.sizes(self.inputs)))

    def steps(self, sent: SentTable, sizes: Sizes) -> Steps[list[Scored]]:
        """Score what was sent; columns that were not are missed by nobody, but for `ad_item`."""
        fields = [field for field in self.fields if field.column_name in {*sent.columns, "ad_item"}]
        scored: list[Scored] = []
        for piece in map(sent.piece, sizes.pieces()):
            batch, _ = yield from decode(RequestColumns(load_schema(), fields), piece)
            scored += self._scores(batch.fields["ad_item"].values_N, piece.counts_G)
            yield
        return scored

    def _scores(self, items: Any, counts_G: Any) -> list[Scored]:
        assert not self.closed
        if self.slow_item is None or self.slow_item in items:
            if self.begun is not None:
                Path(self.begun).touch()
            time.sleep(self.score_s)
        return [self._scored(part) for part in np.split(items, np.cumsum(counts_G)[:-1])] if len(counts_G) else []

    def sample(self) -> pa.Table | None:
        return None

    def close(self) -> None:
        self.closed = True

    def _scored(self, items: Any) -> Scored:
        numbers = np.where(np.abs(items) < 1e6, items, 7)  # an ID of a text is a large number
        logits_C = (self.identity.version + numbers / 1000).astype(np.float32)
        return Scored(logits_C=logits_C, unknown={"ad_item": np.flatnonzero(numbers >= 1000)}, missing={})


@dataclass
class FakeSource(BundleSource):
    """Reads which version is in use from a file that tests write: {"version", "vectors", "broken", "load_s", "score_s",
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
        time.sleep(value.get("load_s", 0))
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


BASE = "http://scorer"


def scoring_of(source: BundleSource, tokens: list[str] | None = None, **settings: Any) -> Scoring:
    """The parts of a server with these settings."""
    return Scoring(ServerSettings(model="-", name="ctr", **settings), source, tokens=tokens)


@asynccontextmanager
async def client_of(scoring: Scoring, wait: bool = True) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the running application, by default once its model is loaded."""
    app = scoring.app()
    starlette = app if isinstance(app, Starlette) else app.app
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with starlette.router.lifespan_context(starlette), httpx2.AsyncClient(transport=transport) as client:
        client.base_url = BASE
        while wait and not scoring.live.is_ready:
            await asyncio.sleep(0.005)
        yield client


def figures_of(text: str) -> dict[str, float]:
    """Return what /metrics shows, by the name and the labels of each line."""
    lines = [line.rpartition(" ") for line in text.splitlines() if line[0] != "#"]
    return {name: float(value) for name, _, value in lines}


def main() -> int:
    settings = {name: ast.literal_eval(value) for name, value in (word.split("=", 1) for word in sys.argv[2:])}
    paths = {name: Path(settings[name]) for name in ("tls_cert", "tls_key", "token_file") if name in settings}
    try:
        return serve(ServerSettings(model=sys.argv[1], name="ctr", **{"port": 0, **settings, **paths}), fake_source)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
