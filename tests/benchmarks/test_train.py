"""benchmarks.train as `make bench` calls it, at a tiny size: every way to train runs, and trains the same model."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.progress import Progress

from benchmarks.quality.runs import fuxictr_python
from benchmarks.train.__main__ import app, check_fuxictr
from benchmarks.train.sections import (
    FUXICTR,
    VARIANTS,
    DifferentLossesError,
    Outcome,
    check_losses,
)
from benchmarks.train.small import Cell, ratios
from benchmarks.workload import Knobs, WorkloadError, make
from featurestore import FeatureStore
from tests.cli import invoke
from trainer.schema.fields import load_schema

TINY = ["--images", "200", "--dim", "16", "--samples-per-rank", "60", "--steps", "4", "--rounds", "1"]
KNOBS = Knobs(images=200, dim=16, samples_per_rank=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.mark.slow
def test_peers_train_the_same_model(folder: Path) -> None:
    out = folder / "train.json"
    names = [name for name in VARIANTS if name not in FUXICTR or fuxictr_python().exists()]
    only = [word for name in names for word in ("--only", name)]
    invoke(app, *TINY, *only, "--dir", folder / "workload", "--json", out, code=0)
    figures = json.loads(out.read_text())
    for name in names:
        assert figures[f"{name}_samples_per_s"] > 0
    assert figures["step_vs_compute"] == figures["compute_samples_per_s"] / figures["ours_samples_per_s"]
    assert figures["two_ranks_vs_one"] == figures["ours_2_ranks_samples_per_s"] / figures["ours_samples_per_s"]


@pytest.mark.slow
def test_compact_rows(folder: Path) -> None:
    out = folder / "compact.json"
    compact = ["--only", "compact", "--dims", "4", "--dir", str(folder / "workload"), "--json", str(out)]
    invoke(app, *TINY, *compact, code=0)
    figures = json.loads(out.read_text())
    assert figures["compact_bytes_share"] == 8 / 32

    def speed(name: str) -> float | None:
        return figures.get(f"compact_rows_{name}_samples_per_s")

    ours = figures["samples_per_s_compact"]
    assert ours == speed("compact") == figures["compact_vs_full"] * speed("full") > 0
    assert figures["step_vs_compute_compact"] == speed("compute") / ours > 0
    for name, figure in (("fuxictr", "vs_fuxictr_compact"), ("fuxictr_grouped", "vs_fuxictr_compact_grouped")):
        rival = speed(name)  # none where FuxiCTR could not be installed
        assert figures[figure] == (rival and ours / rival)


class TestWorkload:
    @pytest.mark.long
    def test_shape_of_the_files(self, folder: Path) -> None:
        with Progress(disable=True) as progress:
            made = make(folder / "workload", KNOBS, progress)
        schema = load_schema(made.folder / "schema.yaml")
        assert len(list(schema.of_kind("id", "multi_id"))) == 27
        assert [field.side for field in schema.of_kind("content")] == ["user", "ad"]
        tables = [pq.read_table(file) for file in sorted((made.samples / "train").glob("*.parquet"))]
        groups = [group for table in tables for group in table.select(["behavior_image", "label"]).to_pylist()]
        assert {len(group["behavior_image"]) for group in groups} == {33}
        assert sum(len(group["label"]) for group in groups) == 60 * KNOBS.steps
        keys = set(made.keys.tolist())
        assert {key for group in groups for key in group["behavior_image"]} <= keys
        assert set(FeatureStore.open(str(made.store)).snapshot().keys().tolist()) == keys

    def test_is_made_once_and_anew_for_other_knobs(self, tmp_path: Path) -> None:
        small = Knobs(images=100, dim=4, samples_per_rank=10, steps=1, test_samples=5, shards=4)
        with Progress(disable=True) as progress:
            made = make(tmp_path / "w", small, progress)
            file = next((made.samples / "train").iterdir())
            before = file.stat().st_mtime_ns
            make(tmp_path / "w", small, progress)
            assert file.stat().st_mtime_ns == before
            make(tmp_path / "w", Knobs(**{**vars(small), "seed": 1}), progress)
            assert file.stat().st_mtime_ns > before
            (tmp_path / "strange").mkdir()
            (tmp_path / "strange" / "own.txt").touch()
            with pytest.raises(WorkloadError, match="strange is not empty"):
                make(tmp_path / "strange", small, progress)
        assert (tmp_path / "strange" / "own.txt").exists()


def test_figures_are_refused_where_losses_differ() -> None:
    ours, same, other = (Outcome(1.0, losses, {}) for losses in ([0.7, 0.6], [0.7001, 0.6001], [0.7, 0.61]))
    check_losses({"ours": [ours], "server": [same]}, ["ours", "server"])
    with pytest.raises(DifferentLossesError, match="server and ours do not train the same model"):
        check_losses({"ours": [ours], "server": [same, other]}, ["ours", "server"])
    with pytest.raises(DifferentLossesError):
        check_losses({"ours": [ours], "server": [Outcome(1.0, [float("nan")], {})]}, ["ours", "server"])


def test_a_missing_fuxictr_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.train.__main__.fuxictr_python", lambda: tmp_path / "python")
    result = invoke(app, "--only", "ours", "--only", "fuxictr", "--dir", tmp_path / "workload", code=1)
    assert result.stderr == "error: fuxictr: FuxiCTR is not installed in this environment (make bench installs it)\n"
    check_fuxictr([])
    assert capsys.readouterr().err.startswith("note: FuxiCTR is not installed")
    check_fuxictr(["ours"])
    (tmp_path / "python").touch()
    check_fuxictr(["fuxictr"])
    assert capsys.readouterr().err == ""


def test_small_batches_are_compared_with_each_other_side_at_the_same_size() -> None:
    speed = {
        Cell("ids", net, batch, side): speed
        for net, batch, side, speed in (
            ("dnn", 512, "ours", 30.0),
            ("dnn", 512, "fuxictr", 60.0),
            ("din", 512, "ours", 20.0),
            ("din", 512, "fuxictr", 10.0),
            ("dnn", 2048, "ours", 90.0),
            ("dnn", 2048, "fuxictr", 30.0),
        )
    }
    assert ratios(speed, {cell.name: value for cell, value in speed.items()}) == {
        "ids_small_vs_fuxictr": 0.5,
        "ids_small_vs_fuxictr_dnn": 0.5,
        "ids_small_vs_fuxictr_din": 2.0,
        "ids_small_vs_fuxictr_2048": 3.0,
        "ids_small_vs_fuxictr_2048_dnn": 3.0,
    }


def test_small_batches_want_fuxictr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.train.__main__.fuxictr_python", lambda: tmp_path / "python")
    result = invoke(app, "--small", "--kind", "ids", code=1)
    assert result.stderr.startswith("error: fuxictr: FuxiCTR is not installed")
