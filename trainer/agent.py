"""The supervisor's agent on one host: starts ranks, forwards their output, and reliably ends them.

    python agent.py LEASE_S         started by the supervisor, over ssh on other machines; needs no other module

Lines of JSON come from stdin and go to stdout. Ranks die

- with this process, however it dies: the kernel sends them SIGKILL;
- when stdin ends: the supervisor, its ssh or the connection is gone;
- LEASE_S seconds after the last beat that the supervisor has answered: the network is cut. So the supervisor knows when
  a host that it cannot reach has no rank any more.

Ranks hold stdout open: its end says that nothing of this process is left.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import IO, Any

AS_RANK = "--as-rank"
BEATS = 10
"""Heartbeats in a lease."""
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


class Agent:
    """Ranks of this host. Threads read their output; the main thread starts them, as they die with it."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._leased_until = time.monotonic() + lease_s
        self._answers = os.dup(1)
        os.dup2(2, 1)  # accidental output of this process must not be taken for an answer
        self._lock = threading.Lock()
        self._ranks: dict[int, subprocess.Popen[bytes]] = {}

    def work(self) -> None:
        """Execute the supervisor's commands until it is gone."""
        for task in (self._beat, self._watch_lease):
            threading.Thread(target=task, daemon=True).start()
        self._answer({"is": "here", "ssh": os.environ.get("SSH_CONNECTION")})
        for line in sys.stdin:
            asked = json.loads(line)
            if asked["do"] == "beat":
                self._leased_until = asked["sent_s"] + self._lease_s
            elif asked["do"] == "signal":
                self._signal(asked["number"])
            else:
                self._start(asked)

    def _beat(self) -> None:
        while True:
            self._answer({"is": "beat", "sent_s": time.monotonic()})
            time.sleep(self._lease_s / BEATS)

    def _watch_lease(self) -> None:
        while time.monotonic() < self._leased_until:
            time.sleep(self._lease_s / BEATS)
        self.end()

    def end(self) -> None:
        """Kill all ranks and this process, even if its threads are waiting."""
        self._signal(signal.SIGKILL)
        os._exit(0)

    def _start(self, asked: dict[str, Any]) -> None:
        self._signal(signal.SIGKILL)  # ranks of two generations never live at once
        for rank in self._ranks.values():
            rank.wait()
        as_rank = [sys.executable, "-I", "-S", __file__, AS_RANK, str(os.getpid())]
        for each in asked["ranks"]:
            try:
                rank = subprocess.Popen(
                    [*as_rank, *asked["command"]],
                    env={**os.environ, **asked["environment"], **each["environment"]},
                    cwd=asked["folder"],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=[self._answers],
                    start_new_session=True,
                )
            except OSError as failure:
                self._answer({"is": "line", "rank": each["rank"], "stream": "err", "text": f"error: {failure}"})
                self._answer({"is": "end", "rank": each["rank"], "code": 127})
                continue
            self._ranks[each["rank"]] = rank
            threading.Thread(target=self._follow, args=(each["rank"], rank), daemon=True).start()

    def _follow(self, number: int, rank: subprocess.Popen[bytes]) -> None:
        readers = [
            threading.Thread(target=self._pass_on, args=(number, name, stream), daemon=True)
            for name, stream in (("out", rank.stdout), ("err", rank.stderr))
        ]
        for reader in readers:
            reader.start()
        code = rank.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)  # what it has started itself
        for reader in readers:
            reader.join(timeout=2)
        self._answer({"is": "end", "rank": number, "code": code})

    def _pass_on(self, number: int, name: str, stream: IO[bytes]) -> None:
        for line in stream:
            text = line.decode(errors="backslashreplace").rstrip("\n")
            self._answer({"is": "line", "rank": number, "stream": name, "text": text[:10_000]})

    def _signal(self, number: int) -> None:
        for rank in list(self._ranks.values()):
            if rank.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.pid, number) if number == signal.SIGKILL else rank.send_signal(number)

    def _answer(self, answer: dict[str, Any]) -> None:
        line = json.dumps(answer).encode() + b"\n"
        with self._lock:
            try:
                while line:
                    line = line[os.write(self._answers, line) :]
            except OSError:  # nobody reads any more
                self.end()


def become(parent: int, command: list[str]) -> None:
    """Become the program of a rank, which dies with its parent."""
    die_with_parent()
    if os.getppid() == parent:
        try:
            os.execvp(command[0], command)
        except OSError as failure:
            sys.exit(f"error: {command[0]} cannot be started: {failure}")


def die_with_parent() -> None:
    """Let the kernel send SIGKILL to this process when its parent ends."""
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)


def main() -> None:
    """Work until stdin ends, then end the ranks."""
    if sys.argv[1] == AS_RANK:
        become(int(sys.argv[2]), sys.argv[3:])
        return
    # A host that goes down sends them to the ranks too, which then write a checkpoint. (What is ignored, ranks would
    # ignore too, until they have set their own.)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    agent = Agent(float(sys.argv[1]))
    if "--local" in sys.argv:  # dies with the supervisor, also where it is stopped and cannot read
        die_with_parent()
    try:
        agent.work()
    finally:
        agent.end()


if __name__ == "__main__":
    main()
