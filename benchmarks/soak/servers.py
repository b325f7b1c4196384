"""What is soaked: a server of a demo, what is asked of it, and what changes beside it.

`ask` returns the kind of what was asked, and whether the answer was right. `change` is called once a minute.
"""

import html
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.format.datafile import FeatureRows
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from featurestore.upkeep.compaction import compact
from serving.bundle.log import known_versions, use


class ScorerSoak:
    """The scorer: bodies in all forms, wrong ones among them; each minute another version, and newer vectors."""

    def __init__(self, demo: Path, port: int) -> None:
        self._store, self._model = FeatureStore.open(demo / "features"), str(demo / "models" / "ctr")
        second = ["-m", "jobs.export_model", "--run", str(demo / "runs" / "behavior"), "--out", self._model, "--no-use"]
        if len(known_versions(Storage(self._model))) < 2:
            subprocess.run([sys.executable, *second], check=True, stdout=subprocess.DEVNULL)
        self.command = ["serving", "serve", self._model, "--max-wait-ms", "5000"]
        self._client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        rows: Any = pq.read_table(demo / "samples" / "test").slice(0, 100)
        self._ads = [name for name in rows.column_names if name.startswith("ad_")]
        behaviors = [name for name in rows.column_names if name.startswith("behavior_")]
        self._rows = rows.select(["user", *behaviors, *self._ads])
        self._users = self._rows.to_pylist()

    def ask(self, draw: random.Random) -> tuple[str, bool]:
        """Send a body, or get health or metrics."""
        kind = draw.choice(["1 ad", "20 ads", "200 ads", "requests", "arrow", "tensors", "wrong", "health", "metrics"])
        path, content, headers, status = "/v1/score", b"", {"content-type": "application/json"}, 200
        if kind in ("health", "metrics"):
            return kind, self._client.get("/metrics" if kind == "metrics" else "/v2/health/ready").status_code == 200
        if kind == "arrow":
            content, headers["content-type"] = self._arrow(draw), "application/vnd.apache.arrow.stream"
        elif kind == "tensors":
            path, content = "/v2/models/ctr/infer", self._tensors(self._request(draw, 20))
        elif kind == "requests":
            content = orjson.dumps([self._request(draw, 5) for _ in range(10)])
        elif kind == "wrong":
            content, status = draw.choice([(b"{", 400), (b"[" * 50, 413), (b" " * 9_000_000, 413), (b"\x1f", 415)])
            headers |= {"content-encoding": "gzip"} if status == 415 else {}
        else:
            content = orjson.dumps(self._request(draw, int(kind.split()[0])))
        return kind, self._client.post(path, content=content, headers=headers).status_code == status

    def change(self, number: int) -> None:
        """Publish vectors of new images, and put the other version in use."""
        from serving.bundle.images import network_for, publish
        from serving.bundle.open import ModelVersion

        put_images(self._store, number)
        version = ModelVersion.open(self._model, 1 + number % 2)
        for of in version.manifest.vectors:
            vectors = FeatureStore.open(version.vectors_url(of))
            publish(vectors, of, network_for(version, of), source_url=self._store.url)
        use(Storage(self._model), version.manifest.version)

    def _request(self, draw: random.Random, ads: int) -> dict[str, Any]:
        user, shown = draw.choice(self._users), draw.choices(self._users, k=ads)
        candidates = {name: [row[name][0] for row in shown] for name in self._ads}
        return {"user": {name: user[name] for name in user if name not in self._ads}, "candidates": candidates}

    def _arrow(self, draw: random.Random) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self._rows.schema) as writer:
            writer.write_table(self._rows.slice(draw.randrange(80), 20))
        return sink.getvalue().to_pybytes()

    def _tensors(self, request: dict[str, Any]) -> bytes:
        inputs = []
        for name, value in (request["user"] | request["candidates"]).items():
            values = value if isinstance(value, list) else [value]
            kind = "BYTES" if isinstance(value, str) else "INT64"
            inputs.append({"name": name, "datatype": kind, "shape": [len(values)], "data": values})
        return orjson.dumps({"inputs": inputs})


class FeaturesSoak:
    """The feature service: lookups of several clients at several snapshots; each minute a new snapshot."""

    def __init__(self, demo: Path, port: int) -> None:
        self._store, self._address = FeatureStore.open(demo / "features"), f"grpc://127.0.0.1:{port}"
        self.command = ["featurestore", "serve", self._store.url, "--poll-s", "2"]
        self._keys_U = self._store.snapshot().to_arrow(["key"])["key"].to_numpy()
        self._clients: list[Any] = [None] * 3
        self._expected: dict[int, bytes] = {}

    def ask(self, draw: random.Random) -> tuple[str, bool]:
        """Look keys up, by a client that keeps its snapshot or a new one; rows have to stay what they were."""
        from featurestore.flight.client import connect

        kind = draw.choice(["1 key", "100 keys", "3000 keys", "missing", "new client"])
        if kind == "new client":
            with connect(self._address, missing="zeros") as client:
                return kind, bool(client.contains(self._keys_U[:10]).all())
        place = draw.randrange(len(self._clients))
        client = self._clients[place] = self._clients[place] or connect(self._address, missing="zeros")
        if kind == "missing":
            return kind, bool(client.lookup(range(50)).missing_U.all())
        keys = [int(draw.choice(self._keys_U)) for _ in range(int(kind.split()[0]))]
        rows = [row.tobytes() for row in client.lookup(keys).features_UD]
        return kind, all(self._expected.setdefault(key, row) == row for key, row in zip(keys, rows, strict=True))

    def change(self, number: int) -> None:
        """Commit a snapshot, and let one client take the newest at its next lookup."""
        put_images(self._store, number)
        self._clients[number % len(self._clients)] = None


_NUMBERS = re.compile(r"/(-?\d+|[0-9a-f]{24}[.]parquet)(?=[/?]|$)|[?].*")
"""What links of one kind differ in: numbers, digests and parameters."""


class ExplorerSoak:
    """The explorer: pages, their parts and pictures, by the links of those before; each minute a new snapshot."""

    def __init__(self, demo: Path, port: int) -> None:
        self._store, self._pictures = FeatureStore.open(demo / "features"), sorted((demo / "images").rglob("*.jpg"))
        places = {"store": "features", "runs": "runs", "samples": "samples", "images": "images", "model": "models/ctr"}
        options = [word for name, folder in places.items() for word in (f"--{name}", str(demo / folder))]
        self.command = ["explorer", "serve", *options]
        self._client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        self._found: dict[str, list[str]] = {"/": ["/"]}

    def ask(self, draw: random.Random) -> tuple[str, bool]:
        """Get what a page before had as a link, or what no page has; send a picture."""
        chance = draw.random()
        if chance < 0.05:
            return "wrong", self._client.get(f"/images/{draw.choice(['x', '1', '9' * 99])}").status_code in (400, 404)
        if chance < 0.07:
            picture = {"picture": draw.choice(self._pictures).read_bytes()}
            return "sent picture", self._client.post("/images/like", files=picture).status_code == 200
        kind = draw.choice(list(self._found))
        try:
            answer = self._client.get(draw.choice(self._found[kind]))
        except httpx2.TimeoutException:  # of which kind is worth more than the error's words
            return kind, False
        if "html" in answer.headers.get("content-type", ""):
            for link in re.findall(r'(?:href|src|hx-get)="(/[^"#]*)"', answer.text):
                known = self._found.setdefault(_NUMBERS.sub("/N", link), [])
                known.append(html.unescape(link))
                del known[:-200]
        return kind, answer.status_code == 200

    def change(self, number: int) -> None:
        """Commit a snapshot."""
        put_images(self._store, number)


def put_images(store: FeatureStore, number: int) -> None:
    """Commit a snapshot with some more images; every tenth time merge the store's files, as who refreshes one does."""
    features_KD = np.random.default_rng(number).normal(size=(8, store.info.dim)).astype(np.float32)
    store.put(FeatureRows.of([f"soak/{number}-{each}.jpg" for each in range(8)], features_KD))
    if number % 10 == 0:
        compact(store, force=True)


Target = ScorerSoak | FeaturesSoak | ExplorerSoak
TARGETS: dict[str, type[Target]] = {"scorer": ScorerSoak, "features": FeaturesSoak, "explorer": ExplorerSoak}
