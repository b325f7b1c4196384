"""The network of a bundle, loaded: the rows of some users and their candidates in, logits out.

    network = ServedNetwork.load(folder)
    network.score(inputs)        (B,) float32
    network.form, network.note   "compiled" or "portable", and why existing compiled code is not used

Uses code compiled for this kind of machine (`compiled_name`) if there is any. The portable form gives the same logits
up to rounding, and takes some milliseconds a user. A call uses one core; torch's number of threads applies to the whole
process.
"""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.errors import BrokenBundleError
from serving.network import Steps, run_steps
from serving.network.exporting import PORTABLE, SLOTS, compiled_name
from serving.network.inputs import Float32, NetworkInputs, Slots, split_by_user

_BLOCK = 256  # candidates a run, so that intermediate results stay in the processor's cache
_MOST_PAIRS = 1 << 15
"""Pairs of a candidate and a behaviour a run: some milliseconds, and some megabytes."""

Form = Literal["compiled", "portable"]
Run = Callable[[list[Tensor]], Sequence[Tensor]]


class ServedNetwork:
    """An exported network; calls from several threads may run at the same time."""

    def __init__(self, run: Run, slots: Slots, form: Form, note: str | None) -> None:
        self._run, self._slots = run, slots
        self.form = form
        self.note = note
        """Why existing compiled code is not used."""

    @classmethod
    def load(cls, folder: Path, *, portable: bool = False) -> Self:
        """Load the network that `export_network` wrote into `folder`. Takes about two seconds.

        From then on torch uses one thread in the whole process. `portable`: compiled code is not looked for. Raises
        BrokenBundleError where a file is missing or is not what was written.
        """
        torch.set_num_threads(1)
        note = None
        if not portable:
            compiled = folder / compiled_name()
            if compiled.is_file():
                _check_archive(compiled)
                try:
                    return cls(*_load_compiled(compiled), "compiled", None)
                except (RuntimeError, OSError) as failure:
                    reason = _first_line(failure)
                    note = f"{compiled.name} cannot be loaded ({reason}); the portable network is used, and is slower"
            elif others := sorted(path.name for path in folder.glob("network-*.pt2")):
                note = (
                    f"{', '.join(others)} is compiled for another machine than this one ({compiled.name}); the "
                    "portable network is used, and is slower. Export the model here with --compile"
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
        with torch.inference_mode():
            (logits_B,) = self._run([_as_tensor(array) for array in self._slots.arrays(inputs)])
        logits: NDArray[np.float32] = logits_B.numpy()
        return logits


def _as_tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _load_compiled(path: Path) -> tuple[Run, Slots]:
    """Load compiled code. Raises RuntimeError or OSError where this machine cannot run it."""
    from torch._inductor import aoti_load_package  # a second's import

    loader = aoti_load_package(str(path)).loader
    return loader.boxed_run, Slots.from_json(loader.get_metadata()[SLOTS])


def _load_portable(path: Path) -> tuple[Run, Slots]:
    """Load the program of torch.export. Raises BrokenBundleError."""
    _check_archive(path)
    written = {SLOTS: ""}
    try:
        # Guards record sizes of the tracing, e.g. B % (B * L) != 0, and fail for L = 0 and 1, which are valid. #
        # `Slots.arrays` checks the sizes.
        network = torch.export.load(path, extra_files=written).module(check_guards=False)
        slots = Slots.from_json(written[SLOTS])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as failure:
        raise _broken(path, _first_line(failure)) from failure
    # `forward`: by its hooks the module would check sizes at each call, in 1.4 ms.
    return lambda tensors: (network.forward(*tensors),), slots


def _check_archive(path: Path) -> None:
    """Compare each part of a file with its checksum, as torch only checks some. Raises BrokenBundleError."""
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except FileNotFoundError as failure:
        raise BrokenBundleError(f"{path} is missing; export the model again, or use another version") from failure
    except zipfile.BadZipFile as failure:
        raise _broken(path, str(failure)) from failure
    if part is not None:
        raise _broken(path, f"its part {part} has changed")


def _broken(path: Path, reason: str) -> BrokenBundleError:
    return BrokenBundleError(f"{path} is not a network as it was exported ({reason}); export the model again")


def _first_line(failure: Exception) -> str:
    return next(iter(str(failure).splitlines()), type(failure).__name__)
