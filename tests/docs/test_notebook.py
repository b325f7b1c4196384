"""The notebook runs from the first cell to the last, and scores a request."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from featurestore import FeatureStore

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "notebooks" / "pictures_to_score.py"


@pytest.mark.pages
@pytest.mark.long
def test_marimo_finds_nothing_wrong() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "marimo", "check", "--strict", NOTEBOOK], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.pages
@pytest.mark.services
@pytest.mark.timeout(600)
def test_from_pictures_to_a_scored_request(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, NOTEBOOK, "--dir", tmp_path / "shop"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert FeatureStore.open(tmp_path / "shop" / "features").snapshot().num_rows == 60
    (scores,) = re.findall(r"the last ad: (0\.\d+) with its own picture, (0\.\d+) with that of the best", done.stdout)
    own, other = map(float, scores)
    assert 0 < own < 1 and 0 < other < 1 and own != other
    assert (tmp_path / "shop" / "visual.parquet").is_file()
    assert not (tmp_path / "data").exists()
