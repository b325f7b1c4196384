"""Commands info, log and use, as a person types them."""

import json
import re
import shutil
from pathlib import Path

import pytest

from featurestore.problems import Problem as StoreProblem
from serving.__main__ import app
from serving.network.served import ServedNetwork
from serving.problems import Problem
from tests.cli import said
from tests.raised import told
from tests.serving.bundle.conftest import flipped, forge, with_versions
from tests.serving.scoring.variants import Exported, Variants

DAMAGED = Problem.VERSION_DAMAGED
VERSION_1 = {"version": 1, "hint": "; version 2 stays in use"}


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
    return str(shutil.copytree(with_versions(made, 2), tmp_path / "model"))


@pytest.mark.long
def test_info_tells_what_a_version_holds(url: str, made: Exported, exported: Variants, tmp_path: Path) -> None:
    text = said(app, "info", url, "--json", tmp_path / "info.json")
    for line in (
        "version 2 (in use)",
        f"run {made.run}, step-00000023",
        "table item hashed, 64 rows of 12",
        f"snapshot 1: 48 images of snapshot 2 of {made.places.folder}/features",
        f"snapshot 1: 49 images of snapshot 1 of {made.places.folder}/texts",
        "missing images count as the vector that training has learned for them test ",
        "test gauc impressions ",
    ):
        assert line in text
    figures = json.loads((tmp_path / "info.json").read_text())
    assert (figures["version"], figures["in_use"]) == (2, True)
    assert figures["vectors_now"]["texts"]["images"] == 49
    assert "version 1 (not in use)" in said(app, "info", url, "--version", 1)
    assert "missing images count as zeros test " in said(app, "info", exported("plain").url)


@pytest.mark.long
def test_use_and_log(url: str, made: Exported, tmp_path: Path) -> None:
    assert said(app, "use", url, 1) == f"version 1 of {url} is in use instead of version 2"
    text = said(app, "log", url, "--json", tmp_path / "log.json")
    assert text.startswith("version published run checkpoint bytes in use 2 20")
    assert "since 20" in text.partition(" 1 20")[2]
    figures = json.loads((tmp_path / "log.json").read_text())
    assert figures["in_use"] == 1
    assert [each["version"] for each in figures["versions"]] == [2, 1]
    assert [each["version"] for each in figures["choices"]] == [1, 2, 1]
    assert said(app, "log", url, "--last", 1).count(str(made.run)) == 1


def test_log_tells_which_versions_are_damaged(url: str, tmp_path: Path) -> None:
    path = Path(url, "log", f"{1:020}.json")
    path.write_bytes(path.read_bytes()[:-1])
    assert " 1 damaged was, 20" in said(app, "log", url, "--json", tmp_path / "log.json")
    figures = json.loads((tmp_path / "log.json").read_text())
    assert (figures["damaged"], [each["version"] for each in figures["versions"]]) == ([1], [2])


def test_use_refuses_what_is_damaged_by_name(url: str, made: Exported) -> None:
    """Files of another size are all named; the choice stays."""
    folder = Path(url, made.manifest.folder)
    path, vectors = folder / "ids-12.bin", folder / "vectors" / "texts"
    sound = path.read_bytes()
    path.write_bytes(flipped(sound, 0))
    reason = re.compile(told(StoreProblem.DIGEST_DIFFERS, where=path, algorithm="sha256"))
    damaged = told(DAMAGED, **VERSION_1, where=url, reason=reason)
    assert re.fullmatch(f"error: {damaged}", said(app, "use", url, 1, code=1))
    path.write_bytes(sound)
    (file,) = (vectors / "data").glob("*/*.parquet")
    (folder / "schema.yaml").unlink()
    file.write_bytes(file.read_bytes()[:-1])
    both = told(Problem.MISSING, where=folder / "schema.yaml") + " " + told(Problem.OTHER_SIZE, where=file)
    assert re.search(f" {both}", said(app, "use", url, 1, code=1))
    shutil.rmtree(vectors / "log")
    assert re.search(told(Problem.NO_SNAPSHOT, where=vectors), said(app, "use", url, 1, code=1))
    assert "version 2 (in use)" in said(app, "info", url)


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
    assert re.search(told(DAMAGED, **VERSION_1, where=url), said(app, "use", url, 1, code=1))
    assert "version 2 (in use)" in said(app, "info", url)


def test_use_opens_the_network(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the one of these tests is no network
    assert re.search(told(Problem.NOT_NETWORK, where=re.compile(r"network\.pt2")), said(app, "use", url, 1, code=1))
    assert "version 2 (in use)" in said(app, "info", url)


def test_info_says_what_is_damaged(url: str, made: Exported, tmp_path: Path) -> None:
    folder = Path(url, made.manifest.folder)
    (folder / "ids-12.bin").write_bytes(b"half")
    shutil.rmtree(folder / "vectors" / "texts")
    text = said(app, "info", url, "--version", 1, "--json", tmp_path / "info.json", code=1)
    assert re.search(f" damage {told(Problem.OTHER_SIZE, where=folder / 'ids-12.bin', value=4)}", text)
    assert f" damage no store at {folder}/vectors/texts" in text
    assert " vectors of texts damaged missing images " in text
    assert len(json.loads((tmp_path / "info.json").read_text())["damage"]) == 2
