"""What differs between two records of runs, and what each difference decides."""

from typing import Any, get_args

import pytest

from trainer.config.comparison import decides_of, differences, settings_that_decide, values_that_decide
from trainer.config.config import Config, load_config
from trainer.config.options import SETTINGS_OF_POOLINGS, ModelConfig, Pooling


def _record(*settings: str) -> dict[str, Any]:
    return load_config(settings=settings).model_dump(mode="json")


def test_a_difference_has_both_values_and_what_it_decides() -> None:
    changed = ("data.shuffle=false", "model.tables.item=9", "optim.lr=0.5", "run.name=x", "model.mlp=[8]")
    found = {each.name: each for each in differences(_record(*changed), _record())}
    assert {name: each.decides for name, each in found.items()} == {
        "data.shuffle": "positions",
        "model.tables.item": "rows",
        "model.mlp": "parameters",
        "optim.lr": "training",
        "run.name": "nothing",
    }
    assert found["model.tables.item"].text("there") == "model.tables.item is 9 here, 65536 there"
    assert found["model.tables.item"].setting == "model.tables"
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
    assert values_that_decide(Config().train, "positions") == {"seed": 0}
    assert settings_that_decide("positions")["train"] == {"seed"}
    assert decides_of("model.tables.item.max_rows") == "rows"
