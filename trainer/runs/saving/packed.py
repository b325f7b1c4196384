"""Tensors as a safetensors file: laid out in memory that is used again, or written one after the other."""

import json
from collections.abc import Mapping
from typing import BinaryIO

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8


class PackedTensors:
    """The bytes of one safetensors file. Packing as many bytes again takes the same memory.

    Library calls that write such files copy all tensors first, and again into the file's bytes; this copies each tensor
    once, to its place, at the speed of memory.
    """

    def __init__(self) -> None:
        self.data = bytearray()
        """The file's bytes, until the next `pack`."""

    def pack(self, tensors: Mapping[str, Tensor]) -> "PackedTensors":
        """Copy the tensors, on whichever device; afterwards they may change. Raises MemoryError."""
        beginning, ordered = _laid_out(tensors)
        start = len(beginning)
        if len(self.data) != (size := start + packed_bytes(tensors)):
            self.data = bytearray()  # gone before the new one is made
            self.data = bytearray(size)
        self.data[:start] = beginning
        for tensor in ordered:
            if tensor.numel():
                target = torch.frombuffer(self.data, dtype=tensor.dtype, count=tensor.numel(), offset=start)
                target.view(tensor.shape).copy_(tensor.detach())
            start += tensor.nbytes
        return self


def packed_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return about how many bytes the tensors take when they are packed."""
    return sum(tensor.nbytes for tensor in tensors.values())


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """Write the bytes that `PackedTensors` would hold. No more than one tensor is copied at a time. Raises OSError."""
    beginning, ordered = _laid_out(tensors)
    file.write(beginning)
    for tensor in ordered:
        if tensor.numel():
            copied = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
            file.write(copied.view(-1).view(torch.uint8).numpy().data)


def _laid_out(tensors: Mapping[str, Tensor]) -> tuple[bytes, list[Tensor]]:
    """Return what comes before the numbers, the header's length and the header in JSON, and the tensors in order."""
    header: dict[str, dict[str, object]] = {}
    offset = 0
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in ordered:
        end = offset + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, [tensor for _, tensor in ordered]
