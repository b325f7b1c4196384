"""Processes that die: the job itself, and workers that an image brings down."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dask
import pytest
from distributed import Client, LocalCluster, WorkerPlugin

from featurestore.store import FeatureStore
from pipeline.extract import ExtractOptions, extract

JOB = Path(__file__).parents[2] / "jobs/extract_features.py"
OPTIONS = ["--weights", "random:0", "--dtype", "float32", "--compute-dtype", "float32"]

pytestmark = [pytest.mark.filterwarnings("ignore:weights random"), pytest.mark.usefixtures("one_torch_thread")]


def options(images, store, part_size):
    return ExtractOptions(
        str(images), str(store), "random:0", "float32", "float32", batch_size=2, part_size=part_size, num_shards=4
    )


def wait_until(condition, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def children_of(pid):
    """Processes below `pid`, all generations."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parent_of = dict(tuple(map(int, line.split())) for line in listed.splitlines())
    found = {pid}
    while grown := {child for child, parent in parent_of.items() if parent in found} - found:
        found |= grown
    return found - {pid}


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_job_goes_on_with_the_parts_that_it_had(client, counted, draw, encode, tmp_path):
    images, store = tmp_path / "images", tmp_path / "features"
    images.mkdir()
    for number in range(12):
        (images / f"{number:02d}.jpg").write_bytes(encode(draw(number)))
    command = [sys.executable, JOB, "--images", images, "--store", store, *OPTIONS]
    command += ["--batch-size", "2", "--part-size", "2", "--num-shards", "4"]
    job = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})

    def parts():
        return list(store.glob("staging/*/*.parquet"))

    try:
        wait_until(lambda: len(parts()) >= 2 or job.poll() is not None)
        workers = children_of(job.pid)
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
    wait_until(lambda: not any(map(alive, workers)))
    num_staged = 2 * len(parts())
    assert 4 <= num_staged < 12
    assert FeatureStore.open(store).snapshot().version == 0

    summary = extract(options(images, store, part_size=2), client)
    assert sum(counted) == 12 - num_staged
    assert (summary.num_resumed, summary.num_computed) == (num_staged, 12)
    assert FeatureStore.open(store).snapshot().num_rows == 12
    assert not parts()


def test_an_image_that_brings_workers_down_is_quarantined_and_no_innocent(draw, encode, tmp_path):
    class Crash(WorkerPlugin):
        """Makes the workers' decoder die of one image, as a bug in a C library would; lives on in restarted workers."""

        def setup(self, worker):
            from pipeline import parts

            decode, parts.torch_threads = parts.prepare, lambda workers_per_host: 1
            parts.prepare = lambda data: os._exit(1) if data.startswith(b"deadly") else decode(data)

    images, store = tmp_path / "images", tmp_path / "features"
    images.mkdir()
    (images / "0.jpg").write_bytes(b"deadly")
    for number in range(1, 6):
        (images / f"{number}.jpg").write_bytes(encode(draw(number)))
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        LocalCluster(
            n_workers=1, threads_per_worker=2, dashboard_address="127.0.0.1:0", silence_logs="CRITICAL"
        ) as cluster,
        Client(cluster) as client,
    ):
        client.register_plugin(Crash())
        summary = extract(options(images, store, part_size=2), client)
    assert [bad[1:3] for bad in summary.bad] == [("0.jpg", "brings down the process that decodes it")]
    assert FeatureStore.open(store).snapshot().num_rows == 5
