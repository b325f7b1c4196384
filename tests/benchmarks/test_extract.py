"""benchmarks.extract and benchmarks.refresh as `make bench` calls it, at a tiny size."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks import refresh
from benchmarks.extract import app, draw_images


@pytest.mark.slow
def test_it_draws_its_own_images(tmp_path):
    options = ["--limit", "8", "--rounds", "1", "--batch-size", "4", "--json", str(tmp_path / "extract.json")]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "extract.json").read_text())
    assert figures["images"] == 8
    assert figures["extract_vs_bare"] > 0


@pytest.mark.long
def test_drawn_images_all_differ(tmp_path):
    draw_images(tmp_path, 50)
    assert len({path.read_bytes() for path in tmp_path.glob("*.jpg")}) == 50


def test_a_wrong_folder_is_one_message(tmp_path):
    result = CliRunner().invoke(app, ["--images", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert "error: there is no folder" in result.stderr
    assert isinstance(result.exception, SystemExit)  # no traceback


@pytest.mark.slow
def test_a_refresh_is_measured_beside_its_extraction(tmp_path):
    result = CliRunner().invoke(refresh.app, ["--limit", "12", "--json", str(tmp_path / "refresh.json")])
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "refresh.json").read_text())
    assert figures["images"] == 12
    assert figures["new"] == figures["changed"] == figures["gone"] == 1
    assert 0 < figures["bytes_share"] < 1
    assert figures["time_share"] > 0
    assert figures["refresh_of_nothing_bytes"] == 0
    written = figures["extract_bytes"]
    assert 2 * 12 * 4096 < written < 2 * 12 * 8192 + 200_000  # parts and shards, compressed
