"""What a run tells: progress and TensorBoard's file, also on a full disk, figures of its report, and other trackers."""

import importlib
import io
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from featurestore.console.output import figure
from tests.cli import wait_until
from tests.faulty import full_from
from tests.trainer.conftest import Places
from tests.trainer.whole_runs import assert_same, drawn_scalars, interrupted_after, report_of, run_alone
from trainer.comm import SoloComm
from trainer.engine.engine import StepResult
from trainer.loop.summary import FILE, EventsFile, ProgressLog, StepTotals, TrackerThread, Values, WandbRun, gather
from trainer.stages import Stages


def test_tensorboard_shows_the_figures_but_what_an_earlier_start_wrote_after_its_checkpoint(tmp_path: Path) -> None:
    earlier, later = EventsFile(tmp_path / "made", 0), EventsFile(tmp_path / "made", 2)
    earlier.add(1, {"train/loss": 0.5, "images/owner skew": 2})
    for step in (2, 3):
        earlier.add(step, {"train/loss": step})
    later.add(2, {"train/loss": 20})
    assert drawn_scalars(tmp_path / "made") == {"train/loss": [(1, 0.5), (2, 20.0)], "images/owner skew": [(1, 2.0)]}


def test_what_a_full_disk_cuts_is_told_and_what_comes_after_it_is_read(tmp_path: Path) -> None:
    file = EventsFile(tmp_path, 0)
    file.add(1, {"loss": 1.0})
    (written,) = tmp_path.iterdir()
    with full_from(written.stat().st_size + 10), pytest.raises(OSError, match="File too large"):
        file.add(2, {"loss": 2.0, "auc": 0.5})
    file.add(3, {"loss": 3.0})
    assert drawn_scalars(tmp_path) == {"loss": [(1, 1.0), (3, 3.0)]}


def test_one_warning_for_all_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    (tmp_path / "events").touch()  # where a folder is needed
    with ProgressLog(tmp_path / "events", 0, 3) as progress:
        progress.step(1, {"loss": 0.5}, {"auc": 0.5})
        progress.step(2, {"loss": 0.5}, {"auc": 0.5})
        progress.console.file = Full()
        progress.say("a line")
        progress.step(3, {"loss": 0.5}, {})
    told = capsys.readouterr().err.splitlines()
    assert [line.split(" cannot")[0] for line in told] == ["warning: figures for TensorBoard", "warning: output"]


@pytest.mark.parametrize(
    ("seconds", "samples_per_s"),
    [pytest.param([10.0, 0.5, 0.5], 200.0, id="without the first step"), ([2.0], 50.0), ([], None)],
)
def test_throughput(seconds: list[float], samples_per_s: float | None) -> None:
    totals = StepTotals()
    for each in seconds:  # of a step of 100 samples
        totals.seconds["compute"] = totals.seconds.get("compute", 0.0) + each
        totals.add(StepResult(loss=0.5, num_samples=100, learning_rate=0.1), 0, 0)
    figures = gather(SoloComm(), totals, Stages())
    assert (figures["samples_per_s"], figures["steps"]) == (samples_per_s, len(seconds))
    assert figures["samples"] == 100 * len(seconds)


@pytest.mark.parametrize(
    ("value", "text"),
    [(11_410.4, "11,410"), (1_000.0, "1,000"), (999.94, "999.9"), (0.0001, "0.0001"), (0.69317, "0.6932")],
)
def test_numbers_are_printed_without_exponent(value: float, text: str) -> None:
    assert figure(value) == text


def test_rest_is_what_no_stage_of_the_step_accounts_for() -> None:
    stages = Stages()
    for name, seconds in (("wait for the next batch", 9.0), ("gather", 7.0), ("embed images", 0.2), ("rest", 5.0)):
        stages.add(name, seconds)
    stages.add_rest(0.5)
    assert stages.last_ms()["rest"] == pytest.approx(300)
    stages.add_rest(0.1)
    assert stages.last_ms()["rest"] == 0


STEPS = {"train__max_steps": 6, "train__log_every": 2, "train__eval_every": 2}


class Noted:
    """A tracker that notes what it is told."""

    id = "noted"

    def __init__(self) -> None:
        self.told: list[Any] = []

    def add(self, step: int, values: Values, time_s: float) -> None:
        self.told.append((step, dict(values)))

    def end(self, failed: bool) -> None:
        self.told.append(failed)


def test_calls_return_at_once_and_come_in_their_order_and_one_that_hangs_does_not_hold_the_end_of_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    go, noted = threading.Event(), Noted()

    def begin() -> Noted:
        assert go.wait(60)
        return noted

    tracker = TrackerThread("mlflow", begin)
    start_s = time.monotonic()
    for step in range(100):
        tracker.add(step, {"loss": step})
    with monkeypatch.context() as patched:
        patched.setattr("trainer.loop.summary._END_S", 0.2)
        tracker.end(failed=False)
    assert time.monotonic() - start_s < 5 and noted.told == []
    assert "has not taken all figures within" in capsys.readouterr().err
    go.set()
    tracker.end(failed=False)  # which waits
    assert noted.told == [*((step, {"loss": step}) for step in range(100)), False]


def test_the_first_failure_is_one_line_and_the_last_word(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Noted):
        def add(self, step: int, values: Values, time_s: float) -> None:
            raise RuntimeError("the server is away\nand will not come")

    tracker = TrackerThread("wandb", Broken)
    for step in range(5):
        tracker.add(step, {"loss": 1.0})
    tracker.end(failed=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: run.tracking=wandb: the server is away")
    assert line.endswith("the run continues without it")


@pytest.mark.long
def test_weights_and_biases_has_a_run_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    tracker = TrackerThread("wandb", lambda: WandbRun("tracked", {"model.images": "both"}, None))
    for step in range(3):
        tracker.add(step, {"train/loss": 1.0 / (step + 1)})
    tracker.end(failed=False)
    assert "warning" not in capsys.readouterr().err
    (file,) = tmp_path.rglob("*.wandb")
    # Its own process writes, and may do so later.
    wait_until(lambda: all(word in file.read_bytes() for word in (b"train/loss", b"model.images")), file.read_bytes, 60)


@pytest.mark.long
def test_a_tracker_that_is_not_installed_ends_no_run(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = run_alone(places, run__name="untracked", run__dir=tmp_path, run__tracking="wandb", **STEPS)
    assert report_of(run)["global_step"] == 6
    assert capsys.readouterr().err.count("pip install 'crossmedia[wandb]'") == 1
    plain = run_alone(places, run__name="plain", run__dir=tmp_path, **STEPS)
    assert_same(run, plain, metrics=True)
    assert not (plain / FILE).exists()


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A client of MLflow with a store of its own."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "shop")
    tracker = importlib.import_module("mlflow")
    tracker.set_tracking_uri((tmp_path / "mlruns").as_uri())
    return tracker.MlflowClient()


def only_run_of(client: Any) -> Any:
    (run,) = client.search_runs([client.get_experiment_by_name("shop").experiment_id])
    return run


@pytest.mark.long
def test_mlflow_has_settings_figures_and_addresses_also_of_a_run_that_is_continued(
    places: Places, tmp_path: Path, mlflow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(places.folder)
    named = {"run__name": "tracked", "run__dir": tmp_path / "runs", "run__tracking": "mlflow"}
    named |= {"data__samples": "samples", "data__store": "features"}
    run = run_alone(places, **named, **STEPS | {"train__max_steps": 4})
    run_alone(places, **named, **STEPS, run__resume="latest")
    tracked = only_run_of(mlflow)
    assert (tracked.info.run_name, tracked.info.status) == ("tracked", "FINISHED")
    params = tracked.data.params
    assert params["model.images"] == "both" and params["read.folder"] == str(run)
    assert params["data.samples"] == "samples" and params["read.samples"] == str(places.folder / "samples")
    assert params["read.stores.images.url"] == str(places.folder / "features")
    assert params["read.stores.images.version"] == "1" and params["read.samples_digest"]
    drawn = drawn_scalars(run / "tensorboard")
    for name in ("train/loss", "test/gauc"):
        curve = {each.step: each.value for each in mlflow.get_metric_history(tracked.info.run_id, name)}
        shown = dict(drawn[name])  # TensorBoard hides the step at which a run is continued
        assert set(curve) == set(shown) | {4} and 6 in shown
        assert {step: curve[step] for step in shown} == pytest.approx(shown, rel=1e-6)
    assert tracked.data.metrics["test/auc"] == pytest.approx(report_of(run)["metrics"]["auc"])


@pytest.mark.long
def test_a_run_that_fails_is_told_as_failed(places: Places, tmp_path: Path, mlflow: Any) -> None:
    with interrupted_after(0):
        run_alone(places, run__name="broken", run__dir=tmp_path / "runs", run__tracking="mlflow", **STEPS)
    assert only_run_of(mlflow).info.status == "FAILED"
