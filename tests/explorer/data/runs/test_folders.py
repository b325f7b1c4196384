"""What folders of runs say: finished, running, unfinished or unreadable, whatever lies in them."""

import os
import shutil
import time
from pathlib import Path

import pytest

from explorer.data.runs import folders
from explorer.data.runs.folders import RunFacts, open_run, read_facts, read_runs, run_names
from explorer.errors import NotHereError
from explorer.places import Places
from tests.explorer.world import World
from trainer.evaluation.bootstrap import LEAST_USERS_SHOWN
from trainer.runs.folder import DAYS_FILE, finished


@pytest.fixture
def runs(world: World, tmp_path: Path) -> Path:
    shutil.copytree(world.runs, tmp_path / "runs")
    return tmp_path / "runs"


def facts(runs: Path, name: str = "both") -> RunFacts:
    return read_facts(runs / name)


def age(run: Path, seconds: float) -> None:
    for each in [run, *run.rglob("*")]:
        os.utime(each, (time.time() - seconds,) * 2)


def test_a_finished_run_has_its_metrics_settings_and_checkpoints(runs: Path) -> None:
    found = facts(runs)
    assert (found.state, found.images, found.problems) == ("finished", "both", ())
    metrics = found.report["metrics"]
    assert found.metrics["impressions"] == metrics["impressions"]
    assert metrics["gauc"] and metrics["auc"] and metrics["users"] < LEAST_USERS_SHOWN  # of so few users none is shown
    assert found.metrics["gauc"] is found.metrics["auc"] is None
    assert found.settings["train.max_steps"] == 12
    assert found.settings["data.missing"] == "zeros"
    assert found.checkpoints == ("step-00000012",)
    assert found.samples_digest == facts(runs, "ids-only").samples_digest != ""
    Path(finished(runs / "both")[-1].path("state.json")).write_text('{"origin": ')
    assert facts(runs).samples_digest == ""
    assert found.has_evaluation
    assert not facts(runs, "both-longer").has_evaluation


def test_a_run_without_a_report_runs_while_it_writes(runs: Path) -> None:
    (runs / "both" / "report.json").unlink()
    assert facts(runs).state == "running"
    age(runs / "both", 3600)
    assert facts(runs).state == "unfinished"


@pytest.mark.parametrize("content", ['{"metrics": {"gauc": 0.', "", "[1, 2]", "\x00\xff", '{"metrics": []}'])
def test_a_report_that_is_half_written_stops_nothing(runs: Path, content: str) -> None:
    (runs / "both" / "report.json").write_text(content)
    found = facts(runs)
    assert found.metrics == {}
    assert found.settings["train.max_steps"] == 12
    assert bool(found.problems) == (content != '{"metrics": []}')


@pytest.mark.parametrize("content", ["model: {images: [", "- a\n- b\n", "", "\x00"])
def test_settings_that_cannot_be_read_are_a_problem_of_the_run(runs: Path, content: str) -> None:
    (runs / "both" / "config.yaml").write_text(content)
    found = facts(runs)
    assert found.state == "finished"
    assert len(found.problems) == 1
    assert found.images == ""


@pytest.mark.parametrize("content", ["a: &a [1]\nb: *a\n", "a: 1\n" + "#" * 300_000, "model: ["])
def test_settings_that_are_refused_are_read_once(runs: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Aliases can stand for endless values, and a large file takes long: neither is parsed."""
    read: list[Path] = []
    monkeypatch.setattr(folders, "read_file", lambda file: read.append(file) or file.read_bytes())
    config = runs / "both" / "config.yaml"
    config.write_text(content)
    first, second = read_facts(runs / "both"), read_facts(runs / "both")
    assert first == second and first.settings == {} and len(first.problems) == 1
    assert read.count(config) <= 1
    config.write_text("model: {images: none}")
    assert read_facts(runs / "both").images == "none"


def test_runs_and_days_of_trainer_daily_are_listed_by_their_last_change(runs: Path) -> None:
    for number, name in enumerate(("ids-only", "both", "both-longer")):
        age(runs / name, 1000 * (3 - number))
    (runs / "no run").mkdir()
    no_text = runs / os.fsdecode(b"\xff")
    no_text.mkdir()
    (no_text / "config.yaml").write_text("")
    for name in ("daily/2026-01-02", "other/both"):
        shutil.copytree(runs / "both", runs / name)
        age(runs / name, 500)
    (runs / "daily" / DAYS_FILE).write_text("{}")
    (runs / "daily" / "2026-01-04").mkdir()  # not begun
    places = Places(runs=str(runs))
    names = ["daily/2026-01-02", "both-longer", "both", "ids-only"]
    assert run_names(places) == names
    assert [(run.name, run.state) for run in read_runs(places, names[:2])] == [(name, "finished") for name in names[:2]]
    assert open_run(places, names[0]) == runs / "daily" / "2026-01-02"


@pytest.mark.parametrize(
    "name", ["..", ".", "", "a/b", "/etc", "nothing", "a\0b", "x" * 300, "../both", "x/..", "/..", "../.", "a//b"]
)
def test_what_is_no_run_is_not_here(runs: Path, name: str) -> None:
    with pytest.raises(NotHereError):
        open_run(Places(runs=str(runs / "both")), name)
