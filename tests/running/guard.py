"""A guard: a test fails that starts ranks, a Dask cluster or a server without `services` (`slow`, `cluster`)."""

import os
import sys
from collections.abc import Generator, Sequence
from pathlib import PurePath

import pytest

PROGRAMS = {"horovodrun", "horovodrun.py", "dask", "dask-submit", "weed"}
JOBS = {
    f"{name}.py" for name in ("build_samples", "extract_features", "import_features", "import_xdl", "refresh_features")
}
"""Those that start a cluster of their own."""


class Guard:
    """A plugin of pytest that watches what this process starts and where it listens."""

    def __init__(self) -> None:
        self._seen: list[str] | None = None
        """What a test without the mark has started; None while none runs."""
        sys.addaudithook(self._audit)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, bool, bool]:
        marked = any(item.get_closest_marker(mark) for mark in ("services", "slow", "cluster"))
        self._seen = None if marked else []
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        result = yield
        if self._seen:
            pytest.fail(f"without the mark `services` this test started {', '.join(self._seen)}")
        return result

    def _audit(self, event: str, arguments: tuple) -> None:
        if self._seen is None:
            return
        if event == "subprocess.Popen" and (program := service_of(arguments[1])):
            self._seen.append(program)
        elif event == "socket.bind" and isinstance(arguments[1], tuple) and arguments[1][0] != "::1":
            # (::1 is what urllib3 tries out when it is imported)
            self._seen.append(f"a server on {arguments[1][0]}")


def service_of(command: Sequence[str | bytes | os.PathLike] | str | bytes) -> str | None:
    """Name the service that a command line starts, e.g. "horovodrun" or a job's script; None where it starts none."""
    if isinstance(command, str | bytes):
        return None
    words = [PurePath(os.fsdecode(word)) for word in command]
    programs = [word.name for word in words[:2] if word.name in PROGRAMS]
    jobs = [word.name for word in words[:2] if word.parent.name == "jobs" and word.name in JOBS]
    return next(iter([*programs, *jobs]), None)
