"""Files of commands: nobody reads half of one, and what is not finite is null in JSON."""

import json
import os
from pathlib import Path

import pytest

from featurestore.console.files import replace_file, replaced_file, write_json, write_json_option
from featurestore.errors import UserError


def test_what_is_not_finite_is_null_and_nothing_else_is_left_behind(tmp_path: Path) -> None:
    write_json(tmp_path / "demo.json", {"auc": [float("nan"), (0.5, float("inf"))], "gauc": 0.5})
    assert json.loads((tmp_path / "demo.json").read_text()) == {"auc": [None, [0.5, None]], "gauc": 0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_file(tmp_path / "a", "old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        replace_file(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"


def test_the_option_json_is_named(tmp_path: Path) -> None:
    write_json_option(None, {})
    with pytest.raises(UserError, match=f"cannot write --json {tmp_path}: "):
        write_json_option(tmp_path, {})


def test_what_is_not_written_whole_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    replace_file(file, "old")
    with pytest.raises(ValueError, match="half"), replaced_file(file) as part:
        part.write_text("new")
        raise ValueError("half of it")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a.txt", "old")]


def test_a_pipe_or_a_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="not a regular file"):
        replace_file(tmp_path / "pipe", "new")
    assert (tmp_path / "pipe").is_fifo() and [path.name for path in tmp_path.iterdir()] == ["pipe"]
