"""The input tensors of an exported network, by name and in order, made from a user's `NetworkInputs`.

A network is exported for one user and B candidates. All candidates share the same behaviours, so attention is a product
of two dense blocks without lists of lengths. Several users need several calls.

The first tensor is (B,), for its length alone. The second counts the values of each list of the user, in the order of
`Slots.lists`, for torch.export takes a size that can be 0 for 2 at least. The others are those of `Slots.slots`.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from serving.network.inputs import FieldRows, NetworkInputs
from trainer.config.options import ModelConfig
from trainer.models.ctr import CtrModel
from trainer.models.layers import width_of
from trainer.models.nets import Din
from trainer.schema import Field

Part = Literal["rows_NV", "weights_N", "sizes_K", "lengths_M", "dense", "tiers_BT", "nearest_N", "lengths_B"]
Size = Literal["one", "candidates", "list", "any"]
_OF_SIMILAR = ("tiers_BT", "nearest_N", "lengths_B")


@dataclass(frozen=True)
class Slot:
    """One tensor: which part of which field, by its name in `FieldRows` or `NearestRows`."""

    field: str
    part: Part
    size: Size
    """Its first dimension: 1, B, the values of the user's list, or any."""
    width: int = 0
    """Its second dimension; 0: none, it is (N,)."""

    @property
    def is_real(self) -> bool:
        """Whether its numbers are float32, and not int64."""
        return self.part in ("rows_NV", "weights_N", "dense", "tiers_BT")


@dataclass(frozen=True, kw_only=True)
class Slots:
    """All tensors of one network but the first two."""

    slots: tuple[Slot, ...]
    lists: tuple[str, ...]
    """Fields of the user with several values."""
    equal_lists: tuple[str, ...]
    """Fields whose lists are aligned value by value."""
    of_user: tuple[str, ...]
    """Fields of side user, dense ones included."""

    @classmethod
    def of(cls, model: CtrModel, config: ModelConfig) -> Self:
        """Name the tensors of a model."""
        slots = [slot for field in model.fields for slot in _of_field(field, width_of(field, config))]
        for name in model.aggregators:
            if config.similarity_tiers:
                slots.append(Slot(name, "tiers_BT", "candidates", config.similarity_tiers))
            if config.similarity_top_k:
                slots += [Slot(name, "nearest_N", "any"), Slot(name, "lengths_B", "candidates")]
        lists = tuple(f.name for f in model.fields if f.side == "user" and f.kind in ("multi_id", "content"))
        return cls(
            slots=tuple(slots),
            lists=lists,
            equal_lists=tuple(model.behaviors) if isinstance(model, Din) else (),
            of_user=tuple(field.name for field in model.fields if field.side == "user"),
        )

    def to_json(self) -> str:
        """Write down what `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Undo `to_json`. Raises ValueError, KeyError or TypeError for anything else."""
        read = json.loads(text)
        slots = tuple(Slot(**slot) for slot in read.pop("slots"))
        return cls(slots=slots, **{name: tuple(names) for name, names in read.items()})

    def arrays(self, inputs: NetworkInputs) -> list[NDArray[Any]]:
        """Return the arrays of one user in order, contiguous and of the right types; copies only if needed."""
        assert inputs.num_groups == 1
        num_candidates = len(inputs.group_of_sample_B)
        counts = {name: _num_values(inputs.fields[name]) for name in self.lists}
        assert len({counts[name] for name in self.equal_lists}) <= 1, "lists that belong together are equally long"
        arrays: list[NDArray[Any]] = [inputs.group_of_sample_B, np.array(list(counts.values()), np.int64)]
        for slot in self.slots:
            array = _part(inputs, slot)
            _check(slot, array, num_candidates, counts)
            arrays.append(np.ascontiguousarray(array, np.float32 if slot.is_real else np.int64))
        return arrays


def _of_field(field: Field, width: int) -> Iterator[Slot]:
    """Name the tensors of a field."""
    of_user = field.side == "user"
    if field.kind == "dense":
        yield Slot(field.name, "dense", "one" if of_user else "candidates", width)
        return
    is_list = field.kind == "multi_id" or (field.kind == "content" and of_user)
    size: Size = "candidates"
    if is_list or of_user:
        size = ("list" if of_user else "any") if is_list else "one"
    if field.gallery is not None:
        yield Slot(field.name, "rows_NV", "any", width)
        yield Slot(field.name, "sizes_K", size)
        return
    yield Slot(field.name, "rows_NV", size, width)
    if field.weights is not None:
        yield Slot(field.name, "weights_N", size)
    if size == "any":
        yield Slot(field.name, "lengths_M", "candidates")


def _num_values(field: FieldRows) -> int:
    return len(field.rows_NV if field.sizes_K is None else field.sizes_K)


def _part(inputs: NetworkInputs, slot: Slot) -> NDArray[Any]:
    if slot.part == "dense":
        return inputs.dense[slot.field]
    parts = inputs.similar if slot.part in _OF_SIMILAR else inputs.fields
    array: NDArray[Any] | None = getattr(parts[slot.field], slot.part)
    assert array is not None, f"field {slot.field} needs {slot.part}"
    return array


def _check(slot: Slot, array: NDArray[Any], num_candidates: int, counts: dict[str, int]) -> None:
    """Check the sizes of an array, as compiled code trusts them."""
    size = len(array)
    expected = 1 if slot.size == "one" else num_candidates if slot.size == "candidates" else counts.get(slot.field)
    assert slot.size == "any" or size == expected, f"{slot.field}.{slot.part} has {size} rows and not {expected}"
    width = array.shape[1] if array.ndim == 2 else 0
    assert width == slot.width, f"{slot.field}.{slot.part} is {width} wide and not {slot.width}"
