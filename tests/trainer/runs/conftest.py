"""Where a run may be, and settings of runs whose steps can be compared sample by sample."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from featurestore.published.paths import RunPath, run_path
from tests.trainer.runs.resumed.legs import comparable_settings, write_schema_with_serials

Places = Any


@pytest.fixture(params=["disk", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPath:
    """Where a run may be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "a" if request.param == "disk" else run_path(f"{request.getfixturevalue('s3_url')}/runs/a")


@pytest.fixture(scope="session")
def settings_of(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Settings in which much depends on the step and on each row's own count; no number of ranks divides a batch."""
    file = write_schema_with_serials(tmp_path_factory.mktemp("schema"))

    def settings(folder: Path, steps: int, every: int, **changes: Any) -> list[str]:
        return comparable_settings(places, file, folder, steps, every, **changes)

    return settings
