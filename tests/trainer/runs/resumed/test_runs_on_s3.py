"""Runs whose folder is on S3: trained, continued from nothing but it, read by every command, and by one writer."""

import re
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from featurestore.published.paths import RemotePath, RunPath, run_path
from tests.commands.calls import call
from tests.raised import raises
from tests.servers import Server, environment_of, new_bucket
from tests.trainer.checkpoints import steps_of
from tests.trainer.conftest import Places
from tests.trainer.main_worker import before_steps
from tests.trainer.whole_runs import assert_same, report_of, run_alone
from trainer.engine.engine import Engine
from trainer.errors import CheckpointError, ConfigError, TakenOverError
from trainer.loop import training
from trainer.problems import Problem
from trainer.runs.saving import CheckpointPlace


def train_on(places: Places, folder: object, name: str = "a", **changes: Any) -> RunPath:
    """Train six steps, with three checkpoints."""
    steps = {"train__max_steps": 6, "train__checkpoint_every": 2, "model__compute_dtype": "float32"}
    run_alone(places, run__dir=folder, run__name=name, **{**steps, **changes})
    return run_path(str(folder)) / name


@pytest.fixture(scope="module")
def far_and_near(places: Places, s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[RemotePath, Path]:
    """The same run on S3 and on a disk."""
    folders = f"{new_bucket()}/runs", tmp_path_factory.mktemp("near") / "runs"
    return tuple(train_on(places, folder) for folder in folders)


def called(*words: object) -> str:
    done = call([*map(str, words)])
    assert done.code == 0, done
    return done.out


def test_a_run_on_s3_is_that_of_a_disk(far_and_near: tuple[RemotePath, Path]) -> None:
    far, near = far_and_near
    assert_same(far, near, metrics=True)
    names = {each.name for each in far.iterdir()} - {"evaluation"}
    assert names == {"checkpoints", "config.yaml", "report.json", "tensorboard"}
    assert steps_of(far) == [2, 4, 6]
    events = (far / "tensorboard").iterdir()
    assert len(events) == 1 and len(events[0].read_bytes()) > 500
    assert not list(near.parents[1].glob("**/s3*"))


@pytest.mark.usefixtures("undrawn")
def test_every_command_reads_it_alike(far_and_near: tuple[RemotePath, Path], places: Places, tmp_path: Path) -> None:
    far, near = far_and_near
    for run in far_and_near:
        called("trainer.evaluate", run, "--bootstrap", 5)
    mine, theirs = (report_of(run / "evaluation") for run in far_and_near)
    assert mine.keys() == theirs.keys()
    assert {name for name in mine if mine[name] != theirs[name]} <= {"run", "checkpoint"}
    written, expected = ({each.name for each in (run / "evaluation").iterdir()} for run in far_and_near)
    assert written == expected
    for command in ("jobs/score", "jobs/export_embeddings"):
        tables = []
        for number, run in enumerate(far_and_near):
            out = tmp_path / f"{number}.parquet"
            called(command, "--run", run, "--out", out)
            tables.append(pq.read_table(out).replace_schema_metadata(None))
            out.unlink()
        assert tables[0].num_rows > 0 and tables[0].equals(tables[1])
    called("jobs/export_model", "--run", far, "--out", tmp_path / "model", "--sample-groups", 0)
    assert "at most" in called("serving", "check", tmp_path / "model")
    assert "compatible" in called("trainer.compat", far, places.folder / "features")
    warm = {"run__dir": tmp_path, "run__warm_parts": "all", "train__max_steps": 2}
    of_far = run_alone(places, run__name="of-far", run__warm_start=far, **warm)
    assert_same(of_far, run_alone(places, run__name="of-near", run__warm_start=near, **warm), metrics=True)


def test_a_run_that_is_there_is_refused_or_replaced(places: Places, s3_url: str) -> None:
    far = train_on(places, s3_url, train__max_steps=4)
    with raises(ConfigError, Problem.RUN_EXISTS, where=far):
        train_on(places, s3_url)
    train_on(places, s3_url, train__max_steps=2, run__overwrite=True)
    assert steps_of(far) == [2]
    assert report_of(far)["global_step"] == 2
    train_on(places, s3_url, run__resume="latest")
    assert steps_of(far) == [2, 4, 6]


def test_a_second_start_ends_the_first(places: Places, s3_url: str) -> None:
    def take_over(engine: Engine, _: object) -> None:
        if engine.num_steps == 5:
            CheckpointPlace(run_path(s3_url) / "a").claim()  # as a start elsewhere does

    refused = raises(TakenOverError, Problem.TAKEN_OVER, where=f"{run_path(s3_url)}/a/checkpoints")
    with refused, before_steps(take_over):
        train_on(places, s3_url)
    there = steps_of(run_path(s3_url) / "a")
    assert there[0] == 2 and 6 not in there


@pytest.mark.services
def test_s3_that_is_away_for_a_while_stops_nothing(
    places: Places, far_and_near: tuple[RemotePath, Path], tmp_path: Path
) -> None:
    """The server is killed before a checkpoint, and comes back after the next steps: these are not waited for."""
    server, seen = Server(tmp_path), list[int]()

    def go_without(engine: Engine, _: object) -> None:
        if engine.num_steps == 2:
            server.kill()
        if engine.num_steps == 5:
            seen.append([thread.name for thread in threading.enumerate()].count("checkpoint"))
            server.start()

    server.start()
    try:
        with environment_of(server.endpoint), before_steps(go_without):
            far = train_on(places, new_bucket(), train__checkpoint_every=3)
            assert seen == [1], "it was being written while steps were made"
            assert steps_of(far) == [3, 6]
            assert report_of(far)["checkpoints"] == {"written": 2, "failed": 0}
            assert_same(far, far_and_near[1])
    finally:
        server.kill()


def test_a_full_disk_is_told_and_ends_the_run_when_it_stays_full(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, full = CheckpointPlace.write, {2, 4}

    def refuse(place: CheckpointPlace, step: int, name: str, content: Any) -> Any:
        if step in full:
            raise OSError(28, "No space left on device")
        return write(place, step, name, content)

    monkeypatch.setattr(CheckpointPlace, "write", refuse)
    run = train_on(places, tmp_path)
    told = "warning: the checkpoint of step 2 could not be written: [Errno 28] No space left on device"
    assert told in capsys.readouterr().out.replace("\n", " ")
    assert report_of(run)["checkpoints"] == {"written": 1, "failed": 2}
    assert training.MOST_FAILURES == 5, "docs/TROUBLE.md says that the sixth in a row ends the run"
    monkeypatch.setattr(training, "MOST_FAILURES", 1)
    with raises(CheckpointError, Problem.CHECKPOINTS_FAIL, where=4, reason=re.compile("No space left"), before=1):
        train_on(places, tmp_path, "b")


@pytest.mark.parametrize("setting", ["run.dir", "data.samples", "data.store", "run.resume", "run.warm_start"])
def test_a_missing_bucket_is_one_line(setting: str, places: Places, missing_bucket: str, tmp_path: Path) -> None:
    settings = places.settings(run__dir=tmp_path, run__name="a")
    words = [f"--set={each}" for each in [*settings, f"{setting}={missing_bucket}/a"]]
    called = call(["trainer.main", *words])
    assert (called.code, called.trace, called.err.count("\n")) == (2, "", 1), called.err
    assert "s3://nobucket" in called.err and "no bucket nobucket" in called.err
