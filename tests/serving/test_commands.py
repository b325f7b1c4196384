"""Commands info, log and use, as a person types them."""

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import Result

from serving.__main__ import app
from serving.network.served import ServedNetwork
from tests.cli import invoke
from tests.serving.bundle.conftest import forge, with_versions
from tests.serving.scoring.variants import Exported, Variants


@pytest.fixture(autouse=True)
def any_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let versions open without a network, as they are exported here."""
    monkeypatch.setattr(ServedNetwork, "load", lambda folder: None)


@pytest.fixture
def made(exported: Variants) -> Exported:
    return exported("contents")


@pytest.fixture
def url(made: Exported, tmp_path: Path) -> str:
    """Two versions, the second in use."""
    shutil.copytree(with_versions(made, 2), tmp_path / "model")
    return str(tmp_path / "model")


def done(*words: object) -> str:
    result = invoke(app, *words, code=0)
    return " ".join(result.stdout.split()) if words[0] == "log" else narrow(result.stdout)


def narrow(text: str) -> str:
    return re.sub(" +", " ", text)


@pytest.mark.long
def test_info_tells_what_a_version_holds(url: str, made: Exported, exported: Variants, tmp_path: Path) -> None:
    text = done("info", url, "--json", tmp_path / "info.json")
    for line in (
        "version 2 (in use)",
        f"run {made.run}, step-00000023",
        "table item hashed, 64 rows of 12",
        f"snapshot 1: 48 images of snapshot 2 of {made.places.folder}/features",
        f"snapshot 1: 49 images of snapshot 1 of {made.places.folder}/texts",
        "missing images count as the vector that training has learned for them\n",
        "test gauc impressions ",
    ):
        assert line in text
    figures = json.loads((tmp_path / "info.json").read_text())
    assert (figures["version"], figures["in_use"]) == (2, True)
    assert figures["vectors_now"]["texts"]["images"] == 49
    assert "version 1 (not in use)" in done("info", url, "--version", 1)
    assert "missing images count as zeros\n" in done("info", exported("plain").url)


def test_use_and_log(url: str, made: Exported, tmp_path: Path) -> None:
    assert done("use", url, 1) == f"version 1 of {url} is in use instead of version 2\n"
    text = done("log", url, "--json", tmp_path / "log.json")
    assert text.startswith("version published run checkpoint bytes in use 2 20")
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


def refused(*words: object) -> Result:
    return invoke(app, *words, code=1)


def test_use_refuses_what_is_damaged_by_name(url: str, made: Exported) -> None:
    """Files of another size are all named; the choice stays."""
    folder = Path(url, made.manifest.folder)
    path, vectors = folder / "ids-12.bin", folder / "vectors" / "texts"
    sound = path.read_bytes()
    path.write_bytes(bytes([sound[0] ^ 1]) + sound[1:])
    first, second = refused("use", url, 1).stderr.splitlines()
    assert first == f"error: version 1 of {url} is damaged; version 2 stays in use:"
    assert second == f"{path} is damaged: its sha256 is not the one in the manifest"
    path.write_bytes(sound)
    (file,) = (vectors / "data").glob("*/*.parquet")
    (folder / "schema.yaml").unlink()
    file.write_bytes(file.read_bytes()[:-1])
    assert f"\n{folder}/schema.yaml is missing\n{file} has " in refused("use", url, 1).stderr
    shutil.rmtree(vectors / "log")
    assert "vectors/texts has no snapshot" in refused("use", url, 1).stderr
    assert "version 2 (in use)" in done("info", url)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": {"num_rows": 10**12}},
        {"rows": {"first_bit": -8}},
        {"tables": {"first_row": -5}},
        {"tables": {"width": 0}},
        {"files": {"bytes": -1}},
        {"vectors": {"store_id": "../x"}},
        {"vectors": {"folder": "../../x"}},
        {"vectors": {"no_image": [0.0]}},
    ],
    ids=str,
)
def test_use_refuses_what_no_scorer_opens(url: str, made: Exported, change: dict) -> None:
    """Numbers that cannot be are found in the manifest, others by opening the version; the choice stays."""
    ((part, fields),) = change.items()
    first, *others = json.loads(Path(url, "log", f"{1:020}.json").read_bytes())[part]
    forge(url, 1, **{part: [{**first, **fields}, *others]})
    found = refused("use", url, 1)
    assert found.stdout == "" and "; version 2 stays in use:" in found.stderr
    assert "version 2 (in use)" in done("info", url)


def test_use_opens_the_network(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the one of these tests is no network
    assert "network.pt2 is not a network as it was exported" in refused("use", url, 1).stderr
    assert "version 2 (in use)" in done("info", url)


def test_info_says_what_is_damaged(url: str, made: Exported, tmp_path: Path) -> None:
    folder = Path(url, made.manifest.folder)
    (folder / "ids-12.bin").write_bytes(b"half")
    shutil.rmtree(folder / "vectors" / "texts")
    text = narrow(refused("info", url, "--version", 1, "--json", tmp_path / "info.json").stdout)
    assert f"\ndamage {folder}/ids-12.bin has 4 bytes instead of " in text
    assert f"\ndamage no store at {folder}/vectors/texts" in text
    assert "\nvectors of texts damaged\n" in text
    assert len(json.loads((tmp_path / "info.json").read_text())["damage"]) == 2
