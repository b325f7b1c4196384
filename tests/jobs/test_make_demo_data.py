"""The job as a person types it: what it writes, that equal options give equal bytes, and what it refuses to touch."""

import hashlib
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.make_demo_data import app
from pipeline.problems import Problem
from pipeline.samples.logs import BEHAVIORS, IMPRESSIONS, documented_layout, find_pieces
from tests.cli import invoke, ran, said
from tests.raised import told

pytestmark = pytest.mark.long  # they draw whole data sets
JOB = Path(__file__).parents[2] / "jobs" / "make_demo_data.py"
TINY = ["--items", "40", "--users", "60", "--days", "5"]


def _make(out: Path, *arguments: str) -> str:
    return invoke(app, "--out", out, *(arguments or TINY), code=0).output


def _digests(out: Path) -> dict[str, str]:
    """Of every file but demo.json, which names the folder."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "demo.json"]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    _make(out := tmp_path_factory.mktemp("demo"))
    return out


def test_logs_images_and_the_truth_fit_together(demo: Path) -> None:
    url = str(demo / "logs")
    shown, done = (find_pieces(url, log, documented_layout(log)) for log in (IMPRESSIONS, BEHAVIORS))
    assert shown[0].layout.user_columns == ("user_age", "user_gender")
    assert len({piece.path for piece in shown}) == 5
    assert len({piece.path for piece in done}) == 5 + 14, "the users have a past"
    impressions = pq.read_table(demo / "logs" / "impressions")
    assert impressions.schema.field("timestamp").type == pa.timestamp("us", tz="UTC")
    images = demo / "images"
    drawn = {path.relative_to(images).as_posix() for path in images.rglob("*.jpg")}
    assert len(drawn) == 40
    for log in ("impressions", "behaviors"):
        assert set(pq.read_table(demo / "logs" / log)["image"].to_pylist()) <= drawn
    truth = json.loads((demo / "demo.json").read_text())
    counts = truth["counts"]
    assert counts["train_impressions"] + counts["test_impressions"] == impressions.num_rows
    assert truth["click_rate"] == pytest.approx(np.mean(impressions["label"].to_numpy()), abs=1e-4)
    assert truth["ceiling"].keys() == {"auc", "new_ad_auc"}
    assert truth["complete"]


@pytest.mark.services  # a job in another process
def test_equal_seeds_give_equal_bytes_in_any_process(demo: Path, tmp_path: Path) -> None:
    job = ran(sys.executable, JOB, "--out", tmp_path / "again", *TINY, env=os.environ | {"PYTHONHASHSEED": "1"})
    assert job.returncode == 0, job.stderr
    assert _digests(tmp_path / "again") == _digests(demo)


def test_a_second_run_changes_nothing_and_an_unfinished_demo_is_finished(demo: Path, tmp_path: Path) -> None:
    _make(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert "has this demo already, nothing to do" in _make(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    next((tmp_path / "images").rglob("*.jpg")).unlink()
    _make(tmp_path)
    assert _digests(tmp_path) == _digests(demo)
    written = json.loads((tmp_path / "demo.json").read_text())
    (tmp_path / "demo.json").write_text(json.dumps({"complete": False, "parameters": written["parameters"]}))
    assert "nothing to do" not in _make(tmp_path)
    assert json.loads((tmp_path / "demo.json").read_text())["complete"]


def test_another_demo_is_replaced_only_with_force_and_only_its_own_files(tmp_path: Path) -> None:
    _make(tmp_path, *TINY, "--items", "60")
    mine = tmp_path / "images" / "mine.jpg"
    mine.write_bytes(b"mine")
    refused = told(Problem.OTHER_DEMO, where=tmp_path, options=re.compile("items: 60 there, 40 wanted"))
    assert re.search(refused, said(app, "--out", tmp_path, *TINY, code=1))
    _make(tmp_path, *TINY, "--force")
    assert len(list((tmp_path / "images").rglob("item-*.jpg"))) == 40
    assert mine.read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["images/photo.jpg", "logs/impressions/day=2026-03-01.parquet"])
def test_files_of_others_are_never_touched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(b"mine")
    for arguments in ((), ("--force",)):
        text = said(app, "--out", tmp_path, *TINY, *arguments, code=1)
        assert re.search(told(Problem.IN_THE_WAY, where=tmp_path / name.partition("/")[0]), text)
        assert _digests(tmp_path).keys() == {name}


def test_a_place_that_cannot_be_written_is_one_message() -> None:
    text = said(app, "--out", "/proc/demo", *TINY, code=1)
    assert re.search(
        told(Problem.REFUSED, action="write the demo to", where="/proc/demo", reason=re.compile(r"\[Errno")), text
    )


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, colour in enumerate(np.random.default_rng(0).integers(0, 256, size=(40, 3)).tolist()):
        Image.new("RGB", (64, 64), tuple(colour)).save(folder / f"photo-{index}.png")
    (folder / "bad.jpg").write_text("no image")
    return folder


def test_own_photographs_stay_where_they_are_and_too_few_are_refused(photos: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    rows = [f"photo-{index},{'dress' if index % 2 else 'hat'}" for index in range(39)]
    labels.write_text("\n".join(["image,label", *rows]))
    out = tmp_path / "out"
    arguments = ["--images", str(photos), "--labels", str(labels), "--users", "60", "--days", "4"]
    flat = _make(out, *arguments).replace("\n", "")
    assert not (out / "images").exists()
    assert f"crossmedia extract --images {photos}" in flat
    assert "1 images left out" in flat
    uris = set(pq.read_table(out / "logs" / "behaviors")["image"].to_pylist())
    assert uris <= {f"photo-{index}.png" for index in range(40)}
    truth = json.loads((out / "demo.json").read_text())
    assert (truth["counts"]["items"], truth["num_unlabelled"]) == (40, 1)
    (photos / "photo-0.png").unlink()
    _make(out, *arguments)
    assert json.loads((out / "demo.json").read_text())["counts"]["items"] == 39, "photographs are looked at each time"
    for path in sorted(photos.glob("*.png"))[5:]:
        path.unlink()
    few = said(app, "--out", tmp_path / "few", "--images", photos, code=1)
    assert re.search(told(Problem.TOO_FEW_IMAGES, value=5, where=photos), few)
    assert not (tmp_path / "few").exists(), "nothing is left behind"
