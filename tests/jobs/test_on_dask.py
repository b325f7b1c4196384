"""The jobs on a Dask cluster as a person types them: with their defaults, under dask-submit, and with mistakes."""

import dataclasses
import json
import os
import pickle
import re
import sys
from pathlib import Path

import pytest

from featurestore.store import FeatureStore
from jobs import build_samples, extract_features
from pipeline.errors import PipelineError
from pipeline.features.refresh import RefreshSummary
from pipeline.problems import Problem
from pipeline.store_run import BadRow
from tests.cli import invoke, ran, said
from tests.pipeline.conftest import draw_photo, encode_image
from tests.pipeline.samples.rows import DAY_S, done, shown, write
from tests.raised import told

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("DASK_SCHEDULER")}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with logs of two days where the job looks for them by default: 20 users, one of them without a past."""
    days = [[shown(day * DAY_S + 100, user=user, label=user % 2) for user in range(20)] for day in (1, 2)]
    write(tmp_path / "data/logs", days, [[done(DAY_S, user=user, dwell_s=float(user)) for user in range(20)]])
    return tmp_path


@pytest.mark.services
def test_defaults_make_samples_of_both_splits(place: Path) -> None:
    job = ran(sys.executable, build_samples.__file__, cwd=place, env=ENVIRONMENT, timeout=150)
    assert job.returncode == 0 and "Traceback" not in job.stderr, job.stderr
    files = sorted(f"{path.parent.name}/{path.name}" for path in (place / "data/samples").glob("t*/*"))
    assert files == ["test/day=2026-01-03-000.parquet", "train/day=2026-01-02-000.parquet"]
    summary = json.loads((place / "data/samples/summary.json").read_text())
    numbers = (summary["train"]["groups"], summary["test"]["groups"], summary["behaviors"]["short_dwell"])
    assert numbers == (20, 20, 5)
    assert "groups       40 of 20 users, with 0.8 behaviours each; 10 without" in job.stdout
    assert "20 impressions, 50.00% clicks" in job.stdout


@pytest.fixture
def inside(place, connected, monkeypatch):
    """Runs the job in this process and in `place`, on the tests' cluster; returns its one error."""
    monkeypatch.chdir(place)

    def run_inside(*options: object, code: int = 2) -> str:
        stderr = invoke(build_samples.app, *options, code=code).stderr
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == bool(code)
        return "".join(errors)

    return run_inside


def test_options_reach_the_samples(inside, place):
    options = "--logs data/logs --samples out --min-dwell-s 10 --window-days 0.5 --max-behaviors 7 --test-days 0"
    inside(*options.split(), "--partitions", 3, code=0)
    summary = json.loads((place / "out/summary.json").read_text())
    assert (summary["behaviors"]["short_dwell"], summary["test"]["files"]) == (10, 0)
    assert summary["behaviors_in_groups"] == 10  # of the first day alone: the second is beyond the window
    assert (summary["options"]["max_behaviors"], summary["options"]["partitions"]) == (7, 3)


def test_a_folder_that_cannot_be_replaced_is_refused(inside, place):
    for _ in range(2):  # the second time the folder counts as one of samples
        for samples in (".", "..", "", " ", "/", "data/../.", f"../{place.name}"):
            line = inside("--samples", samples)
            named = {"where": samples} if samples.strip() else {}
            problem = Problem.OWN_FOLDER if named else Problem.NOT_A_FOLDER
            assert re.fullmatch(f"error: {told(problem, **named)}", line)
        (place / "summary.json").touch()
    (place / "data/summary.json").touch()
    assert Problem.OPTION_INSIDE.of("data", "--logs", "data/logs") in inside("--samples", "data")
    assert (place / "data/logs/behaviors/day=00.parquet").is_file()
    (place / "file").write_text("mine")
    for samples in ("file/samples", "/proc/samples"):
        line = inside("--samples", samples, code=1)
        assert (
            re.fullmatch(f"error: {told(Problem.REFUSED, action='make the samples in', where=samples)}", line)
            and "[Errno" in line
        )


def test_a_wrong_network_is_a_usage_error_before_a_cluster_starts(monkeypatch):
    monkeypatch.setattr("pipeline.cluster.tasks.connect", None)
    network = ["--weights", "random:3", "--backbone", "resnet18:avgpol"]
    text = said(extract_features.app, "--weights", "text.pth", code=2)
    assert re.search(told(Problem.NO_SUCH_WEIGHTS, value="text.pth"), text)
    values = {"where": network[3], "model": "resnet18", "value": "avgpol", "near": re.compile(".*avgpool.*?")}
    assert re.search(told(Problem.NO_SUCH_LAYER, **values), said(extract_features.app, *network, code=2))


def test_the_summary_names_what_was_bad():
    bad = (BadRow(1, "a.jpg", "empty file"), BadRow(2, "b.jpg", "no such file"), BadRow(3, "c.jpg", "empty file"))
    numbers = {"num_images": 13, "num_ignored": 1, "num_new": 2, "num_changed": 1, "num_touched": 1, "num_gone": 5}
    numbers |= {"num_unchanged": 6, "num_kept": 2, "num_resolved": 1, "num_computed": 3, "num_duplicates": 4}
    numbers |= {"num_resumed": 2, "seconds": 2.0, "snapshot": 7}
    counts = RefreshSummary(**numbers, bad=bad, store="/features", precision="float32")
    for part in (
        "images       13 (1 other files ignored)", "new          2", "changed      1", "touched      1 (",
        "unchanged    6",
        "gone         5 (2 not listed, kept)", "quarantined  3: 2 empty file (a.jpg, c.jpg); 1 no such file (b.jpg)",
        "resolved     1 (", "duplicates   4 (", "computed     3 (2 images staged", "2.0 s, 2.0 images/s",
        "/features, snapshot 7", "precision    float32",
    ):  # fmt: skip
        assert part in str(counts)
    assert "time         2.0 s\n" in str(dataclasses.replace(counts, num_images=7)), "no image was worked on"


@pytest.mark.services
@pytest.mark.long(20)
def test_under_dask_submit_with_the_default_places(tmp_path):
    images = tmp_path / "data/images"
    images.mkdir(parents=True)
    for number in range(3):
        (images / f"{number}.jpg").write_bytes(encode_image(draw_photo(number)))
    (images / "text.jpg").write_text("a text")
    network = ["--backbone", "squeezenet1_1:flatten", "--weights", "random:0"]  # small: it is sent to the worker
    submit = Path(sys.executable).with_name("dask-submit")
    first = ran(submit, "-n", 1, extract_features.__file__, *network, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "computed     3" in first.stdout
    assert "(text.jpg)" in first.stdout
    assert first.stderr.count("NOT pretrained") == 1
    assert "warning: the weights random:0 are NOT pretrained\n" in first.stderr
    assert FeatureStore.open(tmp_path / "data/features").snapshot().num_rows == 3


def test_errors_of_the_pipeline_survive_the_wire():
    for kind in PipelineError.__subclasses__():
        if not kind.__subclasses__():
            assert str(pickle.loads(pickle.dumps(kind("message")))) == "message"
