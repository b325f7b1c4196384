"""The job as a person runs it: plain, under dask-submit, and with a mistake."""

import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.build_samples import app
from tests.cli import invoke, ran

BIN = Path(sys.executable).parent
JOB = Path(__file__).parents[2] / "jobs" / "build_samples.py"
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("DASK_SCHEDULER")}
DAY_S = 86_400


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with logs of two days where the job looks for them by default: 20 users, one of them without a past."""
    for log in ("impressions", "behaviors"):
        (tmp_path / "data" / "logs" / log).mkdir(parents=True)
    users = list(range(20))
    common = {"item": users, "image": [f"{user}.jpg" for user in users], "category": users, "user": users}
    for day in (1, 2):
        shown = common | {"timestamp": [day * DAY_S + 100] * 20, "session": [day] * 20, "scene": users}
        shown |= {"label": pa.array([user % 2 for user in users], pa.int8())}
        pq.write_table(pa.table(shown), tmp_path / f"data/logs/impressions/day={day}.parquet")
    done = pa.table(common | {"timestamp": [DAY_S] * 20, "dwell_s": [float(user) for user in users]})
    pq.write_table(done, tmp_path / "data/logs/behaviors/day=1.parquet")
    return tmp_path


@pytest.mark.services
@pytest.mark.parametrize(
    "runner", [[sys.executable], pytest.param([BIN / "dask-submit", "-n", "2"], marks=pytest.mark.slow)]
)
def test_defaults_make_samples_of_both_splits(runner, place):
    done = ran(*runner, JOB, cwd=place, env=ENVIRONMENT, timeout=150)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (place / "data/samples/train").iterdir()] == ["day=1970-01-02-000.parquet"]
    assert [path.name for path in (place / "data/samples/test").iterdir()] == ["day=1970-01-03-000.parquet"]
    summary = json.loads((place / "data/samples/summary.json").read_text())
    assert summary["train"]["groups"] == summary["test"]["groups"] == 20
    assert summary["behaviors"]["short_dwell"] == 5
    assert "groups       40 of 20 users, with 0.8 behaviours each; 10 without" in done.stdout
    assert "20 impressions, 50.00% clicks" in done.stdout


@pytest.fixture
def inside(place, connected, monkeypatch):
    """Runs the job in this process and in `place`, on the tests' cluster; returns its one error."""
    monkeypatch.chdir(place)

    def run_inside(*options: object, code: int = 2) -> str:
        errors = [line for line in invoke(app, *options, code=code).stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == bool(code)
        return "".join(errors)

    return run_inside


def test_options_reach_the_samples(inside, place):
    options = "--logs data/logs --samples out --min-dwell-s 10 --window-days 0.5 --max-behaviors 7 --test-days 0"
    inside(*options.split(), "--partitions", 3, code=0)
    summary = json.loads((place / "out/summary.json").read_text())
    assert summary["behaviors"]["short_dwell"] == 10
    assert summary["behaviors_in_groups"] == 10  # of the first day alone: the second is beyond the window
    assert summary["test"]["files"] == 0
    assert summary["options"]["max_behaviors"] == 7
    assert summary["options"]["partitions"] == 3


def test_a_folder_that_cannot_be_replaced_is_refused(inside, place):
    for _ in range(2):  # the second time the folder counts as one of samples
        for samples in (".", "..", "", " ", "/", "data/../.", f"../{place.name}"):
            line = inside("--samples", samples)
            assert "is the folder that this command runs in, or one above" in line or "is not a folder name" in line
        (place / "summary.json").touch()
    (place / "data/summary.json").touch()
    assert "data would be replaced by the samples, with --logs data/logs in it" in inside("--samples", "data")
    assert (place / "data/logs/behaviors/day=1.parquet").is_file()
    (place / "file").write_text("mine")
    for samples in ("file/samples", "/proc/samples"):
        assert inside("--samples", samples, code=1).startswith(f"error: cannot make the samples in {samples}: [Errno")
