"""benchmarks.read at a tiny size: figures by name, and samples that are the same in every layout."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.read.__main__ import app
from benchmarks.read.layouts import LAYOUTS, files_of


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_same_samples(layout: str) -> None:
    sizes = list(files_of(layout, 200))
    assert sum(map(sum, sizes)) == 200 * 128
    largest = max(max(each) for each in sizes)
    assert largest == (20 * 128 if layout == "huge" else 128)
    assert (max(map(len, sizes)) == 1) == (layout == "single")


@pytest.mark.slow
@pytest.mark.services
def test_the_whole_of_it(tmp_path: Path) -> None:
    out = tmp_path / "read.json"
    small = ["--dir", str(tmp_path / "samples"), "--row-groups", "64", "--batch-size", "2048", "--json", str(out)]
    result = CliRunner().invoke(app, small)
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert figures["decode_share_1"] == 1 and figures["decode_share_8"] < 1.3
    assert figures["old_decode_share_8"] > 7
    assert figures["s3_mb_per_rank_8"] < 0.3 * figures["old_s3_mb_per_rank_8"]
    assert 0 < figures["mixing"] < 3 * figures["old_mixing"]
