"""Features as tensors: on a device, held there, and through PReLU block by block.

Letters of shapes as in featurestore/lookup/embedding.py. Where a device holds all features, nothing is looked up, and a
step carries only the places of its keys there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from featurestore.keys import AnyArray, BoolArray, Int64Array
from featurestore.lookup.partition import FeaturePartition


class PReLU(nn.PReLU):
    """torch's PReLU of one weight, of numbers in any dtype, computed in that of the weight and rounded once.

    On a CPU it is a leaky ReLU, whose kernels take numbers in bfloat16 as they are: a copy in float32 of E's hidden
    numbers costs as much as a product.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return functional.prelu(input, self.weight)
        output: Tensor = applied(_PReLU, input, self.weight)
        return output


class _PReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight)
        if input.device.type == "cpu":
            return functional.leaky_relu(input, _slope(weight))
        return functional.prelu(input.to(weight.dtype), weight).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        input, weight = ctx.saved_tensors
        if input.device.type == "cpu":
            passed = torch.ops.aten.leaky_relu_backward(gradient, input, _slope(weight), False)
            num_rows = BLOCK_ROWS  # they stay in the processor's cache
        else:
            passed = torch.where(input > 0, gradient, (gradient * weight).to(gradient.dtype))
            num_rows = max(1, len(input))
        of_weight = weight.new_zeros(())
        for input_block, gradient_block in zip(
            *(torch.split(each, num_rows) for each in (input, gradient)), strict=True
        ):
            of_weight += input_block.clamp_max(0).to(weight.dtype).mul_(gradient_block).sum()
        return passed, of_weight.reshape(weight.shape)


def _slope(weight: Tensor) -> float:
    """Read the weight of a PReLU that is on a CPU."""
    return float(weight.detach().numpy().item())


class Copies:
    """Copies of rows to a GPU, in a stream of their own, during its other work."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def begin(self, rows_QD: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
        """Begin a copy; return it and the event of its arrival. On a CPU it is the rows themselves."""
        if device.type == "cpu":
            return rows_QD, None
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            return rows_QD.to(device, non_blocking=True), self._stream.record_event()


@dataclass
class Gathered:
    """Features of Q keys, and which keys had none.

    On a CPU they are `EmbeddingModel.numbers`; on a GPU they are as in the store, which is the least to carry.
    """

    features_QD: Tensor
    missing_Q: BoolArray | None
    """Bool (Q,), or None when no key was missing."""
    buffer: Tensor | None = field(default=None, repr=False)
    """The memory that the service takes back."""
    copied: torch.cuda.Event | None = field(default=None, repr=False)
    """Event that the GPU waits for before it reads them; None: nothing."""

    def arrived(self) -> Tensor:
        """Return the features (Q, D), which the work that a GPU is given from now on finds there."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.features_QD.device)
            stream.wait_event(self.copied)
            self.features_QD.record_stream(stream)
        return self.features_QD


def applied(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """Return `function.apply(*inputs)`, which torch 2.13 does not type and torch 2.15 does."""
    apply: Callable[..., Any] = function.apply
    return apply(*inputs)


def on_device(values: AnyArray, device: torch.device) -> Tensor:
    """Copy an array to a device without waiting for it: to a GPU from pinned memory, kept by torch until it is read.
    On a CPU it is the same memory."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def as_tensor(features: AnyArray) -> Tensor:
    """Return the same memory as a tensor; 16 unsigned bits are a bfloat16."""
    tensor = torch.from_numpy(features)
    return tensor.view(torch.bfloat16) if features.dtype == np.uint16 else tensor


def as_array(features: Tensor) -> AnyArray:
    """Return the same memory as an array: undoes `as_tensor`."""
    return features.view(torch.uint16).numpy() if features.dtype == torch.bfloat16 else features.numpy()


_HELD_BLOCK_ROWS = 65_536
BLOCK_ROWS = 1024  # they stay in the processor's cache while numbers are made of them


class HeldRows:
    """All rows of a partition in a device's memory, as stored; they do not follow it, as it never changes while open.

    A step then carries there only the places of its keys, 8 bytes each."""

    def __init__(self, partition: FeaturePartition, device: torch.device) -> None:
        """Raises torch's error where memory is short (`held_bytes`)."""
        dtype = as_tensor(np.empty(0, partition.info.storage_dtype)).dtype
        self._partition = partition
        self._zeros = partition.num_rows
        shape = partition.num_rows + 1, partition.dim  # the last row: no image
        self._rows = torch.zeros(shape, dtype=dtype, device=device)
        start = 0
        for block in partition.rows(_HELD_BLOCK_ROWS):
            end = start + len(block)
            self._rows[start:end].copy_(as_tensor(block.copy()))
            start = end

    def take(self, place_Q: Int64Array) -> Tensor:
        """Return the rows (Q, D) at these places; -1: a row of zeros."""
        place_Q = np.where(place_Q < 0, self._zeros, place_Q)
        return self._rows.index_select(0, on_device(place_Q, self._rows.device))

    def gather(self, keys_Q: Int64Array) -> Gathered:
        """Find the features of `keys_Q` in the order asked, as `EmbeddingService.gather` does."""
        place_Q = self._partition.find(keys_Q)
        missing_Q = place_Q < 0
        return Gathered(self.take(place_Q), missing_Q if missing_Q.any() else None)


def held_bytes(partition: FeaturePartition) -> int:
    """Return the bytes that `HeldRows` take."""
    return (partition.num_rows + 1) * partition.info.row_bytes
