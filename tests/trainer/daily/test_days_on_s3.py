"""trainer.daily whose runs and table are on S3: what it writes there is what it writes on a disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from featurestore.published.paths import run_path
from tests.trainer.daily.test_daily import DAYS, config_of, make_days
from trainer.comm import SoloComm
from trainer.daily import follow

Places = Any


@pytest.mark.long
def test_days_on_s3_are_those_of_a_disk(
    make_places: Callable[[Path], Places], tmp_path: Path, s3_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second start finds all done."""
    places = make_days(make_places(tmp_path))
    far, near = run_path(f"{s3_url}/runs/d"), tmp_path / "runs" / "d"
    for folder in (far, near, far):
        capsys.readouterr()
        follow(config_of(places, run__name="d", run__dir=folder.parent), SoloComm(), DAYS[0], continues=True)
    assert "step 1/" not in capsys.readouterr().out
    days, expected = (json.loads((each / "days.json").read_bytes()) for each in (far, near))
    assert [{**row, "warm_start": None} for row in days] == [{**row, "warm_start": None} for row in expected]
    assert [row["warm_start"] for row in days] == [None, *(str(far / day) for day in DAYS[:3])]
