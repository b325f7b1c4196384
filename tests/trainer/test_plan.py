"""The planner: speeds of a run's report, keys of a batch, a step by hand, what is recommended, its command."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.filesize import decimal

from featurestore.keys import owner_of, shard_of
from tests.cli import invoke
from tests.pages import check_page
from tests.raised import told
from tests.trainer.conftest import Places
from tests.trainer.whole_runs import report_of, run_alone
from trainer import planner
from trainer.comm import SoloComm
from trainer.plan import app
from trainer.problems import Problem
from trainer.runs.open import train_reader
from trainer.samples.index import open_index
from trainer.stages import WAIT

LINK = 1e9
SPEED = planner.Speed(image_s=2e-5, sample_s=1.2e-5, call_s=1e-3, ranks_per_machine=1, link_bytes_per_s=LINK)


@pytest.fixture(scope="module")
def run(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 5 steps of 100 samples, on one rank."""
    folder = tmp_path_factory.mktemp("plan")
    return run_alone(places, run__dir=folder, run__name="short", data__global_batch_size=100, train__max_steps=5)


def test_ranks_of_a_machine_share_its_link() -> None:
    """A rank alone sends nothing, and what ranks of one machine send each other costs a call."""
    two = dataclasses.replace(SPEED, ranks_per_machine=2)
    assert SPEED.collective_s(1, 0, 3e6) == 0 and two.collective_s(2, 1, 3e6) == 1e-3
    assert SPEED.collective_s(4, 3, 3e6) == pytest.approx(1e-3 + 3 * planner.LATENCY_S + 3e6 / 1e9)
    # Two thirds of what a rank sends leave the machine, over half of its link.
    assert two.collective_s(4, 3, 3e6) == pytest.approx(1e-3 + 3 * planner.LATENCY_S + 2e6 / 0.5e9)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_is_shared_out_as_its_stages_say(ranks: int) -> None:
    """A step of 10 ms: a quarter of it is work on images, as much are collectives; what runs ahead is free."""
    ms = {"read": 9.0, "gather": 2.0, WAIT: 3.0, "embed images": 1.0, "embed backward": 1.5, "rest": 2.5}
    ms |= {"update id rows": 2.5, "exchange vectors": 1.0, "exchange gradients": 1.0, "reduce gradients": 0.5}
    report = {"num_ranks": ranks, "steps": 7, "samples": 700, "samples_per_s": 1e4, "images_per_step": 50.0}
    report["stages"] = {name: {"median_ms": value} for name, value in ms.items()}
    found = planner.speed_of(report, LINK)
    assert found.image_s == pytest.approx(2.5e-3 / (50 / ranks))
    assert found.call_s == pytest.approx(0 if ranks == 1 else 2.5e-3 / 3)
    assert found.sample_s == pytest.approx((7.5e-3 if ranks == 1 else 5e-3) / (100 / ranks))
    assert found.ranks_per_machine == ranks


def test_keys_are_those_that_readers_hand_to_the_ranks(run: Path) -> None:
    plan = planner.open_planner(run, 64, LINK)
    schema, config = plan.saved.schema, plan.saved.config.changed(data={"global_batch_size": 64})
    index = open_index(SoloComm(), config.data.samples, "train", schema)
    images = next(each for each in plan.sources if each.is_store)
    batches = [next(train_reader(config, index, schema, rank, 2).batches()) for rank in range(2)]
    parts = [np.unique(np.concatenate([each.fields[name].values_N for name in images.fields])) for each in batches]
    both = np.unique(np.concatenate(parts))
    num_shards = plan.snapshots["images"].info.num_shards
    owned_P = np.bincount(owner_of(shard_of(both, num_shards), 2))
    found = planner.count(plan.batch, [images], 2)
    assert (found.images, found.most_images) == (len(both), owned_P.max())
    assert found.keys == pytest.approx(np.mean([len(keys_U) for keys_U in parts]), rel=0.05)
    sent_P = sum(np.bincount(owner_of(shard_of(keys_U, num_shards), 2), minlength=2) for keys_U in parts)
    assert found.vector_bytes == pytest.approx(4 * images.width * sent_P.max(), rel=0.05)
    assert planner.count(plan.batch, plan.sources, 2).keys > 2 * found.keys


def test_a_step_waits_for_the_busiest_owner(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = planner.BatchCounts(images=2000, most_images=600, keys=3000, vector_bytes=156e3)
    monkeypatch.setattr(planner, "count", lambda *_: counts)
    plan = dataclasses.replace(planner.open_planner(run, 100, LINK), speed=SPEED)
    row, away = plan.row(4), 0.75  # a quarter of a rank's keys are its own
    vectors_s = 1e-3 + 3 * planner.LATENCY_S + away * 156e3 / 1e9
    dense_s = 1e-3 + 6 * planner.LATENCY_S + 2 * away * plan.dense_bytes / 1e9
    assert row.step_s == pytest.approx(600 * 2e-5 + 25 * 1.2e-5 + 2 * vectors_s + dense_s)
    assert row.samples_per_s == pytest.approx(100 / row.step_s)
    assert row.epoch_s == pytest.approx(plan.samples / 100 * row.step_s)
    assert row.efficiency == pytest.approx(plan.row(1).step_s / row.step_s / 4)
    assert row.bytes_sent == pytest.approx(away * (8 * 3000 + 2 * 156e3 + 2 * plan.dense_bytes))


def test_memory_is_that_of_the_rank_with_most_shards(run: Path) -> None:
    """Fifty features of 16 float32 numbers, and ID rows twice: a checkpoint is written from a copy."""
    plan = planner.open_planner(run, None, LINK)
    waiting = plan.saved.config.changed(train={"checkpoint_beside": False})
    tables = plan.rank_bytes(1) - 50 * 16 * 4
    at_once = dataclasses.replace(plan, saved=dataclasses.replace(plan.saved, config=waiting))
    assert at_once.rank_bytes(1) == 50 * 16 * 4 + tables / 2
    assert plan.rank_bytes(2) == plan.rank_bytes(1) / 2


GIB = 2**30


def row_of(ranks: int, efficiency: float) -> planner.RankPlan:
    """A row for 20 GiB of features and ID rows on machines of two ranks."""
    rank_bytes = 20 * GIB / ranks
    return planner.RankPlan(
        ranks=ranks, images=0, rank_bytes=rank_bytes, machine_bytes=2 * (rank_bytes + planner.PROGRAM_BYTES) / 0.8,
        bytes_sent=0.0, step_s=1.0, samples_per_s=1.0, epoch_s=1.0, efficiency=efficiency,
    )  # fmt: skip


def test_the_most_ranks_that_fit_and_are_half_efficient_are_recommended() -> None:
    """Of 2, 4 and 8 ranks the first do not fit into 18 GiB; where none does, the reason says how much is missing."""
    for efficiencies, memory_bytes, ranks, words in (
        ({2: 0.9, 4: 0.7, 8: 0.5, 16: 0.4}, 1 << 40, 8, "at least 50% efficient (50%). A machine needs 12.1 GB"),
        ({2: 0.4, 4: 0.2}, 1 << 40, 2, "as none is at least 50% efficient"),
        ({2: 0.9, 4: 0.9, 8: 0.3}, 18 * GIB, 4, "the most that are"),
        ({2: 1.0}, 4 * GIB, None, "None of 2 ranks fits: with 2 a machine needs 32.2 GB and this one has 4.29 GB."),
    ):
        found, reason = planner.recommend([row_of(*each) for each in efficiencies.items()], memory_bytes)
        assert found == ranks and words in reason


def test_the_command_prints_the_rows_and_writes_them(run: Path, tmp_path: Path) -> None:
    file, html = tmp_path / "plan.json", tmp_path / "plan.html"
    words = ("--run", run, "--ranks", "1,2", "--network-gbit", "1", "--json", file, "--html", html)
    done = invoke(app, *words, code=0)
    plan, page = json.loads(file.read_text()), check_page(html.read_text(encoding="utf-8"))
    assert [row["ranks"] for row in plan["rows"]] == [1, 2] and "joined by 1 Gbit/s" in plan["title"]
    assert plan["advice"] in " ".join(done.stdout.split()) and plan["title"] in page.texts
    for row in plan["rows"]:
        shown = [str(row["ranks"]), f"{row['images']:,}"]
        shown += [decimal(round(row[name]), precision=2) for name in ("rank_bytes", "bytes_sent")]
        shown += [f"{1e3 * row['step_s']:,.1f}", f"{row['samples_per_s']:,.0f}", f"{row['epoch_s'] / 60:,.1f}"]
        cells = " ".join([*shown, f"{row['efficiency']:.0%}"])
        assert cells in [" ".join(text.split()) for text in page.texts]
    alone = plan["rows"][0]
    assert alone["efficiency"] == 1 and alone["bytes_sent"] == 0
    assert alone["samples_per_s"] == pytest.approx(report_of(run)["samples_per_s"], rel=0.5)


def test_mistakes_and_a_run_without_a_report_are_refused(run: Path, tmp_path: Path) -> None:
    too_large = told(Problem.BATCH_OVER_ALL_SAMPLES, value=100_000)
    for options, message in ((["--global-batch-size", 100_000], too_large), (["--ranks", 0], "--ranks")):
        assert re.search(message, invoke(app, "--run", run, *options, code=2).stderr)
    unfinished = shutil.copytree(run, tmp_path / "short")
    (unfinished / "report.json").write_text(json.dumps(report_of(run) | {"samples_per_s": None}))
    without = told(Problem.RUN_WITHOUT_FIGURES, where=unfinished)
    assert re.search(without, invoke(app, "--run", unfinished, code=2).stderr)
