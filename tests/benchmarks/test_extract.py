"""benchmarks.extract as `make bench` calls it, at a tiny size."""

import json

import pytest
from typer.testing import CliRunner

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
