"""Warm start: a new run that begins with parameters of an earlier one, by group.

The paper's partial warm-up takes everything but the ID vectors, which start fresh: taking them too overfits ("Image
Matters", arXiv 1711.06505: GAUC .6260 without, .6283 partial, .6230 full). Optimisers, the counts of ID rows and the
learning rate's schedule start fresh: Adam's moments are running means of the earlier run's gradients, at the end of its
schedule and on its data, and a new run's first steps would be made of them. But a run of the next day on the same
settings (`all`) is better with them: a day is too short to find new ones (docs/RESULTS.md). It continues as if resumed,
steps counted on; only the schedule begins anew, so that rates do not shrink for ever.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from featurestore.published.paths import run_path
from trainer.comm import Comm
from trainer.config.config import WarmPart, differences
from trainer.engine.engine import Engine
from trainer.engine.wiring import NO_IMAGES
from trainer.errors import CheckpointError, CheckpointNotFoundError
from trainer.ids.shards import check_names
from trainer.runs import checkpoint
from trainer.runs.checkpoint import CheckpointState, Origin
from trainer.runs.folder import Checkpoint, checkpoint_at, find_checkpoint
from trainer.samples.survey import DECLARED, FOUND

_PREFIXES: Mapping[WarmPart, str] = {"images": "stores.", "model": "model."}
_DECIDED = "model.new_ads.counts"
"""What evaluations settle (model.image_dropout): a run may begin without it, or let it go; so it is with the vectors of
`NO_IMAGES`, which data.missing decides on."""

_OTHER_LAYERS = {
    *("model.embed_hidden", "model.shared_image_model", "model.visual_width"),  # E's own, which shapes tell
    *("model.init", "model.compute_dtype", "model.image_dropout", "model.pooling_length"),
    *("model.fields", "model.label"),  # of the schema: what layers read of its fields is compared by itself
}
"""What decides on parameters, and may differ where layers are taken."""


@dataclass(frozen=True)
class WarmStart:
    """A checkpoint to begin with, and the groups of parameters to take."""

    checkpoint: Checkpoint
    state: CheckpointState
    parts: tuple[WarmPart, ...]


def find(run: str, parts: Sequence[WarmPart]) -> WarmStart:
    """Read the checkpoint that run.warm_start names: a run's folder means its newest one. Raises CheckpointError."""
    try:
        found = checkpoint_at(run_path(run)) or find_checkpoint(run_path(run))
    except CheckpointNotFoundError as failure:
        raise CheckpointNotFoundError(f"run.warm_start={run}: {failure}") from failure
    return WarmStart(found, checkpoint.read_state(found), tuple(parts))


def load(comm: Comm, warm: WarmStart, origin: Origin, trained: Engine, cache_dir: str | None = None) -> None:
    """Copy the chosen groups into `trained`; ranks may be more or fewer than those that wrote the checkpoint.

    Raises CheckpointError on all ranks where a file is damaged, where E would see features of another kind than those
    it was trained on, where what is chosen has other names or shapes here, or where it would mean something else.
    """
    if not warm.parts:
        return
    if "images" in warm.parts:
        origin.check_store(warm.state.origin, warm.checkpoint)
    if "model" in warm.parts:
        _check_fields(origin.model, warm)
        _check_layers(origin.model, warm)
    if "ids" in warm.parts:
        _check_rows(origin.model, warm)
    if "optimizers" in warm.parts:
        _check_optimizers(origin.optim, warm)
        checkpoint.load(comm, warm.checkpoint, warm.state, trained, cache_dir)
        return
    rows = {} if "ids" in warm.parts else {"files": {checkpoint.DENSE: warm.state.files[checkpoint.DENSE]}}
    checkpoint.load(comm, warm.checkpoint, warm.state.model_copy(update=rows), _Chosen(warm, trained), cache_dir)


class _Chosen:
    """The chosen groups of an engine, as something that a checkpoint can be loaded into."""

    def __init__(self, warm: WarmStart, trained: Engine) -> None:
        self._warm, self._trained, self._dense = warm, trained, trained.dense_state()

    def load_dense_state(self, state: Mapping[str, Tensor]) -> None:
        for part, prefix in _PREFIXES.items():
            if part in self._warm.parts:
                idle = {_DECIDED} - (self._dense.keys() & state.keys())
                idle |= {name for name in self._dense.keys() ^ state.keys() if NO_IMAGES in name}
                mine, theirs = (
                    {name: value for name, value in each.items() if name.startswith(prefix) and name not in idle}
                    for each in (self._dense, state)
                )
                with self._named(part):
                    check_names(mine, theirs)
                    self._trained.begin_dense_with(theirs)

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
            raise _refusal(self._warm, part, str(failure)) from failure


def _refusal(warm: WarmStart, part: WarmPart, why: str) -> CheckpointError:
    """Say why a part cannot be taken, and how it could be."""
    return CheckpointError(
        f"warm start from {warm.checkpoint}, part {part}: {why}, or leave {part} out of run.warm_parts"
    )


def not_taken(model: Mapping[str, Any], warm: WarmStart) -> list[str]:
    """List the earlier run's ID tables that are asked for, and that this run has no field for."""
    mine, theirs = (
        {field.get("table") or name for name, field in each["fields"].items() if field["kind"] in ("id", "multi_id")}
        for each in (model, warm.state.origin.model)
    )
    return sorted(theirs - mine) if "ids" in warm.parts else []


def _check_layers(model: Mapping[str, Any], warm: WarmStart) -> None:
    """What the layers make of the same values is a matter of these settings, which the values' shapes may not tell."""
    found = [
        each
        for each in differences({"model": model}, {"model": warm.state.origin.model}, ("rows", "training", "nothing"))
        if each.name.startswith("model.") and each.setting not in _OTHER_LAYERS
    ]
    if found:
        was, has = (
            _settings((each.name, each.there) for each in found),
            _settings((each.name, each.here) for each in found),
        )
        raise _refusal(warm, "model", f"it was trained with {was}, this run has {has}; set {was}")


def _settings(values: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values)


def _check_rows(model: Mapping[str, Any], warm: WarmStart) -> None:
    """Rows of the same shape may be of other buckets, or lie where this run does not take them for untrained."""
    theirs = warm.state.origin.model
    for name in model["fields"].keys() & theirs["fields"].keys():
        here, there = ([each["fields"][name].get(key) for key in ("buckets", "boundaries")] for each in (model, theirs))
        if here != there:
            why = f"the buckets of field {name} begin elsewhere in this run; use its data.schema_file"
            raise _refusal(warm, "ids", why)
    marks_new_ads = model["image_dropout"] and model["images"] in ("ad", "both")
    if marks_new_ads and theirs["id_init_std"] > model["id_init_std"]:
        why = (
            f"its rows started with model.id_init_std={theirs['id_init_std']}, and with "
            f"model.image_dropout={model['image_dropout']} an ad is new while its rows lie within this run's "
            f"{model['id_init_std']}, so none would be; set model.image_dropout=0"
        )
        raise _refusal(warm, "ids", why)


def _check_optimizers(optim: Mapping[str, Any], warm: WarmStart) -> None:
    """State of one optimiser means nothing to another."""
    found = differences({"optim": optim}, {"optim": warm.state.origin.optim})
    if found:
        said = "; ".join(each.text("there") for each in found)
        raise CheckpointError(
            f"warm start from {warm.checkpoint}, part optimizers: {said}; their state fits the same optimiser: "
            "set run.warm_parts=full"
        )


def _check_fields(model: Mapping[str, Any], warm: WarmStart) -> None:
    """The first layer's columns belong to fields by their order, which its shape does not tell; nor does it tell how
    numbers are scaled, and how the values of a row or the images of a gallery become one."""
    mine, theirs = _read_of(model["fields"]), _read_of(warm.state.origin.model["fields"])
    found = [f"{name} is in one of the two alone" for name in mine.keys() ^ theirs.keys()]
    both = mine.keys() & theirs.keys()
    for each in differences({name: mine[name] for name in both}, {name: theirs[name] for name in both}):
        name, _, key = each.name.rpartition(".")
        found.append(f"{name}, {key}" + ("" if key in FOUND else f"={each.there}, here {each.here}"))
    if found or list(mine) != list(theirs):
        fields = "; ".join(sorted(found)) or "the same in another order"
        why = f"its schema has other fields ({fields}), so its layers read other inputs; use its data.schema_file"
        raise _refusal(warm, "model", why)


def _read_of(fields: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What decides, by field, on the meaning of what the layers read."""
    keys = ("side", *DECLARED, *FOUND, "gallery")
    return {
        name: {key: field.get(key) for key in keys} | {"weights": "a column" if field.get("weights") else None}
        for name, field in fields.items()
    }
