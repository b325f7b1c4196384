"""Warm starts: what is taken and what stays fresh; what does not fit is refused and named."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from featurestore.store import FeatureStore
from featurestore.upkeep.remake import remake
from tests.raised import raises, told
from tests.trainer.checkpoints import assert_same_tensors, damage, differs, tensors_of
from tests.trainer.conftest import Places, add_a_row, drawn_store, make_places
from tests.trainer.whole_runs import assert_same, run_alone
from trainer.comm import SoloComm
from trainer.config import load_config
from trainer.errors import CheckpointError
from trainer.loop.training import total_steps
from trainer.problems import Problem
from trainer.runs.checkpoint import DENSE, CheckpointState, RunFingerprint, WarmStart, warm_start
from trainer.runs.folder import find_checkpoint
from trainer.runs.open import Run, open_run
from trainer.schema.fields import DEFAULT_SCHEMA

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


def test_what_is_taken(own: Places, before: Path, states: tuple[State, State]) -> None:
    """Of a part of the run before: its networks, and neither ID rows nor an optimiser's state."""
    fresh, old = states
    run = opened(own, run__warm_start=before)
    assert (run.position.epoch, run.position.step, run.history, run.engine.num_steps) == (0, 0, [], 0)
    for name, value in state_of(run).items():
        assert torch.equal(value, (old if name.startswith(("model.", "stores.")) else fresh)[name]), name
    moved = [name for name in fresh if not torch.equal(fresh[name], old[name])]
    assert {name.partition("/")[0].partition(".")[0] for name in moved} >= {"model", "stores", "item", "adam"}


def test_a_run_is_its_last_checkpoint_and_a_checkpoint_is_itself(own: Places, before: Path) -> None:
    paths = before, find_checkpoint(before), before / "checkpoints" / "step-00000003"
    run, last, middle = (state_of(opened(own, run__warm_start=path))["model.mlp.0.weight"] for path in paths)
    assert torch.equal(run, last) and not torch.equal(run, middle)


def test_resumption_goes_on_instead_of_beginning_again(own: Places, before: Path) -> None:
    whole = trained(own, "whole", 6, run__warm_start=before)
    trained(own, "halves", 3, run__warm_start=before)
    halves = trained(own, "halves", 6, run__warm_start=before, run__resume="latest")
    assert_same(halves, whole)


def refused(where: str, value: object, **other: object) -> str:
    return told(Problem.WARM_START_OF_OTHER_RUN, differing=differs(where, value, **other))


@pytest.mark.parametrize(
    ("parts", "changes", "message"),
    [
        ("partial", {"model__mlp": [9, 4]}, refused("model.mlp", [9, 4], other=[8, 4], there="in the checkpoint")),
        ("partial", {"model__embed_hidden": [9, 4]}, refused("model.embed_hidden", [9, 4])),
        ("partial", {"model__multi_hot": "sum"}, refused("model.multi_hot", "sum")),
        ("partial", {"model__images": "none"}, told(Problem.CHECKPOINT_HAS_IMAGES)),
        ("all", {"model__tables__item": 640}, told(Problem.TABLE_SHAPE, where="item/0000/weight", value=(16, 12))),
        ("all", {"model__table_shards": 2}, refused("model.table_shards", 2)),
        ("all", {"optim__ids": "rowwise_adagrad"}, refused("optim.ids", "rowwise_adagrad")),
        ("all", {"model__id_init_std": 0.05}, refused("model.id_init_std", 0.05)),
    ],
)
def test_other_settings_are_named(own: Places, before: Path, parts: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        opened(own, run__warm_start=before, run__warm_parts=parts, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__dropout": 0.2, "model__id_dropout": 0.2, "model__id_init_std": 0.05, "model__tables__item": 640},
        {"model__image_dropout": 0.1},  # whether pictures count is not decided yet
        {"model__compute_dtype": "bfloat16", "optim__ids": "rowwise_adagrad", "train__seed": 5},
    ],
)
def test_settings_that_change_no_meaning_may_differ(own: Places, before: Path, changes: dict[str, Any]) -> None:
    opened(own, run__warm_start=before, **changes).close()


@pytest.mark.parametrize(
    ("theirs", "mine"),
    [
        ({"std": [1.0]}, {"std": [2.0]}),
        ({}, {"weights": "ad_weight"}),
        ({"boundaries": [1.0, 2.0]}, {"boundaries": [1.0, 3.0]}),
    ],
)
@pytest.mark.parametrize("parts", ["partial", "all"])
def test_fields_that_mean_something_else_are_noticed(theirs: dict[str, Any], mine: dict[str, Any], parts: Any) -> None:
    """Where neither names nor shapes tell."""
    models = ({"fields": {"ad_item": {"kind": "id", **each}}} for each in (theirs, mine))
    old, new = (RunFingerprint(data={}, train={}, stores={}, optim={}, model=each) for each in models)
    state = CheckpointState.model_construct(origin=old, files={DENSE: ""})
    ((name, value),) = mine.items()
    differing = differs(f"model.fields.ad_item.{name}", value)
    with raises(CheckpointError, Problem.WARM_START_OF_OTHER_RUN, where="old", differing=differing):
        warm_start(SoloComm(), WarmStart(Path("old"), state, parts), new, None)  # type: ignore[arg-type]


def test_fields_in_another_order_are_noticed(own: Places, before: Path, tmp_path: Path) -> None:
    schema = yaml.safe_load(DEFAULT_SCHEMA.read_text())
    schema["fields"].reverse()
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(schema))
    differing = differs("model.fields", re.compile("'.*'"), other=re.compile("'.*'"), there="in the checkpoint")
    for problem, changes in (
        (Problem.CHECKPOINT_OF_OTHER_RUN, {"run__name": "before", "run__resume": "latest"}),
        (Problem.WARM_START_OF_OTHER_RUN, {"run__warm_start": before}),
    ):
        with raises(CheckpointError, problem, where=find_checkpoint(before), differing=differing):
            opened(own, data__schema_file=tmp_path / "schema.yaml", **changes)


def test_a_damaged_file_is_named(own: Places) -> None:
    run = trained(own, "damaged", 1)
    damage(run, 1, rows := "rows-00000-of-00001.safetensors", "-1")
    opened(own, run__warm_start=run).close()  # partial: the file is not needed
    with raises(CheckpointError, Problem.CHECKPOINT_FILE_CHANGED, where=f"{find_checkpoint(run)}/{rows}"):
        opened(own, run__warm_start=run, run__warm_parts="all")


def test_features_of_another_kind_are_refused(own: Places, before: Path) -> None:
    features_ND = np.random.default_rng(1).normal(size=(50, 16))
    extractor = FeatureStore.open(own.folder / "features").info.extractor.model_copy(update={"weights_digest": "x"})
    drawn_store(own.folder / "other", features_ND, 1_000, extractor=extractor)
    drawn_store(own.folder / "wide", features_ND[:, :8], 1_000, dtype="bfloat16")
    remake(FeatureStore.open(own.folder / "features"), own.folder / "compact", dims=6, dtype="float32")

    def images(name: str, value: object, other: object) -> re.Pattern[str]:
        return differs(f"stores.images.{name}", value, other=other, there="in the checkpoint")

    expected = [("other", images("extractor.weights_digest", "x", "0"))]
    expected += [("compact", images("basis", re.compile(r"'\w{64}'"), None)), ("wide", images("dim", 8, 16))]
    expected += [("wide", images("dtype", "bfloat16", "float32"))]
    for changes in ({"run__name": "before", "run__resume": "latest"}, {"run__warm_start": before}):
        for name, differing in expected:
            with raises(CheckpointError, Problem.CHECKPOINT_OF_OTHER_FEATURES, differing=differing):
                opened(own, data__store=own.folder / name, **changes)


def test_a_run_without_images_is_told_so(own: Places) -> None:
    run = trained(own, "plain", 1, model__images="none")
    with raises(CheckpointError, Problem.CHECKPOINT_WITHOUT_IMAGES, where=find_checkpoint(run)):
        opened(own, run__warm_start=run)
    opened(own, run__warm_start=run, model__images="none").close()


def test_a_newer_snapshot_of_the_same_kind_is_fine(tmp_path: Path) -> None:
    places = make_places(tmp_path)
    run = trained(places, "a", 2)
    add_a_row(FeatureStore.open(tmp_path / "features"))
    old = state_of(opened(places, run__name="a", run__resume="latest"))
    new = opened(places, run__warm_start=run)
    assert new.store_version == 2
    state = state_of(new)
    # E and the standardisation that it was trained with belong together.
    stores = [name for name in old if name.startswith("stores.")]
    assert any(name.endswith("mean_D") for name in stores)
    assert all(torch.equal(state[name], old[name]) for name in stores)


def test_all_has_old_state_and_a_new_schedule(own: Places, before: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warm = {"run__warm_start": before, "run__warm_parts": "all"}
    ended, run = tensors_of(before), opened(own, **warm)
    state = state_of(run)
    assert_same_tensors(state, ended)
    assert (run.engine.first_step, total_steps(run)) == (6, 6 + 2 * run.train_reader.steps_per_epoch)
    next_run = trained(own, "next", 4, **warm)
    said = " ".join(capsys.readouterr().out.split())
    assert f"warm start from {before}/checkpoints/step-00000006: all" in said
    assert find_checkpoint(next_run).name == "step-00000010"
    resumed = opened(own, run__name="next", run__resume="latest", **warm)
    resumed.close()
    assert (resumed.engine.first_step, resumed.engine.num_steps) == (6, 10)
