"""The command line, runs of one rank and of two, and how a run ends when something goes wrong on one rank or on all."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from pyarrow import csv

from featurestore.format.datafile import FeatureRows
from featurestore.keys import NO_IMAGE
from featurestore.staging import QuarantineRow
from featurestore.store import FeatureStore
from pipeline.samples.build import write_suggested
from tests.cli import invoke, ran
from tests.raised import raises, told
from tests.ranks import (
    Forks,
    StandingRanks,
    TorchRanks,
    command_of,
    environment,
    forks_of_ranks,
    ranks_of,
    standing_ranks,
)
from tests.trainer.checkpoints import assert_same_tensors, steps_of, tensors_of
from tests.trainer.conftest import Places, change_column, make_places, values_of
from tests.trainer.standing_ranks import run as run_here
from tests.trainer.whole_runs import all_alike, assert_same, drawn_scalars, report_of, run_alone
from trainer.errors import CheckpointError
from trainer.ids.exact import num_ids
from trainer.main import app
from trainer.problems import Problem
from trainer.runs.checkpoint import read_state
from trainer.runs.folder import find_checkpoint
from trainer.schema.__main__ import app as schema_app
from trainer.schema.names import by_bucket, write_buckets
from trainer.stages import AHEAD, Stage

WORKER = Path(__file__).parent / "main_worker.py"
RANKS_TIMEOUT_S = 150
# Of the runs of one rank and of two; their numbers are compared, so the type of the products is not the machine's.
SHARED = {"data__global_batch_size": 64, "train__epochs": 3, "model__compute_dtype": "float64"}


@pytest.fixture(scope="module")
def alone(places: Places) -> Path:
    """16 steps of one rank, into the second epoch."""
    return run_alone(places, run__name="alone", train__max_steps=16, **SHARED)


def test_a_run_without_a_name_is_continued_by_its_own_settings(tmp_path: Path) -> None:
    settings = make_places(tmp_path).settings(train__max_steps=1)
    invoke(app, *settings, code=0)
    (folder,) = (tmp_path / "runs").iterdir()
    invoke(app, "--config", folder / "config.yaml", "run.resume=latest", "train.max_steps=2", code=0)
    assert [*(tmp_path / "runs").iterdir()] == [folder] and report_of(folder)["global_step"] == 2


def test_images_that_the_store_lacks_are_counted_and_listed(tmp_path: Path, two_ranks_of_each: StandingRanks) -> None:
    places = make_places(tmp_path)
    samples, features = tmp_path / "samples", tmp_path / "features"
    settings = ["--set", *places.settings(train__max_steps=1, run__name="alone")]
    file = samples / "train" / "day=2026-01-02.parquet"
    change_column(file, "ad_image", lambda rows: [[NO_IMAGE, *rows[0][1:]], *rows[1:]])
    said = invoke(app, *settings, code=0).stdout  # the store has all images that are named
    assert "the samples name no image in 1 of " in said and " impressions, 0 behaviours: they get a trained" in said
    result = invoke(app, *settings, "data.missing=error", "run.name=error", code=1)
    assert "data.missing=learned" in result.stderr and "add them" not in result.stderr

    store = FeatureStore.open(features)
    store.delete([1_000, 1_001])
    store.add_quarantine([QuarantineRow(1_001, "item/1", "truncated", 1.0)])
    named = pa.table({"key": pa.array([1_000, 1_007]), "uri": ["item/0", "item/7"]})
    write_buckets(samples / "images.parquet", named.schema, by_bucket(named))
    of_ads, of_behaviors = (
        [*values_of(samples / "train", name), *values_of(samples / "test", name)]
        for name in ("ad_image", "behavior_image")
    )
    uses = {
        image: {"impressions": of_ads.count(key), "behaviors": of_behaviors.count(key)}
        for image, key in (("", NO_IMAGE), ("item/0", 1_000), ("item/1", 1_001))
    }
    found = [sum(use[name] for use in uses.values()) for name in ("impressions", "behaviors")]
    said = (
        f"{features} lacks 2 images that the samples name ({found[0]:,} of {len(of_ads):,} impressions, "
        f"{found[1]:,} behaviours, 1 of the impressions without any image)"
    )
    listing = f"list them: crossmedia schema missing {samples} {features}"
    result = invoke(app, *settings, "run.name=lacking", code=0)
    assert result.stdout.count(f'{said}: they get a trained "no image" vector (data.missing=learned); {listing}') == 1
    more = ["run.name=two", f"data.cache_dir={tmp_path / 'other'}"]  # where nothing is remembered
    (_, first), (_, second) = two_ranks_of_each.call("-m", "trainer.main", *settings, *more)
    assert (first.count(said), second.count(said)) == (1, 0)
    result = invoke(app, *settings, "data.missing=error", "run.name=error", code=1)
    hint = re.compile(f".*--store {features}.*")
    lacked = told(Problem.IMAGES_LACKED, lacking=said, listing=listing, hint=hint)
    assert re.fullmatch(f"error: {lacked}\n", result.stderr)

    out = tmp_path / "missing.csv"
    invoke(schema_app, "missing", samples, features, "--out", out, code=0)
    why = {"": "the logs name no image", "item/0": "not in the store", "item/1": "quarantined: truncated"}
    rows = [{"image": image, **use, "why": why[image]} for image, use in uses.items()]
    assert csv.read_csv(out).to_pylist() == sorted(rows, key=lambda row: -row["impressions"])
    result = invoke(schema_app, "missing", samples, features)
    assert f"2 images of {samples} have no feature in {features}" in result.stdout


def test_a_new_run_refuses_a_store_without_its_images(tmp_path: Path, two_ranks_of_each: StandingRanks) -> None:
    """As where its images have other names; whether it has images of the test samples does not count."""
    places = make_places(tmp_path)
    settings = ["--set", *places.settings(train__max_steps=1, run__name="alone")]
    invoke(app, *settings, code=0)
    FeatureStore.open(tmp_path / "features").delete([*range(1_000, 1_040)])  # the test samples have others
    found = {"where": "data.store", "value": tmp_path / "features", "sample": 1000, "store": re.compile("item/4.*")}
    other = told(Problem.NO_TRAINING_IMAGE, **found)
    for missing in ("learned", "zeros", "error"):
        result = invoke(app, *settings, "run.name=new", f"data.missing={missing}", code=1)
        assert re.fullmatch(f"error: {other}\n", result.stderr)
    more = ["run.name=two", f"data.cache_dir={tmp_path / 'other'}"]  # where nothing is remembered
    both = two_ranks_of_each.call("-m", "trainer.main", *settings, *more)
    assert [code for code, _ in both] == [1, 1] and re.search(other, both[0][1])
    invoke(app, *settings, "run.name=ids", "model.images=none", code=0)
    newest = "data.store_version=2"
    invoke(app, *settings, newest, "train.max_steps=2", "run.resume=latest", code=0)
    invoke(app, *settings, newest, "run.name=warm", f"run.warm_start={tmp_path / 'runs' / 'alone'}", code=0)
    FeatureStore.open(tmp_path / "features").put(FeatureRows.of(["item/0"], np.ones((1, 16), np.float32), keys=[1_000]))
    FeatureStore.open(tmp_path / "features").delete([*range(1_040, 1_050)])
    assert "lacks 49 images" in invoke(app, *settings, "run.name=one", code=0).stdout


def test_a_schema_of_the_samples_that_is_not_used_is_named(tmp_path: Path) -> None:
    places, samples = make_places(tmp_path), tmp_path / "samples"
    settings = ["--set", *places.settings(train__max_steps=1)]
    assert "preset's" not in invoke(app, *settings, "run.name=without", code=0).stdout
    write_suggested(samples, str(samples))
    said = invoke(app, *settings, "run.name=preset", code=0).stdout
    assert f"the fields are the preset's, not those of {samples}/schema.yaml: crossmedia train --config " in said
    config = ["--config", samples / "settings.yaml"]
    assert "preset's" not in invoke(app, *config, *settings, "run.name=own", code=0).stdout


def test_empty_places_name_the_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(app, code=2)
    assert "crossmedia extract --store data/features" in result.stderr
    assert "crossmedia samples --samples data/samples" in result.stderr
    assert "crossmedia demo-data" in result.stderr and result.stderr.count("\n") == 2  # a line for each
    assert list(tmp_path.iterdir()) == []


Job = tuple[Path, dict[str, list[str]]]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, two_ranks_of_each: StandingRanks) -> Job:
    """The folder of the runs of main_worker.py, and what each of two ranks saw of them."""
    places = make_places(tmp_path_factory.mktemp("job"))
    broken = shutil.copytree(places.folder / "samples", places.folder / "broken")
    file = broken / "test" / "day=2026-01-01.parquet"
    change_column(file, "label", lambda rows: [*rows[:-1], [2, *rows[-1][1:]]])
    out = places.folder / "seen.json"
    two_ranks_of_each.run(WORKER, places.folder, out, *places.settings(**SHARED))
    return places.folder / "runs", json.loads(out.read_text())


def test_signal_to_one_rank_stops_all_and_resumption_is_exact(job: Job) -> None:
    runs, seen = job
    assert seen["full"] == ["done", "done"]
    assert seen["stopped"] == ["StoppedError: SIGTERM received"] * 2
    assert seen["after stopped"] == ["done", "done"]
    assert_same(runs / "stopped", runs / "full")
    # The step after the signal's may have been prepared already; then it is taken too.
    assert steps_of(runs / "stopped") in ([13, 16], [14, 16])


def test_an_earlier_checkpoint_replaces_later_ones_where_asked_to_and_one_ranks_error_is_known_to_all(job: Job) -> None:
    runs, seen = job
    assert seen["branched"] == seen["branched, overwritten"] == ["done", "done"]
    assert [text.split(":")[0] for text in seen["branched, refused"]] == ["ConfigError", "ConfigError"]
    assert steps_of(runs / "branched") == [2, 3]
    # The last test sample is in the part that rank 1 alone evaluates.
    assert [text.split(":")[0] for text in seen["broken"]] == ["RemoteRankError", "DataError"]
    assert all("test/day=2026-01-01.parquet, row 59: column label has 2" in text for text in seen["broken"])
    missing = told(Problem.NO_SAMPLES_AT_SETTING, value="train and no test")
    assert all(re.search(missing, text) for text in seen["empty"])
    assert not (runs / "empty").exists(), "nothing is written before all is open"


def test_equals_one_rank(job: Job, alone: Path) -> None:
    two, one = report_of(job[0] / "full"), report_of(alone)
    assert two["metrics"] == all_alike(one["metrics"], within=1e-9)
    assert (two["num_ranks"], two["devices"]) == (2, ["cpu", "cpu"])
    assert two["collectives"].startswith("Gloo by ")
    assert two["samples"] == one["samples"]
    assert two["images_per_step"] == one["images_per_step"], "an image is computed once, whoever asks"
    assert two["bytes_sent_per_step"] > 0


README = (Path(__file__).parents[2] / "README.md").read_text()
STEP_6 = "crossmedia train --config data/samples/settings.yaml --set run.name=both"
QUICK = ["data.global_batch_size=128", "train.epochs=1", "train.log_every=1", "model.compute_dtype=float64"]


def by_module(data: Path, name: str) -> list[str]:
    """The README's step 6 by its module, as quick as 8 ranks need it and the same from every folder."""
    config = ["--config", str(data / "samples" / "settings.yaml"), "--set", f"run.name={name}"]
    places = {"data.store": "features", "data.cache_dir": "cache", "run.dir": "runs"}
    return ["-m", "trainer.main", *config, *QUICK, *(f"{key}={data / place}" for key, place in places.items())]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a shop, where the README's commands run as they are: samples with their settings.yaml, and features."""
    places = make_places(tmp_path_factory.mktemp("shop") / "data")
    samples = places.folder / "samples"
    write_suggested(samples, str(samples))
    invoke(app, *by_module(places.folder, "alone")[2:], code=0)
    return places.folder


@pytest.mark.services
@pytest.mark.timeout(600)
@pytest.mark.long(30)
@pytest.mark.parametrize(
    ("launcher", "num_ranks", "standing"),
    [
        pytest.param("horovodrun -np 8 python", 8, None, marks=pytest.mark.cluster),
        pytest.param("horovodrun -np 2 python", 2, "two_ranks", marks=pytest.mark.cluster),
        ("torchrun --standalone --nproc-per-node 2", 2, None),
        pytest.param("torchrun --standalone --nproc-per-node 2", 2, "two_torch_ranks", marks=pytest.mark.slow),
    ],
)
def test_a_launchers_job_is_that_of_one_rank(
    data: Path, launcher: str, num_ranks: int, standing: str | None, request: pytest.FixtureRequest
) -> None:
    """The README's command by its launchers, from losses to checkpoint; other tests start ranks by themselves."""
    assert f"\nhorovodrun -np 2 {STEP_6}\n" in README
    name = f"{launcher.split(maxsplit=1)[0]}{num_ranks}{'-standing' if standing else ''}"
    module = "-m trainer.main" if num_ranks == 8 else "-m crossmedia train"
    step_6 = STEP_6.replace("crossmedia train", module).replace("=both", f"={name}")
    words = [*launcher.split(), *step_6.split(), *QUICK]
    where = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = ran(*words, cwd=data.parent, env=environment() | {"PATH": where}, timeout=2 * RANKS_TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    found, alone = data / "runs" / name, data / "runs" / "alone"
    report = report_of(found)
    assert (report["num_ranks"], report["steps"]) == (num_ranks, report_of(alone)["steps"])
    assert report["metrics"] == all_alike(report_of(alone)["metrics"], within=1e-9)
    (losses, expected) = (np.array(drawn_scalars(run / "tensorboard")["train/loss"]) for run in (found, alone))
    assert len(expected) > 5
    np.testing.assert_allclose(losses, expected, rtol=1e-6)  # TensorBoard keeps float32
    mine, theirs = tensors_of(found), tensors_of(alone)
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        largest = float(value.abs().max()) if value.numel() else 0.0  # of an exact table's shard without ids
        torch.testing.assert_close(mine[key], value, rtol=1e-9, atol=1e-9 * largest, msg=key)
    if standing:  # the ranks of the other tests
        ranks: StandingRanks = request.getfixturevalue(standing)
        ranks.run(*by_module(data, f"like-{name}"))
        assert_same(found, data / "runs" / f"like-{name}")


@pytest.fixture
def endless(places: Places, tmp_path: Path, num_ranks: int) -> Iterator[subprocess.Popen[str]]:
    """`horovodrun -np 2 crossmedia train`, or that of torchrun, in the midst of its training."""
    settings = places.settings(train__epochs=100_000, run__dir=tmp_path)
    command = command_of(num_ranks, "-m", "trainer.main", "--set", *settings)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    watchdog = threading.Timer(RANKS_TIMEOUT_S, process.kill)
    watchdog.start()
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "step 1/" in line:
            break
    else:
        pytest.fail("".join(seen))
    yield process
    watchdog.cancel()
    ranks = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    for each in ranks:
        each.kill()
    process.kill()
    process.wait()


@pytest.mark.services
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])  # 1: test_changing_ranks.py
@pytest.mark.parametrize(
    ("num_ranks", "says"),
    [
        (2, "Process {} exit with status code"),
        pytest.param(TorchRanks(2), "(local_rank: {})\n  exitcode  : -9 ", marks=pytest.mark.slow),
    ],
    ids=["horovodrun", "torchrun"],
)
def test_killed_rank_ends_the_job(endless: subprocess.Popen[str], victim: int, says: str) -> None:
    ranks = ranks_of(endless, "-m", "trainer.main")
    ranks[victim].send_signal(signal.SIGKILL)
    start = time.monotonic()
    output, _ = endless.communicate(timeout=60)
    assert endless.returncode != 0
    assert time.monotonic() - start < 30
    assert says.format(victim) in output
    assert re.search(f"error: {told(Problem.LOST_RANK, rank=1 - victim)}", output)
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert alive == []


def test_wrong_setting_is_told_once(two_ranks: StandingRanks) -> None:
    (code, output), other = two_ranks.call("-m", "trainer.main", "--set", "train.epoch=1")
    assert code == 2 and other == (2, "")
    assert output == "error: configuration: train.epoch is unknown; did you mean train.epochs?\n"


@pytest.mark.long
def test_interrupt_alone_ends_with_a_checkpoint(places: Places, tmp_path: Path, forks: Forks) -> None:
    settings = places.settings(train__epochs=100_000, run__dir=tmp_path, run__name="interrupted")
    log = tmp_path / "log.txt"
    process = forks.start_with([{}], log, "-m", "trainer.main", "--set", *settings)
    try:
        while "step 1/" not in log.read_text():
            assert process.wait(0.02) == [None], log.read_text()
        os.kill(process.ranks[0], signal.SIGINT)
        assert process.wait(60) == [130]
    finally:
        process.close()
    output = log.read_text()
    path = find_checkpoint(tmp_path / "interrupted")
    assert f"continue with run.resume={path}" in output
    assert read_state(path).step >= 1


@pytest.mark.long
def test_report(alone: Path, places: Places) -> None:
    report = report_of(alone)
    names = ("global_step", "steps", "num_ranks", "store_version", "devices", "collectives", "bytes_sent_per_step")
    assert [report[name] for name in names] == [16, 16, 1, 1, ["cpu"], None, 0]
    metrics = report["metrics"]
    assert 0.55 < metrics["auc"] < 1
    assert 0.3 < metrics["logloss"] < 0.9
    train_ads, test_ads = (values_of(places.folder / "samples" / split, "ad_item") for split in ("train", "test"))
    met = {*train_ads}  # in the first epoch, all of them
    assert metrics["impressions"] == len(test_ads)
    assert metrics["new_ad_impressions"] == sum(ad not in met for ad in test_ads) > 0
    assert all(0 <= metrics[name] <= 1 for name in ("gauc", "new_ad_auc", "new_ad_gauc"))
    assert 0 < report["unique_ratio"] < 1 and report["samples_per_s"] > 0
    assert report["history"][-1] == {"step": 16, **metrics}
    assert set(report["seconds"]) == {"wait", "compute", "evaluate", "checkpoint"}
    assert set(report["stages"]) == set(Stage.__args__) - {"exchange keys"}  # a rank alone has its own
    assert all(row["median_ms"] >= 0 and row["share_of_step"] >= 0 for row in report["stages"].values())
    of_steps = [row["share_of_step"] for name, row in report["stages"].items() if name not in AHEAD]
    assert sum(of_steps) == pytest.approx(1)
    assert num_ids(64, report["tables"]["item"]["used_rows"]) == pytest.approx(len(met), rel=0.3)
    curves = drawn_scalars(alone / "tensorboard")
    for name in ("user", "item", "image"):
        step, share = curves[f"tables/{name}/share"][-1]
        assert (step, share) == (16, pytest.approx(report["tables"][name]["share"], rel=1e-6))


@pytest.mark.long
def test_a_vector_for_missing_images_is_harmless_where_none_is_missing(places: Places) -> None:
    settings = {"train__max_steps": 3, "train__checkpoint_every": 2, "model__compute_dtype": "float64"}
    of = {
        each: run_alone(places, run__name=f"missing-{each}", data__missing=each, **settings)
        for each in ("learned", "zeros", "error")
    }
    learned, zeros = tensors_of(of["learned"]), tensors_of(of["zeros"])
    added = learned.keys() - zeros.keys()
    assert {name for name in added if not name.startswith("adam/")} == {"stores.images.no_image"}
    assert not any(learned[name].any() for name in added if not name.endswith("/step"))
    assert_same_tensors({name: learned[name] for name in learned.keys() - added}, zeros)
    assert_same(of["error"], of["zeros"])
    # What was begun without one may go on with one, and be the beginning of a run with one; or the other way round.
    onward = {**settings, "run__resume": of["error"] / "checkpoints" / "step-00000002", "run__overwrite": "true"}
    resumed = tensors_of(run_alone(places, run__name="missing-error", data__missing="learned", **onward))
    assert_same_tensors({name: resumed[name] for name in zeros}, zeros)
    for before, after in (("zeros", "learned"), ("learned", "error")):
        start = {"run__warm_start": of[before], "data__missing": after, "train__max_steps": 1}
        run_alone(places, run__name=f"{after}-after-{before}", **start)
    for policy in ("zeros", "error"):
        with raises(CheckpointError, Problem.NO_IMAGE_VECTOR_TRAINED):
            run_alone(places, run__name="missing-learned", data__missing=policy, run__resume="latest", **settings)


@pytest.fixture(scope="module")
def bare_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandingRanks]:
    """Two ranks of torch in which `import horovod` fails."""
    folder, said = (tmp_path_factory.mktemp(name) for name in ("bare", "bare-ranks"))
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['horovod'] = None\n")
    bare = {"PYTHONPATH": os.pathsep.join([str(folder), environment()["PYTHONPATH"]])}
    with forks_of_ranks(bare) as forks, standing_ranks(forks, said, TorchRanks(2)) as ranks:
        yield ranks


@pytest.mark.services
@pytest.mark.usefixtures("undrawn")
def test_training_and_evaluation_without_horovod(
    places: Places, tmp_path: Path, bare_ranks: StandingRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = places.settings(run__dir=tmp_path, run__name="two", train__max_steps=2)
    said = bare_ranks.run("-m", "trainer.main", "--set", *settings)
    assert "2 ranks on cpu, collectives: Gloo by torch.distributed" in said
    evaluate = ("-m", "trainer.evaluate", tmp_path / "two", "--bootstrap", 0)
    assert " impressions, 2 ranks\n" in bare_ranks.run(*evaluate)
    monkeypatch.setitem(sys.modules, "horovod", None)  # what is imported at once has been imported by the two ranks
    code, said = run_here(list(map(str, evaluate)))
    assert code == 0 and " impressions, 1 rank\n" in said, said
