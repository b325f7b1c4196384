"""Tests of the hosts that the other tests here run on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.hosts import Network, process_of, python_words

REACHED = "import socket, sys; socket.create_connection((sys.argv[1], 22), 1)"
SENT_BYTES = 40 << 20
RECEIVE = f"""
import socket, time
with socket.create_server(("", 7000)) as server:
    connection, _ = server.accept()
    start_s, missing = time.monotonic(), {SENT_BYTES}
    while missing and (data := connection.recv(1 << 20)):
        missing -= len(data)
    print({SENT_BYTES} * 8e-9 / (time.monotonic() - start_s))
"""
SEND = f"""
import socket, time
for _ in range(100):
    try:
        connection = socket.create_connection(("a", 7000))
        break
    except ConnectionRefusedError:
        time.sleep(0.05)
connection.sendall(bytes({SENT_BYTES}))
"""


def reaches(net: Network, one: str, other: str) -> bool:
    return net[one].run(*python_words("-c", REACHED, other), check=False).returncode == 0


def test_a_host_has_a_name_an_address_a_core_a_disk_and_ssh(net: Network) -> None:
    said = net["a"].run("ssh", "b", "hostname; hostname -I; nproc; echo mine >/mnt/file; ls /mnt").stdout.split()
    assert said == ["b", net["b"].address, "1", "file"]
    assert net["a"].run("ls", "/mnt").stdout == ""


def test_a_host_is_gone_when_it_is_killed_and_comes_back(net: Network, tmp_path: Path) -> None:
    job = net["b"].start("sleep", "100", log=tmp_path / "log.txt")
    time.sleep(0.2)
    process = process_of(job)
    net.kill("b")
    assert job.wait(10) != 0 and not process.is_running()
    assert not reaches(net, "a", "b")
    net.revive("b")
    assert net["a"].run("ssh", "b", "hostname; ls /mnt").stdout == "b\n"


def test_a_cut_lets_nothing_pass_between_two_hosts_for_its_time(net: Network) -> None:
    with net.cut_off("a", "b"):
        assert [reaches(net, *pair) for pair in ("ab", "ba")] == [False, False]
        assert reaches(net, "s3", "a") and reaches(net, "s3", "b")
    assert reaches(net, "a", "b") and reaches(net, "b", "a")
    start_s = time.monotonic()
    net.cut("a", "b", 1.0)
    assert time.monotonic() - start_s >= 1.0 and reaches(net, "a", "b")


def test_a_link_carries_a_gigabit(net: Network) -> None:
    receiver = subprocess.Popen(net["a"].command(*python_words("-c", RECEIVE)), stdout=subprocess.PIPE, text=True)
    net["b"].run(*python_words("-c", SEND))
    gigabits = float(receiver.communicate(timeout=60)[0])
    assert 0.05 < gigabits < 1.1  # the burst goes faster; a busy machine is slower


def test_the_network_of_the_machine_is_not_seen(net: Network) -> None:
    cards = {name for name in psutil.net_if_addrs() if name != "lo"}
    inside = net["a"].run("ip", "-brief", "link").stdout
    assert "eth0@" in inside and not any(f"{card} " in inside for card in cards)
    assert not any(name.startswith(("to-", "bridge")) for name in cards)


PROGRAM = """
import pathlib, sys, time
from tests.cluster.hosts import network
with network(pathlib.Path(sys.argv[1]), ["a", "b"], ssh=False) as net:
    print(net["a"].pid, net["b"].pid, flush=True)
    time.sleep(100)
"""


@pytest.mark.usefixtures("namespaces")
def test_nothing_stays_when_the_process_that_made_the_hosts_is_killed(tmp_path: Path) -> None:
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    pids = [int(word) for word in program.stdout.readline().split()]
    assert len(pids) == 2 and all(psutil.pid_exists(pid) for pid in pids)
    os.kill(program.pid, signal.SIGKILL)
    program.communicate()
    end = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)
