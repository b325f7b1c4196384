"""Training on samples that lie on S3, where connections are cut while it reads, and ranks die."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from featurestore.published.paths import run_path
from featurestore.published.versions import FILES, PublishedFile, publish, upload
from featurestore.storage.storage import Storage
from tests.proxy import Fault, Request, proxy_before
from tests.ranks import Forks
from tests.servers import environment_of
from tests.trainer.checkpoints import tensors_of
from tests.trainer.runs.resumed.legs import TOLERANCE, Killed, assert_no_step_or_sample_is_lost
from trainer.comm import SoloComm
from trainer.config.config import load_config
from trainer.runs import open as open_module
from trainer.runs.open import Run, open_run
from trainer.samples.index import SampleIndex

Places = Any


def uploaded(samples: Path, storage: Storage) -> dict[str, PublishedFile]:
    """All samples, at places of their own; by the names that a version is to give them."""
    return {str(file.relative_to(samples)): upload(storage, file, file.name) for file in samples.glob("*/*.parquet")}


def test_cut_connections_and_dead_ranks_lose_and_repeat_no_sample(
    places: Places,
    settings_of: Callable[..., list[str]],
    s3_endpoint: str,
    s3_url: str,
    tmp_path: Path,
    forks: Forks,
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
        changes = {"data__samples": s3_url, "data__cache_dir": tmp_path / place, "train__checkpoint_beside": True}
        changes |= {"train__checkpoint_every_s": 1}
        return Killed(tmp_path / "far", settings_of(f"{s3_url}/runs", steps, 5, **changes))

    with proxy_before(s3_endpoint) as proxy, environment_of(proxy.endpoint):
        proxy.rule = cut
        first = started_at("there").leg(0, ranks=2, die_at=33, forks=forks)
        second = started_at("elsewhere").leg(1, ranks=1)
        far = tensors_of(run_path(f"{s3_url}/runs/run"))
    assert first.first_step == 1 < second.first_step <= 33
    assert_no_step_or_sample_is_lost([first, second], whole, steps)
    assert min(proxy.faults.count(fault) for fault in (Fault.CUT, Fault.CUT_ANSWER)) > 5
    near = tensors_of(on_disk.run)
    assert far.keys() == near.keys()
    assert max(float((far[name].double() - near[name].double()).abs().max()) for name in far) < TOLERANCE


def test_a_run_has_the_files_of_one_version(
    places: Places, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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

    on_disk = run_on(samples, "disk")
    monkeypatch.setattr(open_module, "open_index", publishes_before_the_second)
    run = run_on(s3_url, "s3")
    monkeypatch.undo()
    for mine, same in ((run.train_reader, on_disk.train_reader), (run.test_reader, on_disk.test_reader)):
        assert mine.num_samples == same.num_samples
        labels, expected = ([batch.label_B.tolist() for batch in reader.batches()] for reader in (mine, same))
        assert labels == expected
    assert run.origin.data["samples_digest"] == on_disk.origin.data["samples_digest"]  # a copy of samples is the same
    later = run_on(s3_url, "later")
    assert later.test_reader.num_samples > run.test_reader.num_samples
    assert later.origin.data["samples_digest"] != run.origin.data["samples_digest"]
