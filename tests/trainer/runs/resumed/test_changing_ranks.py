"""Killed runs that go on with other numbers of ranks, from a disk or S3: no step, sample or row is lost or repeated."""

import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from featurestore.published.paths import RunPath, run_path
from featurestore.published.versions import FILES, PublishedFile, publish, upload
from featurestore.storage.storage import Storage
from tests.proxy import Fault, Request, proxy_before
from tests.ranks import Forks, TorchRanks, ranks_of
from tests.servers import environment_of
from tests.trainer.checkpoints import steps_of, tensors_of
from tests.trainer.conftest import Places
from tests.trainer.runs.resumed.legs import TIMEOUT_S, TOLERANCE, WORKER, Killed, assert_no_step_or_sample_is_lost
from trainer.comm import SoloComm
from trainer.config import load_config
from trainer.evaluation.predict import predict_run
from trainer.runs import open as open_module
from trainer.runs.checkpoint import read_state
from trainer.runs.folder import find_checkpoint
from trainer.runs.open import Run, open_run
from trainer.samples.index import SampleIndex


def assert_same_in_float64(found: RunPath, expected: Path) -> None:
    """All that is trained, and its predictions apart: rounding that the model cannot see is none that a user sees."""
    mine, theirs = tensors_of(found), tensors_of(expected)
    assert mine.keys() == theirs.keys()
    assert theirs["user/0000/weight"].dtype == torch.float64
    apart = {name: float((mine[name].double() - theirs[name].double()).abs().max()) for name in theirs}
    assert {name: value for name, value in apart.items() if value > TOLERANCE} == {}
    logits = [predict_run(run).logit_N for run in (found, expected)]
    np.testing.assert_allclose(*logits, rtol=0, atol=TOLERANCE)


@pytest.mark.services
@pytest.mark.cluster
@pytest.mark.long(20)
@pytest.mark.parametrize(
    ("optim", "ranks", "last"),
    [
        ({"optim__ids": "adam"}, (TorchRanks(3), 1), "two_ranks"),
        pytest.param({"optim__ids": "rowwise_adagrad"}, (4, 1), "two_ranks", marks=pytest.mark.slow),
        pytest.param({"optim__ids": "adam"}, (3, 1), "two_ranks", marks=pytest.mark.slow),
        pytest.param({"optim__ids": "adam"}, (TorchRanks(3), 2), "two_torch_ranks", marks=pytest.mark.slow),
    ],
    ids=["torchrun, alone, horovod", "plain", "adam", "torchrun, horovod, torch"],
)
def test_killed_with_other_ranks_each_time(
    settings_of: Callable[..., list[str]],
    tmp_path: Path,
    optim: dict[str, Any],
    ranks: tuple[int, int],
    last: str,
    forks: Forks,
    request: pytest.FixtureRequest,
) -> None:
    steps = 40  # most of two epochs
    undisturbed = Killed(tmp_path / "undisturbed", settings_of(tmp_path / "undisturbed", steps, 1000, **optim))
    whole = undisturbed.leg(0, ranks=1)
    killed = Killed(tmp_path / "killed", settings_of(tmp_path / "killed", steps, 5, **optim))
    first = forks if isinstance(ranks[0], TorchRanks) else None  # the others' launcher is horovodrun itself
    legs = [killed.leg(0, ranks[0], die_at=28, forks=first), killed.leg(1, ranks[1], die_at=34, forks=forks)]
    request.getfixturevalue(last).run(*killed.words(2))
    legs.append(killed.seen(2, 2))
    assert [leg.first_step for leg in legs] == [1, 26, 31]
    assert_no_step_or_sample_is_lost(legs, whole, steps)
    assert_same_in_float64(killed.run, undisturbed.run)
    assert read_state(find_checkpoint(killed.run)).num_ranks == 2


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_thousand_steps_and_ten_kills_at_any_moment(settings_of: Callable[..., list[str]], tmp_path: Path) -> None:
    """A rank or the launcher gets SIGKILL from outside, whatever it does just then."""
    steps, draw = 2_040, random.Random(0)
    undisturbed = Killed(tmp_path / "undisturbed", settings_of(tmp_path / "undisturbed", steps, 10_000))
    whole = undisturbed.leg(0, ranks=1)
    killed = Killed(tmp_path / "killed", settings_of(tmp_path / "killed", steps, 50))
    legs = []
    for number, ranks in zip(range(10), itertools.cycle([4, 1, 2]), strict=False):
        process, end_s = killed.start(number, ranks), time.monotonic() + TIMEOUT_S
        while max(steps_of(killed.run), default=0) < (number + 1) * steps // 12:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end_s
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.3))
        victims = [process.pid] if ranks == 1 else [process.pid, *(each.pid for each in ranks_of(process, str(WORKER)))]
        job = psutil.Process(process.pid).children(recursive=True)
        psutil.Process(draw.choice(victims)).kill()
        process.communicate(timeout=TIMEOUT_S)
        assert process.returncode != 0
        _, alive = psutil.wait_procs(job, timeout=60)
        assert alive == []
        legs.append(killed.seen(number, ranks))
    legs.append(killed.leg(10, ranks=2))
    assert_no_step_or_sample_is_lost(legs, whole, steps)
    assert_same_in_float64(killed.run, undisturbed.run)


def uploaded(samples: Path, storage: Storage) -> dict[str, PublishedFile]:
    """All samples, at places of their own; by the names that a version is to give them."""
    return {str(file.relative_to(samples)): upload(storage, file, file.name) for file in samples.glob("*/*.parquet")}


@pytest.mark.cluster
@pytest.mark.long(25)
def test_cut_connections_and_dead_ranks_lose_and_repeat_no_sample(
    places: Places, settings_of: Callable[..., list[str]], s3_endpoint: str, s3_url: str, tmp_path: Path, forks: Forks
) -> None:
    """Two ranks take samples published on S3, and one goes on when they have died, from S3 alone: its cache is empty,
    as another machine's would be. Step by step they take those of one rank on a disk, have its losses, and end with its
    numbers. Checkpoints are written beside."""
    steps = 40  # most of two epochs
    publish(Storage(s3_url), uploaded(places.folder / "samples", Storage(s3_url)))
    on_disk = Killed(tmp_path / "disk", settings_of(tmp_path / "disk", steps, 1000))
    whole = on_disk.leg(0, ranks=1)
    reads = 0

    def cut(request: Request) -> Fault | None:
        nonlocal reads
        if request.method != "GET" or f"/{FILES}/" not in request.path:
            return None
        reads += 1
        return {3: Fault.CUT, 6: Fault.CUT_ANSWER}.get(reads % 8)

    def started_at(place: str) -> Killed:
        beside = {"train__checkpoint_beside": True, "train__checkpoint_every_s": 1}
        changes = {"data__samples": s3_url, "data__cache_dir": tmp_path / place, **beside}
        return Killed(tmp_path / "far", settings_of(f"{s3_url}/runs", steps, 5, **changes))

    with proxy_before(s3_endpoint) as proxy, environment_of(proxy.endpoint):
        proxy.rule = cut
        first = started_at("there").leg(0, ranks=2, die_at=33, forks=forks)
        second = started_at("elsewhere").leg(1, ranks=1)
    assert first.first_step == 1 < second.first_step <= 33
    assert_no_step_or_sample_is_lost([first, second], whole, steps)
    assert min(proxy.faults.count(fault) for fault in (Fault.CUT, Fault.CUT_ANSWER)) > 5
    assert_same_in_float64(run_path(f"{s3_url}/runs/run"), on_disk.run)


def test_a_run_is_of_one_version(places: Places, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another one is published between its training and its test samples; its checkpoint knows the next."""
    samples, storage = places.folder / "samples", Storage(s3_url)
    files = uploaded(samples, storage)
    publish(storage, files)
    opened = open_module.open_index
    moved = min(name for name in files if name.startswith("train/"))

    def publishes_before_the_second(*arguments: Any) -> SampleIndex:
        if arguments[2] == "test":
            publish(storage, {name.replace(moved, "test/moved.parquet"): file for name, file in files.items()})
        return opened(*arguments)

    def run_on(place: object, name: str) -> Run:
        settings = places.settings(data__samples=place, run__dir=tmp_path, run__name=name, train__max_steps=9)
        run = open_run(load_config(settings=settings), SoloComm())
        run.close()
        return run

    def labels_of(run: Run) -> list[list[Any]]:
        return [[each.label_B.tolist() for each in reader.batches()] for reader in (run.train_reader, run.test_reader)]

    on_disk = run_on(samples, "disk")
    with monkeypatch.context() as patched:
        patched.setattr(open_module, "open_index", publishes_before_the_second)
        run = run_on(s3_url, "s3")
    assert labels_of(run) == labels_of(on_disk)
    assert run.origin.data["samples_digest"] == on_disk.origin.data["samples_digest"]  # a copy of samples is the same
    later = run_on(s3_url, "later")
    assert later.test_reader.num_samples > run.test_reader.num_samples
    assert later.origin.data["samples_digest"] != run.origin.data["samples_digest"]
