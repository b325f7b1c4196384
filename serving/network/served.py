"""The network of a bundle, loaded: the rows of some users and their candidates in, logits out.

    network = ServedNetwork.load(folder)
    network.score(inputs)        (B,) float32
    network.form, network.note   "compiled" or "portable", and why existing compiled code is not used

Uses code compiled for this kind of machine (`compiled_name`) if there is any. The portable form gives the same logits
up to rounding, and takes some milliseconds a user. A call uses one core, and torch has one thread from then on.

The shapes are those of a batch of the trainer (trainer/samples/reader.py): G users, B candidates of all of them, one
user's after the other's; M = G on the user side and B on the ad side; N values of a field; V width of its vectors. A
network is exported for one user and B candidates. All candidates share the same behaviours, so attention is a product
of two dense blocks without lists of lengths. Several users need several calls.

The first tensor is (B,), for its length alone. The second counts the values of each list of the user, in the order of
`Slots.lists`, for torch.export takes a size that can be 0 for 2 at least. The others are those of `Slots.slots`.
"""

import hashlib
import itertools
import platform
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from serving.errors import BrokenBundleError
from serving.network import Steps, run_steps
from serving.problems import Problem
from trainer.config import ModelConfig
from trainer.models.ctr import CtrModel
from trainer.models.layers import width_of
from trainer.models.nets import Din
from trainer.schema.fields import Field

PORTABLE = "network.pt2"
SLOTS = "slots.json"
"""Inside a portable file, and among the metadata of a compiled one."""

_BLOCK = 256  # candidates a run, so that intermediate results stay in the processor's cache
_MOST_PAIRS = 1 << 15
"""Pairs of a candidate and a behaviour a run: some milliseconds, and some megabytes."""

Run = Callable[[list[Tensor]], Sequence[Tensor]]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


class FieldRows(NamedTuple):
    """The vectors of an id, multi_id or content field: row m holds the next `lengths_M[m]` of `rows_NV`."""

    rows_NV: Float32
    lengths_M: Int64
    weights_N: Float32 | None = None
    """Of a field with weights."""

    def cut(self, ends_M: Int64, start: int, end: int) -> "FieldRows":
        """Return the rows from `start` to `end`; row m has the values from `ends_M[m]` to `ends_M[m + 1]`, (M + 1,)."""
        values = slice(ends_M[start], ends_M[end])
        weights_N = None if self.weights_N is None else self.weights_N[values]
        return FieldRows(self.rows_NV[values], self.lengths_M[start:end], weights_N)


@dataclass(frozen=True, kw_only=True)
class NetworkInputs:
    """All inputs of one call of the network."""

    group_of_sample_B: Int64
    """The user of each candidate, in [0, G), ascending."""
    num_groups: int
    fields: Mapping[str, FieldRows]
    dense: Mapping[str, Float32] = field(default_factory=dict)
    """Every dense field, (M, width), as the model takes it (trainer/samples/reader.py)."""


def split_by_user(
    inputs: NetworkInputs, of_user: Collection[str], at_most: int, most_pairs: int
) -> Iterator[NetworkInputs]:
    """Divide the inputs into blocks of one user and 1 to `at_most` candidates, in their order, by views.

    A block has fewer candidates if their number times the user's longest list exceeds `most_pairs`, but at least one.
    Inputs that are a single block are returned as they are. `of_user`: the fields of side user.
    """
    if inputs.num_groups == 1:
        longest = max((len(rows.rows_NV) for name, rows in inputs.fields.items() if name in of_user), default=0)
        if 0 < len(inputs.group_of_sample_B) <= max(1, min(at_most, most_pairs // max(1, longest))):
            yield inputs
            return
    longest_G = np.ones(inputs.num_groups, np.int64)
    for name in inputs.fields.keys() & of_user:
        longest_G = np.maximum(longest_G, inputs.fields[name].lengths_M)
    at_most_G = np.clip(most_pairs // longest_G, 1, at_most)
    ends = {name: np.append(0, np.cumsum(field.lengths_M)) for name, field in inputs.fields.items()}
    starts_G = np.searchsorted(inputs.group_of_sample_B, np.arange(inputs.num_groups + 1)).tolist()
    for user, (first, last) in enumerate(itertools.pairwise(starts_G)):
        for start in range(first, last, int(at_most_G[user])):
            end = min(start + int(at_most_G[user]), last)
            at = {True: (user, user + 1), False: (start, end)}
            yield NetworkInputs(
                group_of_sample_B=np.zeros(end - start, np.int64),
                num_groups=1,
                fields={name: rows.cut(ends[name], *at[name in of_user]) for name, rows in inputs.fields.items()},
                dense={name: rows_MW[slice(*at[name in of_user])] for name, rows_MW in inputs.dense.items()},
            )


Part = Literal["rows_NV", "weights_N", "sizes_K", "lengths_M", "dense"]
Size = Literal["one", "candidates", "list", "any"]


@dataclass(frozen=True)
class Slot:
    """One tensor: which part of which field, by its name in `FieldRows`."""

    field: str
    part: Part
    size: Size
    """Its first dimension: 1, B, the values of the user's list, or any."""
    width: int = 0
    """Its second dimension; 0: none, it is (N,)."""

    @property
    def is_real(self) -> bool:
        """Whether its numbers are float32, and not int64."""
        return self.part in ("rows_NV", "weights_N", "dense")


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
        lists = tuple(f.name for f in model.fields if f.side == "user" and f.kind in ("multi_id", "content"))
        return cls(
            slots=tuple(slot for field in model.fields for slot in _of_field(field, width_of(field, config))),
            lists=lists,
            equal_lists=tuple(model.behaviors) if isinstance(model, Din) else (),
            of_user=tuple(field.name for field in model.fields if field.side == "user"),
        )

    def arrays(self, inputs: NetworkInputs) -> list[NDArray[Any]]:
        """Return the arrays of one user in order, contiguous and of the right types; copies only if needed."""
        assert inputs.num_groups == 1
        num_candidates = len(inputs.group_of_sample_B)
        counts = {name: len(inputs.fields[name].rows_NV) for name in self.lists}
        assert len({counts[name] for name in self.equal_lists}) <= 1, "lists that belong together are equally long"
        arrays: list[NDArray[Any]] = [inputs.group_of_sample_B, np.array(list(counts.values()), np.int64)]
        for slot in self.slots:
            array = inputs.dense[slot.field] if slot.part == "dense" else getattr(inputs.fields[slot.field], slot.part)
            assert array is not None, f"field {slot.field} needs {slot.part}"
            # Sizes are checked, as compiled code trusts them.
            size = 1 if slot.size == "one" else num_candidates if slot.size == "candidates" else counts.get(slot.field)
            assert slot.size == "any" or len(array) == size, (
                f"{slot.field}.{slot.part} has {len(array)} rows and not {size}"
            )
            width = array.shape[1] if array.ndim == 2 else 0
            assert width == slot.width, f"{slot.field}.{slot.part} is {width} wide and not {slot.width}"
            arrays.append(np.ascontiguousarray(array, np.float32 if slot.is_real else np.int64))
        return arrays


def _of_field(field: Field, width: int) -> Iterator[Slot]:
    """Name the tensors of a field."""
    of_user = field.side == "user"
    if field.kind == "dense":
        yield Slot(field.name, "dense", "one" if of_user else "candidates", width)
        return
    is_list = field.kind == "multi_id" or (field.kind == "content" and of_user)
    size: Size = ("list" if is_list else "one") if of_user else "any" if is_list else "candidates"
    yield Slot(field.name, "rows_NV", size, width)
    if field.weights is not None:
        yield Slot(field.name, "weights_N", size)
    if size == "any":
        yield Slot(field.name, "lengths_M", "candidates")


SLOTS_JSON = TypeAdapter(Slots)
"""Writes the slots of a network as JSON, and reads them. Raises ValidationError for anything else."""


@dataclass
class ServedNetwork:
    """An exported network; calls from several threads may run at the same time."""

    _run: Run
    _slots: Slots
    form: Literal["compiled", "portable"]
    note: str | None
    """Why existing compiled code is not used."""

    @classmethod
    def load(cls, folder: Path, *, portable: bool = False) -> Self:
        """Load the network that `export_network` wrote into `folder`. Takes about two seconds.

        From then on torch uses one thread in the whole process. `portable`: compiled code is not looked for. The files
        are those of a bundle, whose digests were compared. Raises BrokenBundleError where one is not such a network.
        """
        torch.set_num_threads(1)
        note, compiled = None, folder / compiled_name()
        if not portable and compiled.is_file():
            try:
                from torch._inductor import aoti_load_package  # a second's import

                loader = aoti_load_package(str(compiled)).loader
                slots = SLOTS_JSON.validate_json(loader.get_metadata()[SLOTS])
                return cls(loader.boxed_run, slots, "compiled", None)
            except (RuntimeError, OSError) as failure:
                reason = _first_line(failure)
                note = f"{compiled.name} cannot be loaded ({reason}); the portable network is used, and is slower"
        elif not portable and (others := sorted(path.name for path in folder.glob("network-*.pt2"))):
            note = (
                f"{', '.join(others)} is compiled for another machine than this one ({compiled.name}); the portable "
                "network is used, and is slower. Export the model here with --compile"
            )
        return cls(*_load_portable(folder / PORTABLE), "portable", note)

    def score(self, inputs: NetworkInputs) -> Float32:
        """Return the logits of all candidates, (B,), in their order."""
        return run_steps(self.steps(inputs))

    def steps(self, inputs: NetworkInputs) -> Steps[Float32]:
        """Score in pieces: 256 candidates of a user at a time, fewer for long histories."""
        logits = []
        for block in split_by_user(inputs, self._slots.of_user, _BLOCK, _MOST_PAIRS):
            logits.append(self._score(block))
            yield
        return np.concatenate(logits) if logits else np.empty(0, np.float32)

    def _score(self, inputs: NetworkInputs) -> Float32:
        torch.set_num_threads(1)  # OpenMP counts them by calling thread; a second one spins between small requests
        with torch.inference_mode():
            arrays = [array if array.flags.writeable else array.copy() for array in self._slots.arrays(inputs)]
            (logits_B,) = self._run([torch.from_numpy(array) for array in arrays])
        logits: NDArray[np.float32] = logits_B.numpy()
        return logits


def _load_portable(path: Path) -> tuple[Run, Slots]:
    """Load the program of torch.export. Raises BrokenBundleError."""
    written = {SLOTS: ""}
    try:
        # Guards record sizes of the tracing, e.g. B % (B * L) != 0, and fail for L = 0 and 1, which are valid. #
        # `Slots.arrays` checks the sizes.
        program = torch.export.load(path, extra_files=written)
        network = program.module(check_guards=False)
        for node in program.graph.nodes:  # what torch noted of sizes holds itself, and would stay for ever
            if (mode := getattr(node.meta.get("val"), "fake_mode", None)) is not None and mode.shape_env is not None:
                vars(mode.shape_env).clear()
        slots = SLOTS_JSON.validate_json(written[SLOTS])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as failure:
        raise BrokenBundleError(Problem.NOT_NETWORK, path, _first_line(failure)) from failure
    # `forward`: by its hooks the module would check sizes at each call, in 1.4 ms.
    return lambda tensors: (network.forward(*tensors),), slots


def _first_line(failure: Exception) -> str:
    return next(iter(str(failure).splitlines()), type(failure).__name__)


def compiled_name() -> str:
    """Name the file of a network compiled for this machine, e.g. network-x86_64-avx512-1f0c9d2ab34e.pt2.

    The digits depend on all that the code may use: each feature of the processor, the versions of torch and libc.
    """
    features = f"{_processor_features()} {torch.__version__} {' '.join(platform.libc_ver())}"
    digits = hashlib.sha256(features.encode()).hexdigest()[:12]
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return f"network-{platform.machine()}-{capability}-{digits}.pt2"


def _processor_features() -> str:
    """Return the features that the kernel names of the first core, sorted; cores of one machine have the same."""
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return " ".join(sorted(value.split()))
    return platform.processor()
