"""Settings of runs whose steps can be compared sample by sample, and such a run that nothing disturbed."""

from collections.abc import Callable

import pytest

from tests.trainer.runs.conftest import settings_of
from tests.trainer.runs.resumed.legs import Killed, Leg

__all__ = ["settings_of", "whole"]

STEPS = 80


@pytest.fixture(scope="session")
def whole(settings_of: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Leg:
    """The first steps of one rank that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return Killed(folder, settings_of(folder, STEPS, 1000)).leg(0, ranks=1)
