"""The planner: what a step costs by hand, how many keys differ, what is measured and recommended, and its command."""

import dataclasses
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from featurestore.keys import owner_of, shard_of
from featurestore.store import FeatureStore
from featurestore.upkeep.remake import remake
from tests.cli import invoke
from tests.pages import check_page
from tests.ranks import StandingRanks
from tests.trainer.conftest import Places
from tests.trainer.standing_ranks import run as run_here
from trainer import planner
from trainer.comm import SoloComm
from trainer.config import ExactTableConfig, load_config
from trainer.errors import ConfigError, PlanError
from trainer.plan import app
from trainer.planner import (
    PROGRAM_BYTES,
    BatchCounts,
    Calibration,
    KeyCounts,
    Machine,
    NetworkSpeed,
    PlanQuestion,
    RankPlan,
    StoredBytes,
    Widths,
    build,
    bytes_by_part,
    duration,
    rates_of,
    recommend,
    sample,
    size,
    step_cost,
    stored_bytes,
)
from trainer.runs.open import train_reader
from trainer.samples.columns import newest_day
from trainer.samples.index import open_index
from trainer.samples.reader import SampleReader
from trainer.stages import WAIT

COUNTS = BatchCounts(
    samples=1000,
    ranks=4,
    decoded=300.0,
    images=KeyCounts(asked=1000, unique=2000, owned=600),
    ids=KeyCounts(asked=2000, unique=5000, owned=1300),
)
WIDTHS = Widths(image_vector_bytes=48, id_vector_bytes=48.0, dense_bytes=4_000_000)
NETWORK = NetworkSpeed(call_s=1e-3, latency_s=1e-4, link_bytes_per_s=1e9, local_bytes_per_s=5e9)
MACHINE = Machine(read_s=1e-5, image_s=2e-5, sample_s=1.2e-5, network=NETWORK)


class TestCost:
    def test_bytes_of_each_part(self) -> None:
        away = 0.75  # a quarter of a rank's keys are its own
        assert bytes_by_part(COUNTS, WIDTHS) == {
            "keys": 8 * away * 3000,
            "id vectors": 48 * away * 2000,
            "id gradients": 48 * away * 2000,
            "dense gradients": 1.5 * 4_000_000,
            "image vectors": 48 * away * 1000,
            "image gradients": 48 * away * 1000,
        }

    def test_step_waits_for_the_busiest_owner_or_for_reading(self) -> None:
        cost = step_cost(COUNTS, WIDTHS, MACHINE)
        # Vectors and gradients: three messages; the busiest owners have 20 and 4 % more than the mean.
        vectors = 1e-3 + 3 * 1e-4 + (1.2 * 48 * 0.75 * 1000 + 1.04 * 48 * 0.75 * 2000) / 1e9
        dense = 1e-3 + 6 * 1e-4 + 6e6 / 1e9
        assert cost.seconds == pytest.approx(600 * 2e-5 + 250 * 1.2e-5 + 2 * vectors + dense)
        assert cost.samples_per_s == pytest.approx(1000 / cost.seconds)
        assert cost.stages["read"] == pytest.approx(300 * 1e-5)
        assert step_cost(COUNTS, WIDTHS, dataclasses.replace(MACHINE, read_s=1e-3)).seconds == 0.3

    def test_ranks_of_a_machine_share_its_link(self) -> None:
        crowded = dataclasses.replace(MACHINE, network=dataclasses.replace(NETWORK, ranks_per_machine=4))
        cost = step_cost(COUNTS, WIDTHS, crowded)
        assert cost.stages["dense gradients"] == pytest.approx(1e-3 + 6e6 / 5e9)  # no latency inside a machine
        two = dataclasses.replace(NETWORK, ranks_per_machine=2)
        # Two thirds of what a rank sends leave the machine, over half of its link.
        assert two.alltoall_s(4, 3e6) == pytest.approx(1e-3 + 3 * 1e-4 + 2e6 / 0.5e9 + 1e6 / 5e9)


class TestDraws:
    def test_counts_of_drawn_batches_are_those_of_the_readers(self, places: Places) -> None:
        """What the plan counts for two ranks is what two readers hand to two ranks, images and ids."""
        config = load_config(settings=places.settings())
        sampled = sample(config, 64)
        assert sampled.images.num_samples == sampled.index.num_samples
        found, shards = sampled.images.keys(64, 2), FeatureStore.open(config.data.store).info.num_shards
        asked, whole = [], []
        for rank in range(2):
            options: dict[str, Any] = {"rank": rank, "num_ranks": 2, "window": 75}
            reader = SampleReader(sampled.index, sampled.schema, batch_size=64, seed=0, **options)
            fields = [batch.fields for batch in reader.batches()]
            parts = [np.r_[each["behavior_image"].values_N, each["ad_image"].values_N] for each in fields]
            asked.append([len(np.unique(keys_N)) for keys_N in parts[:-1]])
            whole.append(parts[:-1])
        both = [np.unique(np.r_[a, b]) for a, b in zip(*whole, strict=True)]
        unique = [len(keys_U) for keys_U in both]
        owned = [np.bincount(owner_of(shard_of(keys_U, shards), 2)).max() for keys_U in both]
        assert found.asked == pytest.approx(np.mean(asked), rel=0.05)
        assert found.unique == pytest.approx(np.mean(unique), rel=0.05)
        assert found.owned == pytest.approx(np.mean(owned), rel=0.1)
        assert sampled.ids.keys(64, 2).unique > found.unique

    @pytest.mark.parametrize(("size", "ranks", "streams"), [(64, 2, 1), (64, 2, 4), (300, 4, 8)])
    def test_decoded_samples_are_those_of_the_reader(self, size: int, ranks: int, streams: int, places: Places) -> None:
        """Of the rank that decodes most, over an epoch."""
        settings = places.settings(data__shuffle_streams=streams)
        sampled = sample(load_config(settings=settings), size)
        config = sampled.config.changed(data={"global_batch_size": size})
        decoded = []
        for rank in range(ranks):
            reader = train_reader(config, sampled.index, sampled.schema, rank, ranks)
            steps = len(list(reader.batches()))
            decoded.append(reader.num_decoded / steps)
        mean_size = sampled.index.num_samples / steps  # the last batch is smaller
        assert max(decoded) == pytest.approx(sampled.counts(size, ranks).decoded * mean_size / size, rel=0.15)
        assert (max(decoded) > 0.9 * mean_size) == (streams == 1)

    def test_a_batch_above_all_samples_is_refused(self, places: Places) -> None:
        config = load_config(settings=places.settings())
        with pytest.raises(
            ConfigError, match=r"of 100,000 samples is larger than all .* give --global-batch-size of at"
        ):
            sample(config, 100_000)


GIB = 2**30


def rows_of(ranks: list[int], efficiency: list[float] | None = None, local: int = 1) -> list[RankPlan]:
    """Rows for 16 GiB of features and 4 GiB of ID rows, on machines of 8 cores with `local` ranks each."""
    network = dataclasses.replace(NETWORK, ranks_per_machine=local)
    plan = build(
        title="drawn",
        counts_of=lambda count: dataclasses.replace(COUNTS, ranks=count),
        ranks=ranks,
        widths=WIDTHS,
        machine_of=lambda _: dataclasses.replace(MACHINE, network=network),
        stored=StoredBytes(
            feature_bytes=16 * GIB, shards=64, table_bytes=4 * GIB, table_shards=64, machine_memory_bytes=1
        ),
        samples=1_000_000,
    )
    values = efficiency or [1.0] * len(ranks)
    return [dataclasses.replace(row, efficiency=value) for row, value in zip(plan.rows, values, strict=True)]


def test_the_most_ranks_that_are_half_efficient() -> None:
    ranks, reason = recommend(rows_of([2, 4, 8, 16], efficiency=[0.9, 0.7, 0.5, 0.4]), 1 << 40)
    assert ranks == 8 and reason.startswith("Take 8 ranks: the most that are at least 50% efficient (50%).")
    ranks, reason = recommend(rows_of([2, 4], efficiency=[0.4, 0.2]), 1 << 40)
    assert ranks == 2 and "as none is at least 50% efficient" in reason


def test_memory_is_that_of_all_ranks_of_a_machine() -> None:
    """20 GiB on 4 ranks are 5 GiB each; two ranks of a machine, with their programs, leave a fifth of it free."""
    rows = rows_of([4], local=2)
    assert rows[0].machine_bytes == 2 * (5 * GIB + PROGRAM_BYTES) / 0.8
    assert recommend(rows, 1 << 40)[1].endswith("A machine needs 18.8 GB of memory.")


def test_ranks_that_do_not_fit_are_passed_over() -> None:
    """Of 2, 4 and 8 ranks the first do not fit into 10 GiB; where none does, the reason says how much is missing."""
    assert recommend(rows_of([2, 4, 8], efficiency=[0.9, 0.9, 0.3]), 10 * GIB)[0] == 4
    ranks, reason = recommend(rows_of([2]), 4 * GIB)
    assert ranks is None
    assert reason.startswith("None of 2 ranks fits: with 2 a machine needs 16.1 GB and this one has 4.29 GB.")


class TestBuild:
    STORED = StoredBytes(
        feature_bytes=1_000_000 * 8192, shards=64, table_bytes=64_000, table_shards=64, machine_memory_bytes=1 << 40
    )

    def test_memory_of_the_rank_with_most_shards(self) -> None:
        assert self.STORED.rank_bytes(20) == 1_000_000 * 8192 * 4 / 64 + 4_000
        with_copy = dataclasses.replace(self.STORED, copied=True)  # of the ID rows, for checkpoints beside the training
        assert with_copy.rank_bytes(20) == 1_000_000 * 8192 * 4 / 64 + 8_000

    def test_efficiency(self) -> None:
        def counts_of(ranks: int) -> BatchCounts:
            unique = 2_000.0
            images = KeyCounts(unique / ranks, unique, unique / ranks * (1.25 if ranks > 1 else 1))
            return BatchCounts(1_000, ranks, 0.0, images, KeyCounts(0, 0, 0))

        plan = build("t", counts_of, [1, 20], WIDTHS, lambda _: MACHINE, self.STORED, 1_000_000)
        alone, many = plan.rows
        assert alone.efficiency == 1
        assert many.efficiency == pytest.approx(alone.cost.seconds / many.cost.seconds / 20)
        assert many.epoch_s == pytest.approx(1e3 * many.cost.seconds)

    def test_more_ranks_that_are_slower_are_told(self) -> None:
        def counts_of(ranks: int) -> BatchCounts:
            keys = KeyCounts(50, 50, 50 / ranks)
            return BatchCounts(100, ranks, 100 / ranks, keys, keys)

        slow = dataclasses.replace(MACHINE, network=dataclasses.replace(NETWORK, latency_s=1.0))
        advice = build("t", counts_of, [1, 20], WIDTHS, lambda _: slow, self.STORED, 1_000_000).advice
        assert any(line.startswith("20 ranks are slower than 1: ") for line in advice)


class TestMeasuring:
    def test_a_step_is_shared_out_among_images_and_samples(self) -> None:
        """Steps of 10 ms of two runs, half of whose work is that of images, at any speed."""
        ms = {"read": 9.0, "gather": 2.0, "embed images": 1.0, "embed backward": 2.0, WAIT: 3.0}
        ms |= {"unique": 1.0, "worker forward": 2.0, "update id rows": 0.5, "rest": 1.5}
        reports = [
            {"samples_per_s": 1e4, "stages": {name: {"median_ms": value * scale} for name, value in ms.items()}}
            for scale in (0.5, 1.5)
        ]
        assert rates_of(reports, 100, 50.0) == pytest.approx((5e-3 / 50, 5e-3 / 100))
        assert rates_of(reports, 100, 0.0) == pytest.approx((0.0, 10e-3 / 100))

    def test_ranks_beyond_the_cores_take_turns(self, places: Places, tmp_path: Path, monkeypatch: Any) -> None:
        """Four ranks of a machine of two cores are measured by two runs at a time, and cost twice as much."""
        config = load_config(settings=places.settings())
        question, started = PlanQuestion((1, 4), 128, 4, 1e9, 0.0), []

        def run(commands: Sequence[Sequence[str]]) -> list[str]:
            started.append(len(commands))
            if "trainer.planner" in commands[0]:
                return [json.dumps({"call_s": 1e-9, "byte_s": 1e-9})]
            for command in commands:
                folder = Path(command[command.index("--config") + 1]).parent / command[-1].partition("=")[2]
                folder.mkdir()
                stages = {"embed images": {"median_ms": 1.0}, "rest": {"median_ms": 1.0}}
                (folder / "report.json").write_text(json.dumps({"samples_per_s": 1e3, "stages": stages}))
            return [""]

        monkeypatch.setattr(planner, "run_together", run)
        monkeypatch.setattr(planner, "LARGEST_MEASURED", 16)
        monkeypatch.setattr(planner.os, "sched_getaffinity", lambda _: {0, 1})
        calibration = Calibration(question, sample(config, 64), tmp_path, lambda _: None)
        alone, four = calibration.machine(1), calibration.machine(4)
        assert (four.image_s, four.sample_s) == pytest.approx((2 * alone.image_s, 2 * alone.sample_s))
        assert four.network.ranks_per_machine == 4 and four.network.local_bytes_per_s == pytest.approx(1e9)
        assert started == [1, 1, 2, 1] and calibration.machine(8) == four

    @pytest.mark.long
    def test_failed_run_is_one_message(self) -> None:
        with pytest.raises(PlanError, match=r"measuring this machine failed \(2 processes\): --config .*nowhere\.yaml"):
            said = "warning: slow; error: --config /nowhere.yaml: there is no such file"
            planner.run_together([["sh", "-c", f"echo '{said}' >&2; exit 2"], ["true"]])

    def test_runs_on_a_drawn_store_and_few_rows(self, places: Places, tmp_path: Path, monkeypatch: Any) -> None:
        """What is too large for this machine is small in the runs that measure it."""
        monkeypatch.setattr(planner, "_MOST_TABLE_ROWS", 16)
        config = load_config(settings=places.settings(train__early_stopping=1, train__eval_every=1))
        sampled = sample(config, 64)
        runs = planner.config_of_runs(sampled, tmp_path)
        assert runs.data.store == str(tmp_path / "features") and runs.data.missing == "zeros"
        assert FeatureStore.open(runs.data.store).snapshot().num_rows == 40
        assert set(runs.model.tables.values()) == {16} and runs.train.early_stopping is None
        index = open_index(SoloComm(), runs.data.samples, "train", sampled.schema)
        assert index.num_samples == sampled.index.num_samples
        assert newest_day(group.file for group in index.row_groups) == date(2026, 1, 3)
        exact_item = ExactTableConfig(kind="exact", max_rows=400, admit_after=2)
        exact = config.model.tables | {"item": exact_item}
        changed = config.model_copy(update={"model": config.model.model_copy(update={"tables": exact})})
        of_exact = planner.config_of_runs(dataclasses.replace(sampled, config=changed), tmp_path / "exact")
        assert of_exact.model.tables["item"] == exact_item.model_copy(update={"max_rows": 16})
        hashed_bytes, exact_bytes = (stored_bytes(each, sampled).table_bytes for each in (config, changed))
        a_row = hashed_bytes / (3 * 64 + 2 * 16)
        # 100 rows and a cold one in each shard, id, day and step of each; 256 entries of the map and 1,024 counters.
        of_items = 4 * (101 * (a_row + 8 + 4 + 4) + 256 * 4 + 1024)
        assert exact_bytes - hashed_bytes == of_items - 64 * a_row


def test_a_compact_store_is_planned_with_by_its_own_width(places: Places, tmp_path: Path) -> None:
    """And so is what is drawn in its place."""
    remake(FeatureStore.open(places.folder / "features"), tmp_path / "compact", dims=6, dtype="float16")
    config = load_config(settings=places.settings(data__store=tmp_path / "compact"))
    sampled = sample(config, 64)
    assert stored_bytes(config, sampled).feature_bytes == 50 * 12
    drawn = FeatureStore.open(planner.config_of_runs(sampled, tmp_path / "runs").data.store)
    assert (drawn.info.dim, drawn.info.dtype) == (6, "float16")


@pytest.mark.services  # two ranks, for what a collective costs
class TestCommand:
    @pytest.fixture(scope="class")
    @staticmethod
    def plan(places: Places, two_ranks: StandingRanks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
        """Two ranks, one a machine, really measured: the runs of the trainer in this process, collectives on ranks."""

        def run_some_here(commands: Sequence[Sequence[str]]) -> list[str]:
            if list(commands[0][-2:]) == ["-m", "trainer.planner"]:
                return [two_ranks.run(*commands[0][-2:])]
            ((code, said),) = (run_here(list(command[1:])) for command in commands)
            assert code == 0, said
            return [said]

        folder = tmp_path_factory.mktemp("plan")
        file, page = folder / "plan.json", folder / "plan.html"
        options = ["--ranks", "2", "--global-batch-size", "100", "--network-gbit", "1", "--json", str(file)]
        options += ["--html", str(page)]
        for setting in places.settings():
            options += ["--set", setting]
        with mock.patch.object(planner, "run_together", run_some_here):
            done = invoke(app, *options, code=0)
        assert "Recommended" in done.stdout
        values: dict[str, Any] = json.loads(file.read_text())
        return {**values, "page": check_page(page.read_text(encoding="utf-8"))}

    def test_figures(self, plan: dict[str, Any]) -> None:
        assert list(plan["ranks"]) == ["2"]
        for ranks, row in plan["ranks"].items():
            cost = row["cost"]
            assert cost["seconds"] > 0 and cost["samples_per_s"] == pytest.approx(100 / cost["seconds"])
            assert row["efficiency"] > 0
            assert row["rank_bytes"] > 50 * 16 * 2 / int(ranks)
            assert row["counts"]["images"]["unique"] <= 40
        assert plan["recommended_ranks"] == 2
        assert "joined by 1 Gbit/s" in plan["title"]

    def test_the_page_has_the_figures(self, plan: dict[str, Any]) -> None:
        page = plan["page"]
        assert plan["title"] in page.texts
        assert all(line in page.printed for line in plan["advice"])
        for ranks, row in plan["ranks"].items():
            cost = row["cost"]
            shown = [f"{row['counts']['images']['unique']:,.0f}", size(row["rank_bytes"])]
            shown += [size(sum(cost["bytes_by_part"].values())), duration(cost["seconds"])]
            shown += [f"{cost['samples_per_s']:,.0f}", duration(row["epoch_s"]), f"{row['efficiency']:.0%}"]
            assert [ranks, *shown] in page.rows

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--network-gbit", "0"], "--network-gbit"),
            (["--global-batch-size", "8", "--ranks", "16"], "leaves some of 16 ranks without any"),
            (["--set", "model.images=none"], "model.images=none"),
            (["--samples", "/nowhere/samples"], "crossmedia samples"),
            (["--store", "/nowhere/features"], "/nowhere/features"),
            (["--set", "run.threads=1000000"], "run.threads=1000000"),
        ],
    )
    def test_mistakes(self, options: list[str], message: str, places: Places) -> None:
        """Others, which need no places, are in tests/commands/lines.py."""
        own = {"data.samples", "data.store"} if {"--samples", "--store"} & set(options) else set()
        settings = [each for each in places.settings() if each.partition("=")[0] not in own]
        given = ["--ranks", "2", *(word for each in settings for word in ("--set", each))]
        if own:  # the places come by the options of their own, right ones first
            given += ["--samples", str(places.folder / "samples"), "--store", str(places.folder / "features")]
        done = invoke(app, *given, *options, code=2)
        assert message in done.stderr and "Traceback" not in done.output
