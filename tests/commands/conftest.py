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
    run_alone(places, run__name="run", train__max_steps=2)
    run_alone(places, run__name="towers", train__max_steps=2, model__base="two_tower")
    folders = f"--run {folder}/good/runs/towers --samples {folder}/good/samples --out {folder}/index"
    assert call(shlex.split(f"trainer.prerank build {folders}")).code == 0
    model = ExportOptions(run=folder / "good" / "runs" / "run")
    export_model(str(folder / "model"), model, network=no_network)
    found: dict[str, object] = {
        "dir": folder,
        "store": folder / "good" / "features",
        "samples": folder / "good" / "samples",
        "run": folder / "good" / "runs" / "run",
        "towers": folder / "good" / "runs" / "towers",
        "index": folder / "index",
        "model": folder / "model",
        "tables": ROOT / "benchmarks" / "tables" / "paper.yaml",
        "new": folder / "new",
        "missing": folder / "missing",
        "brackets": folder / "[/x]",
        "unicode": folder / "\u202e name é ☃",
    }
    return found | _files(folder) | _damaged(folder, places.folder / "features", found["run"])


def _files(folder: Path) -> dict[str, object]:
    """Files that hold something else than they should."""
    contents: dict[str, bytes] = {
        "empty": b"",
        "garbage": bytes(range(256)) * 8,
        "list": b"- a\n- b\n",
        "deepyaml": b"a: " + b"[\n" * DEEP + b"]\n" * DEEP,
        "utf16": "data: {samples: x}\n".encode("utf-16"),
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


def _state_of(run: Path) -> Path:
    """The file state.json of a run's one checkpoint."""
    (found,) = (run / "checkpoints" / "files").glob("step-*-state-*.json")
    return found


def _damaged(folder: Path, store: Path, run: object) -> dict[str, object]:
    """Stores and runs with one damaged file each."""
    found: dict[str, object] = {}
    newest = sorted((store / "log").glob("*.json"))[-1].name
    manifest = json.loads((store / "log" / newest).read_text())
    for name, text in {
        "nan": json.dumps(manifest | {"time_s": float("nan")}),
        "deep": "[" * DEEP + "]" * DEEP,
        "huge": '{"format_version": ' + "9" * 5000 + "}",
    }.items():
        found[f"{name}store"] = shutil.copytree(store, folder / f"store-{name}")
        (folder / f"store-{name}" / "log" / newest).write_text(text)
    for name, text in {"deep": "[" * DEEP + "]" * DEEP, "list": "[]"}.items():
        found[f"{name}run"] = shutil.copytree(str(run), folder / f"run-{name}")
        _state_of(folder / f"run-{name}").write_text(text)
        found[f"{name}model"] = shutil.copytree(folder / "model", folder / f"model-{name}")
        (folder / f"model-{name}" / "log" / f"{1:020}.json").write_text(text)
    found["deepinfo"] = shutil.copytree(store, folder / "info-deep")
    (folder / "info-deep" / "store.json").write_text("[" * DEEP + "]" * DEEP)
    found["listuse"] = shutil.copytree(folder / "model", folder / "use-list")
    (folder / "use-list" / "use" / f"{1:020}.json").write_text("[]")
    found["unsetrun"] = shutil.copytree(str(run), folder / "run-unset")
    (folder / "run-unset" / "config.yaml").write_text("")
    found["piperun"] = shutil.copytree(str(run), folder / "run-pipe")
    state = _state_of(folder / "run-pipe")
    state.unlink()
    os.mkfifo(state)
    return found
