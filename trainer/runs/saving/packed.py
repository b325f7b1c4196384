"""Tensors as the bytes of a safetensors file, laid out in memory that is used again: one copy, ready to be written."""

import json
from collections.abc import Mapping

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
    once, to its place, at the speed of memory. The format: the header's length, the header in JSON, the numbers.
    """

    def __init__(self) -> None:
        self.data = bytearray()
        """The file's bytes, until the next `pack`."""

    def pack(self, tensors: Mapping[str, Tensor]) -> "PackedTensors":
        """Copy the tensors, on whichever device; afterwards they may change. Raises MemoryError."""
        header: dict[str, dict[str, object]] = {}
        offset = 0
        ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
        for name, tensor in ordered:
            end = offset + tensor.nbytes
            header[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        start = 8 + len(text)
        if len(self.data) != start + offset:
            self.data = bytearray()  # gone before the new one is made
            self.data = bytearray(start + offset)
        self.data[:start] = len(text).to_bytes(8, "little") + text
        for _, tensor in ordered:
            if tensor.numel():
                target = torch.frombuffer(self.data, dtype=tensor.dtype, count=tensor.numel(), offset=start)
                target.view(tensor.shape).copy_(tensor.detach())
            start += tensor.nbytes
        return self


def packed_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return about how many bytes the tensors take when they are packed."""
    return sum(tensor.nbytes for tensor in tensors.values())
