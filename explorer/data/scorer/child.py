"""A scorer of the explorer's own: `python -m serving MODEL` as a child on loopback, which ends with the explorer.

One thread starts it, reads what it prints and waits for its end: the kernel ends the child with the thread that has
started it, so also where the explorer is killed. Only who has the random token of this start can ask it.
"""

import os
import re
import secrets
import subprocess
import sys
import time
from collections import deque
from threading import Event, Lock, Thread
from typing import Literal, NamedTuple

from featurestore.text import one_line
from serving.scoring.remote import RemoteScorer

Phase = Literal["starting", "ready", "ended"]
_ADDRESS = re.compile(r"listening on (http://\S+) for model")
_STOP_S, _AGAIN_S = 5.0, 10.0
_READY = "/v2/health/ready"
_MAIN = (
    "import ctypes, os, runpy, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"  # PR_SET_PDEATHSIG
    "if os.getppid() == int(sys.argv.pop(1)):\n"
    "    runpy.run_module('serving', run_name='__main__', alter_sys=True)\n"
)


class ChildState(NamedTuple):
    """How far the child is. `said`: where it has ended, its last line."""

    phase: Phase
    since_s: float
    said: str = ""


class ChildScorer:
    """Starts the child when it is first asked for, and again where it has ended. For several threads."""

    def __init__(self, model: str) -> None:
        """`model`: address of the published model."""
        self._model, self._lock = model, Lock()
        self._life: _Life | None = None

    def state(self) -> ChildState:
        """Start the child where none runs, and say how far it is."""
        with self._lock:
            life = self._life
            if life is None or (life.has_ended and time.monotonic() - life.ended_s > _AGAIN_S):
                self._life = life = _Life(self._model)
            return life.state()

    def scorer(self) -> RemoteScorer | None:
        """Give what asks it, once it is ready."""
        with self._lock:
            return self._life.scorer() if self._life is not None else None

    @property
    def pid(self) -> int | None:
        """The process, while it runs."""
        life = self._life
        return None if life is None or life.has_ended or life.process is None else life.process.pid

    def close(self) -> None:
        """End the child, and wait for its end."""
        with self._lock:
            if self._life is not None:
                self._life.end()
                self._life = None


class _Life:
    """One start of the child, to its end."""

    def __init__(self, model: str) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.ended_s = 0.0
        self._started_s = time.time()
        self._lines: deque[str] = deque(maxlen=20)
        self._token, self._url = secrets.token_urlsafe(32), ""
        self._ready, self._stopping, self._ended = Event(), Event(), Event()
        self._thread = Thread(target=self._run, args=(model,), name="scorer", daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def state(self) -> ChildState:
        if self.has_ended:
            said = next((line for line in reversed(self._lines) if line.strip()), "it said nothing")
            return ChildState("ended", self._started_s, one_line(said)[:500])
        if not self._ready.is_set() and self._url and _answers(self._scorer()):
            self._ready.set()
        return ChildState("ready" if self._ready.is_set() else "starting", self._started_s)

    def scorer(self) -> RemoteScorer | None:
        return self._scorer() if self._ready.is_set() and not self.has_ended else None

    def end(self) -> None:
        """End the process; SIGKILL where SIGTERM takes long."""
        self._stopping.set()
        if (process := self.process) is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
        self._thread.join(_STOP_S)

    def _scorer(self) -> RemoteScorer:
        return RemoteScorer(self._url, self._token)

    def _run(self, model: str) -> None:
        try:
            tokens = os.memfd_create("tokens")  # no file is left where the explorer is killed
            try:
                os.write(tokens, f"{self._token}\n".encode())
                self._live(model, tokens)
            finally:
                os.close(tokens)
        except OSError as error:
            self._lines.append(f"the scorer cannot be started: {error}")
        finally:
            self.ended_s = time.monotonic()
            self._ended.set()

    def _live(self, model: str, tokens: int) -> None:
        command = [sys.executable, "-c", _MAIN, str(os.getpid()), "serve", model, "--port", "0"]
        process = subprocess.Popen(
            [*command, "--token-file", f"/proc/self/fd/{tokens}", "--poll-s", "2"],
            pass_fds=(tokens,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C of a terminal is the explorer's, which ends the child itself
        )
        self.process = process
        if self._stopping.is_set():
            process.terminate()
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                self._lines.append(line)
                if not self._url and (found := _ADDRESS.search(line)):
                    self._url = found.group(1)
        process.wait()


def _answers(scorer: RemoteScorer) -> bool:
    from serving.errors import ServingError

    try:
        scorer.read(_READY, timeout_s=2)
    except ServingError:
        return False
    return True
