"""Checkpoints: whole or absent, readable at another number of ranks, refused when damaged or of another run."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.runs import saved
from tests.trainer.runs.saved import SHARDS, Trained, flip_bit, on_ranks, origin_of, state_at
from trainer.comm import Comm, SoloComm
from trainer.errors import CheckpointError, DamagedCheckpointError, RemoteRankError
from trainer.runs import checkpoint
from trainer.runs.folder import find_checkpoint, finished
from trainer.runs.places import WrittenPart


def _save(folder: Path, step: int = 50, value: float = 1.0, size: int = 1, keep: int = 3) -> Path:
    (path, *others) = on_ranks(
        size, lambda comm: saved.save(comm, folder, Trained(comm.rank, size, value), state_at(step), keep)
    )
    assert isinstance(path, Path), path
    assert {path, *others} == {folder / f"step-{step:08}"}
    return path


def test_layout(tmp_path: Path) -> None:
    path = _save(tmp_path, size=2)
    assert sorted(each.name for each in path.iterdir()) == [
        "dense.safetensors",
        "rows-00000-of-00002.safetensors",
        "rows-00001-of-00002.safetensors",
        "state.json",
    ]
    state = checkpoint.read_state(path)
    assert state.model_dump(exclude={"files"}) == state_at(50).model_dump(exclude={"files"})
    assert (state.position.epoch, state.position.step) == (1, 10)
    assert set(state.files) == {each.name for each in path.iterdir()} - {"state.json"}


@pytest.mark.parametrize(("written", "read"), [(1, 1), (2, 1), (1, 2), (2, 3), (3, 2)])
def test_loads_at_any_number_of_ranks(tmp_path: Path, written: int, read: int) -> None:
    path = _save(tmp_path, size=written, value=7.0)

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


def test_failed_save_leaves_no_checkpoint_and_all_ranks_raise(tmp_path: Path) -> None:
    _save(tmp_path, step=40, size=2)
    raised = on_ranks(
        2, lambda comm: saved.save(comm, tmp_path, Trained(comm.rank, 2, fail=comm.rank == 1), state_at(50), 3)
    )
    assert [type(each) for each in raised] == [CheckpointError] * 2
    assert all("No space left" in str(each) for each in raised)
    assert finished(tmp_path)[-1].name == "step-00000040"
    assert (tmp_path / ".step-00000050").exists()
    assert _save(tmp_path, step=60, size=2) == finished(tmp_path)[-1]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["step-00000040", "step-00000060"]


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


def test_newest_are_kept_and_order_is_by_number(tmp_path: Path) -> None:
    for step in (70, 99_999_999, 100_000_000, 50):
        _save(tmp_path, step=step, keep=2)
    assert finished(tmp_path)[-1].name == "step-100000000"
    assert {each.name for each in tmp_path.iterdir()} == {"step-99999999", "step-100000000"}


def test_same_step_is_written_once(tmp_path: Path) -> None:
    _save(tmp_path, value=1.0)
    _save(tmp_path, value=2.0)
    trained = Trained()
    path = finished(tmp_path)[-1]
    checkpoint.load(SoloComm(), path, checkpoint.read_state(path), trained)
    assert trained.dense["layer.weight"][0, 0] == 1.0


@pytest.mark.parametrize(
    "name", ["dense.safetensors", "rows-00000-of-00002.safetensors", "rows-00001-of-00002.safetensors"]
)
@pytest.mark.parametrize("damage", ["first", "last", "truncated", "missing"])
def test_damaged_files_are_named(tmp_path: Path, name: str, damage: str) -> None:
    path = _save(tmp_path, size=2)
    file = path / name
    match damage:
        case "first":
            flip_bit(file, 3)
        case "last":
            flip_bit(file, -1)
        case "truncated":
            file.write_bytes(file.read_bytes()[:-5])
        case "missing":
            file.unlink()
    raised = on_ranks(2, lambda comm: checkpoint.load(comm, path, checkpoint.read_state(path), Trained(comm.rank, 2)))
    assert {type(each) for each in raised} == {DamagedCheckpointError, RemoteRankError}
    assert all(str(file) in str(each) for each in raised)


def test_damaged_state_is_named(tmp_path: Path) -> None:
    file = _save(tmp_path) / "state.json"
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
            checkpoint.read_state(file.parent)
    file.write_text(content)
    newer = checkpoint.read_state(file.parent).model_copy(update={"format_version": 99})
    file.write_bytes(checkpoint.state_bytes(newer, {}))
    with pytest.raises(CheckpointError, match="has format 99"):
        checkpoint.read_state(file.parent)


def test_no_file_outside_of_its_folder_is_one_of_a_checkpoint(tmp_path: Path) -> None:
    path = _save(tmp_path)
    state = checkpoint.read_state(path)
    for name in ("../x", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0", "a" * 300):
        (path / "state.json").write_bytes(checkpoint.state_bytes(state, {name: WrittenPart("0")}))
        with pytest.raises(DamagedCheckpointError, match=r"state\.json is damaged: files"):
            checkpoint.read_state(path)


def test_what_a_name_means(tmp_path: Path) -> None:
    """The same for run.resume, run.warm_start and --checkpoint."""
    folder, other = tmp_path / "run" / "checkpoints", _save(tmp_path / "other" / "checkpoints")
    for leftover in ("none", ".step-00000099"):
        (folder / leftover).mkdir(parents=True)
        with pytest.raises(CheckpointError, match=r"run\.resume=latest: .*/run has no checkpoint in"):
            find_checkpoint(tmp_path / "run", "latest", "run.resume=")
    first, last = _save(folder, step=50), _save(folder, step=60)
    assert [find_checkpoint(tmp_path / "run", name) for name in (None, "latest", "60")] == [last] * 3
    assert [find_checkpoint(tmp_path / "run", name) for name in ("50", "step-00000050", str(first))] == [first] * 3
    assert find_checkpoint(tmp_path / "run", str(other)) == other
    for name in ("7", str(tmp_path)):
        with pytest.raises(CheckpointError, match=rf"--checkpoint {name}: no such checkpoint; .* has step-00000050, s"):
            find_checkpoint(tmp_path / "run", name)


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
    state = checkpoint.read_state(_save(tmp_path))
    origin_of().check_same(state.origin, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        origin_of(**changes).check_same(state.origin, tmp_path)
    assert message in str(caught.value)
