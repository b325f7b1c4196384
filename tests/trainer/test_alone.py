"""Runs of one rank: what is written, exact resumption, and what is refused."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from featurestore.errors import MissingKeysError
from featurestore.format.rows import FeatureRows
from featurestore.spec import StoreInfo
from featurestore.store import FeatureStore
from tests.trainer.checkpoints import steps_of, tensors_of
from tests.trainer.whole_runs import SHARED, Places, assert_same, drawn_scalars, report_of, run_alone
from trainer.config.config import load_config
from trainer.engine.engine import Engine
from trainer.errors import CheckpointError, ConfigError, DataError, TrainerError
from trainer.loop.summary import StepTotals
from trainer.stages import AHEAD, Stage, Stages

pytestmark = pytest.mark.long  # they train whole runs


def ads_of(folder: Path) -> np.ndarray:
    """The ad of every impression of a split."""
    return np.concatenate(
        [np.concatenate(pq.read_table(file)["ad_item"].to_pylist()) for file in folder.glob("*.parquet")]
    )


class TestAlone:
    def test_report(self, alone: Path, places: Places) -> None:
        report = report_of(alone)
        assert (report["global_step"], report["steps"], report["num_ranks"], report["store_version"]) == (
            30,
            30,
            1,
            1,
        )
        metrics = report["metrics"]
        assert 0.55 < metrics["auc"] < 1
        assert 0.3 < metrics["logloss"] < 0.9
        train_ads, test_ads = (ads_of(places.folder / "samples" / split) for split in ("train", "test"))
        assert metrics["impressions"] == len(test_ads)
        assert metrics["new_ad_impressions"] == (~np.isin(test_ads, train_ads)).sum() > 0
        assert all(0 <= metrics[name] <= 1 for name in ("gauc", "new_ad_auc", "new_ad_gauc"))
        assert 0 < report["unique_ratio"] < 1
        assert report["bytes_sent_per_step"] == 0
        assert report["samples_per_s"] > 0
        assert report["history"][-1] == {"step": 30, **metrics}
        assert set(report["seconds"]) == {"wait", "compute", "evaluate", "checkpoint"}
        assert set(report["stages"]) == set(Stage.__args__) - {"exchange signatures", "compare images"}
        assert all(row["median_ms"] >= 0 and row["share_of_step"] >= 0 for row in report["stages"].values())
        of_steps = [row["share_of_step"] for name, row in report["stages"].items() if name not in AHEAD]
        assert sum(of_steps) == pytest.approx(1)
        assert report["owner_skew"] == 1.0
        met = set(train_ads.tolist())  # in 30 steps, all of them
        items = report["tables"]["item"]
        assert items["is_exact"] and len(met) <= items["ids"] < 4096
        assert items["used_rows"] <= items["ids"] <= items["used_rows"] * (1 + items["share"])
        curves = drawn_scalars(alone / "tensorboard")
        for name in ("user", "item", "image"):
            step, share = curves[f"tables/{name}/collisions"][-1]
            assert (step, share) == (30, pytest.approx(report["tables"][name]["share"], rel=1e-6))

    def test_files(self, alone: Path, places: Places) -> None:
        changes = {"run__name": "alone", "train__max_steps": 30, **SHARED}
        assert load_config(alone / "config.yaml") == load_config(settings=places.settings(**changes))
        assert list((alone / "tensorboard").glob("events*"))
        assert steps_of(alone) == [30]

    def test_a_profiled_run_has_a_trace_that_names_the_stages(self, places: Places) -> None:
        run = run_alone(places, run__name="traced", run__profile=True, train__max_steps=12)
        events = json.loads((run / "profile/trace-rank-0.json").read_text())["traceEvents"]
        threads = {event["name"]: event["tid"] for event in events if "name" in event and "tid" in event}
        assert set(Stage.__args__) - {"exchange signatures", "compare images", "rest"} <= set(threads)
        assert threads["gather"] != threads["embed images"]

    def test_waits_of_an_evaluation_are_no_part_of_the_steps(
        self, places: Places, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        phases, stages, timed, timed_stage = [], [], StepTotals.timed, Stages.add
        monkeypatch.setattr(StepTotals, "timed", lambda self, phase: phases.append(phase) or timed(self, phase))
        monkeypatch.setattr(Stages, "add", lambda self, *run: stages.append(run[0]) or timed_stage(self, *run))
        changes = {"run__name": "waits", "data__global_batch_size": 16}
        run_alone(places, train__max_steps=5, train__eval_every=2, **changes)
        assert phases.count("evaluate") == 3
        assert phases.count("wait") == phases.count("compute") == 5
        assert {stages.count(each) for each in stages if each != "read"} == {5}
        assert stages.count("read") >= 5  # and a few more ahead

    def test_resumption_is_exact(self, alone: Path, places: Places) -> None:
        changes = {"run__name": "alone-halves", **SHARED}
        run_alone(places, train__max_steps=25, **changes)
        run = run_alone(places, train__max_steps=30, run__resume="latest", train__eval_every=9, **changes)
        assert_same(run, alone)
        assert [entry["step"] for entry in report_of(run)["history"]] == [25, 27, 30]
        assert report_of(run)["steps"] == 5

    def test_checkpoints_on_the_way(self, places: Places) -> None:
        run = run_alone(
            places, run__name="often", train__max_steps=9, train__checkpoint_every=2, train__keep_checkpoints=2
        )
        assert steps_of(run) == [8, 9]

    def test_seed_decides(self, places: Places) -> None:
        runs = [
            run_alone(places, run__name=f"seed-{s}-{n}", train__max_steps=3, train__seed=s)
            for n, s in enumerate((1, 1, 2))
        ]
        assert_same(runs[0], runs[1])
        with pytest.raises(AssertionError):
            assert_same(runs[0], runs[2])

    @pytest.mark.parametrize("images", ["none", "ad", "behavior"])
    def test_variants(self, places: Places, images: str) -> None:
        report = report_of(run_alone(places, run__name=images, model__images=images, train__max_steps=4))
        assert (report["unique_ratio"] is None) == (images == "none")
        assert report["metrics"]["auc"] is not None

    def test_missing_images_are_refused_or_counted(self, make_places: Callable[[Path], Places], tmp_path: Path) -> None:
        places = make_places(tmp_path)
        for key, lacks in ((1_000, "1 image"), (1_001, "2 images")):
            FeatureStore.open(tmp_path / "features").delete([key])
            with pytest.raises(MissingKeysError, match=f"lacks {lacks} that the samples name"):
                run_alone(places, run__name="tried", data__missing="error")
        # The failed run holds no checkpoint: its name is free.
        report = report_of(run_alone(places, run__name="tried", data__missing="zeros", train__max_steps=5))
        assert report["missing_lookups"] > 0
        with pytest.raises(ConfigError, match="holds a run already"):
            run_alone(places, run__name="tried", data__missing="zeros")

    def test_a_vector_for_missing_images_is_harmless_where_none_is_missing(self, places: Places) -> None:
        settings = {"train__max_steps": 3, "train__checkpoint_every": 2, "model__compute_dtype": "float64"}
        of = {
            each: run_alone(places, run__name=f"missing-{each}", data__missing=each, **settings)
            for each in ("learned", "zeros", "error")
        }
        learned, zeros = tensors_of(of["learned"]), tensors_of(of["zeros"])
        added = learned.keys() - zeros.keys()
        assert {name for name in added if not name.startswith("adam/")} == {"stores.images.no_image.shared"}
        assert not any(learned[name].any() for name in added if not name.endswith("/step"))
        assert [name for name in zeros if not torch.equal(zeros[name], learned[name])] == []
        assert_same(of["error"], of["zeros"])
        # What was begun without one may go on with one, and be the beginning of a run with one; or the other way round.
        onward = {**settings, "run__resume": of["error"] / "checkpoints" / "step-00000002", "run__overwrite": "true"}
        resumed = tensors_of(run_alone(places, run__name="missing-error", data__missing="learned", **onward))
        assert [name for name in zeros if not torch.equal(zeros[name], resumed[name])] == []
        for before, after in (("zeros", "learned"), ("learned", "error")):
            start = {"run__warm_start": of[before], "data__missing": after, "train__max_steps": 1}
            run_alone(places, run__name=f"{after}-after-{before}", **start)


class TestRefusals:
    def test_name_in_use(self, alone: Path, places: Places) -> None:
        with pytest.raises(ConfigError, match=r"holds a run already; continue it by run\.resume=latest"):
            run_alone(places, run__name="alone")
        changes = {"run__name": "replaced", "train__max_steps": 2, "run__overwrite": "true"}
        run_alone(places, **{**changes, "train__max_steps": 3})
        run = run_alone(places, **changes)
        assert steps_of(run) == [2]

    def test_resumption_with_other_settings(self, alone: Path, places: Places) -> None:
        changes = {"run__name": "alone", "run__resume": "latest", "data__global_batch_size": 8, "model__mlp": [9]}
        with pytest.raises(CheckpointError) as caught:
            run_alone(places, **changes)
        assert "data.global_batch_size is 8 here, 32 in the checkpoint" in str(caught.value)
        assert "model.mlp is [9] here, [8, 4] in the checkpoint" in str(caught.value)

    def test_store_of_another_network(self, alone: Path, places: Places, tmp_path: Path) -> None:
        store = FeatureStore.open(places.folder / "features")
        extractor = store.info.extractor.model_copy(update={"weights_digest": "other"})
        other = FeatureStore.create(tmp_path / "other", StoreInfo(**{**dict(store.info), "extractor": extractor}))
        snapshot = store.snapshot()
        other.put(FeatureRows.of(["a"] * 50, snapshot.get(np.arange(1_000, 1_050)), keys=np.arange(1_000, 1_050)))
        changes = {"run__name": "alone", "run__resume": "latest", **SHARED}
        with pytest.raises(CheckpointError, match=r"stores\.images\.extractor\.weights_digest is 'other' here, '0'"):
            run_alone(places, data__store=tmp_path / "other", **changes)

    def test_recorded_snapshot_is_opened_again(self, make_places: Callable[[Path], Places], tmp_path: Path) -> None:
        places = make_places(tmp_path)
        run_alone(places, run__name="a", train__max_steps=2)
        FeatureStore.open(tmp_path / "features").put(
            FeatureRows.of(["item/0"], np.ones((1, 16), np.float32), keys=np.array([1_000]))
        )
        again = {"run__name": "a", "run__resume": "latest"}
        assert report_of(run_alone(places, train__max_steps=3, **again))["store_version"] == 1
        assert report_of(run_alone(places, train__max_steps=4, data__store_version=2, **again))["store_version"] == 2
        assert report_of(run_alone(places, run__name="b", train__max_steps=1))["store_version"] == 2

    def test_loss_that_is_no_number(self, places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
        step = Engine.train_step

        def diverged(engine: Engine, prepared: Any) -> Any:
            result = step(engine, prepared)
            object.__setattr__(result, "loss", float("nan"))
            return result

        monkeypatch.setattr(Engine, "train_step", diverged)
        with pytest.raises(TrainerError, match=r"the loss of step 1 is nan; try a lower optim\.lr"):
            run_alone(places, run__name="diverged")

    def test_no_test_samples(self, places: Places, tmp_path: Path) -> None:
        shutil.copytree(places.folder / "samples" / "train", tmp_path / "train")
        with pytest.raises(DataError, match=r"has no test samples; make them with: python jobs/build_samples\.py"):
            run_alone(places, run__name="x", data__samples=tmp_path)
        assert not (places.folder / "runs" / "x").exists(), "nothing is written before all is open"

    @pytest.mark.parametrize("below", [".", "deeper/runs"])
    def test_run_dir_that_is_a_file(self, places: Places, tmp_path: Path, below: str) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(TrainerError, match=r"run\.dir=.*file is not a folder that this user can write to"):
            run_alone(places, run__name="x", run__dir=tmp_path / "file" / below)

    def test_run_dir_on_a_disk_that_refuses(
        self, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("trainer.runs.open.save_config", refuse)
        with pytest.raises(TrainerError, match=r"run\.dir=.* cannot be used: .*No space left"):
            run_alone(places, run__name="x", run__dir=tmp_path)
