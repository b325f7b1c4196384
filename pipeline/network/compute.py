"""What computes a network: torch on a GPU, and on a processor OpenVINO where it is installed, else torch.

Both take the same layers and multiply in the same precision, so their features differ by rounding alone.

Letters of shapes: B images of a batch, C colours, H and W pixels, D feature width.
"""

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torchvision.transforms import functional

from featurestore.keys import Float32Array
from pipeline.images.decode import Preset

BATCH = 16  # images that OpenVINO computes together; fewer are filled up, so a feature depends on its image alone
UNITS = {
    "float32": (),
    "bfloat16": ("amx_bf16", "avx512_bf16"),
    "int8": ("amx_int8", "avx512_vnni", "avx_vnni"),  # without, OpenVINO adds two products in 16 bits: too few
}
"""What a processor needs, any of it, for OpenVINO to be quick and right in a precision."""

Compute = Callable[[torch.Tensor], Float32Array]
"""Computes features (B, D) of normalised pixels (B, C, H, W); one call at a time."""


def normalised(pixels_BHWC: npt.NDArray[np.uint8], preset: Preset) -> torch.Tensor:
    """Scale pixels to what a network takes, (B, C, H, W) float32, by torchvision; on the GPU where there is one."""
    pixels_BCHW = torch.from_numpy(pixels_BHWC).to(_device()).permute(0, 3, 1, 2)
    scaled = functional.convert_image_dtype(pixels_BCHW, torch.float32)
    normal: torch.Tensor = functional.normalize(scaled, list(preset.mean), list(preset.std))
    return normal


def compute_of(layers: nn.Module, height_width: tuple[int, int], precision: str) -> Compute:
    """Make what computes the layers here, which are used up."""
    return by_openvino(layers, height_width, precision) if can_compile(precision) else by_torch(layers, precision)


def can_compile(precision: str) -> bool:
    """Return whether OpenVINO is installed, there is no GPU, and the processor has the units for this precision."""
    if importlib.util.find_spec("openvino") is None or torch.cuda.is_available():
        return False
    units, found = UNITS[precision], torch.cpu.get_capabilities()
    return not units or any(found.get(unit) for unit in units)


def by_torch(layers: nn.Module, precision: str) -> Compute:
    """Let torch compute, on the GPU where there is one; layers in int8 round, and multiply in float32."""
    dtype, device = torch.bfloat16 if precision == "bfloat16" else torch.float32, _device()
    layers.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def compute(pixels_BCHW: torch.Tensor) -> Float32Array:
        pixels_BCHW = pixels_BCHW.to(device, dtype, memory_format=torch.channels_last)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features_BD: Float32Array = layers(pixels_BCHW).float().cpu().numpy()
        return features_BD

    return compute


def by_openvino(layers: nn.Module, height_width: tuple[int, int], precision: str) -> Compute:
    """Let OpenVINO compile the layers for this processor, and for as many threads as torch has here now."""
    openvino = _openvino()
    filled_BCHW = np.zeros((BATCH, 3, *height_width), np.float32)
    with torch.no_grad():
        model = openvino.convert_model(layers, example_input=torch.zeros(2, 3, *height_width))
    model.reshape(list(filled_BCHW.shape))
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # each process would pin its threads to the same cores
    }
    request = openvino.compile_model(model, "CPU", settings).create_infer_request()

    def compute(pixels_BCHW: torch.Tensor) -> Float32Array:
        parts_BD = list[Float32Array]()
        for chunk_BCHW in torch.split(pixels_BCHW, BATCH):
            filled_BCHW[: len(chunk_BCHW)] = chunk_BCHW.numpy()
            parts_BD.append(request.infer([filled_BCHW])[0][: len(chunk_BCHW)])
        return np.concatenate(parts_BD)

    return compute


def _openvino() -> Any:
    """Import OpenVINO, but not the package by which it tells its maker of each import."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
