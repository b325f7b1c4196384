"""The tutorial and the notebook: whoever follows them gets a scored request; pictures are small."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from featurestore import FeatureStore
from tests.cli import ran
from tools import tutorial

NOTEBOOK = tutorial.ROOT / "docs" / "notebooks" / "pictures_to_score.py"
PICTURES = tutorial.ROOT / "docs" / "pictures"


@pytest.mark.pages
@pytest.mark.services
@pytest.mark.timeout(900)
def test_each_command_works(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With few clicks, whose scores nobody needs; crossmedia is that of this checkout, whatever is installed."""
    program = tmp_path / "bin" / "crossmedia"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m crossmedia "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    tutorial.follow(tutorial.quick_page(), tmp_path)
    assert re.search(r'"scores":\[0\.\d+', capfd.readouterr().out)
    assert (tmp_path / "data" / "tutorial" / "models" / "ctr").is_dir()


def test_a_command_that_fails_ends_it_and_json_is_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        tutorial.follow("```\necho before\nfalse\necho after\n```\n", tmp_path)
    assert "before" in (out := capfd.readouterr().out) and "after" not in out
    page = "```\na\nb\n```\n\n```text\nprinted\n```\n\n```json\n{}\n```\n\n```\nc\n```\n"
    assert tutorial.blocks_of(page) == ["a\nb", "c"]


def test_pictures_are_small() -> None:
    names = re.findall(r"\]\(pictures/([\w.-]+)\)", tutorial.PAGE.read_text())
    assert len(names) >= 6
    for name in names:
        assert (PICTURES / name).stat().st_size <= 150_000, name
        with Image.open(PICTURES / name) as picture:
            assert picture.width >= 300


@pytest.mark.pages
@pytest.mark.long
def test_marimo_finds_nothing_wrong() -> None:
    done = ran(sys.executable, "-m", "marimo", "check", "--strict", NOTEBOOK)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.pages
@pytest.mark.services
@pytest.mark.timeout(600)
def test_from_pictures_to_a_scored_request(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(tutorial.ROOT)}
    done = ran(sys.executable, NOTEBOOK, "--dir", tmp_path / "shop", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert FeatureStore.open(tmp_path / "shop" / "features").snapshot().num_rows == 60
    (scores,) = re.findall(r"the last ad: (0\.\d+) with its own picture, (0\.\d+) with that of the best", done.stdout)
    own, other = map(float, scores)
    assert 0 < own < 1 and 0 < other < 1 and own != other
    assert "Evaluation(" in done.stdout and (tmp_path / "shop" / "model" / "bundles").is_dir()
    assert not (tmp_path / "data").exists()
