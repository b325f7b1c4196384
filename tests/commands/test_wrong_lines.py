"""No command line ends in a traceback: one message, and exit code 2 for what was typed, 1 for what went wrong."""

import contextlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import Client

from tests.commands.calls import call, words_of
from tests.commands.lines import LINES

PROGRESS = re.compile(r"^$|━|: [\d,]+ of [\d,]+$")
ON_A_CLUSTER = ("build_samples", "extract_features", "import_features", "import_xdl", "refresh_features")


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, client: Client) -> None:
    """An empty folder to be in, and one cluster for all jobs."""
    monkeypatch.chdir(tmp_path)

    @contextlib.contextmanager
    def same(*_: object, **__: object) -> Iterator[Client]:
        yield client

    for name in ON_A_CLUSTER:
        module = importlib.import_module(f"jobs.{name}")
        monkeypatch.setattr(module, "connect", same, raising=False)


def test_there_are_enough_of_them() -> None:
    assert len(LINES) >= 200 and len({line for line, _, _ in LINES}) == len(LINES)


@pytest.mark.parametrize(("line", "code", "text"), LINES, ids=[line for line, _, _ in LINES])
def test_a_wrong_line_gets_one_message(line: str, code: int, text: str, names: dict[str, object]) -> None:
    called = call(words_of(line, names))
    assert called.trace == ""
    told = [each for each in called.err.splitlines() if "error: " in each]
    others = [each for each in called.err.splitlines() if "error: " not in each and not PROGRESS.search(each)]
    assert len(told) == 1, called.err
    assert all(each.startswith(("warning: ", "dask-submit: ")) or each.endswith(" ...") for each in others), called.err
    assert text.format_map(names) in told[0]
    assert called.code == code
