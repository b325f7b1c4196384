"""A newest checkpoint whose files are not those written: the run continues from the one before it, exactly."""

from pathlib import Path
from typing import Any

import pytest

from featurestore.published.paths import RunPath, run_path
from tests.trainer.checkpoints import damage, names_of, steps_of
from tests.trainer.runs import saved
from tests.trainer.runs.resumed.test_resume import Runs, content
from tests.trainer.runs.saved import Trained, on_ranks, state_at
from tests.trainer.whole_runs import assert_same
from trainer.comm import Comm, SoloComm
from trainer.config.config import load_config
from trainer.errors import DamagedCheckpointError, RemoteRankError
from trainer.main import train
from trainer.runs import checkpoint
from trainer.runs.checkpoint import PassedOver, Resumed, continued
from trainer.runs.folder import finished
from trainer.runs.saving import CheckpointPlace

Places = Any
ROWS = "rows-00000-of-00001.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunPath:
    """Where runs may be."""
    return tmp_path / "runs" if request.param == "disk" else run_path(f"{request.getfixturevalue('s3_url')}/runs")


@pytest.mark.long
def test_a_run_goes_on_from_the_newest_whole_one(
    places: Places, folder: RunPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained(runs: RunPath, **changes: Any) -> RunPath:
        steps = {"train__max_steps": 6, "train__checkpoint_every": 2, "train__keep_checkpoints": 5}
        settings = places.settings(run__dir=runs, run__name="a", **{**steps, **changes})
        train(load_config(settings=settings), SoloComm())
        return runs / "a"

    expected, run = trained(tmp_path / "expected"), trained(folder)
    damage(run, 6, "dense.safetensors", "missing")
    damage(run, 4, ROWS, "-1")
    before = finished(run)[-1].files.published
    with pytest.raises(DamagedCheckpointError, match=r"step-00000006/dense.safetensors is missing; take another check"):
        trained(folder, run__resume=6)
    assert finished(run)[-1].files.published == before, "nothing was touched"
    capsys.readouterr()
    trained(folder, run__resume="auto")
    said = " ".join(capsys.readouterr().out.split())
    for step, why in ((6, "dense.safetensors is missing"), (4, f"{ROWS} is damaged: its digest is not the one in s")):
        name = f"step-{step:08}"
        assert f"warning: {name} is passed over, and kept as damaged-{name} in {run}/checkpoints: " in said
        assert f"{name}/{why}" in said
    assert said.count("continuing from step 2") == 2
    assert_same(run, expected, metrics=True)
    files = finished(run)[-1].files
    assert files.list() == ["damaged-step-00000004", "damaged-step-00000006", *names_of(run)]
    assert steps_of(run) == [2, 4, 6] and files.list("damaged-step-00000006") == [ROWS, "state.json"]
    damage(run, 2, ROWS, "missing")
    trained(folder, run__resume="auto", train__max_steps=7)
    assert steps_of(run) == [4, 6, 7], "nothing could be published with it"
    assert finished(run)[-1].files.list()[:1] == ["damaged-step-00000002"], "in the place of those before"


@pytest.mark.long
def test_if_all_are_damaged_the_newest_is_named(places: Places, tmp_path: Path) -> None:
    runs = Runs(places, tmp_path)
    run = runs.train("a", train__max_steps=4)
    for step in (2, 4):
        damage(run, step, "state.json", "cut")
    before = content(run)
    with pytest.raises(DamagedCheckpointError, match=r"step-00000004/state\.json is damaged"):
        runs.train("a", run__resume="auto")
    assert content(run) == before, "nothing was touched"


def test_all_ranks_take_the_same_one(folder: RunPath, tmp_path: Path) -> None:
    """One rank alone finds the damage, in the file that it reads; whichever that is."""
    run = folder / "a"
    damages: list[tuple[str, str]] = [
        ("rows-00001-of-00002.safetensors", "cut"),
        ("rows-00001-of-00002.safetensors", "head"),
        ("rows-00001-of-00002.safetensors", "names"),
        ("rows-00000-of-00002.safetensors", "missing"),
        ("dense.safetensors", "head"),
        ("state.json", "cut"),
        ("state.json", "missing"),
    ]
    steps = range(50, 51 + len(damages))
    for step in steps:
        on_ranks(2, lambda comm, step=step: saved.save(comm, run, _of(comm, step), state_at(step), 99))
    for step, (name, how) in zip(steps[1:], damages, strict=True):
        damage(run, step, name, how)

    def open_at(comm: Comm, resumed: Resumed | None, passed_over: list[PassedOver]) -> tuple[Trained, list[PassedOver]]:
        assert resumed is not None
        trained = Trained(comm.rank, comm.size)
        checkpoint.load(comm, *resumed, trained, str(tmp_path / "cache"))
        return trained, passed_over

    def resume(comm: Comm, resume: str = "auto") -> tuple[Trained, list[PassedOver]]:
        config = load_config(settings=[f"run.dir={run.parent}", "run.name=a", f"run.resume={resume}"])
        return continued(comm, config, run, lambda *chosen: open_at(comm, *chosen))

    for size in (1, 2, 3):
        for trained, passed_over in on_ranks(size, resume):
            assert [each.checkpoint.name for each in passed_over] == [f"step-{step:08}" for step in steps[:0:-1]]
            for each, (name, _) in zip(passed_over[::-1], damages, strict=True):
                assert name in each.why
            assert float(trained.dense["layer.weight"][0, 0]) == steps[0]
            assert {int(rows[0]) for rows in trained.rows.values()} <= set(range(steps[0], steps[0] + 8))
    raised = on_ranks(2, lambda comm: resume(comm, "57"))
    assert {type(each) for each in raised} <= {DamagedCheckpointError, RemoteRankError}
    assert all("step-00000057/state.json" in str(each) for each in raised)
    CheckpointPlace(run).claim([each.checkpoint for each in on_ranks(1, resume)[0][1]])
    assert steps_of(run) == [50]


def _of(comm: Comm, step: int) -> Trained:
    return Trained(comm.rank, 2, float(step))
