"""Curves: all that was logged, read on while it is written, and half a record left for the next time."""

from pathlib import Path

import pytest

from explorer.data.runs import curves
from explorer.data.runs.curves import CurveReader, StageTime, stages_of_report
from tests.explorer.world import World
from trainer.loop.summary import EventsFile


def test_curves_of_a_run_are_what_it_logged(world: World) -> None:
    found = CurveReader().read(world.runs / "both")
    assert found.loss.steps == tuple(range(1, 13))
    assert all(0 < value < 5 for value in found.loss.values)
    assert found.test("gauc").steps == (4, 8, 12)
    ahead = {each.name for each in found.stages if each.is_ahead}
    assert {"read", "unique"} <= ahead
    assert {"embed images", "worker forward"} <= {each.name for each in found.stages} - ahead


def logged(run: Path, first: int, *losses: float) -> EventsFile:
    """Begin a file of a run, which has these losses from a step on."""
    file = EventsFile(run / "tensorboard", first)
    for step, loss in enumerate(losses, first):
        file.add(step, {"train/loss": loss})
    return file


def test_they_are_read_on_and_half_a_record_waits(tmp_path: Path) -> None:
    reader = CurveReader()
    assert reader.read(tmp_path).loss.steps == ()
    file = logged(tmp_path, 1, 0.5, 0.4)
    assert reader.read(tmp_path).loss.values == pytest.approx((0.5, 0.4))
    (path,) = (tmp_path / "tensorboard").iterdir()
    whole = path.read_bytes()
    file.add(3, {"train/loss": 0.3})
    longer = path.read_bytes()
    for cut in (1, 8, 12, 20, len(longer) - len(whole) - 1):
        path.write_bytes(longer[: len(whole) + cut])
        assert reader.read(tmp_path).last_step == 2
    path.write_bytes(longer)
    assert reader.read(tmp_path).last_step == 3


def test_a_run_that_goes_on_in_a_new_file_forgets_the_steps_that_it_repeats(tmp_path: Path) -> None:
    reader = CurveReader()
    for first, losses in ((0, (0.9, 0.8, 0.7)), (2, (0.75, 0.65))):
        logged(tmp_path, first, *losses)
        found = reader.read(tmp_path).loss
    assert found == CurveReader().read(tmp_path).loss
    assert found.steps == (0, 1, 2, 3)
    assert found.values == pytest.approx((0.9, 0.8, 0.75, 0.65))


def test_a_run_that_is_begun_anew_has_only_its_own_curves(tmp_path: Path) -> None:
    reader = CurveReader()
    logged(tmp_path, 1, 0.5)
    assert reader.read(tmp_path).loss.values == (0.5,)
    (old,) = (tmp_path / "tensorboard").iterdir()
    old.unlink()
    assert reader.read(tmp_path).loss.steps == ()
    logged(tmp_path, 1, 0.25)
    assert reader.read(tmp_path).loss.values == (0.25,)


def test_many_points_are_thinned_and_end_with_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "MOST_POINTS", 10)
    logged(tmp_path, 1, *map(float, range(1, 38)))
    found = CurveReader().read(tmp_path).loss
    assert len(found.steps) <= 11
    assert (found.steps[0], found.steps[-1], found.last) == (1, 37, 37.0)


TWO_STAGES = {"read": {"median_ms": 2, "hidden": 0.9}, "rest": {"median_ms": 1.5, "hidden": None}}


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        *((each, ()) for each in (None, [], {"read": None}, {"read": {"median_ms": "x"}})),
        (TWO_STAGES, (StageTime("read", 2.0, True), StageTime("rest", 1.5, False))),
    ],
)
def test_stages_of_a_report_where_they_are_there(stages: object, expected: tuple[StageTime, ...]) -> None:
    assert stages_of_report({"stages": stages}) == expected


def test_a_run_with_validation_days_has_the_curve_of_these(tmp_path):
    file = EventsFile(tmp_path / "tensorboard", 0)
    for step in (5, 10):
        file.add(step, {"validation/gauc": step / 10})
    file.add(10, {"test/gauc": 0.3, "test/auc": 0.5})
    curves = CurveReader().read(tmp_path)
    assert curves.test("gauc").steps == (5, 10)
    assert curves.test("auc").values == (0.5,)
    assert curves.test("logloss").steps == ()
