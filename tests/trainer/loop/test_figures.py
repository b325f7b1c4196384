"""The figures of a run: what is counted into the throughput, and how a number is printed."""

import pytest

from featurestore.console.output import figure
from trainer.comm import SoloComm
from trainer.engine.engine import StepResult
from trainer.loop.summary import ImageCounts, StepTotals, gather
from trainer.stages import Stages

STEP = StepResult(loss=0.5, num_samples=100, num_references=0, learning_rate=0.1)


def totals_of(*seconds: float) -> StepTotals:
    """Steps of 100 samples, each of which took so long."""
    totals = StepTotals()
    for each in seconds:
        totals.seconds["compute"] = totals.seconds.get("compute", 0.0) + each
        totals.add(STEP, ImageCounts(0, 0))
    return totals


def test_throughput_leaves_the_first_step_out() -> None:
    totals = totals_of(10.0, 0.5, 0.5)
    assert totals.steady == (200, 1.0)
    figures = gather(SoloComm(), totals, Stages())
    assert (figures["samples_per_s"], figures["samples"], figures["steps"]) == (200.0, 300, 3)


def test_throughput_of_one_step_is_its_own_and_of_none_is_none() -> None:
    assert gather(SoloComm(), totals_of(2.0), Stages())["samples_per_s"] == 50.0
    assert gather(SoloComm(), totals_of(), Stages())["samples_per_s"] is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(11_410.4, "11,410"), (1_000.0, "1,000"), (999.94, "999.9"), (0.0001, "0.0001"), (0.69317, "0.6932")],
)
def test_numbers_are_printed_without_exponent(value: float, text: str) -> None:
    assert figure(value) == text


def test_rest_is_what_no_stage_of_the_step_accounts_for() -> None:
    stages = Stages()
    for name, seconds in (("wait for the next batch", 9.0), ("gather", 7.0), ("embed images", 0.2), ("rest", 5.0)):
        stages.add(name, seconds)
    stages.add_rest(0.5)
    assert stages.last_ms()["rest"] == pytest.approx(300)
    stages.add_rest(0.1)
    assert stages.last_ms()["rest"] == 0
