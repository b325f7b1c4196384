"""The explorer's small shop, made once per session; see world.py for what is in it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from starlette.testclient import TestClient

from tests.explorer.serving import Reader, client_of, serving
from tests.explorer.world import World, complete, make_shop
from tests.running.shared import made_once, own_cache, shared_folder
from tests.serving.http.processes import ServerProcess

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["own_cache"]


@pytest.fixture(scope="session")
def shop(client: "Client", tmp_path_factory: pytest.TempPathFactory) -> World:
    """Pictures and a store, for tests that only read them and need no runs. Takes a second, once a test run."""
    folder = shared_folder(tmp_path_factory, "shop")
    made_once(folder, "shop", lambda: make_shop(folder, client))
    return World(folder)


@pytest.fixture
def reader(shop: World) -> Reader:
    """Asks for the pages of the store and its pictures."""
    return Reader(store=shop.store, images=shop.images)


@pytest.fixture(scope="session")
def world(shop: World) -> World:
    """The same with samples, runs and a bundle, for tests that only read them. Takes ten seconds, once a test run."""
    made_once(shop.folder, "world", lambda: complete(shop))
    return shop


@pytest.fixture(scope="module")
def pages(world: World) -> Iterator[TestClient]:
    """The pages of the whole shop, in this process; what one test has computed the next one finds."""
    with client_of(world.places()) as client:
        yield client


@pytest.fixture
def changing_world(world: World, tmp_path: Path) -> World:
    """A copy that a test may change."""
    return world.copy(tmp_path / "world")


@pytest.fixture(scope="session")
def explorer(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The explorer of the whole shop, as a process; for tests that only look."""
    with serving(tmp_path_factory.mktemp("explorer"), *world.options()) as server:
        yield server
