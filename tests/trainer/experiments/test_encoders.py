"""The table encoders: one run on several feature stores, with what each store has and has cost; resumed, and shown."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from featurestore.store import FeatureStore
from featurestore.upkeep.history import ExtractionCost, keep_cost, seconds_per_image
from featurestore.upkeep.remake import remake
from tests.pages import check_page
from trainer.experiments.__main__ import app

pytestmark = pytest.mark.long  # they train whole runs

Places = Any
NAMES = {"full width": "features", "half": "half", "components": "compact"}


@pytest.fixture
def places(make_places: Callable[[Path], Places], tmp_path: Path) -> Places:
    """A store, one of the same rows in float16, and one of four components; the first knows what it has cost."""
    places = make_places(tmp_path)
    store = FeatureStore.open(tmp_path / "features")
    for version, (num_computed, seconds) in enumerate([(40, 10.0), (10, 40.0)], 1):
        cost = ExtractionCost(
            version=version, operation="extract", num_computed=num_computed, seconds=seconds, num_workers=1
        )
        keep_cost(store.storage, cost)
    remake(store, str(tmp_path / "half"), dtype="float16")
    remake(store, str(tmp_path / "compact"), dims=4, dtype="float32")
    return places


def call(*words: object, places: Places) -> Result:
    settings = [f"--set={each}" for each in places.settings(train__max_steps=3)]
    arguments = [*words, "--out", places.folder / "out", *settings]
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_one_run_on_several_stores(places: Places) -> None:
    page, out = places.folder / "encoders.html", places.folder / "out"
    stores = ",".join(f"{name}={places.folder / path}" for name, path in NAMES.items())
    asked = ("encoders", "--stores", stores, "--seeds", 2)
    done = call(*asked, "--html", page, places=places)
    assert done.exit_code == 0, done.output
    table = json.loads((out / "results.json").read_text())["encoders"]
    assert list(table["runs"]) == list(NAMES) and [len(runs) for runs in table["runs"].values()] == [2, 2, 2]
    facts = table["facts"]
    snapshot = FeatureStore.open(places.folder / "features").snapshot()
    assert facts["full width"]["bytes"] == snapshot.manifest.file_bytes
    assert facts["full width"]["commit_id"] == snapshot.manifest.commit_id
    assert facts["full width"]["seconds_per_image"] == pytest.approx({1: 10 / 40, 2: 50 / 50}[snapshot.version])
    assert facts["half"]["dtype"] == "float16" and facts["half"]["seconds_per_image"] is None
    assert facts["components"]["numbers"].startswith("4 of ")
    mine, baseline = ([each["gauc"] for each in table["runs"][name]] for name in ("components", "full width"))
    gain = next(row for row in table["rows"] if row["name"] == "components")["gain"]["mean"]
    assert gain == pytest.approx(sum(mine) / 2 - sum(baseline) / 2)
    losses = ([each["logloss"] for each in table["runs"][name]] for name in ("components", "full width"))
    assert next(losses) != next(losses)
    text = (out / "RESULTS.md").read_text()
    heading = next(line for line in text.splitlines() if line.startswith("| | GAUC"))
    assert heading.endswith("| GAUC, new ads | network | numbers | dtype | images | bytes | s / 1,000 images |")
    cells = [cell.strip() for cell in next(line for line in text.splitlines() if "| half |" in line).split("|")]
    assert cells[1] == "half" and cells[-2] == "" and cells[-5] == "float16"
    assert (out / "plots/encoders.png").read_bytes().startswith(b"\x89PNG")
    read = check_page(page.read_text(encoding="utf-8"))
    assert len(read.plots) == 1
    # Nothing is trained again, and the tables of other calls keep this one.
    reports = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/report.json")}
    assert len(reports) == 6
    assert call(*asked, places=places).exit_code == 0
    assert reports == {path: path.stat().st_mtime_ns for path in out.glob("runs/*/report.json")}
    other = call("prerank", "--seeds", 1, places=places)
    assert other.exit_code == 0, other.output
    assert json.loads((out / "results.json").read_text())["encoders"] == table
    assert text in (out / "RESULTS.md").read_text()


@pytest.mark.parametrize(
    ("name", "stores", "says"),
    [
        ("encoders", None, "name two at least"),
        ("encoders", "a", "name two stores at least"),
        ("encoders", "a,a", "one twice"),
        ("encoders", "a,,b", "an empty store"),
        ("encoders", "x=,b", "an empty store"),
        ("images", "a,b", "it is for the table encoders"),
        ("encoders", "no/such,no/other", "no/such"),
    ],
)
def test_mistakes_are_one_line_and_2(name: str, stores: str | None, says: str, places: Places) -> None:
    done = call(name, "--seeds", 1, *([] if stores is None else ["--stores", stores]), places=places)
    assert done.exit_code == 2 and says in " ".join(done.output.replace("│", " ").split())
    assert not list((places.folder / "out").rglob("report.json"))


def test_costs_up_to_a_snapshot(places: Places) -> None:
    storage = FeatureStore.open(places.folder / "features").storage
    assert seconds_per_image(storage, 1) == pytest.approx(0.25)
    assert seconds_per_image(storage, 2) == pytest.approx(1.0)
    assert seconds_per_image(FeatureStore.open(places.folder / "half").storage, 1) is None
