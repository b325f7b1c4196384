"""Configurations that earlier versions wrote: typed by a person they are refused, saved by a run they load."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from trainer.comm import SoloComm
from trainer.config import legacy
from trainer.config.config import load_config, load_saved, save_config
from trainer.errors import CheckpointError, ConfigError
from trainer.evaluation.predict import predict_run
from trainer.main import train
from trainer.runs.checkpoint import Origin

SAVED = Path(__file__).parent / "saved"

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
    old = {**OLD, "ids": "rowwise_adam", "ids_lr": "null"}
    assert config == load_config(
        settings=["run.name=x", "train.epochs=3", *(f"optim.{name}={value}" for name, value in old.items())]
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


def test_a_saved_file_that_changes_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a file said the last time is kept only for the same text, and not where it names the environment."""
    file = tmp_path / "config.yaml"
    for lr in (0.5, 0.25):
        save_config(load_config(settings=[f"optim.lr={lr}"]), file)
        assert load_saved(file).optim.lr == load_saved(file).optim.lr == lr
    file.write_text("optim: {lr: '${oc.decode:${oc.env:OWN_LR}}'}")
    for lr in ("0.5", "0.25"):
        monkeypatch.setenv("OWN_LR", lr)
        assert load_saved(file).optim.lr == float(lr)


def test_a_run_of_the_time_before_image_products_has_none(tmp_path: Path) -> None:
    values = yaml.safe_load(saved_by_an_earlier_version(tmp_path / "config.yaml").read_text())
    del values["model"]["image_products"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert not load_saved(tmp_path / "config.yaml").model.image_products
    assert load_config().model.image_products


def test_a_run_of_the_time_before_streams_has_one(tmp_path: Path) -> None:
    """Its position in an epoch is one in that order, so another number of streams is refused."""
    config = load_config(settings=["run.name=x", "data.shuffle_streams=8"])
    save_config(config, tmp_path / "config.yaml")
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del values["data"]["shuffle_streams"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert load_saved(tmp_path / "config.yaml").data.shuffle_streams == 1
    assert load_config().data.shuffle_streams is None

    def origin(**data: int) -> Origin:
        return Origin(data=data, train={}, model={}, store={})

    recorded = origin(global_batch_size=512)
    origin(global_batch_size=512, shuffle_streams=1).check_same(recorded, tmp_path)
    with pytest.raises(CheckpointError, match=r"data\.shuffle_streams is 8 here, 1 in the checkpoint"):
        origin(global_batch_size=512, shuffle_streams=8).check_same(recorded, tmp_path)


def test_an_exact_table_of_the_time_before_evictions_refuses(tmp_path: Path) -> None:
    table = "model.tables.item={kind: exact, max_rows: 9, admit_after: 3}"
    config = load_config(settings=["run.name=x", table])
    assert config.model.tables["item"].when_full == "evict"
    save_config(config, tmp_path / "config.yaml")
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del values["model"]["tables"]["item"]["when_full"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    saved = load_saved(tmp_path / "config.yaml")
    assert saved.model.tables == {**config.model.tables, "item": saved.model.tables["item"]}
    assert saved.model.tables["item"].when_full == "refuse"

    def origin(model: dict[str, object]) -> Origin:
        return Origin(data={}, train={}, model=model, store={})

    recorded = origin(values["model"])
    origin(saved.model.model_dump()).check_same(recorded, tmp_path)
    with pytest.raises(CheckpointError, match=r"tables\.item\.when_full is 'evict' here, 'refuse' in the checkpoint"):
        origin(config.model.model_dump()).check_same(recorded, tmp_path)


class TestARunOfTheFirstVersion:
    """`saved` is a run (IDs alone, 30 of its steps) that the first version of the project has written, and the
    logits that it gave to the test samples after steps 30 and 36."""

    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        folder = shutil.copytree(SAVED, tmp_path / "run")
        file = folder / "config.yaml"
        file.write_text(file.read_text().replace(" data/", f" {tmp_path}/run/"))
        return folder

    def test_it_gives_the_same_logits(self, saved: Path) -> None:
        torch.testing.assert_close(logits(saved), expected(30), rtol=1e-5, atol=1e-6)

    def test_it_goes_on_to_the_same_logits(self, saved: Path) -> None:
        settings = [f"run.dir={saved.parent}", "run.resume=latest", "train.max_steps=36"]
        train(load_config(saved / "config.yaml", settings), SoloComm())
        assert not torch.allclose(expected(30), expected(36), rtol=1e-2)
        torch.testing.assert_close(logits(saved), expected(36), rtol=1e-4, atol=1e-5)

    def test_settings_of_today_are_refused_by_name(self, saved: Path) -> None:
        own = ["run.name=run", f"run.dir={saved.parent}", "run.resume=latest", "model.images=none"]
        with pytest.raises(CheckpointError) as caught:
            train(load_config(settings=[*own, f"data.samples={saved}/samples"]), SoloComm())
        for line in ("model.multi_hot is 'mean' here, 'sum' in", "model.activation is 'relu' here, 'prelu' in"):
            assert line in str(caught.value)

    @pytest.mark.parametrize(("name", "value"), [("multi_hot", "mean"), ("activation", "relu")])
    def test_a_warm_start_with_other_layers_is_refused(self, saved: Path, name: str, value: str) -> None:
        file, new = saved / "config.yaml", [f"run.dir={saved.parent}", "run.name=new", f"run.warm_start={saved}"]
        train(load_config(file, [*new, "train.max_steps=1"]), SoloComm())
        settings = [*new, "run.overwrite=true", f"model.{name}={value}"]
        message = rf"it was trained with model\.{name}=.*; set model\.{name}=.*, or leave model out of run\.warm_parts"
        with pytest.raises(CheckpointError, match=message):
            train(load_config(file, settings), SoloComm())
        train(load_config(file, [*settings, "run.warm_parts=[ids]", "train.max_steps=1"]), SoloComm())


def logits(run: Path) -> torch.Tensor:
    return torch.from_numpy(predict_run(run).logit_N)


def expected(step: int) -> torch.Tensor:
    return torch.tensor(json.loads((SAVED / "logits.json").read_text())[str(step)], dtype=torch.float64)
