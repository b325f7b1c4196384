"""What a rank takes of its machine: threads, device, memory; and what a run says of its hardware."""

import gc
import os
import re
import socket
from pathlib import Path

import pytest
import torch

from featurestore.lookup import VARIABLE, dtype_of_machine
from tests.cli import invoke
from tests.raised import raises
from tests.ranks import Forks
from tests.trainer.conftest import Places
from tests.trainer.whole_runs import report_of
from trainer.comm import SoloComm
from trainer.comm.distributed import WITHOUT_NCCL
from trainer.config import Device, OptimConfig, load_config
from trainer.engine import machine
from trainer.engine.machine import RankPlace, check_memory, choose_gpus, holds_features, objects_frozen, share_machine
from trainer.errors import ConfigError
from trainer.ids.optimizers import state_of
from trainer.ids.shards import TableShape
from trainer.loop.summary import hardware_of, hardware_text
from trainer.main import app
from trainer.problems import Problem

STATE = state_of(OptimConfig(ids="rowwise_adagrad"))
CPU = torch.device("cpu")


def place(host: str, *cores: int) -> RankPlace:
    return RankPlace(host, frozenset(cores), has_gpu=False)


class TestThreads:
    @pytest.mark.parametrize(
        ("places", "threads"),
        [
            ([place("a", *range(8))] * 3 + [place("b", *range(8))], [2, 2, 2, 8]),
            ([place("a", 0, 1, 2, 3), place("a", 4, 5, 6, 7)], [4, 4]),
            ([place("a", 0, 1, 2, 3)] * 2 + [place("a", 4, 5, 6, 7)] * 2, [2, 2, 2, 2]),
            ([place("a", 0, 1)] * 4, [1, 1, 1, 1]),
        ],
        ids=["anywhere", "cores of their own", "sockets", "more ranks than cores"],
    )
    def test_ranks_share_the_cores_that_they_may_run_on(self, places: list[RankPlace], threads: list[int]) -> None:
        assert [machine.threads_of(rank, places) for rank in range(len(places))] == threads

    def test_threads_without_end_are_refused(self) -> None:
        with raises(ConfigError, Problem.TOO_MANY_THREADS, value=1_000_000, cores=len(os.sched_getaffinity(0))):
            share_machine(load_config(None, ["run.threads=1000000"]), SoloComm())


class TestMemory:
    def test_of_tables_that_do_not_fit_the_largest_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shapes = (TableShape("item", 12, 1_000_000, 64), TableShape("user", 4, 1_000_000_000, 64))
        monkeypatch.setattr(machine, "free_bytes", lambda: 21_000_000_000)
        check_memory(SoloComm(), shapes, STATE, CPU, torch.float32)
        monkeypatch.setattr(machine, "free_bytes", lambda: 3_000_000_000)
        user = {"where": "model.tables.user=1000000000", "value": 10**9, "width": 4, "needed": 20.0}
        with raises(ConfigError, Problem.TABLES_TOO_LARGE, **user, together=20.052, free=3.0):
            check_memory(SoloComm(), shapes, STATE, CPU, torch.float32)

    def test_ranks_of_a_machine_share_its_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each alone would fit; a rank on another machine does not count."""
        comm = SoloComm()
        on_both, alone = [("a", 30, [20]), ("a", 31, [20])], [("a", 30, [20]), ("b", 30, [20])]
        shapes = [TableShape("user", 4, 10, 2)]
        monkeypatch.setattr(comm, "allgather_object", lambda value, name: alone)
        check_memory(comm, shapes, STATE, CPU, torch.float32)
        monkeypatch.setattr(comm, "allgather_object", lambda value, name: on_both)
        with raises(ConfigError, Problem.TABLES_TOO_LARGE, place="a", ranks=2):
            check_memory(comm, shapes, STATE, CPU, torch.float32)


def test_auto_holds_features_in_half_of_what_a_gpu_has_which_its_ranks_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 200))
    comm, gpu = SoloComm(), torch.device("cuda", 1)
    assert holds_features(comm, "auto", 50, gpu) and not holds_features(comm, "auto", 51, gpu)
    assert not holds_features(comm, "auto", 50, CPU)
    assert not holds_features(comm, False, 50, gpu) and holds_features(comm, True, 51, gpu)
    monkeypatch.setattr(comm, "allgather_object", lambda value, name="": [value, value, ("other, cuda:1", 90)])
    assert holds_features(comm, "auto", 25, gpu) and not holds_features(comm, "auto", 26, gpu)


class TestDevice:
    @pytest.mark.parametrize(
        ("device", "have_gpu", "moves", "on_gpus", "warning"),
        [
            ("auto", [True, True], True, True, None),
            ("cuda", [True, True], True, True, None),
            ("cpu", [True, True], True, False, None),
            ("auto", [False, False], True, False, None),
            ("auto", [True, True], False, False, "2 of 2 ranks found a GPU, .* without NCCL; .*=NCCL make install; or"),
            ("auto", [True, False], False, False, "1 of 2 ranks found a GPU, .* without NCCL"),
            ("auto", [True, False], True, False, "1 of 2 ranks found a GPU, .* not every rank has one"),
            ("cuda", [True, False], True, None, "finds no GPU"),
            ("cuda", [True, True], False, None, "without NCCL.*HOROVOD_GPU_OPERATIONS=NCCL make install"),
        ],
    )
    def test_choice(
        self, device: Device, have_gpu: list[bool], moves: bool, on_gpus: bool | None, warning: str | None
    ) -> None:
        without_cuda = None if moves else WITHOUT_NCCL
        if on_gpus is None:
            with pytest.raises(ConfigError, match=warning):
                choose_gpus(device, have_gpu, without_cuda)
            return
        chosen, said = choose_gpus(device, have_gpu, without_cuda)
        assert chosen is on_gpus and (said is None if warning is None else re.match(warning, said or ""))

    def test_rank_0_warns_of_gpus_without_nccl(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        comm = SoloComm()
        comm.moves_cuda_tensors = False  # as of Horovod that was built for the CPU
        assert share_machine(load_config(None, []), comm) == CPU
        assert re.fullmatch(r"warning: 1 of 1 ranks found a GPU.*\n", capsys.readouterr().err)
        comm.rank = 1
        places = [RankPlace("a", frozenset({0}), has_gpu=True)] * 2
        monkeypatch.setattr(comm, "allgather_object", lambda value, name: places)
        share_machine(load_config(None, ["run.threads=1"]), comm)
        assert capsys.readouterr().err == "", "rank 0 has said it"

    def test_a_rank_takes_the_gpu_of_its_place_on_the_host(self, monkeypatch: pytest.MonkeyPatch) -> None:
        taken: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        comm, here = SoloComm(), socket.gethostname()
        hosts = ["other", here, here, here]
        places = [RankPlace(host, frozenset({0}), has_gpu=True) for host in hosts]
        monkeypatch.setattr(comm, "allgather_object", lambda value, name: places)
        for comm.rank in (1, 2, 3):
            assert share_machine(load_config(None, ["run.threads=1"]), comm) == taken[-1]
        assert taken == [torch.device("cuda", number) for number in (0, 1, 0)]


def test_one_process_has_no_collectives(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)  # the processor decides
    dtype = dtype_of_machine("cpu")
    settings = places.settings(run__name="solo", train__max_steps=1, run__device="cpu")
    result = invoke(app, "--set", *settings, code=0)
    assert f", one process on cpu, no collectives, compute_dtype {dtype}, step 0 of 1" in result.stdout.splitlines()[0]
    report = report_of(places.folder / "runs" / "solo")
    assert (report["devices"], report["collectives"], report["compute_dtype"]) == (["cpu"], None, dtype)
    assert f"compute_dtype: {dtype}\n" in (places.folder / "runs" / "solo" / "config.yaml").read_text()


def test_gpus_are_named_with_their_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    solo = hardware_of(SoloComm(), torch.device("cuda", 0), "bfloat16")
    assert hardware_text(solo, 1) == "one process on cuda:0 (NVIDIA H100), no collectives, compute_dtype bfloat16"
    several = solo | {"devices": [f"cuda:{rank}" for rank in (0, 1, 0, 1)], "collectives": "NCCL by Horovod"}
    said = "4 ranks on cuda:0, cuda:1, collectives: NCCL by Horovod, compute_dtype bfloat16"
    assert hardware_text(several, 4) == said


def test_objects_are_frozen_for_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[str]()
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 0)
    for name in ("collect", "freeze", "unfreeze"):
        monkeypatch.setattr(gc, name, lambda name=name: done.append(name))
    with pytest.raises(ZeroDivisionError), objects_frozen():
        assert done == ["collect", "freeze"]
        raise ZeroDivisionError
    assert done == ["collect", "freeze", "unfreeze"]


def test_freed_blocks_are_used_again(forks: Forks, tmp_path: Path) -> None:
    """In a process of its own: in this one, other threads and tests cut pieces from the blocks that were freed."""
    (tmp_path / "faults.py").write_text(_PAGE_FAULTS)
    forks.run(1, tmp_path / "log.txt", tmp_path / "faults.py")
    faults = min(int(line) for line in (tmp_path / "log.txt").read_text().splitlines())
    assert faults < 5_000  # of 39,000 pages: by default glibc keeps 40 MB of these 160


_PAGE_FAULTS = """
import resource
import torch
from featurestore.console.memory import keep_freed_memory

keep_freed_memory()
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.zeros(5_000_000) for _ in range(8)]
    del blocks
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
