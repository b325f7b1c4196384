"""Configurations that earlier versions wrote: typed by a person they are refused, saved by a run they load."""

from pathlib import Path

import pytest
import yaml

from trainer import legacy
from trainer.config import load_config, load_saved, save_config
from trainer.errors import ConfigError

OLD = {"lr": 0.02, "lr_gamma": 0.8, "lr_every": 70, "id_l2": 0.01}


def saved_by_an_earlier_version(file: Path) -> Path:
    """The configuration of a run of the time when the optimiser's settings stood in section train."""
    save_config(load_config(settings=["run.name=x", "train.epochs=3"]), file)
    values = yaml.safe_load(file.read_text())
    del values["optim"]
    values["train"] |= OLD
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.parametrize("name", sorted(OLD))
def test_a_moved_setting_is_refused_with_its_new_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--set train\.{name}=0\.1: train\.{name} is optim\.{name} now$"):
        load_config(settings=[f"train.{name}=0.1"])
    file = tmp_path / "own.yaml"
    file.write_text(f"train: {{epochs: 3, {name}: 0.1}}\n")
    with pytest.raises(ConfigError, match=rf"^{file}: train\.{name} is optim\.{name} now$"):
        load_config(file)


def test_every_moved_setting_of_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(saved_by_an_earlier_version(tmp_path / "own.yaml"))
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == [
        f"{old} is {new} now" for old, new in legacy.MOVED.items()
    ]


def test_what_a_run_has_saved_loads(tmp_path: Path) -> None:
    config = load_saved(saved_by_an_earlier_version(tmp_path / "config.yaml"))
    assert config == load_config(
        settings=["run.name=x", "train.epochs=3", *(f"optim.{name}={value}" for name, value in OLD.items())]
    )


def test_the_file_in_a_runs_folder_loads_as_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    file = saved_by_an_earlier_version(tmp_path / "config.yaml")
    assert load_config(file, ["optim.lr=0.5"]) == load_saved(file, ["optim.lr=0.5"])
    with pytest.raises(ConfigError, match=r"train\.lr is optim\.lr now"):
        load_config(file, ["train.lr=0.5"])


def test_a_configuration_of_today_is_left_alone(tmp_path: Path) -> None:
    save_config(load_config(settings=["optim.lr=0.5"]), tmp_path / "config.yaml")
    assert load_saved(tmp_path / "config.yaml") == load_config(settings=["optim.lr=0.5"])
