"""Checkpoints: whole or absent, read at any number of ranks, refused when damaged or of another run; a run's folder."""

import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from featurestore.published.paths import RunPath
from featurestore.published.versions import PublishedFile
from tests.trainer.checkpoints import damage, files_of
from tests.trainer.runs import saved
from tests.trainer.runs.saved import SHARDS, Trained, on_ranks, origin_of, state_at
from tests.trainer.whole_runs import run_alone
from trainer.comm import Comm, SoloComm
from trainer.errors import CheckpointError, ConfigError, DamagedCheckpointError, RemoteRankError
from trainer.runs import checkpoint
from trainer.runs.folder import Checkpoint, find_checkpoint, finished
from trainer.runs.saved import open_trained, read_run
from trainer.runs.saving import CheckpointPlace, WrittenPart, state_bytes


def _save(run: RunPath, step: int = 50, value: float = 1.0, size: int = 1, keep: int = 3) -> Checkpoint:
    done = on_ranks(size, lambda comm: saved.save(comm, run, Trained(comm.rank, size, value), state_at(step), keep))
    assert {*done} == {f"{run}/checkpoints/step-{step:08}"}, done
    return next(each for each in finished(run) if each.step == step)


def test_layout(run: RunPath) -> None:
    path = _save(run, size=2)
    parts = ["dense.safetensors", "rows-00000-of-00002.safetensors", "rows-00001-of-00002.safetensors", "state.json"]
    assert path.files.list("step-00000050") == parts
    assert files_of(run) == [f"step-00000050-{name}" for name in parts], "which people look at"
    state = checkpoint.read_state(path)
    assert state.model_dump(exclude={"files"}) == state_at(50).model_dump(exclude={"files"})
    assert (state.position.epoch, state.position.step) == (1, 10)
    assert sorted(state.files) == parts[:-1]


@pytest.mark.parametrize(
    ("run", "written", "read"),
    [*(("disk", *ranks) for ranks in ((1, 1), (2, 1), (1, 2), (2, 3), (3, 2))), ("s3", 2, 3)],
    indirect=["run"],
)
def test_loads_at_any_number_of_ranks(run: RunPath, written: int, read: int) -> None:
    path = _save(run, size=written, value=7.0)

    def load(comm: Comm) -> Trained:
        trained = Trained(comm.rank, read)
        checkpoint.load(comm, path, checkpoint.read_state(path), trained)
        return trained

    loaded = on_ranks(read, load)
    rows = {name: tensor for trained in loaded for name, tensor in trained.rows.items()}
    assert {name: tensor.tolist() for name, tensor in rows.items()} == {
        f"item/{s:04}/weight": [7.0 + s] * 2 for s in range(SHARDS)
    }
    assert all((trained.dense["layer.weight"] == 7.0).all() for trained in loaded)


def test_disk_that_takes_no_more_is_a_checkpoint_error(tmp_path: Path) -> None:
    trained = Trained()
    trained.dense = {"layer.weight": torch.zeros(1_000, 100)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*step-00000050: .*File too large"):
            saved.save(SoloComm(), tmp_path, trained, state_at(50), 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert finished(tmp_path) == []


def test_same_step_is_written_once(run: RunPath) -> None:
    _save(run, value=1.0)
    path, trained = _save(run, value=2.0), Trained()
    checkpoint.load(SoloComm(), path, checkpoint.read_state(path), trained)
    assert trained.dense["layer.weight"][0, 0] == 1.0


PARTS = ("dense.safetensors", "rows-00000-of-00002.safetensors", "rows-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    ("run", "name", "how"),
    [
        *(("disk", name, how) for name in PARTS for how in ("3", "-1", "cut", "missing")),
        *(("s3", PARTS[1], how) for how in ("-1", "missing")),
    ],
    indirect=["run"],
)
def test_damaged_files_are_named(run: RunPath, name: str, how: str) -> None:
    path = _save(run, size=2)
    damage(run, 50, name, how)
    raised = on_ranks(2, lambda comm: checkpoint.load(comm, path, checkpoint.read_state(path), Trained(comm.rank, 2)))
    assert DamagedCheckpointError in {type(each) for each in raised} <= {DamagedCheckpointError, RemoteRankError}
    assert all(f"{path}/{name}" in str(each) for each in raised)


def test_damaged_state_is_named(tmp_path: Path) -> None:
    path = _save(tmp_path)
    file = Path(path.path("state.json"))
    content = file.read_text()
    for damaged in (
        content[:-20],
        content.replace('"step": 50', '"step": 51'),
        "[]",
        "{}",
        content.replace("{", "", 1),
    ):
        file.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
            checkpoint.read_state(path)
    file.write_text(content)
    newer = checkpoint.read_state(path).model_copy(update={"format_version": 99})
    file.write_bytes(state_bytes(newer, {}))
    with pytest.raises(CheckpointError, match="has format 99"):
        checkpoint.read_state(path)


def test_no_file_outside_of_its_folder_is_one_of_a_checkpoint(tmp_path: Path) -> None:
    path = _save(tmp_path)
    state, part = checkpoint.read_state(path), WrittenPart("0", PublishedFile(path="files/x", size_bytes=1))
    for name in ("../x", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0", "a" * 300):
        Path(path.path("state.json")).write_bytes(state_bytes(state, {name: part}))
        with pytest.raises(DamagedCheckpointError, match=r"state\.json is damaged: files"):
            checkpoint.read_state(path)


def test_what_a_name_means(run: RunPath) -> None:
    """The same for run.resume, run.warm_start and --checkpoint."""
    other = _save(run.parent / "other")
    with pytest.raises(CheckpointError, match=r"run\.resume=latest: .*/a has no checkpoint in"):
        find_checkpoint(run, "latest", "run.resume=")
    first, last = _save(run, step=50), _save(run, step=60)
    assert [find_checkpoint(run, name) for name in (None, "latest", "60")] == [last] * 3
    assert [find_checkpoint(run, name) for name in ("50", "step-00000050", str(first))] == [first] * 3
    assert find_checkpoint(run, str(other)) == other
    for name in ("7", "step-7", str(run), f"{run}/step-00000050"):
        with pytest.raises(CheckpointError, match=rf"--checkpoint {name}: no such checkpoint; .* has step-00000050, s"):
            find_checkpoint(run, name)


def test_one_whose_file_somebody_removed_is_no_more_named(run: RunPath) -> None:
    place = CheckpointPlace(run)
    for step in (50, 60):
        saved.save(SoloComm(), place, Trained(), state_at(step), 5)
    damage(run, 50, "dense.safetensors", "missing")
    saved.save(SoloComm(), place, Trained(), state_at(70), 5)
    assert [each.step for each in finished(run)] == [60, 70]


def test_a_copied_run_has_its_checkpoints(tmp_path: Path) -> None:
    _save(tmp_path / "a", value=3.0)
    (path,) = finished(Path(shutil.copytree(tmp_path / "a", tmp_path / "b")))
    shutil.rmtree(tmp_path / "a")
    checkpoint.load(SoloComm(), path, checkpoint.read_state(path), trained := Trained())
    assert trained.dense["layer.weight"][0, 0] == 3.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"global_batch_size": 8}}, "data.global_batch_size is 8 here, 16 in the checkpoint"),
        ({"model": {"mlp": [100]}}, "model.mlp is [100] here, [200, 80] in the checkpoint"),
        ({"model": {"fields": {}}}, "model.fields.user.kind is None here, 'id' in the checkpoint"),
        (
            {"stores": {"images": {"dim": 8, "extractor": {"backbone": "vgg16", "weights_digest": "x"}}}},
            "stores.images.extractor.weights_digest is 'x' here",
        ),
    ],
)
def test_checkpoint_of_another_run_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = _save(tmp_path)
    state = checkpoint.read_state(path)
    origin_of().check_same(state.origin, path)
    with pytest.raises(CheckpointError) as caught:
        origin_of(**changes).check_same(state.origin, path)
    assert message in str(caught.value)


Places = Any


@pytest.fixture(scope="module")
def three_steps(make_places: Callable[[Path], Places], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps, each of which left a checkpoint."""
    places = make_places(tmp_path_factory.mktemp("trained"))
    return run_alone(places, run__name="a", train__max_steps=3, train__checkpoint_every=1)


@pytest.fixture
def copy(three_steps: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(three_steps, tmp_path / "a")


def test_a_folder_of_runs_is_not_a_run(three_steps: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run's folder: .*; it holds the runs a"):
        read_run(three_steps.parent)


@pytest.mark.parametrize(
    ("trained_with", "opened_with"), [("error", "zeros"), ("zeros", "zeros"), ("learned", "learned")]
)
def test_images_without_a_feature_stop_nothing(copy: Path, trained_with: str, opened_with: str) -> None:
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("missing: learned", f"missing: {trained_with}"))
    saved = read_run(copy)
    assert (saved.missing_in_training, saved.config.data.missing) == (trained_with, opened_with)
    assert [bool(saved.notes_on_missing(count)) for count in (0, 3)] == [False, True]  # it met none
    report = (copy / "report.json").read_text()
    (copy / "report.json").write_text(report.replace('"missing_lookups": 0', '"missing_lookups": 4'))
    assert bool(read_run(copy).notes_on_missing(3)) == (trained_with == "error")


def test_a_configuration_that_is_not_the_checkpoints_is_refused(copy: Path) -> None:
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("visual_width: 12", "visual_width: 13"))
    with pytest.raises(CheckpointError, match=r"model\.visual_width is 13 here, 12 in the checkpoint"):
        open_trained(copy, SoloComm())
