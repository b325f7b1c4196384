"""Places that command lines name: a store, samples, a run, and what is none of these."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import dask
import pytest
from distributed import Client, LocalCluster

from featurestore.rows import FeatureRows
from featurestore.store import FeatureStore
from pipeline.cluster import WORKER_CONFIG
from tests.trainer.conftest import make_places
from trainer.comm import SoloComm
from trainer.config import load_config
from trainer.main import train

DEEP = 100_000


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    with (
        dask.config.set(WORKER_CONFIG),
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="session")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What stands in the braces of a line."""
    folder = tmp_path_factory.mktemp("lines")
    places = make_places(folder / "good")
    config = load_config(settings=places.settings(run__name="run", train__max_steps=2))
    train(config, SoloComm())
    found: dict[str, object] = {
        "dir": folder,
        "store": folder / "good" / "features",
        "samples": folder / "good" / "samples",
        "run": folder / "good" / "runs" / "run",
        "new": folder / "new",
        "missing": folder / "missing",
        "brackets": folder / "[/x]",
        "bold": folder / "a [bold] name",
        "spaces": folder / "  ",
        "unicode": folder / "\u202e name é ☃",
        "emoji": folder / ":smile:",
    }
    return found | _files(folder) | _damaged(folder, places.folder / "features", found["run"])


def _files(folder: Path) -> dict[str, object]:
    """Files that hold something else than they should."""
    contents: dict[str, bytes] = {
        "empty": b"",
        "garbage": bytes(range(256)) * 8,
        "list": b"- a\n- b\n",
        "scalar": b"just words\n",
        "unclosed": b"data: {samples: [",
        "deepyaml": b"a: " + b"[" * DEEP + b"]" * DEEP,
        "deepjson": b"[" * DEEP + b"]" * DEEP,
        "utf16": "data: {samples: x}\n".encode("utf-16"),
        "wrongshape": b"data: [1, 2]\n",
        "unknown": b"data: {smaples: x}\n",
        "anchor": b"a: &a [*a]\n",
        "script.py": b"print('hello')\n",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "emptydir").mkdir()
    (folder / "[/x] there").mkdir(parents=True)
    for suffix in ("parquet", "npy", "csv"):
        shutil.copy(folder / "garbage", folder / f"garbage.{suffix}")
    found: dict[str, object] = {name.removesuffix(".py"): folder / name for name in contents}
    found |= {f"garbage_{suffix}": folder / f"garbage.{suffix}" for suffix in ("parquet", "npy", "csv")}
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    return found | {"emptydir": folder / "emptydir", "there": folder / "[/x] there", "pipe": pipe}


def _damaged(folder: Path, store: Path, run: object) -> dict[str, object]:
    """Stores and runs with one damaged file each."""
    found: dict[str, object] = {}
    newest = sorted((store / "log").glob("*.json"))[-1].name
    manifest = json.loads((store / "log" / newest).read_text())
    for name, text in {
        "nan": json.dumps(manifest | {"time_s": float("nan")}),
        "late": json.dumps(manifest | {"time_s": 1e30}),
        "deep": "[" * DEEP + "]" * DEEP,
        "list": "[]",
        "nothing": "",
        "huge": '{"format_version": ' + "9" * 5000 + "}",
    }.items():
        found[f"{name}store"] = shutil.copytree(store, folder / f"store-{name}")
        (folder / f"store-{name}" / "log" / newest).write_text(text)
    for name, text in {"deep": "[" * DEEP + "]" * DEEP, "list": "[]", "nothing": ""}.items():
        found[f"{name}run"] = shutil.copytree(str(run), folder / f"run-{name}")
        (next((folder / f"run-{name}" / "checkpoints").glob("step-*")) / "state.json").write_text(text)
        found[f"{name}info"] = shutil.copytree(store, folder / f"info-{name}")
        (folder / f"info-{name}" / "store.json").write_text(text)
    named = FeatureStore.create(folder / "[/x] store", FeatureStore.open(str(store)).info)
    rows = FeatureRows.of(["[/x].jpg", "a\n\x1b[31m.jpg"], FeatureStore.open(str(store)).snapshot().get([1000, 1001]))
    named.put(rows)
    return found | {"named": folder / "[/x] store"}
