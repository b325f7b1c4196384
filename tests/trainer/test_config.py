"""The configuration: what overrides what, what is refused and how that reads, and how two records differ."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from featurestore.problems import Problem as StoreProblem
from featurestore.text import LONGEST_NAME, near_match
from tests.raised import told
from trainer.config import (
    Config,
    ExactTableConfig,
    decides_of,
    differences,
    load_config,
    load_saved,
    save_config,
    settings_that_decide,
)
from trainer.errors import ConfigError
from trainer.problems import Problem

ITEMS = ExactTableConfig(kind="exact", max_rows=1 << 20)


def test_set_wins_over_file_and_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("train: {epochs: 5, seed: 7}\nmodel: {mlp: [10]}\n")
    config = load_config(file, ["train.epochs=3", "optim.lr=1e-2", "model.tables.user=99"])
    assert (config.train.epochs, config.train.seed, config.model.mlp) == (3, 7, [10])
    assert (config.optim.lr, config.model.tables["user"], config.model.tables["item"]) == (0.01, 99, ITEMS)
    assert config.data == load_config().data
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["train.epoch=1", "train.epochs=0", "model.images=all"])
    assert len(str(caught.value).splitlines()) == 3, "all mistakes are told at once"


@pytest.mark.parametrize(
    ("settings", "added"),
    [
        (["model.tables={a: 1}", "model.tables.a=2"], {"item": ITEMS, "a": 2}),
        (["model.tables.a=2", "model.tables={a: 1}"], {"item": ITEMS, "a": 1}),
        (["model.tables.a=1", "model.tables.a=2"], {"item": ITEMS, "a": 2}),
        (["model.tables={a: 1}", "model.tables=null", "model.tables={b: 2}"], {"b": 2}),
        (["model.tables.a=1", "optim.lr=0.5", "model.tables.b=2"], {"item": ITEMS, "a": 1, "b": 2}),
    ],
)
def test_the_last_setting_wins(settings: list[str], added: dict[str, object]) -> None:
    tables = load_config(settings=settings).model.tables
    assert {name: tables.get(name) for name in ("item", "a", "b")} == {"item": None, "a": None, "b": None} | added
    assert load_config() == Config()


@pytest.mark.parametrize(
    "settings",
    [
        ["model.embed_hidden=[8,4]", "run.name='1e5'", "data.missing=learned", "optim.lr=1e-5", "run.dir=\u00e4 #: x"],
        ["data.train_days=[2026-01-01]", "data.cache_dir=2026-01-01"],
        ["model.tables.item={kind: exact, max_rows: 9, admit_after: 3}"],
        ["run.name=x", "run.overwrite=true", "run.resume=x/checkpoints/step-00000050"],
        ["model.images=none", "model.pooling=multi_query"],
    ],
)
def test_saved_configuration_loads_as_the_same(tmp_path: Path, settings: list[str]) -> None:
    config = load_config(settings=settings)
    assert config != Config()
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == load_saved(tmp_path / "config.yaml") == config


def test_a_name_of_any_length_is_not_compared_with_all_others() -> None:
    name = "x" * LONGEST_NAME
    assert near_match(name, [f"{name}y"]) == f"did you mean {name}y?"
    assert near_match(f"{name}x", [name]) == f"known: {name}"


unknown = partial(told, Problem.SETTING_UNKNOWN)
SMALL_START = told(Problem.IMAGE_DROPOUT_NEEDS_SMALL_START, value=0.1, std=0.05, limit=0.001)
EXACT_ITEM = "model.tables.item={kind: exact, max_rows: 9, "


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.epoch=1", unknown(where="train.epoch", hint="did you mean train.epochs?")),
        ("modell.images=ad", unknown(where="modell", hint="did you mean model?")),
        ("train.zzz=1", unknown(where="train.zzz", hint="known: train.checkpoint_beside, train.checkpoint_every,")),
        ("train.epochs=0", "train.epochs=0: it should be greater than or equal to 1"),
        ("train.epochs=many", "train.epochs='many': it should be a valid integer"),
        ("model.images=all", "model.images='all': it should be 'none', 'ad', 'behavior' or 'both'"),
        ("model.tables.own={kind: exact}", told(Problem.MISSING, where="model.tables.own.max_rows")),
        (f"{EXACT_ITEM}expire: 3}}", unknown(where="model.tables.item.expire", hint=re.compile("did you mean"))),
        (f"{EXACT_ITEM}admit_after: 256}}", "item.admit_after=256: it should be"),
        ("model.tables.item={kind: exact, max_rows: 2147483648}", "max_rows=2147483648: it should be less than"),
        ("model.tables.own={kind: hashed}", told(Problem.NOT_TABLE_ROWS)),
        ("model.base=fm", "model.base='fm': it should be 'lr', 'mlp', 'din', 'dcn'"),
        ("model.tables={user: -2}", "model.tables.user=-2"),
        ("run.name=../x", "run.name='../x'"),
        ("run.resume=latest", told(Problem.RESUME_WITHOUT_NAME, value="latest")),
        ("run.resume=auto", told(Problem.RESUME_WITHOUT_NAME, value="auto")),
        ("epochs=3", told(Problem.NOT_A_SETTING, value="epochs=3")),
        ("train.epochs", told(Problem.NOT_A_SETTING, value="train.epochs")),
        ("run.device=gpu", "run.device='gpu': it should be 'auto', 'cpu' or 'cuda'"),
        ("data.samples=[", told(Problem.SETTING_NOT_YAML, value="data.samples=[")),
        ("data.train_days=[monday]", "data.train_days.0='monday'"),
        ("data.train_days=[]", r"data\.train_days=\[\]: List should have at least 1 item"),
        ("model.id_dropout=1", "model.id_dropout=1: it should be less than 1"),
        ("data.store_version=true", told(Problem.NOT_A_SNAPSHOT, value=True)),
        ("data.store_version=-1", told(Problem.NOT_A_SNAPSHOT, value=-1)),
        ("data.store_version=../x", told(StoreProblem.NOT_A_CHANNEL_NAME, value="../x")),
        ("run.warm_parts=half", "run.warm_parts='half': it should be 'partial' or 'all'"),
        ("run.name=x; run.overwrite=true; run.resume=latest", told(Problem.RESUME_AND_OVERWRITE, value="latest")),
        ("run.name=x; run.overwrite=true; run.resume=auto", told(Problem.RESUME_AND_OVERWRITE, value="auto")),
        ("data.train_days=[2026-01-02]; data.test_days=[2026-01-02]", told(Problem.DAY_FOR_BOTH, value="2026-01-02")),
        ("model.images=behavior; model.pooling=multi_query", told(Problem.POOLING_WITHOUT_AD_IMAGE)),
        ("model.image_dropout=0.1; model.id_init_std=0.05", SMALL_START),
        ("train.early_stopping=2; data.validation_days=0", told(Problem.EARLY_STOPPING_WITHOUT_EVALUATIONS)),
        ("train.early_stopping=2; train.eval_every=5; data.test_days=[]", told(Problem.EARLY_STOPPING_WITHOUT_SAMPLES)),
    ],
)
def test_mistakes_are_named(setting: str, message: str) -> None:
    """Of one setting, or of several that do not fit together: then the message has no other settings."""
    with pytest.raises(ConfigError) as caught:
        load_config(settings=setting.split("; "))
    assert re.search(message, str(caught.value)) and str(caught.value).count("\n") == 0
    assert "visual_width" not in str(caught.value)


def test_days_may_be_written_bare_and_early_stopping_counts_evaluations_on_validation_days_too() -> None:
    config = load_config(settings=["data.train_days=[2026-01-01,2026-01-02]", "data.test_days=[2026-01-03]"])
    assert (config.data.train_days, config.data.test_days) == (["2026-01-01", "2026-01-02"], ["2026-01-03"])
    assert load_config(settings=["train.early_stopping=2", "data.validation_days=1"]).train.early_stopping == 2
    assert load_config(settings=["data.validation_days=2026-03-18"]).data.validation_days == ["2026-03-18"]


@pytest.mark.parametrize(
    ("text", "message", "load"),
    [
        ("- a\n- b\n", told(Problem.SETTINGS_NOT_A_MAPPING, value="list"), load_config),
        ("train: [", told(Problem.SETTINGS_NOT_YAML), load_config),
        ("train: 3\n", told(Problem.SETTING_NOT_A_MAPPING, where="train", value=3), load_config),
        ("a: &a [1]\nb: *a\n", told(Problem.SETTINGS_NOT_YAML, reason=StoreProblem.HAS_ALIASES), load_saved),
        ("\n", told(Problem.SETTINGS_NOT_A_MAPPING, value="NoneType"), load_saved),
        (None, told(Problem.NO_FILE_OF_SETTINGS), load_config),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str | None, message: str, load: Callable[..., Config]) -> None:
    if text is not None:
        (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "own.yaml")


def _record(*settings: str) -> dict[str, Any]:
    return load_config(settings=settings).model_dump(mode="json")


def test_a_difference_has_both_values_and_what_it_decides() -> None:
    changed = ("data.shuffle=false", "model.tables.item.max_rows=9", "optim.lr=0.5", "run.name=x", "model.mlp=[8]")
    found = {each.name: each for each in differences(_record(*changed), _record())}
    assert {name: each.decides for name, each in found.items()} == {
        "data.shuffle": "positions",
        "model.tables.item.max_rows": "rows",
        "model.mlp": "parameters",
        "optim.lr": "training",
        "run.name": "nothing",
    }
    text = found["model.tables.item.max_rows"].text("there")
    assert text == "model.tables.item.max_rows is 9 here, 1048576 there"
    assert found["model.tables.item.max_rows"].setting == "model.tables"
    assert differences(_record(), _record()) == []
    accepted = differences(_record("optim.lr=0.5", "run.name=x", "train.seed=3"), _record(), ("training", "nothing"))
    assert [each.name for each in accepted] == ["train.seed"]


def test_what_is_not_a_setting_decides_on_parameters_but_for_the_samples() -> None:
    here = {"data": {"samples_digest": "a"}, "model": {"fields": {"age": {"kind": "id"}}}, "store": {"dim": 8}}
    found = differences(here, {"data": {"samples_digest": "b"}, "model": {"label": "click"}, "store": {"dim": 9}})
    assert {each.name: each.decides for each in found} == {
        "data.samples_digest": "positions",
        "model.fields.age.kind": "parameters",
        "model.label": "parameters",
        "store.dim": "parameters",
    }
    assert settings_that_decide("positions")["train"] == {"seed"}
    assert decides_of("model.tables.item.max_rows") == "rows"


@pytest.mark.parametrize(
    ("named", "found"), [("./", "made"), (".", "made"), ("./in", "made/in"), ("in", "in"), ("../in", "../in")]
)
def test_places_that_begin_with_a_dot_are_below_the_file(named, found, tmp_path, monkeypatch):
    (tmp_path / "made").mkdir()
    settings = tmp_path / "made" / "settings.yaml"
    settings.write_text(f"data: {{samples: {named}, schema_file: ./schema.yaml}}\n")
    expected = str(tmp_path / found) if named[:2] in (".", "./") else found
    assert load_config(settings).data.samples == expected
    monkeypatch.chdir(tmp_path)
    data = load_config(Path("made/settings.yaml")).data
    assert (data.samples, data.schema_file) == (found, "made/schema.yaml")
    monkeypatch.chdir(tmp_path / "made")
    assert load_config(Path("settings.yaml")).data.samples == expected
    assert load_config(settings, [f"data.samples={named}"]).data.samples == named
