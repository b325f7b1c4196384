"""Processes that die: the job, a worker, a worker of every image that is poison, the scheduler. The rows stay right."""

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import dask
import numpy as np
import psutil
import pytest
import xxhash
from distributed import Client, LocalCluster, Worker, WorkerPlugin
from distributed.utils import get_mp_context

from featurestore.store import FeatureStore
from pipeline.cluster.tasks import WORKER_CONFIG
from pipeline.features import part as parts
from pipeline.problems import Problem
from tests.cli import begun, wait_until
from tests.featurestore.contents import metadata_of

BIN, JOBS = Path(sys.executable).parent, Path(__file__).parents[3] / "jobs"
KNOWN_TO_ALL = "alexnet:flatten"
"""A network that processes without the tests' modules have; of few layers: each worker builds it again."""
SLOW_DECODER = """
import time
from pipeline.features import part as parts
def slow(*args, decode=parts.prepare):
    time.sleep(0.25)
    return decode(*args)
parts.prepare = slow
"""

pytestmark = [pytest.mark.long(18), pytest.mark.cluster]
soon = partial(wait_until, said=lambda: "nothing happened", timeout_s=120)
PARTS = {"batch_size": 2, "part_size": 2}


@pytest.fixture
def draw_some(write):
    """Draws pictures of these numbers into the folder of images."""
    return lambda numbers, seed=0: write(**{f"{number:02d}": number + seed for number in numbers})


def assert_same_rows(store, calm):
    """Everything that two stores say of each image; features but for the rounding that other batches bring."""
    mine, theirs = (FeatureStore.open(place).snapshot() for place in (store, calm))
    table = metadata_of(mine).sort_by("key")
    assert table.to_pylist() == metadata_of(theirs).sort_by("key").to_pylist()
    keys_N = table["key"].to_numpy()
    features_ND, expected_ND = mine.get(keys_N), theirs.get(keys_N)
    np.testing.assert_allclose(features_ND, expected_ND, rtol=1e-3, atol=1e-5 * expected_ND.max())


def num_parts(store):
    return len(list(store.glob("staging/*/*.parquet")))


def start_refresh(folder, store, **environment):
    words = ["--images", folder, "--store", store, "--batch-size", "2", "--part-size", "1"]
    own = {"OMP_WAIT_POLICY": "PASSIVE", **environment}
    return begun(sys.executable, JOBS / "refresh_features.py", *words, env=os.environ | own)


def kill(process):
    """All of a process's group, its children included."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_killed_job_goes_on_with_the_parts_that_it_had(make, run, draw_some, tmp_path):
    folder, store = draw_some(range(4)), tmp_path / "features"
    make(folder, backbone=KNOWN_TO_ALL, **PARTS)
    draw_some(range(2, 22), seed=50)
    slow = tmp_path / "slow.py"
    slow.write_text(SLOW_DECODER)
    job = start_refresh(folder, store, DASK_DISTRIBUTED__WORKER__PRELOAD=str(slow))
    try:
        soon(lambda: num_parts(store) >= 2 or job.poll() is not None)
        workers = psutil.Process(job.pid).children(recursive=True)
        processes = [psutil.Process(job.pid), *workers]
        with_torch = [any("libtorch" in each.path for each in one.memory_maps()) for one in processes]
        assert not with_torch[0] and any(with_torch), "Torch is of workers"
    finally:
        job.kill()
        job.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    kill(job)
    assert not alive
    num_staged = num_parts(store)
    assert 2 <= num_staged < 20
    assert FeatureStore.open(store).snapshot().version == 1

    draw_some([22])  # the listing may change meanwhile
    summary = run(folder, batch_size=2, part_size=1)
    assert (summary.num_new, summary.num_changed, summary.num_unchanged) == (19, 2, 2)
    assert (summary.num_resumed, summary.num_computed, summary.snapshot) == (num_staged, 21, 2)
    make(folder, "calm", backbone=KNOWN_TO_ALL, **PARTS)
    assert_same_rows(store, tmp_path / "calm")
    assert not num_parts(store)


class Crash(WorkerPlugin):
    """Lets the workers' decoder die of some images, as a bug in a C library would; comes back with restarted workers.

    `once` is a folder: of the image whose digest is the name of a file there, one worker dies.
    """

    def __init__(self, once):
        self.once = once

    def setup(self, worker):
        decode, parts.torch_threads = parts.prepare, lambda workers_per_host: 1

        def prepare(data, *args):
            flag = self.once / xxhash.xxh3_64_hexdigest(data)
            if data.startswith(b"deadly") or flag.exists():
                flag.unlink(missing_ok=True)
                os.kill(os.getpid(), signal.SIGKILL)
            return decode(data, *args)

        parts.prepare = prepare

    def mark(self, path):
        """One worker will die of the image at `path`."""
        (self.once / xxhash.xxh3_64_hexdigest(path.read_bytes())).touch()


@contextlib.contextmanager
def preloaded(*modules):
    """Workers are forked from one process, which has imported these modules: those that die start again at once.

    It is another one than that of small processes, which other tests may have started here.
    """
    context, server = get_mp_context(), forkserver._forkserver
    before = server._preload_modules
    server._stop()
    context.set_forkserver_preload(list(modules))
    try:
        yield
    finally:
        server._stop()
        context.set_forkserver_preload(before)


def test_whichever_workers_die_only_the_image_that_kills_each_time_is_blamed(make, run, draw_some, tmp_path):
    folder, store = draw_some(range(1, 9)), tmp_path / "features"
    make(folder, "calm", **PARTS)
    (tmp_path / "once").mkdir()
    crash = Crash(tmp_path / "once")
    crash.mark(folder / "05.jpg")
    forked = {"distributed.worker.multiprocessing-method": "forkserver"}
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1, **WORKER_CONFIG, **forked}),
        preloaded("distributed", "pipeline.features.part", "tests.pipeline.network.tiny"),
        LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs="CRITICAL"
        ) as cluster,
        Client(cluster) as workers,
    ):
        workers.register_plugin(crash)
        assert make(folder, cluster=workers, **PARTS).bad == ()
        assert not list(crash.once.iterdir())
        assert_same_rows(store, tmp_path / "calm")

        draw_some(range(2, 6), seed=50)
        (folder / "06.jpg").write_bytes(b"deadly and changed")
        cluster.scheduler.allowed_failures = 0  # whoever is near is suspected
        summary = run(folder, workers, batch_size=2, part_size=3)
    blame = "brings down the process that decodes it"
    assert [bad[1:3] for bad in summary.bad] == [("06.jpg", blame)]
    assert (summary.num_changed, summary.num_unchanged, summary.num_gone) == (4, 3, 0)
    (folder / "06.jpg").unlink()
    make(folder, "calm_too", **PARTS)
    assert_same_rows(store, tmp_path / "calm_too")


@contextlib.contextmanager
def worker_here(file, monkeypatch):
    """A slow worker of the scheduler of a file, in a thread of this process, which has Torch already."""

    async def work():
        async with Worker(scheduler_file=str(file), host="127.0.0.1", nthreads=1, dashboard=False) as worker:
            await worker.finished()

    thread = threading.Thread(target=asyncio.run, args=(work(),))
    with monkeypatch.context() as patch:
        patch.setattr(parts, "prepare", lambda *args, decode=parts.prepare: time.sleep(0.15) or decode(*args))
        thread.start()
        try:
            yield
        finally:
            thread.join(60)
    assert not thread.is_alive(), "it outlives its scheduler"


def test_a_killed_scheduler_ends_the_job_and_the_next_one_goes_on(make, run, draw_some, tmp_path, monkeypatch):
    folder, store = draw_some(range(4)), tmp_path / "features"
    make(folder, **PARTS)
    draw_some(range(2, 14), seed=50)
    (folder / "00.jpg").unlink()
    file = tmp_path / "scheduler.json"
    options = ["--scheduler-file", file, "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    scheduler = begun(BIN / "dask", "scheduler", *options)
    with contextlib.ExitStack() as stack:
        stack.callback(kill, scheduler)
        soon(file.exists)
        stack.enter_context(worker_here(file, monkeypatch))
        stack.callback(kill, scheduler)
        job = start_refresh(folder, store, DASK_SCHEDULER_FILE=str(file))
        stack.callback(kill, job)
        soon(lambda: num_parts(store) >= 2 or job.poll() is not None)
        with Client(scheduler_file=str(file), set_as_default=False) as looking:
            imported = looking.run_on_scheduler(lambda: list(__import__("sys").modules))
        assert "pipeline.cluster.tasks" in imported and "torch" not in imported, "Torch is of workers"
        kill(scheduler)
        out, err = job.communicate(timeout=100)
    assert (job.returncode, out) == (1, ""), err
    assert f"error: {Problem.SCHEDULER_LOST}" in err
    num_staged = num_parts(store)
    assert 2 <= num_staged < 12
    assert FeatureStore.open(store).snapshot().version == 1

    summary = run(folder, batch_size=2, part_size=1)
    assert (summary.num_new, summary.num_changed, summary.num_unchanged, summary.num_gone) == (10, 2, 1, 1)
    assert (summary.num_resumed, summary.bad, summary.snapshot) == (num_staged, (), 2)
    make(folder, "calm", **PARTS)
    assert_same_rows(store, tmp_path / "calm")
