"""python -m explorer export: maps by UMAP within the minutes that it may take, else told to be quick ones."""

import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from explorer.__main__ import app
from explorer.data import projection
from tests.explorer.world import World

QUICK = "maps by principal components only: the features of the store; UMAP needs more than --map-minutes"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """In place of UMAP's process: a second of work that looks whether it may go on; how often it was asked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked: list[int] = []

    def project(vectors_NV: Any, tell: Any) -> Any:
        asked.append(len(vectors_NV))
        for _ in range(20):
            tell("lays them out")
            time.sleep(0.05)
        return vectors_NV[:, :2].copy()

    monkeypatch.setattr(projection, "umap_in_process", project)
    return asked


def exported(world: World, out: Path, minutes: float) -> tuple[str, str]:
    """What the command says, and the text of its maps."""
    options = ["--store", str(world.store), "--most-files", "10", "--map-minutes", str(minutes)]
    done = CliRunner().invoke(app, ["export", str(out), *options])
    assert done.exit_code == 0, done.output
    maps = [each.read_text() for each in (out / "pages").glob("map-*.html")]
    assert maps
    return done.output, "".join(maps)


def test_umap_lays_out_maps_that_it_did_not_before(shop: World, asked: list[int], tmp_path: Path) -> None:
    for _ in range(2):
        said, maps = exported(shop, tmp_path / "out", 5)
        assert QUICK not in said
        assert "laid out by UMAP" in maps
        assert "principal components" not in maps
        assert len(asked) == 1


@pytest.mark.parametrize(("minutes", "times"), [(0, 0), (0.3 / 60, 1)])
def test_what_had_no_time_is_named(shop: World, asked: list[int], tmp_path: Path, minutes: float, times: int) -> None:
    begun_s = time.monotonic()
    said, maps = exported(shop, tmp_path / "out", minutes)
    assert QUICK in said
    assert "python -m explorer map beforehand" in said
    assert "two principal components" in maps
    assert "laid out by UMAP" not in maps
    assert len(asked) == times
    assert time.monotonic() - begun_s < 60
