"""Warm starts: what is taken and what stays fresh, by group; what does not fit is refused, with the way to go on."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from featurestore.format.rows import FeatureRows
from featurestore.spec import StoreInfo
from featurestore.store import FeatureStore
from tests.cli import invoke
from tests.trainer.checkpoints import damage, tensors_of
from tests.trainer.conftest import Places, make_places
from tests.trainer.whole_runs import assert_same, run_alone
from trainer import main
from trainer.comm import SoloComm
from trainer.config import ModelConfig, load_config
from trainer.errors import CheckpointError
from trainer.loop.training import total_steps
from trainer.runs.checkpoint import DENSE, CheckpointState, Origin, WarmStart, begin_with
from trainer.runs.folder import find_checkpoint
from trainer.runs.open import Run, open_run
from trainer.schema import DEFAULT_SCHEMA

pytestmark = pytest.mark.long  # they train whole runs
State = dict[str, torch.Tensor]


def opened(places: Places, **changes: Any) -> Run:
    return open_run(load_config(settings=places.settings(**changes)), SoloComm())


def state_of(run: Run) -> State:
    run.close()
    return {name: value.clone() for name, value in (run.engine.dense_state() | run.engine.shard_state()).items()}


def trained(places: Places, name: str, steps: int, **changes: Any) -> Path:
    return run_alone(places, run__name=name, train__max_steps=steps, **changes)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Places:
    return make_places(tmp_path_factory.mktemp("warm"))


@pytest.fixture(scope="module")
def before(own: Places) -> Path:
    """A run of some steps, that warm starts begin with."""
    return trained(own, "before", 6, train__checkpoint_every=3)


@pytest.fixture(scope="module")
def states(own: Places, before: Path) -> tuple[State, State]:
    """State of a fresh run, and that at the end of `before`."""
    return state_of(opened(own)), state_of(opened(own, run__name="before", run__resume="latest"))


PARTS = {
    "none": (),
    "partial": ("model.", "stores."),
    "full": ("model.", "stores.", "user/", "item/", "image/", "category/", "scene/"),
    "[images]": ("stores.",),
    "[model,ids]": ("model.", "user/", "item/", "image/", "category/", "scene/"),
}


@pytest.mark.parametrize("parts", PARTS)
def test_what_is_taken(own: Places, before: Path, states: tuple[State, State], parts: str) -> None:
    fresh, old = states
    run = opened(own, run__warm_start=before, run__warm_parts=parts)
    assert (run.position.epoch, run.position.step, run.history, run.engine.num_steps) == (0, 0, [], 0)
    for name, value in state_of(run).items():
        is_parameter = "/" not in name or name.endswith(("/weight", "/last_weight"))
        taken = is_parameter and name.startswith(PARTS[parts])
        source = name.replace("/last_weight", "/weight")  # what a row is worth now, where it makes up for steps
        assert torch.equal(value, old[source] if taken else fresh[name]), name
    moved = [name for name in fresh if not torch.equal(fresh[name], old[name])]
    assert {name.partition("/")[0].partition(".")[0] for name in moved} >= {"model", "stores", "item", "adam"}


def test_a_run_is_its_last_checkpoint_and_a_checkpoint_is_itself(own: Places, before: Path) -> None:
    def begun(path: object) -> torch.Tensor:
        return state_of(opened(own, run__warm_start=path))["model.mlp.0.weight"]

    last, middle = find_checkpoint(before), before / "checkpoints" / "step-00000003"
    assert torch.equal(begun(before), begun(last))
    assert not torch.equal(begun(before), begun(middle))


def test_resumption_goes_on_instead_of_beginning_again(own: Places, before: Path) -> None:
    whole = trained(own, "whole", 6, run__warm_start=before)
    trained(own, "halves", 3, run__warm_start=before)
    halves = trained(own, "halves", 6, run__warm_start=before, run__resume="latest")
    assert_same(halves, whole)


def test_options_of_the_command(own: Places, before: Path) -> None:
    settings = own.settings(run__name="option", train__max_steps=1)
    warm = ["--warm-start", str(before), "--warm-parts", "model,ids"]
    result = invoke(main.app, *warm, "--set", *settings, code=0)
    assert f"warm start from {before}/checkpoints/step-00000006: model, ids" in result.stdout
    result = invoke(main.app, *warm[:-1], "most")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "run.warm_parts.0='most': it should be 'images', 'model', 'ids' or 'optimizers'" in result.stderr


@pytest.mark.parametrize(
    ("parts", "changes", "message"),
    [
        ("partial", {"model__mlp": [9, 4]}, r"part model: .* model\.mlp=\[8, 4\], this run has model\.mlp=\[9, 4\]; "),
        ("partial", {"model__embed_hidden": [9, 4]}, r"part images: .*or leave images out of run\.warm_parts"),
        ("full", {"model__tables__item": 640}, r"part ids: item/0000/weight has shape \(16, 12\) .*leave ids out"),
        ("[ids]", {"model__table_shards": 2}, r"part ids: .*leave ids out"),
        ("partial", {"model__images": "none"}, "has an E for images, and this run uses none; set model.images"),
    ],
)
def test_other_shapes_are_named(own: Places, before: Path, parts: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        opened(own, run__warm_start=before, run__warm_parts=parts, **changes)


def taken(part: Any, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Take a part of a run whose origin says this of its model, where this run's says that; what fits needs files."""
    theirs, mine = (Origin(data={}, train={}, stores={}, optim={}, model=model) for model in (before, now))
    state = CheckpointState.model_construct(origin=theirs, files={DENSE: ""})
    begin_with(SoloComm(), WarmStart(Path("old"), state, (part,)), mine, None)  # type: ignore[arg-type]


ONE_POOLING = {"pooling": "sum", "image_products": False}


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({}, {"multi_hot": "sum"}, "model.multi_hot=mean, this run has model.multi_hot=sum"),
        ({}, {"activation": "prelu"}, "model.activation=relu, this run"),
        (ONE_POOLING, {**ONE_POOLING, "pooling": "mean"}, "model.pooling=sum, this run has model.pooling=mean"),
        ({**ONE_POOLING, "images": "ad"}, {**ONE_POOLING, "images": "behavior"}, "model.images=ad"),
        ({}, {"id_proxy": True}, "model.id_proxy=False, this run has model.id_proxy=True"),
        ({}, {"base": "dcn", "pooling": "sum"}, "model.base=mlp, model.pooling=attentive, this run has"),
    ],
)
def test_settings_that_no_shape_tells_are_noticed(before: dict[str, Any], now: dict[str, Any], told: str) -> None:
    models = ({**ModelConfig(**settings).model_dump(), "fields": {}} for settings in (before, now))
    with pytest.raises(CheckpointError, match=rf"trained with {re.escape(told)}.*leave model out"):
        taken("model", *models)


@pytest.mark.parametrize(
    ("parts", "changes"),
    [
        ("full", {"model__dropout": 0.2, "model__id_dropout": 0.2, "model__id_init_std": 0.05}),
        ("full", {"model__image_dropout": 0.1}),  # whether pictures count is not decided yet
        ("[images,ids]", {"model__multi_hot": "sum"}),  # of the layers, which are not taken
    ],
)
def test_settings_that_change_no_meaning_may_differ(
    own: Places, before: Path, parts: str, changes: dict[str, Any]
) -> None:
    opened(own, run__warm_start=before, run__warm_parts=parts, **changes).close()


def test_rows_that_no_longer_tell_new_ads_are_refused(own: Places) -> None:
    run = trained(own, "far", 1, model__id_init_std=0.05, model__images="ad")
    changes = {"model__image_dropout": 0.1, "model__images": "ad", "run__warm_start": run}
    with pytest.raises(
        CheckpointError,
        match=r"rows started with model\.id_init_std=0\.05.*with model\.image_dropout=0\.1 .*leave ids out",
    ):
        opened(own, run__warm_parts="[ids]", **changes)
    opened(own, run__warm_parts="[images]", **changes).close()
    idle = {"model__image_dropout": 0.1, "model__images": "none", "run__warm_start": run}
    opened(own, run__warm_parts="[ids]", **idle).close()


@pytest.mark.parametrize(
    ("change", "part", "told"),
    [
        ({"age": {"std": [2.0]}}, "model", r"part model: .*other fields \(age, std\)"),
        ({"ad_item": {"weights": "ad_weight"}}, "model", r"\(ad_item, weights=None, here a column\)"),
        ({"price": {"boundaries": [1.0, 3.0]}}, "ids", "part ids: the buckets of field price begin elsewhere"),
        ({"price": {"boundaries": [1.0, 3.0]}}, "model", r"other fields \(price, boundaries\)"),
    ],
)
def test_fields_that_mean_something_else_are_noticed(change: dict[str, Any], part: Any, told: str) -> None:
    """Where neither names nor shapes tell."""
    fields: dict[str, dict[str, Any]] = {
        "age": {"side": "user", "kind": "dense", "transform": "standardize", "mean": [0.0], "std": [1.0]},
        "price": {"side": "ad", "kind": "id", "boundaries": [1.0, 2.0]},
        "ad_item": {"side": "ad", "kind": "id", "table": "item"},
        "ad_image": {"side": "ad", "kind": "content"},
    }
    model = ModelConfig().model_dump()
    changed = {name: field | change.get(name, {}) for name, field in fields.items()}
    with pytest.raises(CheckpointError, match=told):
        taken(part, {**model, "fields": fields}, {**model, "fields": changed})


def test_fields_in_another_order_are_noticed(own: Places, before: Path, tmp_path: Path) -> None:
    schema = yaml.safe_load(DEFAULT_SCHEMA.read_text())
    schema["fields"].reverse()
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(schema))
    changes = {"run__warm_start": before, "data__schema_file": tmp_path / "schema.yaml"}
    with pytest.raises(CheckpointError, match=r"other fields \(the same in another order\).*leave model out"):
        opened(own, **changes)
    opened(own, run__warm_parts="[images,ids]", **changes).close()


def test_a_damaged_file_is_named(own: Places) -> None:
    run = trained(own, "damaged", 1)
    damage(run, 1, "rows-00000-of-00001.safetensors", "-1")
    opened(own, run__warm_start=run).close()  # partial: the file is not needed
    with pytest.raises(CheckpointError, match=r"rows-00000-of-00001\.safetensors is damaged"):
        opened(own, run__warm_start=run, run__warm_parts="full")


def _other_store(places: Places, **changes: Any) -> Path:
    """A store of other features for the same keys."""
    store = FeatureStore.open(places.folder / "features")
    other = FeatureStore.create(places.folder / f"other-{'-'.join(changes)}", StoreInfo(**dict(store.info) | changes))
    features_ND = np.random.default_rng(1).normal(size=(50, other.info.dim)).astype(np.float32)
    other.put(FeatureRows.of([f"item/{n}" for n in range(50)], features_ND, keys=np.arange(1_000, 1_050)))
    return places.folder / f"other-{'-'.join(changes)}"


def test_features_of_another_kind_are_refused_and_the_way_out_works(own: Places, before: Path) -> None:
    extractor = FeatureStore.open(own.folder / "features").info.extractor.model_copy(update={"weights_digest": "x"})
    other, wide = _other_store(own, extractor=extractor), _other_store(own, dim=8, dtype="bfloat16")
    for changes in ({"run__name": "before", "run__resume": "latest"}, {"run__warm_start": before}):
        for store, told in ((other, "extractor.weights_digest is 'x' here, '0'"), (wide, "dim is 8 here, 16")):
            with pytest.raises(CheckpointError) as caught:
                opened(own, data__store=store, **changes)
            said = str(caught.value)
            assert f"stores.images.{told} in the checkpoint" in said
            assert "set data.store to a store of that kind" in said
            assert f"--warm-start {find_checkpoint(before)} --warm-parts model,ids" in said
        assert "stores.images.dtype is 'bfloat16' here, 'float32' in the checkpoint" in said
    trained(own, "on-other", 2, data__store=wide, run__warm_start=before, run__warm_parts="[model,ids]")


def test_a_run_without_images_is_told_so(own: Places) -> None:
    run = trained(own, "plain", 1, model__images="none")
    with pytest.raises(CheckpointError, match=r"was trained without images.*--warm-parts ids"):
        opened(own, run__warm_start=run)
    opened(own, run__warm_start=run, run__warm_parts="[ids]").close()
    opened(own, run__warm_start=run, model__images="none").close()


def test_a_newer_snapshot_of_the_same_kind_is_fine(tmp_path: Path) -> None:
    places = make_places(tmp_path)
    run = trained(places, "a", 2)
    more = FeatureRows.of(["new"], np.full((1, 16), 9, np.float32), keys=np.array([9_999]))
    FeatureStore.open(tmp_path / "features").put(more)
    old = state_of(opened(places, run__name="a", run__resume="latest"))
    new = opened(places, run__warm_start=run)
    assert new.partition is not None and new.partition.snapshot_version == 2
    state = state_of(new)
    # E and the standardisation that it was trained with belong together.
    stores = [name for name in old if name.startswith("stores.")]
    assert any(name.endswith("mean_D") for name in stores)
    assert all(torch.equal(state[name], old[name]) for name in stores)


def test_all_continues_with_the_optimisers_state_and_a_new_schedule(own: Places, before: Path) -> None:
    warm = {"run__warm_start": before, "run__warm_parts": "all"}
    ended, run = tensors_of(before), opened(own, **warm)
    state = state_of(run)
    assert state.keys() == ended.keys()
    assert [name for name in ended if not torch.equal(state[name], ended[name])] == []
    assert (run.engine.first_step, total_steps(run)) == (6, 6 + 2 * run.train_reader.steps_per_epoch)
    next_run = trained(own, "next", 4, **warm)
    assert find_checkpoint(next_run).name == "step-00000010"
    resumed = opened(own, run__name="next", run__resume="latest", **warm)
    resumed.close()
    assert (resumed.engine.first_step, resumed.engine.num_steps) == (6, 10)


def test_the_state_of_another_optimiser_is_refused(own: Places, before: Path) -> None:
    with pytest.raises(CheckpointError, match=r"part optimizers: .*set run\.warm_parts=full"):
        opened(own, run__warm_start=before, run__warm_parts="all", optim__ids="rowwise_adagrad")
