"""Impressions of a log as rows to score: the columns and the histories that samples have, in the log's order."""

import random
from pathlib import Path

import pytest

from featurestore.errors import UserError
from pipeline.errors import SampleError
from pipeline.samples.requests import with_behaviors
from tests.pipeline.samples.rows import Call, done, random_logs, shown, table


@pytest.mark.services
def test_each_impression_has_the_history_of_its_group_and_bad_rows_are_errors(build: Call, tmp_path: Path) -> None:
    """Where each impression is a session of its own, its row is that of the samples."""
    impressions, behaviors = random_logs(random.Random(3))
    impressions = [row | {"session": place} for place, row in enumerate(impressions[:60])]
    samples, _ = build(impressions, behaviors, max_behaviors=4, window_days=5)
    asked = table([{name: value for name, value in row.items() if name != "label"} for row in impressions])
    rows = with_behaviors(asked, table(behaviors), str(tmp_path / "samples")).to_pylist()
    wanted = {row["session"]: row for row in samples}
    assert [row["ad_item"] for row in rows] == [[row["item"]] for row in impressions]
    for row in rows:
        assert row | {"label": wanted[row["session"]]["label"]} == wanted[row["session"]]
    build([shown(100)], [done(50)])
    samples = str(tmp_path / "samples")
    bad = table([shown(100), shown(200, user=None)])
    with pytest.raises(SampleError, match="row 1 of the impressions: user is null"):
        with_behaviors(bad, table([done(50)]), samples)
    none = table([done(50)]).slice(0, 0)
    assert with_behaviors(table([shown(100)]), none, samples)["behavior_item"].to_pylist() == [[]]
    short = table([done(50, dwell_s=1.0)])
    assert with_behaviors(table([shown(100)]), short, samples)["behavior_item"].to_pylist() == [[]]
    with pytest.raises(UserError, match="no samples that crossmedia samples made"):
        with_behaviors(table([shown(100)]), none, str(tmp_path))
