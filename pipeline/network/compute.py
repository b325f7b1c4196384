"""What computes a network: torch on a GPU, and on a processor OpenVINO where it is installed, else torch.

Both take the same layers and multiply in the same precision, so their features differ by rounding alone.

In int8 convolutions, linear layers and pools take inputs and weights of 8 bits. Those that take pixels and depthwise
convolutions stay in floating point: they lose most and gain least. With them efficientnet-lite2 kept a cosine of .974
with float32, without it keeps .997. The range of each layer's inputs is measured on images once, and is in the store.
Weights are rounded where they are loaded, those of each output channel by the largest of them. torch rounds both and
multiplies in float32; OpenVINO finds the rounding in what it compiles, and multiplies integers.

Letters of shapes: N images, B images of a batch, C colours, H and W pixels, O output channels, D feature width.
"""

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.utils import parametrize
from torchvision.transforms import functional

from featurestore.keys import Float32Array
from featurestore.spec import Int8Spec
from pipeline.errors import BackboneError
from pipeline.images.decode import Preset

BATCH = 16  # images of a pass; for OpenVINO fewer are filled up, so a feature depends on its image alone
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
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # it tells its maker of each import
    import openvino

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


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


INPUT_STEPS = 255  # 256 numbers, zero among them
WEIGHT_STEPS = 127  # on each side of zero
SMALLEST = 1e-12  # of what is divided by
NUM_COLOURS = 3

Ranges = tuple[tuple[str, float, float], ...]  # layer, smallest and largest input


class _RoundedWeight(nn.Module):
    """Rounds the weights of a layer, each output channel by its largest."""

    scale_O: torch.Tensor
    zero_O: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        largest_O = weight.detach().abs().flatten(1).amax(1)
        self.register_buffer("scale_O", largest_O.clamp(min=SMALLEST) / WEIGHT_STEPS)
        self.register_buffer("zero_O", torch.zeros(len(weight), dtype=torch.int32))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Round the weights, which keep their shape."""
        return torch.fake_quantize_per_channel_affine(weight, self.scale_O, self.zero_O, 0, -WEIGHT_STEPS, WEIGHT_STEPS)


def calibrated(layers: nn.Module, pixels_NCHW: torch.Tensor) -> Int8Spec:
    """Measure ranges on two thirds of the images, at least 2 (normalised), and what int8 costs on the others.

    The layers are used up.
    """
    held_out_BCHW = pixels_NCHW[-max(1, len(pixels_NCHW) // 3) :]
    measured_BCHW = pixels_NCHW[: -len(held_out_BCHW)]
    ranges = _measured(layers, measured_BCHW)
    single_BD = _features(layers, held_out_BCHW)
    int8_BD = _features(rounded(layers, ranges), held_out_BCHW)
    cosine = float(torch.cosine_similarity(int8_BD, single_BD).mean())
    return Int8Spec(ranges=ranges, num_images=len(measured_BCHW), num_held_out=len(held_out_BCHW), mean_cosine=cosine)


def _measured(layers: nn.Module, pixels_NCHW: torch.Tensor) -> Ranges:
    """Find the smallest and the largest input of each layer: means of the images, with zero between them."""
    found = {name: list[torch.Tensor]() for name in _layers(layers)}

    def hook(into: list[torch.Tensor]) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, inputs: into.append(torch.stack(torch.aminmax(inputs[0].flatten(1), dim=1)))

    hooks = [layer.register_forward_pre_hook(hook(found[name])) for name, layer in _layers(layers).items()]
    _features(layers, pixels_NCHW)
    for each in hooks:
        each.remove()
    means = {name: torch.cat(parts_2B, 1).mean(1).tolist() for name, parts_2B in found.items() if parts_2B}
    return tuple((name, min(low, 0.0), max(high, 0.0)) for name, (low, high) in means.items())


def rounded(layers: nn.Module, ranges: Ranges) -> nn.Module:
    """Let the layers round from now on, and return them. Raises BackboneError for ranges of another network."""
    there = _layers(layers)
    for name, low, high in ranges:
        if name not in there:
            raise BackboneError(f"int8: the store has a range for {name}, which this version of the network lacks")
        there[name].register_forward_pre_hook(_rounding(low, high))
        if not isinstance(there[name], nn.MaxPool2d):
            weight = there[name].get_parameter("weight")
            parametrize.register_parametrization(there[name], "weight", _RoundedWeight(weight))
    return layers


def _rounding(low: float, high: float) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    scale = max((high - low) / INPUT_STEPS, SMALLEST)
    zero = round(-low / scale)

    def rounding(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (torch.fake_quantize_per_tensor_affine(inputs[0], scale, zero, 0, INPUT_STEPS), *inputs[1:])

    return rounding


def _layers(layers: nn.Module) -> dict[str, nn.Module]:
    """Find what rounds, by its name; pools do it for speed, as what goes into them is written in 8 bits then."""
    return {name: each for name, each in layers.named_modules() if _rounds(each)}


def _rounds(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return NUM_COLOURS < layer.in_channels != layer.groups
    return isinstance(layer, nn.Linear | nn.MaxPool2d)


@torch.no_grad()
def _features(layers: nn.Module, pixels_BCHW: torch.Tensor) -> torch.Tensor:
    return torch.cat([layers(chunk_BCHW) for chunk_BCHW in torch.split(pixels_BCHW, BATCH)])
