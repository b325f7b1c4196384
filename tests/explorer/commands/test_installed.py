"""Tests that the explorer says what it lacks, before it looks at anything."""

import configparser

import pytest

from explorer import __main__ as command
from explorer.__main__ import NEEDED, check_installed
from explorer.errors import ExplorerError
from tests.ranks import ROOT


def test_here_all_is_there() -> None:
    check_installed()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "sklearn" else object())
    with pytest.raises(ExplorerError, match=r"\(sklearn\).*crossmedia\[explorer\]"):
        check_installed()


def test_each_is_in_the_extra_of_this_name() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    extra = parser["options.extras_require"]["explorer"]
    distributions = {"python_multipart": "python-multipart", "sklearn": "scikit-learn"}
    assert sorted(line.partition(">")[0] for line in extra.split()) == sorted(distributions.get(n, n) for n in NEEDED)
