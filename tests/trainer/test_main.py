"""Whole runs: what is written, exact resumption, and how a run ends when something goes wrong on one rank or on all."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from featurestore.errors import MissingKeysError
from featurestore.format.rows import FeatureRows
from featurestore.spec import StoreInfo
from featurestore.store import FeatureStore
from tests.ranks import StandingRanks, command_of, run_ranks
from tests.trainer.alike import all_alike
from trainer.comm import SoloComm
from trainer.config.config import load_config
from trainer.engine.engine import Engine
from trainer.errors import CheckpointError, ConfigError, DataError, RemoteRankError, TrainerError
from trainer.loop.summary import StepTotals
from trainer.main import app, train
from trainer.runs.checkpoint import find, read_state
from trainer.stages import AHEAD, Stage, Stages

WORKER = Path(__file__).parent / "main_worker.py"
RANKS_TIMEOUT_S = 150
# Of the runs of one rank and of two; their numbers are compared, so the type of the products is not the machine's.
SHARED = {"data__global_batch_size": 16, "train__epochs": 3, "model__compute_dtype": "float64"}
Places = Any


def run_alone(places: Places, **changes: Any) -> Path:
    """Trains in this process; returns the run's folder."""
    config = load_config(settings=places.settings(**changes))
    train(config, SoloComm())
    return Path(config.run.dir) / str(config.run.name)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint, whoever wrote them."""
    files = find(run / "checkpoints", "latest").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(found: Path, expected: Path) -> None:
    """Two runs ended with the same bits in every parameter, optimiser state and ID row."""
    mine, theirs = tensors(found), tensors(expected)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@pytest.fixture(scope="module")
def alone(places: Places) -> Path:
    """100 steps of one rank."""
    return run_alone(places, run__name="alone", train__max_steps=100, **SHARED)


def ads_of(folder: Path) -> np.ndarray:
    """The ad of every impression of a split."""
    return np.concatenate(
        [np.concatenate(pq.read_table(file)["ad_item"].to_pylist()) for file in folder.glob("*.parquet")]
    )


def report_of(run: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run / "report.json").read_text())
    return report


class TestAlone:
    def test_report(self, alone: Path, places: Places) -> None:
        report = report_of(alone)
        assert (report["global_step"], report["steps"], report["num_ranks"], report["store_version"]) == (
            100,
            100,
            1,
            1,
        )
        metrics = report["metrics"]
        assert 0.55 < metrics["auc"] < 1
        assert 0.3 < metrics["logloss"] < 0.9
        train_ads, test_ads = (ads_of(places.folder / "samples" / split) for split in ("train", "test"))
        assert metrics["impressions"] == len(test_ads)
        assert metrics["new_ad_impressions"] == (~np.isin(test_ads, train_ads)).sum() > 0
        assert all(0 <= metrics[name] <= 1 for name in ("gauc", "new_ad_auc", "new_ad_gauc"))
        assert 0 < report["unique_ratio"] < 1
        assert report["bytes_sent_per_step"] == 0
        assert report["samples_per_s"] > 0
        assert report["history"][-1] == {"step": 100, **metrics}
        assert set(report["seconds"]) == {"wait", "compute", "evaluate", "checkpoint"}
        assert set(report["stages"]) == set(Stage.__args__) - {"exchange signatures", "compare images"}
        assert all(row["median_ms"] >= 0 and row["share_of_step"] >= 0 for row in report["stages"].values())
        of_steps = [row["share_of_step"] for name, row in report["stages"].items() if name not in AHEAD]
        assert sum(of_steps) == pytest.approx(1)
        assert (report["owner_skew"], report["reused_vectors"]) == (1.0, 0.0)
        assert 0 < report["unique_ratio_by_field"]["behavior_image"] < 1
        met = set(train_ads.tolist())  # in 100 steps, all of them
        items = report["tables"]["item"]
        assert items["is_exact"] and len(met) <= items["ids"] < 4096
        assert items["used_rows"] <= items["ids"] <= items["used_rows"] * (1 + items["share"])

    def test_files(self, alone: Path, places: Places) -> None:
        changes = {"run__name": "alone", "train__max_steps": 100, **SHARED}
        assert load_config(alone / "config.yaml") == load_config(settings=places.settings(**changes))
        assert list((alone / "tensorboard").glob("events*"))
        assert [path.name for path in (alone / "checkpoints").iterdir()] == ["step-00000100"]

    def test_a_profiled_run_has_a_trace_that_names_the_stages(self, places: Places) -> None:
        run = run_alone(places, run__name="traced", run__profile=True, train__max_steps=12)
        events = json.loads((run / "profile/trace-rank-0.json").read_text())["traceEvents"]
        threads = {event["name"]: event["tid"] for event in events if "name" in event and "tid" in event}
        assert set(Stage.__args__) - {"exchange signatures", "compare images", "rest"} <= set(threads)
        assert threads["gather"] != threads["embed images"]

    def test_waits_of_an_evaluation_are_no_part_of_the_steps(
        self, places: Places, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        phases, stages, timed, timed_stage = [], [], StepTotals.timed, Stages.add
        monkeypatch.setattr(StepTotals, "timed", lambda self, phase: phases.append(phase) or timed(self, phase))
        monkeypatch.setattr(Stages, "add", lambda self, *run: stages.append(run[0]) or timed_stage(self, *run))
        run_alone(places, run__name="waits", train__max_steps=5, train__eval_every=2, data__global_batch_size=16)
        assert phases.count("evaluate") == 3
        assert phases.count("wait") == phases.count("compute") == 5
        assert {stages.count(each) for each in stages if each != "read"} == {5}
        assert stages.count("read") >= 5  # and a few more ahead

    def test_reuse_is_counted(self, places: Places) -> None:
        changes = {"run__name": "reused", "train__max_steps": 12, "data__global_batch_size": 16}
        report = report_of(run_alone(places, exchange__reuse_steps=3, **changes))
        assert 0.1 < report["reused_vectors"] < 1

    def test_resumption_is_exact(self, alone: Path, places: Places) -> None:
        changes = {"run__name": "alone-halves", **SHARED}
        run_alone(places, train__max_steps=50, **changes)
        run = run_alone(places, train__max_steps=100, run__resume="latest", train__eval_every=30, **changes)
        assert_same(run, alone)
        assert [entry["step"] for entry in report_of(run)["history"]] == [50, 60, 90, 100]
        assert report_of(run)["steps"] == 50

    def test_checkpoints_on_the_way(self, places: Places) -> None:
        run = run_alone(
            places, run__name="often", train__max_steps=9, train__checkpoint_every=2, train__keep_checkpoints=2
        )
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000008", "step-00000009"]

    def test_seed_decides(self, places: Places) -> None:
        runs = [
            run_alone(places, run__name=f"seed-{s}-{n}", train__max_steps=3, train__seed=s)
            for n, s in enumerate((1, 1, 2))
        ]
        assert_same(runs[0], runs[1])
        with pytest.raises(AssertionError):
            assert_same(runs[0], runs[2])

    @pytest.mark.parametrize("images", ["none", "ad", "behavior"])
    def test_variants(self, places: Places, images: str) -> None:
        report = report_of(run_alone(places, run__name=images, model__images=images, train__max_steps=4))
        assert (report["unique_ratio"] is None) == (images == "none")
        assert report["metrics"]["auc"] is not None

    def test_missing_images_are_refused_or_counted(self, make_places: Callable[[Path], Places], tmp_path: Path) -> None:
        places = make_places(tmp_path)
        FeatureStore.open(tmp_path / "features").delete([1_000, 1_001])
        with pytest.raises(MissingKeysError, match="keys have no feature"):
            run_alone(places, run__name="tried")
        # The failed run holds no checkpoint: its name is free.
        report = report_of(run_alone(places, run__name="tried", data__missing="zeros", train__max_steps=5))
        assert report["missing_lookups"] > 0
        with pytest.raises(ConfigError, match="holds a run already"):
            run_alone(places, run__name="tried", data__missing="zeros")


class TestRefusals:
    def test_name_in_use(self, alone: Path, places: Places) -> None:
        with pytest.raises(ConfigError, match=r"holds a run already; go on with it by run\.resume=latest"):
            run_alone(places, run__name="alone")
        changes = {"run__name": "replaced", "train__max_steps": 2, "run__overwrite": "true"}
        run_alone(places, **{**changes, "train__max_steps": 3})
        run = run_alone(places, **changes)
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]

    def test_resumption_with_other_settings(self, alone: Path, places: Places) -> None:
        changes = {"run__name": "alone", "run__resume": "latest", "data__global_batch_size": 8, "model__mlp": [9]}
        with pytest.raises(CheckpointError) as caught:
            run_alone(places, **changes)
        assert "data.global_batch_size is 8 here, 16 in the checkpoint" in str(caught.value)
        assert "model.mlp is [9] here, [8, 4] in the checkpoint" in str(caught.value)

    def test_store_of_another_network(self, alone: Path, places: Places, tmp_path: Path) -> None:
        store = FeatureStore.open(places.folder / "features")
        extractor = store.info.extractor.model_copy(update={"weights_digest": "other"})
        other = FeatureStore.create(tmp_path / "other", StoreInfo(**{**dict(store.info), "extractor": extractor}))
        snapshot = store.snapshot()
        other.put(FeatureRows.of(["a"] * 50, snapshot.get(np.arange(1_000, 1_050)), keys=np.arange(1_000, 1_050)))
        changes = {"run__name": "alone", "run__resume": "latest", **SHARED}
        with pytest.raises(CheckpointError, match=r"store\.extractor\.weights_digest is 'other' here, '0'"):
            run_alone(places, data__store=tmp_path / "other", **changes)

    def test_recorded_snapshot_is_opened_again(self, make_places: Callable[[Path], Places], tmp_path: Path) -> None:
        places = make_places(tmp_path)
        run_alone(places, run__name="a", train__max_steps=2)
        FeatureStore.open(tmp_path / "features").put(
            FeatureRows.of(["item/0"], np.ones((1, 16), np.float32), keys=np.array([1_000]))
        )
        again = {"run__name": "a", "run__resume": "latest"}
        assert report_of(run_alone(places, train__max_steps=3, **again))["store_version"] == 1
        assert report_of(run_alone(places, train__max_steps=4, data__store_version=2, **again))["store_version"] == 2
        assert report_of(run_alone(places, run__name="b", train__max_steps=1))["store_version"] == 2

    def test_loss_that_is_no_number(self, places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
        step = Engine.train_step

        def diverged(engine: Engine, prepared: Any) -> Any:
            result = step(engine, prepared)
            object.__setattr__(result, "loss", float("nan"))
            return result

        monkeypatch.setattr(Engine, "train_step", diverged)
        with pytest.raises(TrainerError, match=r"the loss of step 1 is nan; try a lower optim\.lr"):
            run_alone(places, run__name="diverged")

    def test_no_test_samples(self, places: Places, tmp_path: Path) -> None:
        shutil.copytree(places.folder / "samples" / "train", tmp_path / "train")
        with pytest.raises(DataError, match=r"has no test samples; make them with: python jobs/build_samples\.py"):
            run_alone(places, run__name="x", data__samples=tmp_path)
        assert not (places.folder / "runs" / "x").exists(), "nothing is written before all is open"

    @pytest.mark.parametrize("below", [".", "deeper/runs"])
    def test_run_dir_that_is_a_file(self, places: Places, tmp_path: Path, below: str) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match=r"run\.dir=.*file is not a folder that this user can write to"):
            run_alone(places, run__name="x", run__dir=tmp_path / "file" / below)

    def test_run_dir_on_a_disk_that_refuses(
        self, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("trainer.runs.open.save_config", refuse)
        with pytest.raises(ConfigError, match=r"run\.dir=.* cannot be used: .*No space left"):
            run_alone(places, run__name="x", run__dir=tmp_path)


class TestCommandLine:
    def test_missing_key_names_the_ways_out(self, make_places: Callable[[Path], Places], tmp_path: Path) -> None:
        places = make_places(tmp_path)
        FeatureStore.open(tmp_path / "features").delete([1_000, 1_001])
        result = CliRunner().invoke(app, ["--set", *places.settings(run__name="error")])
        assert result.exit_code == 1
        assert "keys have no feature" in result.stderr
        assert f"python jobs/extract_features.py --store {tmp_path / 'features'}" in result.stderr
        assert "quarantine" in result.stderr
        assert "data.missing=zeros, or data.missing=learned" in result.stderr

    @pytest.mark.parametrize(("error", "told"), [("MissingKeysError", True), ("DataError", False)])
    def test_missing_key_of_another_rank(self, monkeypatch: pytest.MonkeyPatch, error: str, told: bool) -> None:
        def fail(*_: Any) -> None:
            raise RemoteRankError(1, error, "3 keys")

        monkeypatch.setattr("trainer.main.train", fail)
        result = CliRunner().invoke(app, [])
        assert result.stderr.startswith(f"error: rank 1 failed: {error}: 3 keys\n")
        assert ("data.missing=zeros" in result.stderr) is told

    def test_empty_places_name_the_jobs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        result = CliRunner().invoke(app, [])
        assert result.exit_code == 2
        assert "python jobs/extract_features.py --store data/features" in result.stderr
        assert "python jobs/build_samples.py --samples data/samples" in result.stderr
        assert "python jobs/make_demo_data.py" in result.stderr
        assert list(tmp_path.iterdir()) == []

    def test_mistakes_are_usage_errors(self) -> None:
        result = CliRunner().invoke(app, ["--set", "train.epoch=1"])
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == "error: configuration: train.epoch is unknown; did you mean train.epochs?\n"

    def test_several_settings_may_follow_one_set(self, places: Places) -> None:
        result = CliRunner().invoke(app, ["--set", *places.settings(run__name="cli", train__max_steps=1)])
        assert result.exit_code == 0, result.output
        assert "step 1/1" in result.stdout
        assert report_of(places.folder / "runs" / "cli")["steps"] == 1

    def test_help_has_examples_and_loads_no_torch(self) -> None:
        code = "import sys, trainer.main; sys.exit('torch' in sys.modules or 'horovod' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
        result = CliRunner().invoke(app, ["--help"])
        assert "horovodrun -np 8 python -m trainer.main" in result.stdout


@pytest.fixture(scope="module")
def job(
    make_places: Callable[[Path], Places], tmp_path_factory: pytest.TempPathFactory, two_ranks: StandingRanks
) -> tuple[Places, dict[str, list[str]]]:
    """What each of two ranks saw of the runs of main_worker.py."""
    places = make_places(tmp_path_factory.mktemp("job"))
    shutil.copytree(places.folder / "samples", places.folder / "broken")
    file = places.folder / "broken" / "test" / "day=2026-01-01.parquet"
    table = pq.read_table(file, partitioning=None)
    labels = table.column("label").to_pylist()
    labels[-1][0] = 2
    broken = table.set_column(table.schema.get_field_index("label"), "label", pa.array(labels, pa.list_(pa.int8())))
    pq.write_table(broken, file, row_group_size=7)
    out = places.folder / "seen.json"
    two_ranks.run(WORKER, places.folder, out, *places.settings(**SHARED))
    return places, json.loads(out.read_text())


class TestTwoRanks:
    def test_signal_to_one_rank_stops_all_and_resumption_is_exact(
        self, job: tuple[Places, dict[str, list[str]]]
    ) -> None:
        places, seen = job
        assert seen["full"] == ["done", "done"]
        for name in ("stopped", "stopped-ahead"):
            assert seen[name] == ["StoppedError: SIGTERM received"] * 2
            assert seen[f"after {name}"] == ["done", "done"]
            assert_same(places.folder / "runs" / name, places.folder / "runs" / "full")
        steps, ahead = (
            sorted(path.name for path in (places.folder / "runs" / name / "checkpoints").iterdir())
            for name in ("stopped", "stopped-ahead")
        )
        assert steps == ["step-00000050", "step-00000100"]
        # The step after the signal's may have been prepared already; then it is taken too.
        assert ahead in (steps, ["step-00000051", "step-00000100"])

    def test_an_earlier_checkpoint_replaces_the_later_ones_where_asked_to(
        self, job: tuple[Places, dict[str, list[str]]]
    ) -> None:
        places, seen = job
        runs = places.folder / "runs"
        assert seen["branched"] == seen["elsewhere"] == seen["branched, overwritten"] == ["done", "done"]
        assert [text.split(":")[0] for text in seen["branched, refused"]] == ["ConfigError", "ConfigError"]
        assert_same(runs / "branched", runs / "elsewhere")
        steps = sorted(path.name for path in (runs / "branched" / "checkpoints").iterdir())
        assert steps == ["step-00000002", "step-00000004", "step-00000006"]

    def test_error_of_one_rank_is_known_to_all(self, job: tuple[Places, dict[str, list[str]]]) -> None:
        _, seen = job
        # The last test sample is in the part that rank 1 alone evaluates.
        assert [text.split(":")[0] for text in seen["broken"]] == ["RemoteRankError", "DataError"]
        assert all("test/day=2026-01-01.parquet, row 59: column label has 2" in text for text in seen["broken"])
        assert all("build_samples.py" in text for text in seen["empty"])

    def test_equals_one_rank(self, job: tuple[Places, dict[str, list[str]]], alone: Path) -> None:
        places, _ = job
        two, one = (report_of(run)["metrics"] for run in (places.folder / "runs" / "full", alone))
        assert two == all_alike(one, within=1e-9)
        report = report_of(places.folder / "runs" / "full")
        assert report["num_ranks"] == 2
        assert report["samples"] == report_of(alone)["samples"]
        assert report["images_per_step"] == report_of(alone)["images_per_step"], (
            "an image is computed once, whoever asks"
        )
        assert report["bytes_sent_per_step"] == report["bytes_received_per_step"] > 0

    def test_checkpoint_loads_at_one_rank(self, job: tuple[Places, dict[str, list[str]]]) -> None:
        places, _ = job
        full = places.folder / "runs" / "full"
        path = find(full / "checkpoints", "latest")
        assert read_state(path).num_ranks == 2
        changes = {**SHARED, "run__resume": path, "train__max_steps": 100}
        run = run_alone(places, run__name="at-one-rank", **changes)
        assert_same(run, full)
        assert report_of(run)["metrics"] == all_alike(report_of(full)["metrics"], within=1e-6)


@pytest.fixture
def endless(places: Places, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`horovodrun -np 2 python -m trainer.main` in the midst of its training."""
    settings = places.settings(train__epochs=100_000, run__dir=tmp_path)
    command = command_of(2, "-m", "trainer.main", "--set", *settings)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    watchdog = threading.Timer(RANKS_TIMEOUT_S, process.kill)
    watchdog.start()
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "step 1/" in line:
            break
    else:
        pytest.fail("".join(seen))
    yield process
    watchdog.cancel()
    ranks = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    for each in ranks:
        each.kill()
    process.kill()
    process.wait()


def _ranks(job: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of the two ranks, in their order."""
    found = {}
    for process in psutil.Process(job.pid).children(recursive=True):
        if process.cmdline()[1:3] == ["-m", "trainer.main"]:
            found[process.environ()["HOROVOD_RANK"]] = process
    return [found["0"], found["1"]]


class TestEnds:
    @pytest.mark.services
    @pytest.mark.parametrize("victim", [0, 1])
    def test_killed_rank_ends_the_job(self, endless: subprocess.Popen[str], victim: int) -> None:
        ranks = _ranks(endless)
        ranks[victim].send_signal(signal.SIGKILL)
        start = time.monotonic()
        output, _ = endless.communicate(timeout=60)
        assert endless.returncode != 0
        assert time.monotonic() - start < 30
        assert f"Process {victim} exit with status code" in output
        assert f"error: rank {1 - victim} lost another rank" in output
        assert "with run.resume=latest and the run's name where it has a checkpoint" in output
        _, alive = psutil.wait_procs(ranks, timeout=10)
        assert alive == []

    @pytest.mark.services
    def test_wrong_setting_is_told_once(self) -> None:
        done = run_ranks(2, "-m", "trainer.main", "--set", "train.epoch=1")
        output = done.stdout + done.stderr
        assert done.returncode != 0
        assert output.count("did you mean train.epochs?") == 1
        assert "]<stderr>:Traceback" not in output

    def test_a_table_beyond_the_memory_is_told_once(
        self, places: Places, tmp_path: Path, two_ranks: StandingRanks
    ) -> None:
        tables = "{user: 1000000000000, item: 64, image: 64, category: 16, scene: 16}"
        settings = places.settings(model__tables=tables, run__dir=tmp_path)
        (code, output), other = two_ranks.call("-m", "trainer.main", "--set", *settings)
        assert code != 0 and other == (code, "")
        assert output.count("error: model.tables.user=1000000000000: 1,000,000,000,000 rows") == 1
        assert "(2 ranks; all tables" in output and "Traceback" not in output


def test_interrupt_alone_ends_with_a_checkpoint(places: Places, tmp_path: Path) -> None:
    settings = places.settings(train__epochs=100_000, run__dir=tmp_path, run__name="interrupted")
    command = [sys.executable, "-m", "trainer.main", "--set", *settings]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    for line in process.stdout:
        if "step 1/" in line:
            break
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    path = find(tmp_path / "interrupted" / "checkpoints", "latest")
    assert f"continue with run.resume={path}" in output
    assert read_state(path).step >= 1
