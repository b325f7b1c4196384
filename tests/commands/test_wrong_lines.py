"""No command line ends in a traceback: one message, and exit code 2 for what was typed, 1 for what went wrong."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from distributed import Client

from tests.cli import ran
from tests.commands.calls import ROOT, Told, call, pattern_of, process_of, words_of
from tests.commands.lines import LINES

PROGRESS = re.compile(r"━|: [\d,]+ of [\d,]+$")
ON_A_CLUSTER = ("build_samples", "extract_features", "import_features", "import_xdl", "refresh_features")


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """An empty folder to be in, and one cluster for all jobs that come as far as to ask for one."""
    monkeypatch.chdir(tmp_path)

    @contextlib.contextmanager
    def same(*_: object, **__: object) -> Iterator[Client]:
        yield request.getfixturevalue("client")

    monkeypatch.setattr("pipeline.cluster.tasks.connect", same)


def parameters_of(line: str, code: int, text: Told) -> ParameterSet:
    """A line under its own name; those of some jobs may ask for a cluster."""
    on_a_cluster = line.startswith(tuple(f"jobs/{name}" for name in ON_A_CLUSTER))
    return pytest.param(line, code, text, id=line, marks=[pytest.mark.services] if on_a_cluster else [])


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("line", "code", "text"), [parameters_of(*each) for each in LINES])
def test_a_wrong_line_gets_one_message(
    line: str, code: int, text: Told, names: dict[str, object], tmp_path: Path
) -> None:
    names = names | {"new": tmp_path / "new"}
    called = call(words_of(line, names))
    assert called.trace == ""
    told = [each for each in called.err.splitlines() if "error: " in each]
    others = [each for each in called.err.splitlines() if "error: " not in each and not PROGRESS.search(each)]
    assert len(told) == 1, called.err
    warned = ("warning: ", "note: ")
    assert all(each.startswith(warned) or " WARNING " in each or each.endswith(" ...") for each in others), called.err
    assert re.search(pattern_of(text, names), told[0])
    assert called.code == code
    assert not Path(str(names["missing"])).exists(), "a command made the folder that it missed"


@pytest.mark.services
@pytest.mark.parametrize(
    "line",
    [
        "featurestore get {store} 1000 --out {pipe}",
        "dask-submit --memory-limit nan {script}",
        "jobs/export_embeddings --run {run} --out .parquet",
    ],
)
def test_a_process_ends_the_same_way(line: str, names: dict[str, object], tmp_path: Path) -> None:
    """One of each kind of program: a process of its own ends as a call within this one does."""
    code, text = next((code, text) for each, code, text in LINES if each == line)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = ran(*process_of(words_of(line, names)), timeout=60, cwd=tmp_path, env=environment)
    (told,) = done.stderr.splitlines()
    assert told.startswith("error: ") and re.search(pattern_of(text, names), told)
    assert (done.returncode, done.stdout) == (code, "")
