"""Going on from an earlier checkpoint: later ones are refused or replaced as a whole, damaged ones are passed over."""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from featurestore.errors import USAGE
from featurestore.published.paths import RunPath
from featurestore.storage.local import DiskFiles
from tests.featurestore.storage.test_paths import files_below
from tests.raised import raises
from tests.trainer.checkpoints import content_of, damage, differs, files_of, names_of, of_step, steps_of
from tests.trainer.conftest import Places
from tests.trainer.runs.saved import Trained, on_ranks, save
from tests.trainer.whole_runs import assert_same, report_of, run_alone
from trainer.comm import Comm, SoloComm
from trainer.config import load_config
from trainer.errors import CheckpointError, ConfigError, DamagedCheckpointError, RemoteRankError, TrainerError
from trainer.problems import Problem
from trainer.runs import checkpoint
from trainer.runs.checkpoint import Resumed, SkippedCheckpoint, continued
from trainer.runs.folder import Checkpoint, finished
from trainer.runs.saved import RunSource, open_source
from trainer.runs.saving import CheckpointPlace

pytestmark = pytest.mark.long  # they train whole runs


class Runs:
    """Runs of six steps with three checkpoints, in a folder of their own."""

    def __init__(self, places: Places, folder: Path) -> None:
        self._places, self.folder = places, folder

    def train(self, name: str, **changes: Any) -> Path:
        steps = {"train__max_steps": 6, "train__checkpoint_every": 2, "train__seed": 3}
        return run_alone(self._places, run__dir=self.folder, run__name=name, **{**steps, **changes})

    def branch(self, name: str, step: int = 2, of: str = "a", **changes: Any) -> Path:
        """From an earlier checkpoint of run `of`, at another learning rate."""
        resume = step if of == name else self.step(of, step)
        return self.train(name, run__resume=resume, **{"optim__lr": 0.5, **changes})

    def step(self, name: str, step: int) -> Checkpoint:
        return of_step(self.folder / name, step)


@pytest.fixture(scope="module")
def trained(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With a finished run, `a`, and `expected`: what it is from its first checkpoint on at another learning rate."""
    found = Runs(places, tmp_path_factory.mktemp("resume"))
    found.train("a")
    found.branch("expected")
    return found


@pytest.fixture
def runs(places: Places, trained: Runs, tmp_path: Path) -> Runs:
    """With a copy of the finished run, `a`."""
    shutil.copytree(trained.folder / "a", tmp_path / "a")
    return Runs(places, tmp_path)


def test_later_checkpoints_refuse_it_untouched_and_overwriting_leaves_the_new_steps_alone(
    runs: Runs, trained: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    before, first = files_below(runs.folder), content_of(runs.step("a", 2))
    refused = {"value": 2, "where": runs.folder / "a", "found": "step-00000004, step-00000006"}
    with raises(ConfigError, Problem.RUN_HAS_LATER_CHECKPOINTS, **refused):
        runs.branch("a")
    assert files_below(runs.folder) == before
    capsys.readouterr()
    again = runs.branch("a", run__overwrite=True)
    assert "removed by run.overwrite=true: step-00000004, step-00000006\n" in capsys.readouterr().out
    assert steps_of(again) == [2, 4, 6]
    assert content_of(runs.step("a", 2)) == first
    assert_same(again, trained.folder / "expected", metrics=True)
    assert load_config(again / "config.yaml").optim.lr == 0.5


def test_the_newest_and_its_path_need_no_overwriting(runs: Runs) -> None:
    runs.train("a", run__resume="latest", train__max_steps=7)
    link = runs.folder / "link"
    link.symlink_to(runs.folder / "a")
    run = runs.train("a", run__resume=link / "checkpoints" / "step-00000007", train__max_steps=8)
    assert steps_of(run) == [6, 7, 8]
    changes = {"run__overwrite": True, "train__checkpoint_every": 1, "train__keep_checkpoints": 3}
    assert steps_of(runs.branch("a", 6, **changes, train__max_steps=8)) == [6, 7, 8], "it is not the first to go"


def test_a_checkpoint_of_another_run_replaces_all(runs: Runs, trained: Runs) -> None:
    other = runs.train("b", train__max_steps=4)
    before = files_below(other)
    later = "step-00000002, step-00000004"
    with raises(ConfigError, Problem.RUN_HAS_LATER_CHECKPOINTS, where=other, found=later):
        runs.branch("b")
    assert files_below(other) == before
    runs.branch("b", run__overwrite=True)
    assert steps_of(other) == [4, 6]
    assert_same(other, trained.folder / "expected", metrics=True)
    assert len(list((other / "tensorboard").iterdir())) == 1


def test_killed_between_the_old_steps_and_the_new_ones(runs: Runs, trained: Runs) -> None:
    with mock.patch("trainer.runs.open.save_config", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        runs.branch("a", run__overwrite=True)
    run = runs.folder / "a"
    assert steps_of(run) == [2]
    assert not (run / "report.json").exists(), "it told of the steps that are gone"
    assert_same(runs.train("a", run__resume="latest", optim__lr=0.5), trained.folder / "expected", metrics=True)


def test_killed_in_the_midst_of_a_removal(runs: Runs, trained: Runs) -> None:
    delete_files = DiskFiles.delete_files

    def killed(files: DiskFiles, paths: Sequence[str]) -> None:
        if rows := [each for each in paths if "-rows-" in each]:
            files.path(rows[0]).unlink()
            raise KeyboardInterrupt
        delete_files(files, paths)

    with mock.patch.object(DiskFiles, "delete_files", killed), pytest.raises(KeyboardInterrupt):
        runs.branch("a", run__overwrite=True)
    assert steps_of(runs.folder / "a") == [2], "they go together"
    run = runs.branch("a", run__overwrite=True)
    assert steps_of(run) == [2, 4, 6]
    assert {name[:13] for name in files_of(run)} == set(names_of(run)), "nothing else is left"
    assert_same(run, trained.folder / "expected", metrics=True)


def test_a_checkpoint_of_another_start_meanwhile_ends_this_one(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a supervisor starts it again, as its settings are right."""
    claim = CheckpointPlace.claim

    def claimed(place: CheckpointPlace, damaged: Sequence[Checkpoint] = ()) -> None:
        save(place.run, 50, keep=9)
        claim(place, damaged)

    monkeypatch.setattr(CheckpointPlace, "claim", claimed)
    with raises(CheckpointError, Problem.STARTED_TWICE, where=runs.folder / "a") as caught:
        runs.train("a", run__resume="latest", train__max_steps=8)
    assert caught.value.exit_code != USAGE and steps_of(runs.folder / "a") == [2, 4, 6, 50]


def test_an_evaluation_of_an_earlier_one_touches_nothing(runs: Runs) -> None:
    before = files_below(runs.folder)
    opened = open_source(RunSource(runs.folder / "a", "2"), SoloComm())
    opened.close()
    assert opened.saved.checkpoint == runs.step("a", 2)
    assert files_below(runs.folder) == before


def test_a_plain_overwriting_that_cannot_remove_says_so(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = mock.Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr(Path, "hardlink_to", refused)
    reason = re.compile("Permission denied")
    with raises(TrainerError, Problem.RUN_DIR_UNUSABLE, value=runs.folder, reason=reason):
        runs.train("a", run__overwrite=True, optim__lr=0.5)
    assert steps_of(runs.folder / "a") == [2, 4, 6]


def test_one_command_line_begins_a_run_and_continues_it(runs: Runs) -> None:
    """As a launcher that starts a job again needs it: run.resume=auto."""
    runs.train("b", run__resume="auto", train__max_steps=4)
    assert_same(runs.train("b", run__resume="auto"), runs.folder / "a", metrics=True)


@pytest.mark.parametrize("resume", ["auto", "latest", 6])
def test_a_finished_run_that_is_started_again_stays_as_it_is_and_names_settings_that_it_does_not_use(
    runs: Runs, resume: str | int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_below(runs.folder / "a")
    runs.train("a", run__resume=resume, train__log_every=3)
    assert files_below(runs.folder / "a") == before
    said = " ".join(capsys.readouterr().out.split())
    assert f"{runs.folder / 'a'} is finished already: step 6 of 6" in said
    assert "nothing to do, not used: train.log_every=3; a larger train.max_steps continues it" in said


def test_a_run_without_its_report_gets_one_and_trains_longer_where_it_is_to(runs: Runs) -> None:
    file = runs.folder / "a" / "report.json"
    metrics = report_of(runs.folder / "a")["metrics"]
    file.unlink()
    runs.train("a", run__resume="auto")
    assert metrics and report_of(runs.folder / "a")["metrics"] == metrics
    run = runs.train("a", run__resume="auto", train__max_steps=7)
    assert report_of(run)["global_step"] == 7 and steps_of(run)[-1] == 7


def test_settings_that_the_checkpoint_refuses_are_not_tried_again(places: Places, runs: Runs) -> None:
    """Only the ranks find them out."""
    settings = places.settings(run__dir=runs.folder, run__name="a", run__resume="auto", model__mlp=[9, 4])
    words = ["--max-np", "1", "--", "python", "-m", "trainer.main", *settings, "train.seed=3"]
    command = [sys.executable, "-m", "trainer.supervise", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    *_, last = done.stderr.splitlines()
    assert done.returncode == 2 and last.startswith("supervise: rank 0 on localhost ended with exit code 2"), last
    assert last.endswith("or set back); not started again"), done.stderr
    line = differs("model.mlp", [9, 4], other=[8, 4], there="in the checkpoint")
    assert len(line.findall(done.stderr)) == 1, "the rank's line"
    assert "resuming at step 6 on 1 rank" in done.stderr


ROWS = "rows-00000-of-00001.safetensors"


def test_a_run_goes_on_from_the_newest_whole_one(
    places: Places, run: RunPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained(runs: RunPath, **changes: Any) -> RunPath:
        steps = {"train__max_steps": 6, "train__checkpoint_every": 2, "train__keep_checkpoints": 5}
        run_alone(places, run__dir=runs, run__name="a", **{**steps, **changes})
        return runs / "a"

    folder, expected = run.parent, trained(tmp_path / "expected")
    trained(folder)
    damage(run, 6, "dense.safetensors", "missing")
    damage(run, 4, ROWS, "-1")
    before = finished(run)[-1].files.published
    where = f"{run}/checkpoints/step-00000006/dense.safetensors"
    with raises(DamagedCheckpointError, Problem.CHECKPOINT_FILE_MISSING, where=where):
        trained(folder, run__resume=6)
    assert finished(run)[-1].files.published == before, "nothing was touched"
    capsys.readouterr()
    trained(folder, run__resume="auto")
    said = " ".join(capsys.readouterr().out.split())
    missing, changed = Problem.CHECKPOINT_FILE_MISSING, Problem.CHECKPOINT_FILE_CHANGED
    for step, file, problem in ((6, "dense.safetensors", missing), (4, ROWS, changed)):
        name = f"step-{step:08}"
        assert f"warning: {name} is skipped, and kept as damaged-{name} in {run}/checkpoints: " in said
        why = problem.of(f"{run}/checkpoints/{name}/{file}").partition(";")[0]
        assert f"{why}; continuing from step 2" in said
    assert_same(run, expected, metrics=True)
    files = finished(run)[-1].files
    assert files.list() == ["damaged-step-00000004", "damaged-step-00000006", *names_of(run)]
    assert steps_of(run) == [2, 4, 6] and files.list("damaged-step-00000006") == [ROWS, "state.json"]
    damage(run, 2, ROWS, "missing")
    trained(folder, run__resume="auto", train__max_steps=7)
    assert steps_of(run) == [4, 6, 7], "nothing could be published with it"
    assert finished(run)[-1].files.list()[:1] == ["damaged-step-00000002"], "in the place of those before"


def test_if_all_are_damaged_the_newest_is_named(places: Places, tmp_path: Path) -> None:
    runs = Runs(places, tmp_path)
    run = runs.train("a", train__max_steps=4)
    for step in (2, 4):
        damage(run, step, "state.json", "cut")
    before = files_below(run)
    reason = re.compile(r"step-00000004/state\.json")
    with raises(DamagedCheckpointError, Problem.CHECKPOINT_FILE_BAD, reason=reason):
        runs.train("a", run__resume="auto")
    assert files_below(run) == before, "nothing was touched"


def test_all_ranks_take_the_same_one(run: RunPath, tmp_path: Path) -> None:
    """One rank alone finds the damage, in the file that it reads; whichever that is."""
    rows, dense = [f"rows-0000{rank}-of-00002.safetensors" for rank in (0, 1)], "dense.safetensors"
    damages = [*((rows[1], how) for how in ("-1", "cut", "head", "names")), (rows[0], "missing"), (dense, "head")]
    damages += [("state.json", "cut"), ("state.json", "missing")]
    steps = range(50, 51 + len(damages))
    for step in steps:
        save(run, step, float(step), size=2, keep=99)
    for step, (name, how) in zip(steps[1:], damages, strict=True):
        damage(run, step, name, how)

    def resume(comm: Comm, resume: str = "auto") -> tuple[Trained, list[SkippedCheckpoint]]:
        config = load_config(settings=[f"run.dir={run.parent}", "run.name=a", f"run.resume={resume}"])

        def load(resumed: Resumed | None, skipped: list[SkippedCheckpoint]) -> tuple[Trained, list[SkippedCheckpoint]]:
            trained = Trained(comm.rank, comm.size)
            checkpoint.load(comm, *resumed, trained, str(tmp_path / "cache"))
            return trained, skipped

        return continued(comm, config, run, load)

    for size in (1, 2, 3):
        for trained, skipped in on_ranks(size, resume):
            assert [each.checkpoint.name for each in skipped] == [f"step-{step:08}" for step in steps[:0:-1]]
            for each, (name, _) in zip(skipped[::-1], damages, strict=True):
                assert name in each.why
            assert float(trained.dense["layer.weight"][0, 0]) == steps[0]
            assert {int(each[0]) for each in trained.rows.values()} <= set(range(steps[0], steps[0] + 8))
    for step, (name, _) in zip(steps[1:], damages, strict=True):
        raised = on_ranks(2, partial(resume, resume=str(step)))
        assert DamagedCheckpointError in {type(each) for each in raised} <= {DamagedCheckpointError, RemoteRankError}
        assert all(f"{of_step(run, step)}/{name}" in str(each) for each in raised)
    CheckpointPlace(run).claim([each.checkpoint for each in on_ranks(1, resume)[0][1]])
    assert steps_of(run) == [50]
