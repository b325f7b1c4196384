"""Charts of runs: of many stages the largest are told apart, and nothing of a step's time is lost."""

import pytest

from explorer.data.runs.curves import StageTime
from explorer.html.charts import stages

AHEAD, STEP = "ahead, at the same time", "the step"


def total(figure: dict, bar: str) -> float:
    parts = [zip(trace["y"], trace["x"], strict=True) for trace in figure["data"]]
    return sum(ms for part in parts for name, ms in part if name == bar)


def test_the_eight_largest_stages_are_told_apart_and_the_others_are_one_part_of_each_bar() -> None:
    times = [StageTime(f"stage {number}", float(1 + number * 7 % 17), number < 5) for number in range(17)]
    figure = stages(times)
    names = [trace["name"] for trace in figure["data"]]
    largest = {each.name for each in sorted(times, key=lambda each: -each.ms)[:8]}
    assert names == [each.name for each in times if each.name in largest] + ["other"]
    assert len({trace["marker"]["color"] for trace in figure["data"]}) == len(names)
    for bar, is_ahead in ((AHEAD, True), (STEP, False)):
        assert total(figure, bar) == pytest.approx(sum(each.ms for each in times if each.is_ahead == is_ahead))


def test_few_stages_have_no_other() -> None:
    figure = stages([StageTime("<b>read", 2.0, True), StageTime("rest", 1.0, False)])
    assert [trace["name"] for trace in figure["data"]] == ["&lt;b&gt;read", "rest"]
    assert [trace["y"] for trace in figure["data"]] == [[AHEAD], [STEP]]
