"""Settings of runs whose steps can be compared sample by sample."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.runs.resumed.legs import comparable_settings, write_schema_with_serials

Places = Any


@pytest.fixture(scope="session")
def settings_of(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Settings in which much depends on the step and on each row's own count; no number of ranks divides a batch."""
    file = write_schema_with_serials(tmp_path_factory.mktemp("schema"))

    def settings(folder: Path, steps: int, every: int, **changes: Any) -> list[str]:
        return comparable_settings(places, file, folder, steps, every, **changes)

    return settings
