"""Runs on S3 are listed, read and followed as those of a disk."""

from pathlib import Path

import pytest

from explorer.data.runs.comparing import read_evaluation
from explorer.data.runs.curves import CurveReader
from explorer.data.runs.folders import list_runs, open_run
from explorer.errors import NotHereError
from explorer.places import Places
from featurestore.storage.storage import Storage
from tests.explorer.world import World
from trainer.loop.summary import EventsFile

pytestmark = pytest.mark.services


def put(folder: Path, url: str) -> None:
    storage = Storage(url)
    for file in folder.rglob("*"):
        if file.is_file():
            storage.write_bytes(str(file.relative_to(folder)), file.read_bytes())


def test_runs_on_s3_are_those_of_a_disk(world: World, s3_url: str, tmp_path: Path) -> None:
    for name in ("both", "ids-only"):
        for part in ("config.yaml", "report.json", "evaluation/report.json"):
            Storage(f"{s3_url}/runs/{name}").write_bytes(part, (world.runs / name / part).read_bytes())
        put(world.runs / name / "tensorboard", f"{s3_url}/runs/{name}/tensorboard")
    far, near = Places(runs=f"{s3_url}/runs"), Places(runs=str(world.runs))
    runs, count = list_runs(far, 1, 10)
    assert ([run.name for run in runs], count) == (["both", "ids-only"], 2)
    for run in runs:
        mine = next(each for each in list_runs(near, 1, 10)[0] if each.name == run.name)
        assert (run.state, run.settings, run.report) == (mine.state, mine.settings, mine.report)
        assert run.has_evaluation
        assert read_evaluation(far.run(run.name)) == read_evaluation(near.run(run.name))
    with pytest.raises(NotHereError):
        open_run(far, "nothing")

    reader = CurveReader()
    assert reader.read(far.run("both")) == CurveReader().read(world.runs / "both")
    file = EventsFile(tmp_path, 12)
    file.add(13, {"train/loss": 0.25})
    put(tmp_path, f"{s3_url}/runs/both/tensorboard")
    assert reader.read(far.run("both")).last_step == 13
    reader.close()
