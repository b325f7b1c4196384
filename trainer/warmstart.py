"""Warm start: a new run that begins with parameters of an earlier one, by group.

The paper's partial warm-up takes everything but the ID vectors, which start fresh: taking them too overfits ("Image
Matters", arXiv 1711.06505: GAUC .6260 without, .6283 partial, .6230 full). Optimisers, the counts of ID rows and the
learning rate's schedule start fresh in any case: Adam's moments are running means of the earlier run's gradients, at
the end of its schedule and on its data, and a new run's first steps would be made of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer import checkpoint, legacy
from trainer.checkpoint import CheckpointState, Origin
from trainer.comm import Comm
from trainer.config import WarmPart
from trainer.errors import CheckpointError
from trainer.inputs.statistics import DECLARED
from trainer.optim import check_names
from trainer.options import ModelConfig

_PREFIXES: Mapping[WarmPart, str] = {"images": "stores.", "model": "model."}


class Warmable(Protocol):
    """What of the engine a warm start needs; `dense_state` gives the tensors themselves."""

    def dense_state(self) -> dict[str, Tensor]: ...
    def warm_names(self) -> list[str]: ...
    def begin_with(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class WarmStart:
    """A checkpoint to begin with, and the groups of parameters to take."""

    path: Path
    state: CheckpointState
    parts: tuple[WarmPart, ...]


def find(run: str, parts: Sequence[WarmPart]) -> WarmStart:
    """The checkpoint that run.warm_start names: a run's folder means its last one. Raises CheckpointError."""
    path = Path(run)
    if not (path / "state.json").is_file():
        finished = checkpoint.finished(path / "checkpoints")
        if not finished:
            raise CheckpointError(
                f"run.warm_start={run} is neither a checkpoint nor the folder of a run that has one; "
                "give one of them, as data/runs/NAME"
            )
        path = finished[-1]
    return WarmStart(path, checkpoint.read_state(path), tuple(parts))


def load(comm: Comm, warm: WarmStart, origin: Origin, trained: Warmable) -> None:
    """Copies the chosen groups into `trained`; ranks may be more or fewer than those that wrote the checkpoint.

    Raises CheckpointError on all ranks where a file is damaged, where E would see features of another kind than those
    it was trained on, or where what is chosen has other names or shapes here.
    """
    if not warm.parts:
        return
    if "images" in warm.parts:
        origin.check_store(warm.state.origin, warm.path)
    if "model" in warm.parts:
        _check_fields(origin.model, warm)
        _check_layers(origin.model, warm)
    rows = {} if "ids" in warm.parts else {"files": {checkpoint.DENSE: warm.state.files[checkpoint.DENSE]}}
    checkpoint.load(comm, warm.path, warm.state.model_copy(update=rows), _Chosen(warm, trained))


class _Chosen:
    """The chosen groups of an engine, as something that a checkpoint can be loaded into."""

    def __init__(self, warm: WarmStart, trained: Warmable) -> None:
        self._warm, self._trained, self._dense = warm, trained, trained.dense_state()

    def load_dense_state(self, state: Mapping[str, Tensor]) -> None:
        for part, prefix in _PREFIXES.items():
            if part in self._warm.parts:
                mine, theirs = (
                    {name: value for name, value in each.items() if name.startswith(prefix)}
                    for each in (self._dense, state)
                )
                with self._named(part), torch.no_grad():
                    check_names(mine, theirs)
                    for name, value in mine.items():
                        value.copy_(theirs[name])

    def shard_names(self) -> list[str]:
        return self._trained.warm_names() if "ids" in self._warm.parts else []

    def load_shard_state(self, state: Mapping[str, Tensor]) -> None:
        if "ids" in self._warm.parts:
            with self._named("ids"):
                self._trained.begin_with(state)

    @contextmanager
    def _named(self, part: WarmPart) -> Iterator[None]:
        """Says in a CheckpointError of the block which part of which run does not fit."""
        try:
            yield
        except CheckpointError as failure:
            raise CheckpointError(
                f"warm start from {self._warm.path}, part {part}: {failure}, or leave {part} out of run.warm_parts"
            ) from failure


def _check_layers(model: Mapping[str, Any], warm: WarmStart) -> None:
    """What the layers make of the same values is a matter of these settings, which the values' shapes do not tell."""
    theirs = ModelConfig().model_dump() | legacy.BEFORE["model"] | warm.state.origin.model
    heads = ["transformer_heads"] if model["pooling"] == "transformer" else []
    for name in ("multi_hot", "activation", *heads):
        if model[name] != theirs[name]:
            raise CheckpointError(
                f"warm start from {warm.path}, part model: it was trained with model.{name}={theirs[name]}, this run "
                f"has {model[name]}; set model.{name}={theirs[name]}, or leave model out of run.warm_parts"
            )


def _check_fields(model: Mapping[str, Any], warm: WarmStart) -> None:
    """The first layer's columns belong to fields by their order, which its shape does not tell."""
    mine, theirs = (
        [(name, *(field.get(key) for key in ("side", *DECLARED))) for name, field in each["fields"].items()]
        for each in (model, warm.state.origin.model)
    )
    if mine != theirs:
        differing = [str(field) for field in [*mine, *theirs] if (field in mine) != (field in theirs)]
        raise CheckpointError(
            f"warm start from {warm.path}, part model: its schema has other fields "
            f"({', '.join(differing) or 'the same in another order'}), so its layers read other inputs; "
            "use its data.schema_file, or leave model out of run.warm_parts"
        )
