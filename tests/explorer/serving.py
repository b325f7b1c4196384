"""The explorer as a process of its own on loopback, as a thread, and as a folder of files."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from tests.explorer.world import World
from tests.serving.http.processes import ROOT, ServerProcess, ended

EXPLORER = [sys.executable, "-m", "explorer"]


@contextmanager
def serving(folder: Path, *options: object, verify: object = True) -> Iterator[ServerProcess]:
    """Run `python -m explorer` with these options on a free port; its log goes below `folder`."""
    command = [*EXPLORER, *map(str, options), "--port", "0"]
    with ended(ServerProcess(command, folder, verify)) as server:
        yield server


@contextmanager
def in_thread(app: ASGIApp, **tls: Any) -> Iterator[str]:
    """Serve an application in this process, in a thread; gives its address. Quicker than a process of its own."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", **tls))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"{'https' if tls else 'http'}://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def pages_of(**places: object) -> Iterator[str]:
    """Serve the pages of these places in a thread; gives their address."""
    from explorer.html.site import Site
    from explorer.places import Places
    from explorer.server import application

    named = Places(**{name: str(place) for name, place in places.items()})
    named.check()
    with in_thread(application(Site(named))) as url:
        yield url


def exported(world: World, out: Path, *options: object) -> str:
    """Run `python -m explorer export`; return what it prints."""
    command = [*EXPLORER, "export", str(out), *world.options(), *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
