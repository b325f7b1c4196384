"""dask-submit as its users run it: a script's output and exit code, signals, what stays; see also tests/commands."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest
from distributed import Client

import pipeline.cluster.submit
from pipeline.problems import Problem
from tests.cli import begun, ran, wait_until
from tests.commands.calls import call
from tests.raised import told

pytestmark = pytest.mark.services
slow = pytest.mark.slow
BIN = Path(sys.executable).parent
OURS = (
    "CROSSMEDIA_LOCAL_CLUSTER", "DASK_CROSSMEDIA__INSECURE_SCHEDULER", "DASK_SCHEDULER_ADDRESS", "DASK_SCHEDULER_FILE",
    "PYTHONUNBUFFERED",
)  # fmt: skip
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in OURS}


def start(*args: object) -> subprocess.Popen[str]:
    return begun(BIN / "dask-submit", *args, env=ENVIRONMENT)


def submit(*args: object, command: str = "dask-submit", **environment: str) -> subprocess.CompletedProcess[str]:
    return ran(BIN / command, *args, env=ENVIRONMENT | environment, timeout=150)


@pytest.fixture
def script(tmp_path: Path):
    def write(body: str) -> Path:
        path = tmp_path / "script.py"
        path.write_text("import json, os, signal, sys, time\nfrom pipeline.cluster.tasks import connect\n" + body)
        return path

    return write


def is_free_of(pids: list[int], patience_s: float = 10.0) -> bool:
    """Whether all processes are gone; a killed one may need a moment."""
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=patience_s)
    return not alive


WHERE = """
if __name__ == "__main__":
    with connect() as client:
        print(json.dumps({
            "args": sys.argv[1:],
            "workers": list(client.run(os.getpid).values()),
            "threads": list(client.nthreads().values()),
            "scheduler": client.scheduler.address,
            "sum": client.submit(sum, [1, 2]).result(),
        }))
    sys.exit(7)
"""


def test_script_runs_on_a_local_cluster_that_ends_with_it(script):
    args = ["--help", "-n", "9", "--", "", "--scheduler=x", "é ü"]
    size = ["-n", 2, "--threads-per-worker", 3, "--memory-limit", "1GB"]
    done = submit("submit", *size, script(WHERE), *args, command="dask")
    assert done.returncode == 7, done.stderr
    told = json.loads(done.stdout)
    assert (told["args"], told["threads"], told["sum"]) == (args, [3, 3], 3)
    assert f"scheduler {told['scheduler']}, workers 2, threads 6" in done.stderr
    assert "dashboard http://127.0.0.1:" in done.stderr
    assert is_free_of(told["workers"])


@pytest.mark.parametrize(
    "by", [*(pytest.param(by, marks=slow) for by in ("option", "variable", "file")), "by variable"]
)
def test_running_scheduler_is_used_and_left_running(by, cluster, script, tmp_path):
    address, file = cluster.scheduler_address, tmp_path / "scheduler.json"
    file.write_text(json.dumps({"address": address}))
    options, environment = {
        "option": (["--scheduler", address], {"DASK_SCHEDULER_ADDRESS": "tcp://127.0.0.1:9"}),
        "variable": ([], {"DASK_SCHEDULER_ADDRESS": address}),
        "file": (["--scheduler-file", file], {"DASK_SCHEDULER_ADDRESS": "tcp://127.0.0.1:9"}),
        "by variable": ([], {"DASK_SCHEDULER_FILE": str(file)}),
    }[by]
    done = submit(*options, "--wait-workers", 2, script(WHERE), **environment)
    assert done.returncode == 7, done.stderr
    assert json.loads(done.stdout)["scheduler"] == address
    with Client(cluster) as client:
        assert len(client.nthreads()) == 2


def test_output_is_streamed(cluster, script):
    process = start("--scheduler", cluster.scheduler_address, script("print('now')\ntime.sleep(120)"))
    began = time.monotonic()
    try:
        assert process.stdout.readline() == "now\n"  # without a flush in the script
        assert time.monotonic() - began < 100  # nor at its end
    finally:
        process.terminate()
        assert process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM


CAREFUL = """
received = []
def note(number, frame):
    received.append(number)
signal.signal(signal.SIGTERM, note)
if __name__ == "__main__":
    with connect() as client:
        print(json.dumps([os.getpid(), *client.run(os.getpid).values()]), flush=True)
        while not received:
            time.sleep(0.05)
        print(json.dumps({"received": received, "sum": client.submit(sum, [1, 2]).result(timeout=10)}))
    sys.exit(5)
"""


@pytest.mark.parametrize("is_handled", [True, False])
def test_signal_reaches_the_script_once_and_the_cluster_outlives_it(is_handled, script):
    """Not handled, it ends the script, also as a container's first process, where it would do nothing by itself."""
    body = CAREFUL if is_handled else CAREFUL.replace("signal.signal(signal.SIGTERM, note)\n", "")
    process = start("-n", 1, script(body))
    pid, *workers = json.loads(process.stdout.readline())
    assert pid == process.pid, "the script takes the place of dask-submit"
    process.terminate()
    out, err = process.communicate(timeout=30)
    assert not is_handled or json.loads(out) == {"received": [signal.SIGTERM], "sum": 3}, err
    assert process.returncode == (5 if is_handled else 128 + signal.SIGTERM), err
    assert is_free_of(workers) and "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=slow)])
def test_signal_before_the_script_runs_ends_dask_submit(number, cluster, script, tmp_path):
    ran, known = tmp_path / "ran", set(cluster.scheduler.clients)
    body = script(f"open({str(ran)!r}, 'w')")
    process = start("--scheduler", cluster.scheduler_address, "--wait-workers", 3, "--timeout", 600, body)
    # Until it waits for workers: on a busy machine its imports alone take seconds.
    wait_until(lambda: not set(cluster.scheduler.clients) <= known, lambda: "it does not connect", 60, process)
    time.sleep(0.3)
    process.send_signal(number)
    _, err = process.communicate(timeout=150)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err and err.count("stopped by Ctrl-C\n") == (number == signal.SIGINT)
    assert not ran.exists()


@pytest.mark.parametrize("delay_s", [pytest.param(0.6, marks=slow), 1.0])
def test_signal_while_the_cluster_starts_leaves_no_process(delay_s, script):
    process = start("-n", 1, script("time.sleep(60)"))
    time.sleep(delay_s)
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)  # negative: before `connect`
    assert is_free_of(children)


def refused(code, *args, body=""):
    """The message of a call that must not run its script, and must be quick; in this process."""
    began = time.monotonic()
    with mock.patch.object(os, "execve", side_effect=AssertionError("the script ran")):
        done = call(["dask-submit", *map(str, args), str(body)])
    assert (done.code, done.out, done.trace) == (code, "", ""), done.err
    assert time.monotonic() - began < 25  # --timeout is 30 by default; the rest is for a busy machine
    return done.err


def test_schedulers_beyond_loopback_and_lacking_workers_are_refused(script, cluster, monkeypatch):
    body, beyond = script("print('ran')"), ("--scheduler", "tcp://192.0.2.1:8786")
    assert re.search(told(Problem.INSECURE_SCHEDULER, where=beyond[1]), refused(2, *beyond, body=body))
    message = refused(1, *beyond, "--insecure", "--timeout", 0.5, body=body)  # tried, and nobody is there
    assert re.search(told(Problem.NO_SCHEDULER, where=beyond[1]), message)
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "192.0.2.1:8786")
    refused(2, body=body)
    address = cluster.scheduler_address
    message = refused(1, "--scheduler", address, "--wait-workers", 5, "--timeout", 1, body=script("print('ran')"))
    assert re.search(told(Problem.TOO_FEW_WORKERS, value=2, wanted=5, where=address), message)


@pytest.mark.parametrize("limit", ["1", "0.5", "4GB", "128MiB", "auto"])
def test_a_share_of_the_memory_is_a_limit_too(limit):
    """1 is the whole of it, as Dask has it, and not a byte."""
    context = pipeline.cluster.submit.submit.make_context("dask-submit", ["--memory-limit", limit, __file__])
    assert context.params["memory_limit"] == limit
