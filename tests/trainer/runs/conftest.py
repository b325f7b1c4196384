"""Where a run may be."""

from pathlib import Path

import pytest

from featurestore.published.paths import RunPath, run_path


@pytest.fixture(params=["disk", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPath:
    """Where a run may be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "a" if request.param == "disk" else run_path(f"{request.getfixturevalue('s3_url')}/runs/a")
