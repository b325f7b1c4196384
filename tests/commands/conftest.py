"""Places that command lines name: a store, samples, a run, and what is none of these."""

import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from serving.bundle.export import ExportOptions, export_model
from tests.commands.calls import ROOT, call
from tests.serving.bundle.conftest import no_network
from tests.trainer.conftest import make_places
from tests.trainer.whole_runs import run_alone

DEEP = 20_000


@pytest.fixture(scope="session")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What stands in the braces of a line."""
    folder = tmp_path_factory.mktemp("lines")
    places = make_places(folder / "good")
    run = run_alone(places, run__name="run", train__max_steps=2)
    towers = run_alone(places, run__name="towers", train__max_steps=2, model__base="two_tower")
    folders = f"--run {towers} --samples {places.folder}/samples --out {folder}/index"
    assert call(shlex.split(f"trainer.prerank build {folders}")).code == 0
    export_model(str(folder / "model"), ExportOptions(run=run), network=no_network)
    found: dict[str, object] = {
        "store": places.folder / "features",
        "samples": places.folder / "samples",
        "run": run,
        "towers": towers,
        "index": folder / "index",
        "model": folder / "model",
        "tables": ROOT / "benchmarks" / "tables" / "paper.yaml",
        "new": folder / "new",
        "missing": folder / "missing",
        "brackets": folder / "[/x]",
        "unicode": folder / "\u202e name é ☃",
    }
    return found | _files(folder) | _damaged(folder, places.folder / "features", run)


def _files(folder: Path) -> dict[str, object]:
    """Files that hold something else than they should."""
    contents: dict[str, bytes] = {
        "empty": b"",
        "garbage": bytes(range(256)) * 8,
        "list": b"- a\n- b\n",
        "deepyaml": b"a: " + b"[\n" * DEEP + b"]\n" * DEEP,
        "unknown": b"data: {smaples: x}\n",
        "badmapping": b"{impressions: {}, behaviors: {}, csv: {delimiter: 5}}\n",
        "script.py": b"print('hello')\n",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    found: dict[str, object] = {name.removesuffix(".py"): folder / name for name in contents}
    for suffix in ("parquet", "npy", "csv"):
        found[f"garbage_{suffix}"] = shutil.copy(folder / "garbage", folder / f"garbage.{suffix}")
    folders = {"emptydir": folder / "emptydir", "there": folder / "[/x] there", "photos": folder / "photos"}
    for place in folders.values():
        place.mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(folder / "photos" / "a.jpg")
    np.save(folder / "matrix.npy", np.ones((3, 4), np.float32))
    torch.save({"other": torch.zeros(2)}, folder / "otherweights.pt")
    found |= {"matrix": folder / "matrix.npy", "otherweights": folder / "otherweights.pt"}
    return found | folders | _pipes(folder)


def _pipes(folder: Path) -> dict[str, object]:
    """Pipes that nobody writes into, and folders with one in the place of a file: to read one would last for ever."""
    places = {
        "pipe": "pipe",
        **{f"pipe_{suffix}": f"pipe.{suffix}" for suffix in ("parquet", "npy", "csv", "yaml")},
        "pipelogs": "logs-pipe/impressions/0.parquet",
        "pipesamples": "samples-pipe/train/day=2026-01-01.parquet",
        "pipetest": "samples-pipe/test/day=2026-01-02.parquet",
        "pipeimages": "images-pipe/data.0",
        "pipestore": "store-pipe/store.json",
    }
    found: dict[str, object] = {}
    for name, place in places.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(folder / place)
        found[name] = folder / place.partition("/")[0]
    return found


def _damaged(folder: Path, store: Path, run: Path) -> dict[str, object]:
    """Stores, runs and models with one damaged file each."""
    found: dict[str, object] = {}
    (state,) = (each.relative_to(run) for each in run.glob("checkpoints/files/step-*-state-*.json"))
    newest = sorted((store / "log").glob("*.json"))[-1].relative_to(store)
    not_finite = json.dumps(json.loads((store / newest).read_text()) | {"time_s": float("nan")})
    deep, model, first = "[" * DEEP + "]" * DEEP, folder / "model", f"{1:020}.json"
    for name, whole, file, text in (
        ("nanstore", store, newest, not_finite),
        ("deepstore", store, newest, deep),
        ("hugestore", store, newest, '{"format_version": ' + "9" * 5000 + "}"),
        ("deepinfo", store, "store.json", deep),
        ("deeprun", run, state, deep),
        ("listrun", run, state, "[]"),
        ("unsetrun", run, "config.yaml", ""),
        ("deepmodel", model, f"log/{first}", deep),
        ("listuse", model, f"use/{first}", "[]"),
        ("piperun", run, state, ""),
    ):
        found[name] = shutil.copytree(whole, folder / name)
        (folder / name / file).write_text(text)
    (folder / "piperun" / state).unlink()
    os.mkfifo(folder / "piperun" / state)
    return found
