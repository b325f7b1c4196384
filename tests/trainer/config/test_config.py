"""The configuration: what overrides what, what is refused and how that reads, and how two records differ."""

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from trainer.config.config import (
    WARM_PARTS,
    Config,
    config_digest,
    decides_of,
    differences,
    load_config,
    load_saved,
    save_config,
    settings_that_decide,
)
from trainer.config.options import (
    DECISIONS,
    LONGEST_NAME,
    SETTINGS_OF_POOLINGS,
    ExactTableConfig,
    ModelConfig,
    Pooling,
    Section,
    decision_of,
    near_match,
)
from trainer.errors import ConfigError

PRESET = Path(__file__).parents[3] / "trainer/presets/dicm.yaml"
ITEMS = ExactTableConfig(kind="exact", max_rows=1 << 20)


def test_the_preset_is_the_default_configuration() -> None:
    assert load_config(PRESET) == load_config() == Config()


@pytest.mark.parametrize(
    "section", [*(type(getattr(Config(), name)) for name in Config.model_fields), ExactTableConfig]
)
def test_every_setting_says_what_it_decides(section: type[Section]) -> None:
    said = {name: decision_of(field) for name, field in section.model_fields.items()}
    assert said and {*said.values()} <= {*DECISIONS}


def test_texts_of_the_settings_are_those_of_the_classes() -> None:
    check = [sys.executable, "-m", "tools.settings", "--check"]
    assert subprocess.run(check, cwd=Path(__file__).parents[3], check=False).returncode == 0


def test_defaults_have_the_papers_model_and_rates() -> None:
    config = load_config()
    assert (config.optim.lr, config.optim.lr_gamma, config.optim.lr_every) == (0.001, 0.9, 24_000)
    assert (config.train.epochs, config.model.mlp, config.model.embed_hidden) == (2, [200, 80], [256, 64])
    assert (config.model.id_width, config.model.visual_width, config.model.images) == (12, 12, "both")


def test_a_long_run_writes_checkpoints_on_the_way() -> None:
    every = load_config().train.checkpoint_every
    assert every is not None
    assert every <= 5_000


def test_set_wins_over_file_and_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("train: {epochs: 5, seed: 7}\nmodel: {mlp: [10]}\n")
    config = load_config(file, ["train.epochs=3", "optim.lr=1e-2", "model.tables.user=99"])
    assert (config.train.epochs, config.train.seed, config.model.mlp) == (3, 7, [10])
    assert (config.optim.lr, config.model.tables["user"], config.model.tables["item"]) == (0.01, 99, ITEMS)
    assert config.data == load_config().data


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


def test_saved_configuration_loads_as_the_same(tmp_path: Path) -> None:
    config = load_config(settings=["model.embed_hidden=[8,4]", "run.name=x", "data.missing=learned"])
    save_config(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert config_digest(again.model_dump()) == config_digest(config.model_dump())
    assert config_digest(load_config().model_dump()) != config_digest(config.model_dump())


def test_a_name_of_any_length_is_not_compared_with_all_others() -> None:
    name = "x" * LONGEST_NAME
    assert near_match(name, [f"{name}y"]) == f"did you mean {name}y?"
    assert near_match(f"{name}x", [name]) == f"known: {name}"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.epoch=1", "train.epoch is unknown; did you mean train.epochs?"),
        ("modell.images=ad", "modell is unknown; did you mean model?"),
        ("optim.learn_every=1", "optim.learn_every is unknown; did you mean optim.lr_every?"),
        ("train.zzz=1", "train.zzz is unknown; known: train.checkpoint_beside, train.checkpoint_every,"),
        ("train.epochs=0", "train.epochs=0: it should be greater than or equal to 1"),
        ("train.epochs=many", "train.epochs='many': it should be a valid integer"),
        ("model.images=all", "model.images='all': it should be 'none', 'ad', 'behavior' or 'both'"),
        ("model.tables.own={kind: exact}", "model.tables.own.max_rows is missing"),
        (
            "model.tables.item={kind: exact, max_rows: 9, expire: 3}",
            "tables.item.expire is unknown; did you mean",
        ),
        (
            "model.tables.item={kind: exact, max_rows: 9, admit_after: 256}",
            "item.admit_after=256: it should be",
        ),
        ("model.tables.item={kind: exact, max_rows: 2147483648}", "max_rows=2147483648: it should be less than"),
        ("model.transformer_width=31", "model.transformer_width=31: it should be a multiple of 2"),
        ("model.tables.own={max_rows: 9}", "a number of rows, or {kind: exact, max_rows: NUMBER}"),
        ("model.tables.own={kind: hashed}", "a number of rows, or {kind: exact, max_rows: NUMBER}"),
        ("model.base=fm", "model.base='fm': it should be 'lr', 'mlp', 'din', 'dcn'"),
        ("model.pooling_length=0", "model.pooling_length=0: it should be greater than or equal to 1"),
        ("data.global_batch_size=-4", "data.global_batch_size=-4"),
        ("model.tables={user: -2}", "model.tables.user=-2"),
        ("run.name=../x", "run.name='../x'"),
        ("run.resume=latest", "run.resume=latest needs the run's name"),
        ("run.resume=auto", "run.resume=auto needs the run's name"),
        ("data.samples=${nowhere.at.all}", "unresolved"),
        ("epochs=3", "write it as section.field=value"),
        ("train.epochs", "write it as section.field=value"),
        ("run.device=gpu", "run.device='gpu': it should be 'auto', 'cpu' or 'cuda'"),
        ("data.samples=[", "not readable as YAML"),
        ("data.train_days=[monday]", "data.train_days.0='monday'"),
        ("data.train_days=[]", "data.train_days=[]: List should have at least 1 item"),
        ("model.id_dropout=1", "model.id_dropout=1: it should be less than 1"),
        ("optim.id_l2=-1", "optim.id_l2=-1: it should be greater than or equal to 0"),
        (
            "run.warm_parts=half",
            "run.warm_parts='half': it should be none, partial, full, all, or a list of images, model",
        ),
    ],
)
def test_mistakes_are_named(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(settings=[setting])
    assert message in str(caught.value)


def test_the_newest_checkpoint_is_resumed_or_overwritten() -> None:
    settings = ["run.name=x", "run.overwrite=true"]
    for resume in ("latest", "auto"):
        with pytest.raises(
            ConfigError, match=r"run\.overwrite=true removes it; set one of them, or resume from the path"
        ):
            load_config(settings=[*settings, f"run.resume={resume}"])
    assert load_config(settings=[*settings, "run.resume=x/checkpoints/step-00000050"]).run.overwrite


def test_days_may_be_written_bare() -> None:
    config = load_config(settings=["data.train_days=[2026-01-01,2026-01-02]", "data.test_days=[2026-01-03]"])
    assert (config.data.train_days, config.data.test_days) == (["2026-01-01", "2026-01-02"], ["2026-01-03"])
    with pytest.raises(ConfigError, match="share 2026-01-02"):
        load_config(settings=["data.train_days=[2026-01-02]", "data.test_days=[2026-01-02]"])


def test_warm_parts_have_names() -> None:
    parts = {name: load_config(settings=[f"run.warm_parts={name}"]).run.warm_parts for name in WARM_PARTS}
    full = ["images", "model", "ids"]
    assert parts == {"none": [], "partial": full[:2], "full": full, "all": [*full, "optimizers"]}
    assert load_config().run.warm_parts == parts["partial"]


def test_multi_query_needs_the_ad_image() -> None:
    with pytest.raises(ConfigError, match=r"model\.pooling='multi_query': it queries with the ad image .* set model"):
        load_config(settings=["model.images=behavior", "model.pooling=multi_query"])
    assert load_config(settings=["model.images=none", "model.pooling=multi_query"]).model.images == "none"


def test_a_transformer_needs_the_ad() -> None:
    with pytest.raises(ConfigError, match=r"model\.pooling='transformer': it looks at the ad .* set model\.base=mlp"):
        load_config(settings=["model.base=two_tower", "model.pooling=transformer"])


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(settings=["train.epoch=1", "train.epochs=0", "model.images=all"])
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "found a list"),
        ("train: [", "not a readable YAML"),
        ("train: 3\n", "train=3 has to be a mapping"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)
    with pytest.raises(ConfigError, match="there is no such file"):
        load_config(tmp_path / "absent.yaml")


def test_an_exact_table_is_saved_and_loaded(tmp_path: Path) -> None:
    config = load_config(settings=["model.tables.item={kind: exact, max_rows: 9, admit_after: 3}"])
    assert config.model.tables["item"] == ExactTableConfig(kind="exact", max_rows=9, admit_after=3)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_configuration_is_immutable() -> None:
    config: Config = load_config()
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 3


def test_what_several_settings_do_together_is_told_without_all_others() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["model.image_dropout=0.1", "model.id_init_std=0.01"])
    assert str(caught.value).startswith("configuration: model.image_dropout=0.1 takes an ad for new")
    assert "visual_width" not in str(caught.value)


def test_a_saved_file_has_no_aliases_and_is_not_empty(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for text, message in (("a: &a [1]\nb: *a\n", "it has aliases"), ("\n", "the settings of the run are lost")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_saved(file)


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


def test_kinds_that_are_accepted_are_left_out() -> None:
    found = differences(_record("optim.lr=0.5", "run.name=x", "train.seed=3"), _record(), ("training", "nothing"))
    assert [each.name for each in found] == ["train.seed"]


def test_what_is_not_a_setting_decides_on_parameters_but_for_the_samples() -> None:
    here = {"data": {"samples_digest": "a"}, "model": {"fields": {"age": {"kind": "id"}}}, "store": {"dim": 8}}
    found = differences(here, {"data": {"samples_digest": "b"}, "model": {"label": "click"}, "store": {"dim": 9}})
    assert {each.name: each.decides for each in found} == {
        "data.samples_digest": "positions",
        "model.fields.age.kind": "parameters",
        "model.label": "parameters",
        "store.dim": "parameters",
    }


@pytest.mark.parametrize(
    ("model", "setting", "is_idle"),
    [
        ("model.base=mlp", "model.cross_structure=stacked", True),
        ("model.base=dcn", "model.cross_structure=stacked", False),
        ("model.base=mine.MyNet", "model.cross_structure=stacked", False),  # it may read any
        ("model.base=mine.MyNet", "model.transformer_width=4", False),
        ("model.base=lr", "model.mlp=[8]", True),
        ("model.images=none", "model.pooling=sum", True),
        ("model.images=ad", "model.pooling=sum", True),
        ("model.images=ad", "model.id_proxy=true", False),
        ("model.images=behavior", "model.id_proxy=true", True),
        ("model.base=two_tower", "model.pooling=sum", True),
        ("model.base=lr", "model.image_products=false", True),
        ("model.pooling=sum", "model.transformer_width=4", True),
        ("model.pooling=transformer", "model.transformer_width=4", False),
        ("model.pooling=sum", "model.pooling_length=4", True),
        ("model.pooling=concat", "model.pooling_length=4", False),
        ("model.pooling=transformer", "model.pooling_length=4", False),
        ("model.pooling=sum", "model.attention_hidden=4", True),
        ("model.pooling=multi_query", "model.attention_hidden=4", False),
        ("model.pooling=sum", "model.visual_width=4", False),
    ],
)
def test_a_setting_that_the_others_make_idle_counts_as_equal(model: str, setting: str, is_idle: bool) -> None:
    assert (differences(_record(model, setting), _record(model)) == []) == is_idle


def test_what_a_pooling_reads_are_settings_of_the_model() -> None:
    assert SETTINGS_OF_POOLINGS.keys() <= set(get_args(Pooling))
    assert set().union(*SETTINGS_OF_POOLINGS.values()) <= ModelConfig.model_fields.keys()


def test_an_idle_setting_counts_where_one_of_the_two_uses_it() -> None:
    found = differences(_record("model.base=dcn", "model.cross_structure=stacked"), _record())
    assert [each.name for each in found] == ["model.base", "model.cross_structure"]


def test_settings_are_listed_by_what_they_decide() -> None:
    assert settings_that_decide("positions")["train"] == {"seed"}
    assert decides_of("model.tables.item.max_rows") == "rows"
