"""A store, its pictures and runs on an object store: the pages are those of a disk."""

from pathlib import Path

from explorer.data.runs.comparing import read_evaluation
from explorer.data.runs.curves import CurveReader
from explorer.data.runs.folders import open_run, read_runs, run_names
from explorer.errors import NotHereError
from explorer.places import Places
from explorer.problems import Problem
from featurestore import key_of_uri
from featurestore.storage.storage import Storage
from tests.explorer.serving import Reader
from tests.explorer.stores import make_store, rows
from tests.explorer.world import World
from tests.pipeline.conftest import draw_photo, encode_image
from tests.raised import raises
from trainer.loop.summary import EventsFile


def put(folder: Path, url: str) -> None:
    storage = Storage(url)
    for file in folder.rglob("*"):
        if file.is_file():
            storage.write_bytes(str(file.relative_to(folder)), file.read_bytes())


def test_store_and_pictures(s3_url: str) -> None:
    store = make_store(f"{s3_url}/features")
    store.put(rows(["a/1.jpg", "a/2.jpg", "none.jpg"], 1, [1, 1, 2]))
    store.put(rows(["a/3.jpg"], 2, [3]))
    Storage(s3_url).write_bytes("images/a/3.jpg", encode_image(draw_photo(3)))
    reader = Reader(store=f"{s3_url}/features", images=f"{s3_url}/images")
    texts = {path: reader.read(path) for path in ("/store", "/store/arrived", "/store/broken", "/images")}
    assert "Images 4" in texts["/store"].text
    assert {*texts["/store/arrived"].uris()} == {"a/1.jpg", "a/2.jpg", "a/3.jpg", "none.jpg"}
    assert "among all 4 images" in reader.read(f"/images/{key_of_uri('a/3.jpg')}").text
    outside = "../features/store.json"
    for uri, problem in (("a/3.jpg", None), ("none.jpg", Problem.NO_PICTURE), (outside, Problem.REFUSED)):
        assert reader.client.get("/picture", params={"uri": uri}).headers.get("x-picture-problem") == problem


def test_runs(world: World, s3_url: str, tmp_path: Path) -> None:
    names = ["both", "ids-only"]
    for name in names:
        for part in ("config.yaml", "report.json", "evaluation/report.json"):
            Storage(f"{s3_url}/runs/{name}").write_bytes(part, (world.runs / name / part).read_bytes())
        put(world.runs / name / "tensorboard", f"{s3_url}/runs/{name}/tensorboard")
    far, near = Places(runs=f"{s3_url}/runs"), Places(runs=str(world.runs))
    assert run_names(far) == names
    for run, mine in zip(read_runs(far, names), read_runs(near, names), strict=True):
        assert (run.state, run.settings, run.report) == (mine.state, mine.settings, mine.report)
        assert read_evaluation(far.run(run.name)) == read_evaluation(near.run(run.name))
    with raises(NotHereError, Problem.NO_RUN, where="nothing"):
        open_run(far, "nothing")

    reader = CurveReader()
    assert reader.read(far.run("both")) == CurveReader().read(world.runs / "both")
    file = EventsFile(tmp_path, 12)
    file.add(13, {"train/loss": 0.25})
    put(tmp_path, f"{s3_url}/runs/both/tensorboard")
    assert reader.read(far.run("both")).last_step == 13
    reader.close()
