"""Figures out of a server's text: numbers as Prometheus would compute them."""

import pytest

from explorer.data.scorer.figures import parse, quantiles

TEXT = """# HELP serving_stage_seconds Seconds
# TYPE serving_stage_seconds histogram
serving_stage_seconds_bucket{le="0.001",stage="score"} 0.0
serving_stage_seconds_bucket{le="0.002",stage="score"} 60.0
serving_stage_seconds_bucket{le="0.01",stage="score"} 98.0
serving_stage_seconds_bucket{le="+Inf",stage="score"} 100.0
serving_stage_seconds_bucket{le="0.001",stage="read"} 0.0
serving_stage_seconds_bucket{le="+Inf",stage="read"} 0.0
serving_unknown_total{field="a\\"}b"} 3.0
process_resident_memory_bytes 1.5e+08
"""


def test_series_and_labels() -> None:
    series = parse(TEXT)
    assert series["process_resident_memory_bytes"] == [({}, 1.5e8)]
    assert series["serving_unknown_total"] == [({"field": 'a\\"}b'}, 3.0)]
    assert len(series["serving_stage_seconds_bucket"]) == 6
    assert series["nobody"] == []


def test_quantiles() -> None:
    found = quantiles(parse(TEXT), "serving_stage_seconds", {"stage": "score"})
    assert found.count == 100
    assert found.p50_s == pytest.approx(0.001 + 0.001 * 50 / 60)
    assert found.p99_s == pytest.approx(0.01)  # beyond the last bound
    nothing = quantiles(parse(TEXT), "serving_stage_seconds", {"stage": "read"})
    assert (nothing.count, nothing.p50_s, nothing.p99_s) == (0, None, None)
    assert quantiles(parse(""), "serving_stage_seconds", {}).count == 0
