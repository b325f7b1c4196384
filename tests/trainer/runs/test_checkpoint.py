"""Checkpoints: whole or absent whatever dies, read by any number of ranks, refused when damaged or of another run."""

import io
import itertools
import re
import shutil
import signal
import threading
from pathlib import Path
from threading import Event
from typing import Any
from unittest import mock

import pytest
import torch
import xxhash
from safetensors.torch import load
from safetensors.torch import save as save_tensors

from featurestore.errors import USAGE, StorageError
from featurestore.problems import Problem as StoreProblem
from featurestore.published.paths import RunPath, run_path
from featurestore.published.versions import PublishedFile
from featurestore.storage.storage import Storage
from tests.faulty import Fault, FaultyStorage, fails, made_but_lost, while_set
from tests.fuse import FORK, Fuse
from tests.raised import compare, raises, told
from tests.trainer.checkpoints import damage, differs, files_of, steps_of
from tests.trainer.conftest import make_places
from tests.trainer.runs.saved import SHARDS, Trained, on_ranks, save, state_at
from tests.trainer.whole_runs import run_alone
from trainer.comm import Comm, SoloComm
from trainer.errors import CheckpointError, ConfigError, DamagedCheckpointError, TakenOverError
from trainer.problems import Problem
from trainer.runs import checkpoint, saving
from trainer.runs.folder import Checkpoint, find_checkpoint, finished
from trainer.runs.saved import open_trained, read_run
from trainer.runs.saving import Checkpointer, CheckpointPlace, Outcome, WrittenPart, copied, state_bytes, write_tensors


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


PARTS = ("dense.safetensors", "rows-00000-of-00002.safetensors", "rows-00001-of-00002.safetensors")


def test_layout_of_a_step_that_is_written_once(run: RunPath) -> None:
    path = save(run, size=2)
    assert path.files.list("step-00000050") == [*PARTS, "state.json"]
    assert files_of(run) == [f"step-00000050-{name}" for name in (*PARTS, "state.json")], "which people look at"
    state = checkpoint.read_state(path)
    assert state.model_dump(exclude={"files"}) == state_at(50).model_dump(exclude={"files"})
    assert (state.position.epoch, state.position.step) == (1, 10)
    assert sorted(state.files) == [*PARTS]
    assert values(save(run, value=2.0)) == {1.0}


@pytest.mark.parametrize(
    ("run", "written", "read"),
    [*(("disk", *ranks) for ranks in ((1, 1), (2, 1), (1, 2), (2, 3), (3, 2))), ("s3", 2, 3)],
    indirect=["run"],
)
def test_loads_at_any_number_of_ranks(run: RunPath, written: int, read: int) -> None:
    path = save(run, size=written, value=7.0)
    assert values(path, read) == {7.0}


def test_damaged_state_is_named(tmp_path: Path) -> None:
    path = save(tmp_path)
    file = Path(path.path("state.json"))
    content = file.read_text()
    state, part = checkpoint.read_state(path), WrittenPart("0", PublishedFile(path="files/x", size_bytes=1))
    outside = ("../x", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0", "a" * 300)
    changed = (content[:-20], content.replace('"step": 50', '"step": 51'), "[]", "{}", content.replace("{", "", 1))
    bad, without_dense = Problem.CHECKPOINT_FILE_BAD, {"rows-00000-of-00001.safetensors": part}
    for damaged, problem, values in (
        *((each.encode(), bad, {"reason": re.compile(r"state\.json")}) for each in changed),
        *((state_bytes(state, {name: part}), bad, {"reason": re.compile(r"state\.json.*: files")}) for name in outside),
        (state_bytes(state, without_dense), Problem.CHECKPOINT_FILE_UNLISTED, {"file": "dense.safetensors"}),
    ):
        file.write_bytes(damaged)
        with raises(DamagedCheckpointError, problem, **values) as caught:
            checkpoint.read_state(path)
        assert f"{path}/state.json" in str(caught.value)
    file.write_bytes(state_bytes(state.model_copy(update={"format_version": 99}), {}))
    with raises(CheckpointError, StoreProblem.FORMAT_TOO_NEW, where=f"{path}/state.json", value=99):
        checkpoint.read_state(path)


def test_what_a_name_means(run: RunPath) -> None:
    """The same for run.resume, run.warm_start and --checkpoint."""
    other = save(run.parent / "other")
    asked = {"asked": "run.resume=latest: ", "run": run}
    with raises(CheckpointError, Problem.RUN_WITHOUT_CHECKPOINT, where=run / "checkpoints", **asked):
        find_checkpoint(run, "latest", "run.resume=")
    first, last = save(run, step=50), save(run, step=60)
    assert [find_checkpoint(run, name) for name in (None, "latest", "60")] == [last] * 3
    assert [find_checkpoint(run, name) for name in ("50", "step-00000050", str(first))] == [first] * 3
    assert find_checkpoint(run, str(other)) == other
    for name in ("7", "step-7", str(run), f"{run}/step-00000050"):
        known = "step-00000050, step-00000060"
        with raises(CheckpointError, Problem.NO_SUCH_CHECKPOINT, where="--checkpoint ", value=name, found=known):
            find_checkpoint(run, name)


def test_one_whose_file_somebody_removed_is_no_more_named(run: RunPath) -> None:
    place = CheckpointPlace(run)
    for step in (50, 60):
        save(place, step)
    damage(run, 50, "dense.safetensors", "missing")
    save(place, 70)
    assert [each.step for each in finished(run)] == [60, 70]


def test_a_copied_run_has_its_checkpoints(tmp_path: Path) -> None:
    save(tmp_path / "a", value=3.0)
    (path,) = finished(Path(shutil.copytree(tmp_path / "a", tmp_path / "b")))
    shutil.rmtree(tmp_path / "a")
    assert values(path) == {3.0}


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps, each of which left a checkpoint."""
    places = make_places(tmp_path_factory.mktemp("trained"))
    return run_alone(places, run__name="a", train__max_steps=3, train__checkpoint_every=1)


@pytest.mark.parametrize(
    ("trained_with", "opened_with"), [("error", "zeros"), ("zeros", "zeros"), ("learned", "learned")]
)
def test_missing_images_stop_nothing(three_steps: Path, tmp_path: Path, trained_with: str, opened_with: str) -> None:
    copy = shutil.copytree(three_steps, tmp_path / "a")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("missing: learned", f"missing: {trained_with}"))
    saved = read_run(copy)
    assert (saved.missing_in_training, saved.config.data.missing) == (trained_with, opened_with)
    assert [bool(saved.notes_on_missing(count)) for count in (0, 3)] == [False, True]  # it met none
    report = (copy / "report.json").read_text()
    (copy / "report.json").write_text(report.replace('"missing_lookups": 0', '"missing_lookups": 4'))
    assert bool(read_run(copy).notes_on_missing(3)) == (trained_with == "error")


def test_a_folder_of_runs_and_another_configuration_are_refused(three_steps: Path, tmp_path: Path) -> None:
    hint = re.compile(r"\ba$")  # the runs in it
    with raises(ConfigError, Problem.NOT_A_RUN, where=three_steps.parent, hint=hint):
        read_run(three_steps.parent)
    copy = shutil.copytree(three_steps, tmp_path / "a")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("visual_width: 12", "visual_width: 13"))
    differing = differs("model.visual_width", 13, other=12, there="in the checkpoint")
    with raises(CheckpointError, Problem.CHECKPOINT_OF_OTHER_RUN, where=finished(copy)[-1], differing=differing):
        open_trained(copy, SoloComm())


@pytest.fixture
def folder(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPath:
    """A run on S3."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return run_path(f"{s3_url}/runs/a")


def nothing() -> None:
    """Before a checkpoint is published."""


class Held(CheckpointPlace):
    """A disk that writes a part when it is let go."""

    def __init__(self, run: Path) -> None:
        super().__init__(run)
        self.free = threading.Event()

    def write(self, step: int, name: str, content: Any) -> WrittenPart:
        assert self.free.wait(10)
        return super().write(step, name, content)


@pytest.mark.parametrize("size", [1, 3])
def test_it_is_the_state_at_the_step_that_began_it(tmp_path: Path, size: int) -> None:
    place = Held(tmp_path)

    def work(comm: Comm) -> None:
        trained, saves = Trained(comm.rank, comm.size, 1.0), Checkpointer(comm, place, None, nothing)
        assert saves.begin(trained, state_at(50), 3, None) is None
        assert saves.is_writing and saves.should_poll(51)
        trained.dense["layer.weight"] += 1  # the next step
        for name in trained.rows:
            trained.rows[name] += 1
        assert saves.look(51) == (None, False)
        place.free.set()
        assert saves.wait() == Outcome(50, "")
        assert not saves.is_writing and not saves.should_poll(53)

    assert on_ranks(size, work) == [None] * size
    assert [values(each) for each in finished(tmp_path)] == [{1.0}] and steps_of(tmp_path) == [50]


def test_what_failed_is_told_and_the_next_is_written(tmp_path: Path) -> None:
    """A disk that takes no more of rank 1's part."""

    class Full(CheckpointPlace):
        def write(self, step: int, name: str, content: Any) -> WrittenPart:
            if step == 50 and name.startswith("rows-00001"):
                raise OSError(28, "No space left on device")
            return super().write(step, name, content)

    left: list[set[str]] = []

    def work(comm: Comm) -> list[Outcome | None]:
        saves, outcomes = Checkpointer(comm, Full(tmp_path), None, nothing), []
        for step in (50, 60):
            saves.begin(Trained(comm.rank, comm.size, float(step)), state_at(step), 3, None)
            outcomes.append(saves.wait())
            comm.allgather_object(None)
            left.append({name[:13] for name in files_of(tmp_path)})
            comm.allgather_object(None)
        return outcomes

    told = [Outcome(50, "rank 1: [Errno 28] No space left on device"), Outcome(60, "")]
    assert on_ranks(2, work) == [told, told]
    assert left == [set(), set(), {"step-00000060"}, {"step-00000060"}]
    assert steps_of(tmp_path) == [60]


@pytest.mark.parametrize("kind", [OSError, ValueError])
def test_a_rank_that_cannot_give_its_state_fails_it_on_all(tmp_path: Path, kind: type[Exception]) -> None:
    class Broken(Trained):
        def shard_state(self) -> dict[str, torch.Tensor]:
            raise kind("no state")

    def work(comm: Comm) -> Outcome | None:
        saves = Checkpointer(comm, CheckpointPlace(tmp_path), None, nothing)
        return saves.begin((Broken if comm.rank == 1 else Trained)(comm.rank, 2), state_at(50), 3, None)

    for outcome in on_ranks(2, work):
        assert outcome.step == 50 and "no state" in outcome.error
    assert steps_of(tmp_path) == []


def test_without_memory_for_a_copy_it_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.runs.saving.free_bytes", lambda: 100)
    saves = Checkpointer(SoloComm(), CheckpointPlace(tmp_path), None, nothing)
    monkeypatch.setattr("trainer.runs.saving.copied", None)
    saves.begin(Trained(), state_at(50), 3, None)
    assert "step-00000050-dense.safetensors" in files_of(tmp_path)
    assert saves.wait() == Outcome(50, "")
    assert values(finished(tmp_path)[0]) == {0.0}


def test_an_error_of_a_run_of_one_rank_loses_none_that_was_begun(tmp_path: Path) -> None:
    place = Held(tmp_path)
    saves = Checkpointer(SoloComm(), place, None, nothing)
    saves.begin(Trained(), state_at(50), 3, None)
    threading.Timer(0.2, place.free.set).start()
    saves.close()
    assert steps_of(tmp_path) == [50]


@pytest.mark.parametrize(("step_s", "every_s", "most_looks"), [(0.1, 60.0, 16), (2.0, 60.0, 10), (90.0, 60.0, 1)])
def test_one_is_due_by_the_clock_and_few_steps_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_s: float, every_s: float, most_looks: int
) -> None:
    now_s = 0.0
    monkeypatch.setattr("trainer.runs.saving.time.monotonic", lambda: now_s)
    saves, begun_s, looks = Checkpointer(SoloComm(), CheckpointPlace(tmp_path), every_s, nothing), [0.0], 0
    for step in range(1, int(10 * max(every_s, step_s) / step_s) + 3):
        now_s += step_s
        if saves.should_poll(step):
            looks += 1
            if saves.look(step)[1]:
                begun_s.append(now_s)
                saves.begin(Trained(), state_at(step), 3, None)
                saves.wait()
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(begun_s)]
    assert len(gaps_s) >= 9
    assert all(every_s - step_s <= gap <= max(every_s, step_s) + step_s for gap in gaps_s), gaps_s
    assert looks <= (len(gaps_s) + 1) * most_looks


def test_written_tensors_are_a_safetensors_file() -> None:
    """The tensors themselves, their copies, and copies that take the memory of these."""
    tensors = dict[str, torch.Tensor]()
    for dtype in (torch.float64, torch.int64, torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.bool):
        tensors[f"some.{dtype}"] = torch.arange(15).reshape(3, 5).to(dtype)
    block = torch.arange(12.0).reshape(3, 4)
    tensors |= {"none": torch.zeros(0, 12), "one": torch.tensor(7), "turned": block.T}
    counts = block[:, 3:].view(torch.int32)[:, 0]  # as ID rows have them
    tensors |= {"columns": block[:, :2], "counts": counts, "count": counts[:1]}
    theirs = load(save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}))
    first = copied(tensors, {})
    places = {name: copy.data_ptr() for name, copy in first.items()}
    other = dict(first) | {"one": torch.zeros(2), "turned": first["turned"].double()}  # of another shape, and type
    second = copied(tensors, other)
    assert {name for name, copy in second.items() if copy.data_ptr() != places[name]} == {"one", "turned"} and not other
    for each in (tensors, first, second):
        digest, size_bytes = write_tensors(written := io.BytesIO(), each)
        data = written.getvalue()
        assert (digest, size_bytes) == (xxhash.xxh3_128_hexdigest(data), len(data))
        found = load(data)
        assert found.keys() == theirs.keys()
        assert [name for name in theirs if not torch.equal(found[name], theirs[name])] == []
        assert [name for name in theirs if found[name].dtype != theirs[name].dtype] == []


@pytest.mark.parametrize("run", ["disk", "s3"], indirect=True)
def test_a_copy_counts_twice_where_a_part_goes_in_one_piece(run: RunPath, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, noted = Trained(), []
    monkeypatch.setattr("trainer.runs.saving._fits", lambda everyone: noted.append(everyone[0].needed_bytes) or True)
    saves = Checkpointer(SoloComm(), CheckpointPlace(run), None, nothing)
    for step in (50, 60):
        saves.begin(trained, state_at(step), 3, None)
        assert saves.wait() == Outcome(step, "")
    size_bytes = sum(each.nbytes for each in (*trained.dense.values(), *trained.rows.values()))
    assert noted == ([size_bytes, 0] if isinstance(run, Path) else [2 * size_bytes, size_bytes])


def test_rows_that_no_rank_wrote_are_named(tmp_path: Path) -> None:
    """Of a table of another kind, or of other shards."""
    found = save(tmp_path)
    names = [*Trained().rows, "item/0000/ids"]
    with raises(CheckpointError, Problem.LACKS_ROWS, where=found, missing="item/0000/ids", more=0):
        checkpoint.read_rows(found, checkpoint.read_state(found), names)


def test_a_rank_copies_only_the_parts_with_its_rows(folder: RunPath, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder, size=2)
    noted = mock.Mock(wraps=checkpoint.local_copy)
    monkeypatch.setattr(checkpoint, "local_copy", noted)
    assert values(finished(folder)[0], 2) == {1.0}
    assert sorted(call.args[1] for call in noted.mock_calls if call.args[1] != PARTS[0]) == [*PARTS[1:]]


@pytest.mark.long
@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)], ids=["every third", "every"])
def test_killed_at_every_write_there_is_the_old_one_or_the_new(run: RunPath, tmp_path: Path, stride: int) -> None:
    """On a disk in the midst of what is written too."""
    on_disk = isinstance(run, Path)
    save(run, 1, 1.0)
    expected, at, killed = [1], 1, 0
    while True:
        step, fuse = expected[-1] + 1, Fuse(at, tmp_path / "trace")

        def writer(fuse: Fuse = fuse, step: int = step) -> None:
            torch.set_num_threads(1)
            if on_disk:
                fuse.watch_disk(str(run))
            else:
                fuse.watch_s3({"put_object", "delete_object", "delete_objects"})
            place = CheckpointPlace(run)
            place.claim()
            saves = Checkpointer(SoloComm(), place, None, nothing)
            saves.begin(Trained(value=float(step)), state_at(step), 2, None)
            assert saves.wait() == Outcome(step, "")

        process = FORK.Process(target=writer)
        process.start()
        process.join()
        assert steps_of(run) in (expected, [*expected, step][-2:])
        expected = steps_of(run)
        assert [values(each) for each in finished(run)] == [{float(number)} for number in expected]
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed, at = killed + 1, at + stride
    assert killed >= (20 if on_disk else 12) // stride, "before and after three parts, two versions, the clock's probe"
    assert not on_disk or len(files_of(run)) == 6, "of two checkpoints: state, dense, rows"


def test_of_two_writers_the_one_that_began_last_goes_on_and_the_other_ends(run: RunPath) -> None:
    first, second = CheckpointPlace(run), CheckpointPlace(run)
    first.claim()
    save(first, 50, 1.0)
    second.claim()
    refused = on_ranks(2, lambda comm: Checkpointer(comm, first, None, nothing).save(Trained(), state_at(60), 3, None))
    for each in refused:
        assert isinstance(each, TakenOverError) and each.exit_code == USAGE, "a supervisor does not start it again"
        compare(each, Problem.TAKEN_OVER, where=run / "checkpoints", writer=re.compile("^, .+"))
    assert steps_of(run) == [50]
    save(second, 60, 2.0)
    with raises(TakenOverError, Problem.TAKEN_OVER, where=run / "checkpoints"):
        save(first, 70, 1.0)
    assert steps_of(run) == [50, 60] and values(finished(run)[-1]) == {2.0}


def test_of_two_writers_that_begin_at_once_one_is_refused(run: RunPath) -> None:
    first, second = CheckpointPlace(run), CheckpointPlace(run)
    for place in (first, second):
        assert not place.has(50)
    first.remove([first.at(50)])
    with raises(TakenOverError, Problem.TAKEN_OVER, where=run / "checkpoints"):
        second.remove([second.at(50)])


def faulty(folder: RunPath, now: Event, call: str, fault: Fault) -> CheckpointPlace:
    """A place on S3 whose calls of that name go wrong while the event is set."""
    storage = Storage(f"{folder}/checkpoints")
    return CheckpointPlace(folder, FaultyStorage(storage, {call: while_set(now, fault)}))


def test_a_checkpoint_whose_answer_was_lost_counts_unless_another_start_came_after_it(folder: RunPath) -> None:
    lost = Event()
    place = faulty(folder, lost, "create_or_read", made_but_lost)
    save(place, 50, 1.0)
    for step in (60, 80):
        lost.set()
        with raises(CheckpointError, Problem.REFUSED, action="write", reason=re.compile("connection reset")):
            save(place, step, 2.0)
        lost.clear()
        assert steps_of(folder)[-1] == step, "nobody said so"
        if step == 60:
            save(place, 70, 3.0)
            assert values(finished(folder)[-1]) == {3.0} and steps_of(folder)[-1] == 70
    CheckpointPlace(folder).claim()
    with raises(TakenOverError, Problem.TAKEN_OVER, where=folder / "checkpoints"):
        save(place, 90, 3.0)


@pytest.mark.parametrize("call", ["write_bytes", "create_or_read"])
def test_what_cannot_be_written_leaves_no_checkpoint(folder: RunPath, call: str) -> None:
    away = Event()
    place = faulty(folder, away, call, fails("S3 is away"))
    save(place, 50)
    away.set()
    where, reason = f"{folder}/checkpoints/step-00000060", re.compile("S3 is away")
    with raises(CheckpointError, Problem.REFUSED, action="write", where=where, reason=reason):
        save(place, 60)
    assert steps_of(folder) == [50]
    away.clear()
    save(place, 70)
    assert steps_of(folder) == [50, 70]


def test_one_whose_file_goes_just_before_it_is_published_has_failed(folder: RunPath) -> None:
    """It looked for its files, was away for long, and an expiry took them for leftovers."""
    late = Event()

    def after_an_expiry(call: Fault, *given: Any) -> Any:
        late.clear()
        storage = Storage(f"{folder}/checkpoints")
        storage.delete_files([each.path for each in storage.entries("files") if "step-00000060-rows" in each.path])
        return call(*given)

    place = faulty(folder, late, "create_or_read", after_an_expiry)
    save(place, 50)
    late.set()
    told_by = re.compile(told(Problem.REMOVED_BEFORE_PUBLISHED, where=re.compile("s3://.*step-00000060-rows.*")))
    with raises(CheckpointError, Problem.REFUSED, action="write", reason=told_by):
        save(place, 60)
    save(place, 70, 2.0)
    assert steps_of(folder) == [50, 70] and values(finished(folder)[-1]) == {2.0}


def test_a_removed_one_is_read_to_its_end_and_then_gone(folder: RunPath, monkeypatch: pytest.MonkeyPatch) -> None:
    place = CheckpointPlace(folder)
    save(place, 50, 5.0)
    held = find_checkpoint(folder)
    for step in (60, 70, 80):
        save(place, step, keep=1)
    assert steps_of(folder) == [80]
    assert values(held) == {5.0}
    assert saving.KEEP_REMOVED_S == 600, "docs/TROUBLE.md says that removed ones are read for ten minutes more"
    monkeypatch.setattr(saving, "KEEP_REMOVED_S", -5.0)
    save(folder, 90, keep=1)
    assert len(files_of(folder)) == 3, "of one checkpoint: state, dense, rows"
    assert values(finished(folder)[0]) == {1.0}


def test_the_newest_and_the_best_are_kept(run: RunPath) -> None:
    """The newest ones by their number."""
    place = CheckpointPlace(run)
    for step in (10, 70, 99_999_999, 100_000_000, 50):  # the last one is removed at once
        save(place, step, keep=2, best=10)
    assert [each.name for each in finished(run)] == ["step-00000010", "step-99999999", "step-100000000"]
    assert place.has(10) and not place.has(70)
    place.remove([each for each in finished(run) if each.step != 10])
    assert steps_of(run) == [10]


def test_wrong_credentials_are_one_error(folder: RunPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    place = CheckpointPlace(folder)
    where, reason = f"{folder}/checkpoints/step-00000050", re.compile(told(StoreProblem.NO_PERMISSION))
    with raises(CheckpointError, Problem.REFUSED, action="write", where=where, reason=reason):
        save(place, 50)
    with raises(StorageError, StoreProblem.NO_PERMISSION):
        place.claim()
