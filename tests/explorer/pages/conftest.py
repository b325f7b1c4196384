"""Runs that tests of pages change and put back."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from explorer.errors import ExplorerError
from explorer.problems import Problem
from tests.explorer.serving import client_of
from tests.explorer.world import World


@pytest.fixture(scope="module")
def own_runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Path]]:
    """Pages of copied runs, whose tests put back what they change; differences are not measured on them."""
    runs = shutil.copytree(world.runs, tmp_path_factory.mktemp("own") / "runs")

    def not_measured(*_: object) -> None:
        raise ExplorerError(Problem.NO_CHECKPOINT)

    with pytest.MonkeyPatch.context() as patch, client_of(world.places(runs=runs)) as client:
        patch.setattr("explorer.pages.runs.compare_runs", not_measured)
        yield client, runs
