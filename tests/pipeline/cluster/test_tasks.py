"""A cluster for tasks: the configured one or a local one, what is checked of it, and the order of results."""

import contextlib
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import dask.system
import numpy as np
import psutil
import pytest
from distributed import Client

from featurestore.errors import KeyCollisionError, StorageError
from pipeline.cluster.tasks import check_address, check_packages, connect, open_client, run_all, run_tasks
from pipeline.errors import ClusterError, InsecureSchedulerError, SampleError, SchedulerUnreachableError
from pipeline.problems import Problem
from tests.cli import begun
from tests.commands.calls import call
from tests.raised import raises, told

pytestmark = pytest.mark.services


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = ("DASK_SCHEDULER_ADDRESS", "DASK_SCHEDULER_FILE", "DASK_CROSSMEDIA__INSECURE_SCHEDULER")
    for name in (*variables, "CROSSMEDIA_LOCAL_CLUSTER"):
        monkeypatch.delenv(name, raising=False)


def tells_late_heartbeats() -> bool:
    """Say whether a worker logs that the scheduler has ended before its last heartbeat."""
    late = logging.makeLogRecord({"msg": "Failed to communicate with scheduler during heartbeat."})
    return bool(logging.getLogger("distributed.worker").filter(late))


def test_local_cluster_has_the_size_asked_for_and_leaves_no_process_when_the_job_fails():
    """Its workers do not profile themselves: on Python 3.11 the profiler can stop the whole worker for ever."""
    with pytest.raises(ZeroDivisionError), connect(workers=2, threads_per_worker=3, memory_limit="1GB") as client:
        info = client.scheduler_info()["workers"].values()
        assert [worker["nthreads"] for worker in info] == [3, 3]
        assert {worker["memory_limit"] for worker in info} == {1_000_000_000}
        assert client.scheduler.address.startswith("tcp://127.0.0.1:")
        assert client.dashboard_link.startswith("http://127.0.0.1:")
        assert client.scheduler_comm.interval < 0.01  # by default tasks wait for 10 ms
        assert client.submit(sum, [1, 2]).result() == 3
        callbacks = client.run(lambda dask_worker: list(dask_worker.periodic_callbacks))
        assert all("profile" not in names and "heartbeat" in names for names in callbacks.values())
        assert set(client.run(os.environ.get, "MALLOC_TRIM_THRESHOLD_").values()) == {str(64 << 20)}
        assert set(client.run(tells_late_heartbeats).values()) == {False}
        pids = list(client.run(os.getpid).values())
        assert len(set(pids)) == 2
        _ = 1 / 0
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_scheduler_that_cannot_be_reached_is_named_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, started = tmp_path / "scheduler.json", time.monotonic()
    monkeypatch.setenv("DASK_SCHEDULER_FILE", str(file))
    for content in (None, "", "[]", "{}"):
        if content is not None:
            file.write_text(content)
        with raises(SchedulerUnreachableError, Problem.NO_SCHEDULER, where=re.compile(f" {file}$")):
            connect(timeout_s=0.1).__enter__()
    monkeypatch.delenv("DASK_SCHEDULER_FILE")
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://127.0.0.1:9")
    with raises(SchedulerUnreachableError, Problem.NO_SCHEDULER, where="tcp://127.0.0.1:9"):
        connect(timeout_s=0.5).__enter__()
    assert time.monotonic() - started < 8
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tls://127.0.0.1:9")
    with raises(ClusterError, Problem.NO_CERTIFICATES, where="tls://127.0.0.1:9"), connect():
        pass


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", Problem.NOT_A_SCHEDULER),
        (bytes(64), Problem.NOT_A_SCHEDULER),
        (b"", Problem.SILENT.of(2)),
    ],
)
def test_another_service_at_the_address_is_named(words: bytes, reason: str):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        held: list[socket.socket] = []

        def serve() -> None:
            with contextlib.suppress(OSError):  # the server is closed
                while True:
                    held.append(server.accept()[0])
                    held[-1].sendall(words)

        threading.Thread(target=serve, daemon=True).start()
        started = time.monotonic()
        unreachable = raises(SchedulerUnreachableError, Problem.NO_SCHEDULER, where=address, reason=reason)
        with unreachable, open_client(address, 1):
            pass
        assert time.monotonic() - started < 8
        for each in held:
            each.close()


INTERRUPTED_JOB = """
import os, time
from pipeline.cluster.tasks import connect
with connect(workers=1) as client:
    try:
        print(*client.run(os.getpid).values(), flush=True)
        for _ in range(1200):  # a signal just before a sleep is seen after it
            time.sleep(0.05)
    except KeyboardInterrupt:
        print("still working:", client.submit(sum, [1, 2]).result(timeout=10), flush=True)
"""


def test_ctrl_c_reaches_the_job_and_not_its_workers(tmp_path: Path):
    """The job is a script as users write it: its workers do not run it again, without an `if __name__ == ...`."""
    script = tmp_path / "job.py"
    script.write_text(INTERRUPTED_JOB)
    job = begun(sys.executable, script)
    worker = int(job.stdout.readline())
    os.killpg(job.pid, signal.SIGINT)  # what a terminal does
    out, err = job.communicate(timeout=20)
    assert (job.returncode, out) == (0, "still working: 3\n"), err
    assert "Traceback" not in err
    assert not psutil.pid_exists(worker)


@pytest.fixture
def listener():
    """A socket on an address of this machine that others reach; who connects there is in its queue."""
    found = [each.address for card in psutil.net_if_addrs().values() for each in card if each.family == socket.AF_INET]
    beyond = [address for address in found if not address.startswith("127.")]
    if not beyond:
        pytest.skip("this machine has no address beyond loopback")
    with socket.create_server((beyond[0], 0)) as server:
        server.settimeout(0.2)
        yield server


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()
    return f"tcp://{host}:{port}"


def was_called(listener: socket.socket) -> bool:
    with contextlib.suppress(TimeoutError):
        listener.accept()[0].close()
        return True
    return False


@pytest.mark.parametrize("by", ["variable", "file", "configuration"])
def test_scheduler_beyond_loopback_is_refused_before_anything_is_sent(
    by: str, listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    address, file = address_of(listener), tmp_path / "scheduler.json"
    file.write_text(json.dumps({"address": address}))
    if by == "variable":
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", address)
    elif by == "file":
        monkeypatch.setenv("DASK_SCHEDULER_FILE", str(file))
    with dask.config.set({"scheduler-address": address} if by == "configuration" else {}):
        values = {"where": address, "variable": "DASK_CROSSMEDIA__INSECURE_SCHEDULER"}
        with raises(InsecureSchedulerError, Problem.INSECURE_SCHEDULER, **values):
            connect(timeout_s=0.5).__enter__()
        assert not was_called(listener)
        for refused in (False, 0, "yes", ""):
            with dask.config.set({"crossmedia.insecure-scheduler": refused}), pytest.raises(InsecureSchedulerError):
                connect(timeout_s=0.5).__enter__()
        listener.close()  # the client would wait for the answer of one that never gives it
        with dask.config.set({"crossmedia.insecure-scheduler": True}), pytest.raises(SchedulerUnreachableError):
            connect(timeout_s=0.5).__enter__()


JOBS = {
    "extract_features": ["--images", "x", "--store", "x", "--weights", "random:0"],
    "refresh_features": ["--images", "x", "--store", "x"],
    "build_samples": ["--logs", "x", "--samples", "x"],
    "import_features": ["--from", "x.npy", "--keys", "keys.npy", "--store", "x"],
    "import_xdl": ["--from", "x", "--samples", "x"],
}


@pytest.mark.parametrize("job", JOBS)
def test_jobs_alone_refuse_it_too(job: str, listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    np.save(tmp_path / "x.npy", np.zeros((2, 4), np.float32))
    np.save(tmp_path / "keys.npy", np.arange(2))
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", address_of(listener))
    done = call([f"jobs/{job}", *JOBS[job]])
    assert (done.code, done.trace) == (2, ""), done.err
    lines = [line for line in done.err.splitlines() if "random:0" not in line]
    insecure = told(Problem.INSECURE_SCHEDULER, where=address_of(listener))
    assert len(lines) == 1 and re.fullmatch(f"error: {insecure}", lines[0])
    assert not was_called(listener)


def test_an_open_address_beyond_loopback_is_refused_and_no_other(monkeypatch):
    """A name counts by what it resolves to."""
    loopback = ["tcp://127.0.0.1:1", "127.8.9.1:1", "tcp://localhost:1", "tcp://[::1]:1"]
    for address in (*loopback, "tls://192.0.2.1:8786", "wss://192.0.2.1:8786", "inproc://192.0.2.1/7/1"):
        check_address(address)
    for address in ("tcp://192.0.2.1:8786", "192.0.2.1:8786", "ws://192.0.2.1:1", "tcp://0.0.0.0:1"):
        with raises(InsecureSchedulerError, Problem.INSECURE_SCHEDULER, where=address):
            check_address(address)
    for address in ("tcp://no-such-host.invalid:1", "gopher://127.0.0.1:1", "tcp://[::1"):
        with raises(SchedulerUnreachableError, Problem.NO_SCHEDULER, where=address):
            check_address(address)
    found = {"inside": ["127.0.0.1", "::1"], "outside": ["192.0.2.1"], "both": ["127.0.0.1", "192.0.2.1"]}
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: [(0, 0, 0, "", (ip, 0)) for ip in found[host]])
    check_address("tcp://inside:8786")
    for host in ("outside", "both"):
        with raises(InsecureSchedulerError, Problem.INSECURE_SCHEDULER, where=f"tcp://{host}:8786"):
            check_address(f"tcp://{host}:8786")


def test_workers_without_this_project_are_named(cluster, monkeypatch):
    with Client(cluster) as client:
        check_packages(client)
        monkeypatch.setattr("pipeline.cluster.tasks.IMPORT_OURS", "import featurestore, no_such_package")
        with raises(ClusterError, Problem.NOT_INSTALLED, count=len(cluster.workers)) as caught:
            check_packages(client)
    named = str(caught.value.values["workers"])
    assert all(f"{worker.address}: " in named for worker in cluster.workers.values()) and "no_such_package" in named


def fail(kind, path):
    """Note the attempt in a file, and raise."""
    with path.open("a") as file:
        file.write("tried\n")
    raise kind("no good")


def fail_beside(path, number):
    """Task 0 raises while task 1 runs, which ends a while later; each leaves a file."""
    (path / f"{number} started").touch()
    if number == 0:
        while not (path / "1 started").exists():
            time.sleep(0.01)
        raise SampleError("no good")
    time.sleep(0.5)
    (path / f"{number} ended").touch()


def test_results_come_in_the_order_of_the_calls(client):
    powers = run_all(client, "powers", pow, [(2, number) for number in range(40)], "no advice")
    assert powers == [2**number for number in range(40)]
    assert dict(run_tasks(client, pow, [(3, 1), (3, 2)])) == {0: 3, 1: 9}


@pytest.mark.parametrize(("kind", "tries"), [(SampleError, 1), (KeyCollisionError, 1), (StorageError, 2), (OSError, 2)])
def test_a_mistake_is_raised_at_once_and_another_error_is_tried_again(client, tmp_path, kind, tries):
    with pytest.raises(kind, match="no good"):
        run_all(client, "failing", fail, [(kind, tmp_path / "tried")], "no advice")
    assert (tmp_path / "tried").read_text().splitlines() == ["tried"] * tries


def test_workers_do_not_log_an_error_of_ours(tmp_path, capfd):
    with connect(workers=1) as client:
        for kind in (StorageError, OSError):
            with pytest.raises(kind, match="no good"):
                run_all(client, "failing", fail, [(kind, tmp_path / "tried")], "no advice")
    logged = capfd.readouterr().err
    assert "StorageError" not in logged and "Compute Failed" in logged and "OSError" in logged


def test_what_runs_beside_a_mistake_ends_before_it_is_raised_and_nothing_starts_then(cluster, tmp_path):
    with Client(cluster) as client, pytest.raises(SampleError, match="no good"):
        run_all(client, "failing", fail_beside, [(tmp_path, number) for number in range(12)], "no advice")
    left = {path.name for path in tmp_path.iterdir()}
    started, ended = ({name.split()[0] for name in left if name.endswith(how)} for how in (" started", " ended"))
    assert "1" in ended and started == {"0", *ended}
    time.sleep(1)
    assert {path.name for path in tmp_path.iterdir()} == left
