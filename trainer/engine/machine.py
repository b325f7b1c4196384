"""The machine: threads, memory and number types of a rank."""

import contextlib
import gc
import hashlib
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import pyarrow as pa
import torch
from torch import Tensor

from featurestore.console.output import print_warning
from featurestore.lookup import AutoDType, dtype_of_environment, dtype_of_machine
from trainer.comm import Comm
from trainer.config import Config, Device, ModelConfig
from trainer.errors import ConfigError
from trainer.ids.shards import StatePart, TableShape, owned_bytes
from trainer.problems import Problem

_MOST_THREADS = 4  # for each core


@dataclass(frozen=True)
class RankPlace:
    """A rank's host and `cores`: those that it may run on, as a launcher may have bound it to some."""

    host: str
    cores: frozenset[int]
    has_gpu: bool


def share_machine(config: Config, comm: Comm) -> torch.device:
    """Set the threads of torch and Arrow to this rank's share of the cores, and its GPU; return that, or the CPU.

    Raises ConfigError for more threads than a rank can use, or a GPU that is not there; on all ranks alike.
    """
    place = RankPlace(socket.gethostname(), frozenset(os.sched_getaffinity(0)), torch.cuda.is_available())
    places = comm.allgather_object(place, name="places")
    threads, cores = config.run.threads or threads_of(comm.rank, places), min(len(each.cores) for each in places)
    if threads > _MOST_THREADS * cores:  # the C libraries would just crash
        raise ConfigError(Problem.TOO_MANY_THREADS, threads, cores)
    torch.set_num_threads(threads)
    pa.set_cpu_count(threads)
    without_cuda = None if comm.moves_cuda_tensors else comm.without_cuda
    on_gpus, warning = choose_gpus(config.run.device, [each.has_gpu for each in places], without_cuda)
    if warning and comm.rank == 0:
        print_warning(warning)
    if not on_gpus:
        return torch.device("cpu")
    here = [rank for rank, each in enumerate(places) if each.host == place.host]
    device = torch.device("cuda", here.index(comm.rank) % torch.cuda.device_count())
    torch.cuda.set_device(device)  # NCCL, and code that names no device, would use the first GPU
    return device


def threads_of(rank: int, places: Sequence[RankPlace]) -> int:
    """Return a rank's share of its cores: their number over that of the ranks on its host that may run on one."""
    mine = places[rank]
    sharing = sum(each.host == mine.host and not mine.cores.isdisjoint(each.cores) for each in places)
    return max(1, len(mine.cores) // sharing)


def choose_gpus(device: Device, have_gpu: Sequence[bool], without_cuda: str | None) -> tuple[bool, str | None]:
    """Decide whether the ranks compute on GPUs; also warn, with the way out, where some stay idle by run.device=auto.

    `have_gpu`: of each rank, whether it has one. `without_cuda`: as in Comm, why collectives do not take tensors of a
    GPU; None where they do. Raises ConfigError where run.device=cuda asks for a device that is not there.
    """
    if device == "cpu" or (all(have_gpu) and without_cuda is None):
        return device != "cpu", None
    if device == "cuda" and not all(have_gpu):
        raise ConfigError(Problem.NO_GPU_ON_EVERY_RANK)
    if device == "cuda":
        raise ConfigError(Problem.NO_GPU_COLLECTIVES, without_cuda)
    reason = without_cuda or "not every rank has one. Start ranks only on hosts with GPUs"
    found = f"{sum(have_gpu)} of {len(have_gpu)} ranks found a GPU, but all compute on the CPU"
    return False, f"{found}: {reason}; or set run.device=cpu" if any(have_gpu) else None


def check_memory(
    comm: Comm, shapes: Sequence[TableShape], state: Sequence[StatePart], device: torch.device, dtype: torch.dtype
) -> None:
    """Raise ConfigError where the ID tables of the ranks of one machine, or of one GPU, do not fit into its memory.

    It raises on all ranks alike, so every rank has to call it.
    """
    host, needs = socket.gethostname(), [owned_bytes(shape, comm.rank, comm.size, state, dtype) for shape in shapes]
    on_gpu = device.type == "cuda"
    mine = (f"{host}, {device}", torch.cuda.mem_get_info(device)[0], needs) if on_gpu else (host, free_bytes(), needs)
    found = comm.allgather_object(mine, name="memory")
    for place in dict.fromkeys(where for where, _, _ in found):
        here = [(free, needs) for where, free, needs in found if where == place]
        free = min(free for free, _ in here)
        bytes_of_table = [sum(each) for each in zip(*(needs for _, needs in here), strict=True)]
        if sum(bytes_of_table) <= free:
            continue
        shape, needed = max(zip(shapes, bytes_of_table, strict=True), key=lambda pair: pair[1])
        own_gb, all_gb, free_gb = (size / 1e9 for size in (needed, sum(bytes_of_table), free))
        values = shape.setting, shape.num_rows, shape.width, own_gb, place, len(here), all_gb, free_gb
        raise ConfigError(Problem.TABLES_TOO_LARGE, *values)


def holds_features(comm: Comm, wanted: Literal["auto"] | bool, needed_bytes: int, device: torch.device) -> bool:
    """Decide whether this rank's features, of `needed_bytes`, go into its device's memory; every rank has to call it.

    `wanted`: run.features_on_device; auto: where they take at most half of what is free on a GPU, which ranks share.
    """
    if wanted != "auto" or device.type == "cpu":
        return wanted is True
    here = f"{socket.gethostname()}, {device}"
    needs = [bytes_ for place, bytes_ in comm.allgather_object((here, needed_bytes), name="features") if place == here]
    return sum(needs) <= torch.cuda.mem_get_info(device)[0] // 2


def device_name(device: torch.device) -> str:
    """Name a device with its model, as "cpu" or "cuda:0 (NVIDIA H100)"."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def check_same(comm: Comm, state: Mapping[str, Tensor]) -> None:
    """Compare the ranks' engines. Raises ConfigError, on all ranks, where it is not the same on each."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    digests = comm.allgather_object(digest.hexdigest(), name="digest")
    if len(set(digests)) > 1:
        raise ConfigError(Problem.DIFFERENT_MODELS, ", ".join(d[:8] for d in digests))


_GROUP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def free_bytes() -> int:
    """Return the memory that processes of this machine can still take, swap and the limits of a container included."""
    return min([psutil.virtual_memory().available + psutil.swap_memory().free, *_limits()])


def _limits() -> Iterator[int]:
    """Return the limits of the control groups (version 2) that this process is in: in a container its own alone."""
    with contextlib.suppress(OSError):
        group = _GROUPS / _GROUP.read_text().strip().rpartition(":")[2].lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(_GROUPS):
                with contextlib.suppress(OSError, ValueError):  # "max", or no such file
                    yield int((folder / "memory.max").read_text())


@contextlib.contextmanager
def objects_frozen() -> Iterator[None]:
    """Exclude existing objects from Python's garbage collection within the block.

    Scanning all objects of the imported libraries takes a fifth of a second. Each rank's collector does this at its own
    time, and all ranks wait for it. Does nothing if the process has already frozen objects; whoever froze them
    unfreezes them.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def with_compute_dtype(config: ModelConfig, comm: Comm, device: torch.device, recorded: str | None) -> ModelConfig:
    """Settle model.compute_dtype, the same on every rank.

    Returns the setting; for "auto" `recorded` (from the checkpoint that a run continues), else the type in rank 0's
    environment, else bfloat16 if it is fast on the hardware of every rank, else float32. All ranks call it. Raises
    ConfigError on all if the environment has an unknown type.
    """
    if config.compute_dtype != "auto":
        return config

    def named() -> AutoDType | None:
        try:
            return dtype_of_environment()
        except ValueError as failure:
            raise ConfigError(str(failure)) from failure

    settled = recorded or comm.on_rank_0(named)
    if settled is None:
        of_ranks = comm.allgather_object(dtype_of_machine(device.type), name="compute dtypes")
        settled = "bfloat16" if set(of_ranks) == {"bfloat16"} else "float32"
    return config.model_copy(update={"compute_dtype": settled})
