"""Benchmarks as `make bench` calls them, at a tiny size: figures are there and right; and what they count with.

Every way to train runs, and trains the same model."""

import math
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from rich.progress import Progress

from benchmarks import extract
from benchmarks.gpu.__main__ import app as gpu
from benchmarks.growth.__main__ import app as growth
from benchmarks.problems import Problem
from benchmarks.process import RunFailedError, fuxictr_python, run_to_end
from benchmarks.seeds import holm, p_value, seed_mean
from benchmarks.serve.__main__ import app as serve
from benchmarks.serve.client import as_many_as_it_can, one_after_the_other
from benchmarks.store.__main__ import app as store
from benchmarks.train.__main__ import app as train
from benchmarks.train.__main__ import check_fuxictr
from benchmarks.train.sections import FUXICTR, VARIANTS, DifferentLossesError, Outcome, check_losses
from benchmarks.train.small import Cell, ratios
from benchmarks.workload import Knobs, WorkloadError, make
from featurestore import FeatureStore
from tests.cli import figures_of, invoke
from tests.raised import raises, told
from trainer.schema.fields import load_schema

STAGES = ["samples", "store", "train", "evaluate", "export_vectors", "export_model"]
HEADLINE = ["lookup_vs_numpy_take", "lookup_vs_numpy_take_10_deltas", "lookup_vs_lmdb", "lookup_vs_lance"]
HEADLINE += ["warm_open_s"]
OF_GPU = ["samples_per_s", "step_ms", "busy_share", "features_bytes", "places_bytes", "batch_bytes", "bytes_per_step"]
OF_GPU += ["last_loss", "host_limit_samples_per_s"]


@pytest.mark.slow
def test_extract_draws_its_own_images(tmp_path: Path) -> None:
    figures = figures_of(extract.app, tmp_path, "--limit", "8", "--rounds", "1", "--batch-size", "4")
    assert figures["images"] == 8
    assert figures["extract_vs_bare"] > 0 and figures["int8_vs_torch"] > 0 and figures["int8_mean_cosine"] > 0.99


@pytest.mark.long
def test_drawn_images_all_differ(tmp_path: Path) -> None:
    extract.draw_images(tmp_path, 50)
    assert len({path.read_bytes() for path in tmp_path.glob("*.jpg")}) == 50


@pytest.mark.slow
def test_every_variant_of_store(tmp_path: Path) -> None:
    tiny = ["--rows", "1000", "--keys", "256", "--rounds", "3", "--dir", str(tmp_path)]
    figures = figures_of(store, tmp_path, *tiny)
    assert all(figures[name] > 0 for name in HEADLINE)
    assert all(figures[f"{peer}_rows_per_s"] > 0 for peer in ("lookup", "numpy_take", "lmdb_out", "lance_take"))
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"], "nothing else is left behind"


@pytest.mark.slow
@pytest.mark.services
def test_every_stage_of_growth(tmp_path: Path) -> None:
    sizes = ["--impressions", "2000", "--impressions", "4000", "--samples-alone", "6000", "--dims", "8"]
    figures = figures_of(growth, tmp_path, *sizes, "--dir", str(tmp_path / "growth"))
    for stage in STAGES:
        assert all(figures[f"{cost}_{stage}_{size}"] > 0 for cost in ("seconds", "written_mb") for size in (2000, 4000))
    grown = math.log(figures["written_mb_samples_6000"] / figures["written_mb_samples_4000"]) / math.log(1.5)
    assert figures["written_mb_exponent_samples"] == pytest.approx(grown)
    assert "seconds_store_6000" not in figures
    assert figures["seconds_exponent"] == max(figures[f"seconds_exponent_{stage}"] for stage in STAGES)


def test_a_program_that_fails_is_told_with_its_last_lines(tmp_path: Path) -> None:
    words = ["sh", "-c", "echo out of paper; exit 3"]
    with raises(RunFailedError, Problem.ENDED, where=" ".join(words), value=3, log=re.compile("out of paper")):
        run_to_end(words, tmp_path / "log")


@pytest.mark.slow
def test_all_kinds_of_features_of_gpu_on_the_cpu(tmp_path: Path) -> None:
    tiny = ["--images", "200", "--dim", "16", "--dims", "4", "--samples-per-rank", "60", "--steps", "4"]
    figures = figures_of(gpu, tmp_path, "--device", "cpu", *tiny, "--dir", str(tmp_path / "workload"))
    assert figures["device"] == "cpu"
    kinds = ("compact_from_host", "compact", "full")
    for kind in kinds:
        one = {name: figures[f"{kind}_{name}"] for name in OF_GPU}
        assert one["samples_per_s"] == pytest.approx(60 / one["step_ms"] * 1e3, rel=0.05)
        assert one["busy_share"] > 0 and 0 < one["last_loss"] < 2
        assert one["host_limit_samples_per_s"] > one["samples_per_s"]
        assert one["bytes_per_step"] == one["features_bytes"] + one["places_bytes"] + one["batch_bytes"]
        assert one["batch_bytes"] == pytest.approx(60 * (4 + 8), rel=0.05)
    images = figures["compact_from_host_features_bytes"] / 8  # 4 numbers in bfloat16 each
    assert figures["full_features_bytes"] == 32 * images > 0, "16 numbers in bfloat16"
    assert figures["compact_features_bytes"] == 8 * images, "their places"
    assert figures["compact_last_loss"] == figures["compact_from_host_last_loss"]
    assert [figures[f"{kind}_features_on_device"] for kind in kinds] == [False, True, False]
    assert len({figures[f"{kind}_places_bytes"] for kind in kinds}) == 1


def test_no_gpu_is_one_line_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert f"error: {Problem.NO_GPU}" in invoke(gpu, "--dir", tmp_path / "workload", code=1).output
    assert not (tmp_path / "workload").exists()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_scorer_and_its_rival(tmp_path: Path) -> None:
    small = ["--images", "300", "--dim", "16", "--samples", "60", "--steps", "2", "--requests", "20", "--rounds", "1"]
    figures = figures_of(serve, tmp_path, *small, "--dir", str(tmp_path / "bench"))
    assert 0 < figures["http_p50_ms_200"] <= figures["http_p99_ms_200"]
    assert figures["vs_fastapi_eager_rps"] == figures["http_scorer_rps_200"] / figures["http_fastapi_rps_200"]


class Slow(BaseHTTPRequestHandler):
    """Takes 20 ms a request; refuses bodies that say so."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        threading.Event().wait(0.02)
        self.send_response(503 if body == b"no" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing."""


@pytest.mark.services
def test_client() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port
        alone = one_after_the_other(port, [b"yes"], 5)
        assert alone.failed == 0 and alone.ms(50) >= 20 and 0 < alone.rps <= 50
        together = as_many_as_it_can(port, [b"yes", b"no"], 20, connections=4)
        assert together.failed == 10 and together.seconds >= 20 / 4 * 0.02
        server.shutdown()


TINY = ["--images", "200", "--dim", "16", "--samples-per-rank", "60", "--steps", "4", "--rounds", "1"]
KNOBS = Knobs(images=200, dim=16, samples_per_rank=60)


@pytest.mark.slow
def test_peers_train_the_same_model(tmp_path: Path) -> None:
    names = [name for name in VARIANTS if name not in FUXICTR or fuxictr_python().exists()]
    only = [word for name in names for word in ("--only", name)]
    figures = figures_of(train, tmp_path, *TINY, *only, "--dir", str(tmp_path / "workload"))
    assert all(figures[f"{name}_samples_per_s"] > 0 for name in names)
    assert figures["step_vs_compute"] == figures["compute_samples_per_s"] / figures["ours_samples_per_s"]
    assert figures["two_ranks_vs_one"] == figures["ours_2_ranks_samples_per_s"] / figures["ours_samples_per_s"]


@pytest.mark.slow
def test_compact_rows(tmp_path: Path) -> None:
    compact = ["--only", "compact", "--dims", "4", "--dir", str(tmp_path / "workload")]
    figures = figures_of(train, tmp_path, *TINY, *compact)
    assert figures["compact_bytes_share"] == 8 / 32

    def speed(name: str) -> float | None:
        return figures.get(f"compact_rows_{name}_samples_per_s")

    ours = figures["samples_per_s_compact"]
    assert ours == speed("compact") == figures["compact_vs_full"] * speed("full") > 0
    assert figures["step_vs_compute_compact"] == speed("compute") / ours > 0
    for name, figure in (("fuxictr", "vs_fuxictr_compact"), ("fuxictr_grouped", "vs_fuxictr_compact_grouped")):
        rival = speed(name)  # none where FuxiCTR could not be installed
        assert figures[figure] == (rival and ours / rival)


@pytest.mark.long
def test_a_workload_is_made_once_and_anew_for_other_knobs(tmp_path: Path) -> None:
    with Progress(disable=True) as progress:
        made = make(tmp_path / "w", KNOBS, progress)
        schema = load_schema(made.folder / "schema.yaml")
        assert len(list(schema.of_kind("id", "multi_id"))) == 27
        assert [field.side for field in schema.of_kind("content")] == ["user", "ad"]
        groups = pq.read_table(made.samples / "train", columns=["behavior_image", "label"]).to_pylist()
        assert {len(group["behavior_image"]) for group in groups} == {33}
        assert sum(len(group["label"]) for group in groups) == 60 * KNOBS.steps
        keys = set(made.keys.tolist())
        assert {key for group in groups for key in group["behavior_image"]} <= keys
        assert set(FeatureStore.open(str(made.store)).snapshot().keys().tolist()) == keys
        file = next((made.samples / "train").iterdir())
        before = file.stat().st_mtime_ns
        make(tmp_path / "w", KNOBS, progress)
        assert file.stat().st_mtime_ns == before
        make(tmp_path / "w", Knobs(**{**vars(KNOBS), "seed": 1}), progress)
        assert file.stat().st_mtime_ns > before
        (tmp_path / "strange").mkdir()
        (tmp_path / "strange" / "own.txt").touch()
        with raises(WorkloadError, Problem.NOT_A_WORKLOAD, where=tmp_path / "strange"):
            make(tmp_path / "strange", KNOBS, progress)
    assert (tmp_path / "strange" / "own.txt").exists()


def test_figures_are_refused_where_losses_differ() -> None:
    ours, same, other = (Outcome(1.0, losses, {}) for losses in ([0.7, 0.6], [0.7001, 0.6001], [0.7, 0.61]))
    check_losses({"ours": [ours], "server": [same]}, ["ours", "server"])
    with raises(DifferentLossesError, Problem.DIFFERENT_LOSSES, where="server", other="ours"):
        check_losses({"ours": [ours], "server": [same, other]}, ["ours", "server"])
    with pytest.raises(DifferentLossesError):
        check_losses({"ours": [ours], "server": [Outcome(1.0, [float("nan")], {})]}, ["ours", "server"])


def test_a_missing_fuxictr_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.train.__main__.fuxictr_python", lambda: tmp_path / "python")
    for words in (
        ["--only", "ours", "--only", "fuxictr", "--dir", tmp_path / "workload"],
        ["--small", "--kind", "ids"],
    ):
        said = invoke(train, *words, code=1).stderr
        assert re.match(f"error: {told(Problem.NO_FUXICTR)}\n", said) and said.count("\n") == 1
    check_fuxictr([])
    assert re.match(f"note: {told(Problem.NO_FUXICTR)}", capsys.readouterr().err)
    check_fuxictr(["ours"])
    (tmp_path / "python").touch()
    check_fuxictr(["fuxictr"])
    assert capsys.readouterr().err == ""


def test_small_batches_are_compared_with_each_other_side_at_the_same_size() -> None:
    speed = {
        Cell("ids", net, batch, side): value
        for net, batch, values in (("dnn", 512, (30.0, 60.0)), ("din", 512, (20.0, 10.0)), ("dnn", 2048, (90.0, 30.0)))
        for side, value in zip(("ours", "fuxictr"), values, strict=True)
    }
    assert ratios(speed, {cell.name: value for cell, value in speed.items()}) == {
        "ids_small_vs_fuxictr": 0.5,
        "ids_small_vs_fuxictr_dnn": 0.5,
        "ids_small_vs_fuxictr_din": 2.0,
        "ids_small_vs_fuxictr_2048": 3.0,
        "ids_small_vs_fuxictr_2048_dnn": 3.0,
    }


def test_an_interval_is_students_and_the_test_is_paired() -> None:
    from scipy import stats  # a second's import

    values = [1.0, 2.0, 4.0]
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem(values))
    found = seed_mean(values)
    assert found.half_width == pytest.approx((high - low) / 2) and found.mean == pytest.approx(7 / 3)
    assert seed_mean([1.0]).half_width is None
    base, ours = [0.60, 0.62, 0.61, 0.65], [0.61, 0.635, 0.62, 0.662]
    probability = p_value([a - b for a, b in zip(ours, base, strict=True)])
    assert probability == pytest.approx(float(stats.ttest_rel(ours, base).pvalue))
    assert p_value([0.1]) is None and p_value([0.1, 0.1]) is None
    corrected = {"a": 0.03, "b": 0.06, "c": None, "d": 0.06}
    assert holm({"a": 0.01, "b": 0.04, "c": None, "d": 0.03}) == pytest.approx(corrected)
    assert holm({"a": 0.8, "b": 0.9}) == {"a": 1.0, "b": 1.0}
