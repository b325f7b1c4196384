"""Processes and signals: draining, a second signal, several workers, one that is killed, and starts that fail."""

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import psutil
import pytest

from serving.http.metrics import FOLDER_VARIABLE, ServingMetrics
from serving.problems import Problem
from tests.cli import ran
from tests.raised import told
from tests.serving.http.fakes import figures_of, write_state
from tests.serving.http.processes import ServerProcess, fake_server, post_head
from trainer.launch import free_port

pytestmark = [pytest.mark.services, pytest.mark.long]

ONE = {"candidates": {"ad_item": [1, 2]}}
BODY = json.dumps(ONE).encode()
PAUSE_S = 0.005
"""Between two requests of a thread: hundreds a second, and what they wait for gets the processor too."""


@contextlib.contextmanager
def load(server: ServerProcess) -> Iterator[tuple[list[int], list[str]]]:
    """Send requests one after the other in threads, until the block ends; gives the versions that answered, and what
    went wrong."""
    versions, failures, ended = list[int](), list[str](), threading.Event()

    def ask() -> None:
        with httpx2.Client(base_url=server.url, timeout=30) as client:
            while not ended.wait(PAUSE_S):
                try:
                    answer = client.post("/v1/score", json=ONE)
                    versions.append(answer.raise_for_status().json()["version"])
                except httpx2.HTTPError as error:
                    failures.append(repr(error))

    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(ask)
        try:
            yield versions, failures
        finally:
            ended.set()


def workers_of(server: ServerProcess) -> list[psutil.Process]:
    return [each for each in psutil.Process(server.process.pid).children() if "spawn_main" in " ".join(each.cmdline())]


def test_sigterm_lets_what_has_begun_end_and_nothing_else_keep_the_server(tmp_path: Path) -> None:
    """A request that runs, and one of a connection that is there, are answered; a connection that is idle is closed."""
    slow, begun = {"candidates": {"ad_item": [987]}}, tmp_path / "begun"
    state, health_port = write_state(tmp_path, version=3, score_s=0.5, slow_item=987, begun=str(begun)), free_port()
    health = f"http://127.0.0.1:{health_port}/v2/health/ready"
    with (
        fake_server(state, tmp_path, drain_s=60, health_port=health_port) as server,
        ThreadPoolExecutor(1) as pool,
        server.connect() as connection,
        server.connect() as silent,
    ):
        client = server.client
        assert "connection" not in client.post("/v1/score", json=ONE).headers
        asked = pool.submit(httpx2.post, f"{server.url}/v1/score", json=slow, timeout=30)
        server.wait_until(begun.exists)
        start_s = time.monotonic()
        assert httpx2.get(health).status_code == 200
        os.kill(server.process.pid, signal.SIGTERM)
        ready = client.get("/v2/health/ready")
        assert httpx2.get(health).status_code == 503
        for answer in (ready, client.post("/v1/score", json=ONE)):
            assert answer.headers["connection"] == "close"
        assert ready.status_code == 503
        time.sleep(0.5)
        connection.sendall(post_head(len(BODY)) + BODY)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert server.process.wait(20) == 0
        assert time.monotonic() - start_s < 10
        assert silent.recv(1) == b""
        assert asked.result().status_code == 200
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(server.url)
        assert "stopped" in server.log()


def connect_again_and_again(server: ServerProcess, answers: list[bytes], lost: list[OSError]) -> None:
    """Send each request over a connection of its own, until none can be made; keep what became of those that were."""
    while True:
        try:
            connection = server.connect()
        except OSError:
            return
        try:
            with connection:
                connection.sendall(post_head(len(BODY)) + BODY)
                answers.append(connection.recv(1 << 16)[:12])
        except OSError as error:
            lost.append(error)


@pytest.mark.parametrize("workers", [1, 2])
def test_no_request_of_a_client_that_reconnects_is_lost(tmp_path: Path, workers: int) -> None:
    """A connection that the kernel has begun gets its answer, also in the last moment; later ones are refused."""
    answers, lost, state = list[bytes](), list[OSError](), write_state(tmp_path, version=3)
    with ThreadPoolExecutor(8) as pool, fake_server(state, tmp_path, workers=workers) as server:
        clients = [pool.submit(connect_again_and_again, server, answers, lost) for _ in range(8)]
        server.wait_until(lambda: len(answers) >= len(clients))
        assert server.stop(signal.SIGTERM) == 0
    assert (set(answers), lost) == ({b"HTTP/1.1 200"}, [])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_signal_ends_at_once(tmp_path: Path, workers: int) -> None:
    state = write_state(tmp_path, version=3)
    server_of = fake_server(state, tmp_path, workers=workers, drain_s=60, read_timeout_s=60.0)
    with server_of as server, server.connect() as connection:
        connection.sendall(post_head(9))  # a request that does not end
        time.sleep(0.3)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.7)
        assert server.process.poll() is None
        start_s = time.monotonic()
        assert server.stop(signal.SIGINT) == 130
        assert time.monotonic() - start_s < 5


def test_draining_ends_after_its_time(tmp_path: Path) -> None:
    server_of = fake_server(write_state(tmp_path, version=3), tmp_path, drain_s=1, read_timeout_s=60.0)
    with server_of as server, server.connect() as connection:
        connection.sendall(post_head(9))
        time.sleep(0.3)
        start_s = time.monotonic()
        assert server.stop(signal.SIGTERM) == 0
        assert 0.8 < time.monotonic() - start_s < 10


def test_two_workers_share_a_port_and_one_that_is_killed_comes_back(tmp_path: Path) -> None:
    with fake_server(write_state(tmp_path, version=3, load_s=0.3), tmp_path, workers=2, poll_s=0.1) as server:
        server.wait_for("loaded version 3", 2)
        with load(server) as (versions, failures):
            first, second = workers_of(server)
            os.kill(first.pid, signal.SIGKILL)
            server.wait_for("starting another")
            count = len(versions)
            while server.log().count("loaded version 3") < 3:  # also after the new one has figures, and no model yet
                assert "serving_model_version 3.0" in server.client.get("/metrics").text
                assert httpx2.get(f"{server.url}/v2/health/ready").status_code == 200  # it answers once it has a model
                assert server.process.poll() is None
                time.sleep(0.02)
            assert len(versions) > count  # the other one answered meanwhile
            assert second.is_running()
            write_state(tmp_path, version=4)
            server.wait_for("switched from version 3 to version 4", 2)
        # Connections of the killed worker broke, and with them at most the request that each had open.
        assert len(failures) <= 4
        assert all("disconnected" in each or "Read" in each or "Connect" in each for each in failures)
        assert set(versions) == {3, 4}
        found = figures_of(server.client.get("/metrics").text)
        assert len(versions) * 2 <= found["serving_candidates_total"] <= (len(versions) + 4) * 2
        assert (found["serving_ready_workers"], found["serving_model_version"]) == (2, 4)
        pids = [each.pid for each in workers_of(server)]
        assert server.stop() == 0
        assert not any(psutil.pid_exists(pid) for pid in pids)


def test_workers_end_with_their_supervisor(tmp_path: Path) -> None:
    with fake_server(write_state(tmp_path, version=3), tmp_path, workers=2) as server:
        workers = workers_of(server)
        server.process.kill()
        server.process.wait()
        _, alive = psutil.wait_procs(workers, timeout=20)
        assert not alive


@pytest.mark.parametrize("workers", [1, 2])
def test_a_first_model_that_cannot_be_loaded_ends_the_server_with_one_line(tmp_path: Path, workers: int) -> None:
    state = write_state(tmp_path, version=3, broken=True)
    with fake_server(state, tmp_path, workers=workers, ready=False) as server:
        assert server.process.wait(60) == 1
        assert "network.pt2" in server.log()
        assert "Traceback" not in server.log()


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, state = taken.getsockname()[1], write_state(tmp_path, version=3)
        done = ran(sys.executable, "-m", "tests.serving.http.fakes", state, f"port={port}")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    taken_port = told(Problem.CANNOT_LISTEN, where=f"--host 127.0.0.1 --port {port}", reason=re.compile("Address.*"))
    assert re.match(f"error: {taken_port}", done.stderr)


def test_a_file_that_a_worker_is_making_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    empty = tmp_path / "counter_1.db"
    empty.touch()
    made = threading.Timer(0.03, empty.unlink)
    made.start()
    assert ServingMetrics().text() == b""
    made.join()
