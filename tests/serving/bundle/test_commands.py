"""Commands info, log and use, as a person types them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serving.__main__ import app
from tests.serving.bundle.conftest import Exported, export


@pytest.fixture
def made(exported: Callable[[str], Exported]) -> Exported:
    return exported("contents")


@pytest.fixture
def url(made: Exported, tmp_path: Path) -> str:
    """Two versions, the second in use."""
    shutil.copytree(made.url, tmp_path / "model")
    export(tmp_path / "model", made.run)
    return str(tmp_path / "model")


def done(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split()) if words[0] == "log" else result.stdout


@pytest.mark.long
def test_info_tells_what_a_version_holds(url: str, made: Exported, tmp_path: Path) -> None:
    text = done("info", url, "--json", tmp_path / "info.json")
    assert "version                  2 (in use)" in text
    assert f"run                      {made.run}, step-00000023" in text
    assert "table item               hashed, 64 rows of 12" in text
    assert f"snapshot 1: 48 images of snapshot 2 of {made.places.folder}/features" in text
    assert f"snapshot 1: 49 images of snapshot 1 of {made.places.folder}/texts" in text
    figures = json.loads((tmp_path / "info.json").read_text())
    assert (figures["version"], figures["in_use"]) == (2, True)
    assert figures["vectors_now"]["texts"]["images"] == 49
    assert "version                  1 (not in use)" in done("info", url, "--version", 1)


def test_use_and_log(url: str, made: Exported, tmp_path: Path) -> None:
    assert done("use", url, 1) == f"version 1 of {url} is in use in the place of version 2\n"
    text = done("log", url, "--json", tmp_path / "log.json")
    assert text.startswith("version published run checkpoint id rows bytes in use 2 20")
    assert "since 20" in text.partition(" 1 20")[2]
    figures = json.loads((tmp_path / "log.json").read_text())
    assert figures["in_use"] == 1
    assert [each["version"] for each in figures["versions"]] == [2, 1]
    assert [each["version"] for each in figures["choices"]] == [1, 2, 1]
    assert len(done("log", url, "--last", 1).split(str(made.run))) == 2


def test_log_tells_which_versions_are_damaged(url: str, tmp_path: Path) -> None:
    path = Path(url, "log", f"{1:020}.json")
    path.write_bytes(path.read_bytes()[:-1])
    assert " 1 damaged was, 20" in done("log", url, "--json", tmp_path / "log.json")
    figures = json.loads((tmp_path / "log.json").read_text())
    assert (figures["damaged"], [each["version"] for each in figures["versions"]]) == ([1], [2])
