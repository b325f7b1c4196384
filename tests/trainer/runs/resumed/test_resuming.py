"""A newest checkpoint whose files are not those written: the run continues from the one before it, exactly."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from featurestore.published.paths import FarPath, RunPath, run_path
from featurestore.published.versions import PublishedFiles, open_published
from featurestore.storage.storage import Storage
from tests.trainer.runs import saved
from tests.trainer.runs.resumed.test_resume import Runs, assert_same, content, names, steps_of
from tests.trainer.runs.resumed.test_runs_on_s3 import assert_same as assert_same_far
from tests.trainer.runs.saved import Trained, flip_bit, on_ranks, state_at
from trainer.comm import Comm, SoloComm
from trainer.config.config import load_config
from trainer.errors import DamagedCheckpointError, RemoteRankError
from trainer.main import train
from trainer.runs import checkpoint
from trainer.runs.checkpoint import PassedOver, Resumed, continued
from trainer.runs.folder import finished, place
from trainer.runs.places import place_of

Places = Any
ROWS = "rows-00000-of-00001.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def damage_far(checkpoints: FarPath, step: int, name: str, how: str) -> None:
    """Damage a file of a checkpoint where it lies in the bucket."""
    newest = open_published(checkpoints.url)
    assert isinstance(newest, PublishedFiles)
    storage, file = Storage(checkpoints.url), newest.published.files[f"step-{step:08}/{name}"].path
    data = storage.read_bytes(file)
    if how == "missing":
        storage.delete_files([file])
    else:
        storage.write_bytes(file, damaged(data, how))


def damaged(data: bytes, how: str) -> bytes:
    return {"cut": data[:-5], "head": b"\xff" * 16 + data[16:], "names": data.replace(b'"item/', b'"itex/')}[how]


@pytest.mark.long
def test_a_run_goes_on_from_the_newest_whole_one(
    places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(places, tmp_path)
    expected = runs.train("a")
    run = Path(shutil.copytree(expected, tmp_path / "b"))
    flip_bit(runs.step("b", 6) / ROWS, -1)
    (runs.step("b", 4) / "state.json").unlink()
    before = content(run)
    with pytest.raises(DamagedCheckpointError, match=rf"step-00000006/{ROWS} is damaged: .*; take another checkpoint"):
        runs.train("b", run__resume=6)
    state = runs.step("b", 2) / "state.json"
    whole = state.read_bytes()
    state.write_bytes(whole[:-20])
    with pytest.raises(DamagedCheckpointError, match=rf"step-00000006/{ROWS} is damaged"):
        runs.train("b", run__resume="auto")
    state.write_bytes(whole)
    assert content(run) == before, "nothing was touched"
    capsys.readouterr()
    runs.train("b", run__resume="auto")
    said = " ".join(capsys.readouterr().out.split())
    for step, why in ((6, f"{ROWS} is damaged: its digest is not the one in state.json"), (4, "No such file")):
        name = f"step-{step:08}"
        assert f"warning: {name} is passed over, and kept as damaged-{name} in {run}/checkpoints: " in said
        assert why in said
    assert said.count("continuing from step 2") == 2
    assert_same(run, expected)
    assert names(run) == steps_of(2, 4, 6)
    kept = {path.name for path in (run / "checkpoints").glob("damaged-*")}
    assert kept == {"damaged-step-00000004", "damaged-step-00000006"}
    (runs.step("b", 6) / "dense.safetensors").unlink()
    runs.train("b", run__resume="latest")
    assert [path.name for path in (run / "checkpoints").glob("damaged-*")] == ["damaged-step-00000006"]
    assert_same(run, expected)


@pytest.mark.long
def test_so_does_a_run_on_s3(places: Places, s3_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def trained(folder: object, **changes: Any) -> RunPath:
        steps = {"train__max_steps": 6, "train__checkpoint_every": 2, "train__keep_checkpoints": 5}
        settings = places.settings(run__dir=folder, run__name="a", **{**steps, **changes})
        train(load_config(settings=settings), SoloComm())
        return run_path(str(folder)) / "a"

    expected, run = trained(tmp_path), trained(s3_url)
    checkpoints = run / "checkpoints"
    assert isinstance(checkpoints, FarPath)
    damage_far(checkpoints, 6, "dense.safetensors", "missing")
    damage_far(checkpoints, 4, ROWS, "cut")
    capsys.readouterr()
    trained(s3_url, run__resume="auto")
    said = " ".join(capsys.readouterr().out.split())
    assert "step-00000006/dense.safetensors is missing; continuing from step 2" in said
    assert f"step-00000004/{ROWS} is damaged: its digest is not the one in state.json; continuing from step 2" in said
    assert_same_far(run, expected)
    assert [path.name for path in finished(checkpoints)] == steps_of(2, 4, 6)
    assert (checkpoints / "damaged-step-00000004" / ROWS).is_file()
    assert {path.name for path in (checkpoints / "damaged-step-00000006").iterdir()} == {ROWS, "state.json"}
    damage_far(checkpoints, 2, ROWS, "missing")
    trained(s3_url, run__resume="auto", train__max_steps=7)
    assert [path.name for path in finished(checkpoints)] == steps_of(4, 6, 7), "nothing could be published beside it"


@pytest.mark.parametrize("place_for", ["disk", "s3"])
def test_all_ranks_take_the_same_one(place_for: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """One rank alone finds the damage, in the file that it reads; whichever that is."""
    far = f"{request.getfixturevalue('s3_url')}/runs" if place_for == "s3" else None
    run = run_path(far or str(tmp_path)) / "a"
    checkpoints = run / "checkpoints"
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
        on_ranks(2, lambda comm, step=step: saved.save(comm, checkpoints, _of(comm, step), state_at(step), 99))
    damage_of = _damage_of(checkpoints)
    for step, (name, how) in zip(steps[1:], damages, strict=True):
        damage_of(step, name, how)

    def open_at(comm: Comm, resumed: Resumed | None, passed_over: list[PassedOver]) -> tuple[Trained, list[PassedOver]]:
        assert resumed is not None
        trained = Trained(comm.rank, comm.size)
        checkpoint.load(comm, *resumed, trained, str(tmp_path / "cache"))
        return trained, passed_over

    def resume(comm: Comm, *, reading: bool = False) -> tuple[Trained, list[PassedOver]]:
        config = load_config(settings=[f"run.dir={run.parent}", "run.name=a", "run.resume=auto"])
        return continued(comm, config, run, lambda *chosen: open_at(comm, *chosen), reading=reading)

    for size in (1, 2, 3):
        for trained, passed_over in on_ranks(size, resume):
            assert [path.path.name for path in passed_over] == [f"step-{step:08}" for step in steps[:0:-1]]
            for path, (name, how) in zip(passed_over[::-1], damages, strict=True):
                assert ("it lacks item/" if far and how == "names" else name) in path.why
            assert float(trained.dense["layer.weight"][0, 0]) == steps[0]
            assert {int(rows[0]) for rows in trained.rows.values()} <= set(range(steps[0], steps[0] + 8))
    raised = on_ranks(2, lambda comm: resume(comm, reading=True))
    assert {type(each) for each in raised} <= {DamagedCheckpointError, RemoteRankError}
    assert all("step-00000057/state.json" in str(each) for each in raised)
    place_of(checkpoints).claim([each.path for each in on_ranks(1, resume)[0][1]])
    assert [path.name for path in finished(checkpoints)] == ["step-00000050"]


def _of(comm: Comm, step: int) -> Trained:
    return Trained(comm.rank, 2, float(step))


def _damage_of(checkpoints: RunPath) -> Callable[[int, str, str], None]:
    if isinstance(checkpoints, FarPath):
        return lambda *what: damage_far(checkpoints, *what)

    def damage(step: int, name: str, how: str) -> None:
        file = place(checkpoints, step) / name
        data = file.read_bytes()
        if how == "missing":
            file.unlink()
        else:
            file.write_bytes(damaged(data, how))

    return damage
