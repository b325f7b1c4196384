"""Checkpoints on S3: each is a commit, whatever dies, is lost or comes in between; readers keep the one they have."""

import signal
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from featurestore.errors import StorageError
from featurestore.published.paths import FarPath, run_path
from featurestore.storage.storage import Storage
from tests.faulty import FaultyStorage, fails, made_but_lost, while_set
from tests.fuse import FORK, Fuse
from tests.trainer.checkpoints import files_of
from tests.trainer.runs import saved
from tests.trainer.runs.saved import SHARDS, Trained, on_ranks, state_at
from trainer.comm import Comm, SoloComm
from trainer.errors import CheckpointError
from trainer.runs import checkpoint
from trainer.runs.folder import Checkpoint, find_checkpoint, finished
from trainer.runs.saving import CheckpointPlace


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(s3_url: str) -> FarPath:
    found = run_path(f"{s3_url}/runs/a")
    assert isinstance(found, FarPath)
    return found


def save(place: CheckpointPlace | FarPath, step: int, value: float = 1.0, size: int = 1, keep: int = 3) -> None:
    done = on_ranks(size, lambda comm: saved.save(comm, place, Trained(comm.rank, size, value), state_at(step), keep))
    for each in done:
        if isinstance(each, Exception):
            raise each


def values(path: Checkpoint, size: int = 1) -> set[float]:
    """What a checkpoint holds, read by so many ranks: one value, if it is whole."""

    def load(comm: Comm) -> Trained:
        trained = Trained(comm.rank, size)
        checkpoint.load(comm, path, checkpoint.read_state(path), trained)
        return trained

    loaded = on_ranks(size, load)
    rows = {name: tensor for trained in loaded for name, tensor in trained.rows.items()}
    assert len(rows) == SHARDS
    dense = {float(each) for trained in loaded for each in trained.dense["layer.weight"].flatten()}
    return dense | {float(each) - int(name[5:9]) for name, tensor in rows.items() for each in tensor}


def steps(folder: FarPath) -> list[int]:
    return [each.step for each in finished(folder)]


def test_a_rank_copies_only_the_parts_with_its_rows(folder: FarPath, monkeypatch: pytest.MonkeyPatch) -> None:
    save(CheckpointPlace(folder), 50, size=2)
    copied, local_copy = [], checkpoint.local_copy

    def noted(path: Checkpoint, name: str, *given: Any) -> Any:
        copied.append(name)
        return local_copy(path, name, *given)

    monkeypatch.setattr(checkpoint, "local_copy", noted)
    assert values(finished(folder)[0], 2) == {1.0}
    rows = sorted(name for name in copied if name.startswith("rows"))
    assert rows == ["rows-00000-of-00002.safetensors", "rows-00001-of-00002.safetensors"]


def test_killed_at_every_write_there_is_the_old_one_or_the_new(folder: FarPath, tmp_path: Path) -> None:
    save(CheckpointPlace(folder), 1, 1.0)
    expected, at, killed = [1], 1, 0
    while True:
        step, fuse = expected[-1] + 1, Fuse(at, tmp_path / "trace")

        def writer(fuse: Fuse = fuse, step: int = step) -> None:
            torch.set_num_threads(1)
            fuse.watch_s3({"put_object", "delete_object", "delete_objects"})
            saved.save(SoloComm(), CheckpointPlace(folder), Trained(value=float(step)), state_at(step), 2)

        process = FORK.Process(target=writer)
        process.start()
        process.join()
        found = finished(folder)
        assert steps(folder) in (expected, [*expected, step][-2:])
        assert [values(each) for each in found] == [{float(number)} for number in steps(folder)]
        expected = steps(folder)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed, at = killed + 1, at + 1
    assert killed >= 10, "before and after three parts, the version and the clock's probe"


class TestTwoWriters:
    def test_the_one_that_began_last_goes_on(self, folder: FarPath) -> None:
        first, second = CheckpointPlace(folder), CheckpointPlace(folder)
        first.claim()
        save(first, 50, 1.0)
        second.claim()
        with pytest.raises(CheckpointError, match=r"written to by another start of this run, .*start one alone"):
            save(first, 60, 1.0)
        assert steps(folder) == [50]
        save(second, 60, 2.0)
        with pytest.raises(CheckpointError, match="another start"):
            save(first, 70, 1.0)
        assert steps(folder) == [50, 60] and values(finished(folder)[-1]) == {2.0}

    def test_of_two_that_begin_at_once_one_is_refused(self, folder: FarPath) -> None:
        first, second = CheckpointPlace(folder), CheckpointPlace(folder)
        for place in (first, second):
            assert not place.has(50)
        first.remove([first.at(50)])
        with pytest.raises(CheckpointError, match="another start"):
            second.remove([second.at(50)])


class TestLostAnswers:
    def test_one_that_was_made_counts_as_made(self, folder: FarPath) -> None:
        lost = Event()
        place = CheckpointPlace(
            folder,
            FaultyStorage(Storage(f"{folder.url}/checkpoints"), {"create_or_read": while_set(lost, made_but_lost)}),
        )
        save(place, 50, 1.0)
        lost.set()
        with pytest.raises(CheckpointError, match="connection reset"):
            save(place, 60, 2.0)
        lost.clear()
        assert steps(folder) == [50, 60], "nobody said so"
        save(place, 70, 3.0)
        assert values(finished(folder)[-1]) == {3.0}

    def test_but_not_where_another_start_came_after_it(self, folder: FarPath) -> None:
        lost = Event()
        lost.set()
        place = CheckpointPlace(
            folder,
            FaultyStorage(Storage(f"{folder.url}/checkpoints"), {"create_or_read": while_set(lost, made_but_lost)}),
        )
        with pytest.raises(CheckpointError, match="connection reset"):
            save(place, 60, 2.0)
        lost.clear()
        CheckpointPlace(folder).claim()
        with pytest.raises(CheckpointError, match="another start"):
            save(place, 70, 3.0)


@pytest.mark.parametrize("call", ["write_bytes", "create_or_read"])
def test_what_cannot_be_written_leaves_no_checkpoint(folder: FarPath, call: str) -> None:
    away = Event()
    place = CheckpointPlace(
        folder, FaultyStorage(Storage(f"{folder.url}/checkpoints"), {call: while_set(away, fails("S3 is away"))})
    )
    save(place, 50)
    away.set()
    with pytest.raises(CheckpointError, match=r"cannot write s3://.*step-00000060: S3 is away"):
        save(place, 60)
    assert steps(folder) == [50]
    away.clear()
    save(place, 70)
    assert steps(folder) == [50, 70]


class TestReaders:
    def test_a_removed_one_is_read_to_its_end(self, folder: FarPath) -> None:
        place = CheckpointPlace(folder)
        save(place, 50, 5.0)
        held = find_checkpoint(folder)
        for step in (60, 70, 80):
            save(place, step, keep=1)
        assert steps(folder) == [80]
        assert values(held) == {5.0}

    def test_after_the_grace_it_is_gone(self, folder: FarPath, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("trainer.runs.saving.KEEP_REMOVED_S", -5.0)
        monkeypatch.setattr("trainer.runs.saving.EXPIRE_EVERY_S", 0.0)
        place = CheckpointPlace(folder)
        for step in (50, 60, 70):
            save(place, step, keep=1)
        assert len(files_of(folder)) == 3, "of one checkpoint: state, dense, rows"
        assert values(finished(folder)[0]) == {1.0}


def test_the_newest_and_the_best_are_kept(folder: FarPath) -> None:
    place = CheckpointPlace(folder)
    for step in (10, 20, 30, 40):
        saved.save(SoloComm(), place, Trained(), state_at(step), 2, best=10)
    assert steps(folder) == [10, 30, 40]
    assert place.has(10) and not place.has(20)
    place.remove([each for each in finished(folder) if each.step != 10])
    assert steps(folder) == [10]


def test_wrong_credentials_are_one_error(folder: FarPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    place = CheckpointPlace(folder)
    with pytest.raises(CheckpointError, match=r"cannot write s3://.*are the credentials right"):
        save(place, 50)
    with pytest.raises(StorageError, match="are the credentials right"):
        place.claim()
