"""The server role of the paper's Advanced Model Server: from image keys to visual vectors, once per unique key.

Knows nothing of ranks or transport. Letters of shapes: Q unique keys, D feature width, H width of the first hidden
layer, V visual width. Of the package, this module and ondevice.py alone need torch.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from featurestore.format.codec import Scaling, input_scale
from featurestore.keys import BoolArray, Float32Array, Int64Array
from featurestore.lookup import ComputeDType
from featurestore.lookup.ondevice import BLOCK_ROWS, Copies, Gathered, HeldRows, PReLU, as_array, as_tensor, on_device
from featurestore.lookup.partition import FeaturePartition


class EmbeddingModel(nn.Module):
    """E: fully connected, PReLU between layers, from features (Q, D) to visual vectors (Q, V).

    Weights and everything between two products are of the module's dtype (float32); the products themselves run in
    `compute_dtype`. The features get no gradient.

    Initial values are torch's: of standardised features they make visual vectors of about 0.1. He's values, ten times
    as large, would let the sum over dozens of behaviours drown the other inputs.

    Standardisation is part of the first layer: with the mean and deviation of each dimension set, its effective weight
    is W / std and its effective bias b - (W / std) mean. Of components, one number takes the place of every std. The
    large product is the same as without; only the (H, D) weight is scaled once per step. Adam moves W, which is as well
    conditioned for one backbone as for another.
    """

    mean_D: Tensor
    inverse_std_D: Tensor

    def __init__(
        self, dim: int, hidden: Sequence[int] = (256, 64), out: int = 12, compute_dtype: ComputeDType = "bfloat16"
    ) -> None:
        super().__init__()
        widths = [dim, *hidden, out]
        self.dim, self.out = dim, out
        self.compute_dtype: torch.dtype = getattr(torch, compute_dtype)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.activations = nn.ModuleList(PReLU() for _ in hidden)
        self.register_buffer("mean_D", torch.zeros(dim))
        self.register_buffer("inverse_std_D", torch.ones(dim))

    @torch.no_grad()
    def fold_standardization_(self, mean_D: Float32Array, std_D: Float32Array, scaling: Scaling = "each") -> None:
        """Standardise features by `mean_D` and `std_D` inside the first layer, as `statistics.input_scale` says."""
        self.mean_D.copy_(torch.as_tensor(np.asarray(mean_D, dtype=np.float64)))
        self.inverse_std_D.copy_(torch.from_numpy(input_scale(std_D, scaling)))

    def forward(self, features_QD: Tensor) -> Tensor:
        """Return visual vectors (Q, V) of features in any float dtype; Q may be zero."""
        return self.of_numbers(self.numbers(features_QD))

    @torch.no_grad()
    def numbers(self, features_QD: Tensor, out: Tensor | None = None) -> Tensor:
        """Return features as the first product takes them, in the compute dtype.

        Written into `out` where that is given, and else the features themselves where nothing is to be done."""
        return features_QD.to(self.compute_dtype) if out is None else out.copy_(features_QD)

    def of_numbers(self, numbers_QD: Tensor) -> Tensor:
        """Return visual vectors (Q, V) of the numbers that `numbers` made."""
        first = self.layers[0]
        assert isinstance(first, nn.Linear)
        weight_HD = first.weight * self.inverse_std_D
        bias_H = first.bias + first.weight @ (self.inverse_std_D * -self.mean_D)
        hidden_QH = self._product(numbers_QD, weight_HD, bias_H)
        for activation, layer in zip(self.activations, self.layers[1:], strict=True):
            assert isinstance(layer, nn.Linear)
            hidden_QH = self._product(activation(hidden_QH), layer.weight, layer.bias)
        return hidden_QH.to(first.weight.dtype)

    def _product(self, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        dtype = self.compute_dtype
        return functional.linear(rows.to(dtype), weight.to(dtype), bias.to(dtype))


class EmbeddingService(nn.Module):
    """One rank's partition of a store and the E that reads it.

    The partition decides on keys without a feature: it has the zero vector ("zeros"), a trained vector ("learned"), or
    `gather` raises MissingKeysError ("error").
    """

    holds_rows = False
    """Whether `gather` takes the features out of the device's own memory."""

    def __init__(self, partition: FeaturePartition, model: EmbeddingModel) -> None:
        super().__init__()
        self.partition, self.model = partition, model
        is_learned = partition.missing_policy == "learned"
        self.no_image = nn.Parameter(torch.zeros(model.out)) if is_learned else None
        self._stored_dtype = as_tensor(np.empty(0, partition.info.storage_dtype)).dtype
        self._free_buffers: list[Tensor] = []
        self._copies = Copies()

    @property
    def device(self) -> torch.device:
        """Return the device of the network."""
        return self.model.mean_D.device

    def hold_rows(self) -> None:
        """Copy all features of the partition to the network's device, and let `gather` find them there from now on."""
        self.gather = HeldRows(self.partition, self.device).gather  # type: ignore[method-assign]
        self.holds_rows = True

    def fold_standardization_(self, mean_D: Float32Array, std_D: Float32Array) -> None:
        """Standardise the components of a compact store by one number in common, other features each by its own."""
        self.model.fold_standardization_(mean_D, std_D, "each" if self.partition.info.reduction is None else "common")

    def gather(self, keys_Q: Int64Array) -> Gathered:
        """Look up the features of `keys_Q` in the order asked.

        Independent of all weights, so it may run ahead of them; but not of the standardisation. A GPU gets them
        meanwhile, by a copy during its other work. Policy error: MissingKeysError.
        """
        buffer = self._take_buffer(len(keys_Q))
        features_QD = buffer[: len(keys_Q)]
        if features_QD.dtype == self._stored_dtype:
            missing_Q = self.partition.lookup(keys_Q, out=as_array(features_QD)).missing_U
        else:
            missing_Q = self._gather_numbers(keys_Q, features_QD)
        features_QD, copied = self._copies.begin(features_QD, self.device)
        return Gathered(features_QD, missing_Q if missing_Q.any() else None, buffer, copied)

    def _gather_numbers(self, keys_Q: Int64Array, out_QD: Tensor) -> BoolArray:
        """Make numbers of the features once, ahead of the step, not in every pass; return which keys have none."""
        missing_Q, start = np.zeros(len(keys_Q), np.bool_), 0
        for block in self.partition.lookup_blocks(keys_Q, BLOCK_ROWS):
            end = start + len(block.missing_U)
            self.model.numbers(as_tensor(block.features_UD), out=out_QD[start:end])
            missing_Q[start:end] = block.missing_U
            start = end
        return missing_Q

    def embed(self, gathered: Gathered) -> Tensor:
        """Return visual vectors (Q, V), with autograd attached."""
        visual_QV: Tensor = self.model(gathered.arrived())
        if gathered.missing_Q is None or self.partition.missing_policy == "error":
            return visual_QV
        missing_Q1 = on_device(gathered.missing_Q, self.device).unsqueeze(1)
        instead = visual_QV.new_zeros(()) if self.no_image is None else self.no_image
        return torch.where(missing_Q1, instead, visual_QV)

    def release(self, gathered: Gathered) -> None:
        """Let the memory of `gathered` serve a later one, after backward; its features must not be used any more.

        Pages that are already mapped make a gather a third faster. Not calling this is safe.
        """
        if gathered.buffer is not None:
            self._free_buffers.append(gathered.buffer)
            gathered.buffer = None

    def _take_buffer(self, num_rows: int) -> Tensor:
        """Return memory for that many rows or more: of the stored dtype for a GPU, else of the compute dtype."""
        while self._free_buffers:
            buffer = self._free_buffers.pop()
            if len(buffer) >= num_rows:
                return buffer
        on_gpu = self.device.type == "cuda"
        dtype = self._stored_dtype if on_gpu else self.model.compute_dtype
        return torch.empty(num_rows + num_rows // 8, self.partition.dim, dtype=dtype, pin_memory=on_gpu)
