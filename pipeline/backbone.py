"""The frozen network: torchvision's VGG16 up to fc6 and its ReLU, 4,096 numbers per image.

Letters of shapes: B images of a batch, H and W pixels, C colours, D feature width (4,096).
"""

import functools
import re
import threading
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import nn
from torchvision.models import VGG16_Weights, vgg16
from torchvision.transforms import functional

from featurestore.spec import ExtractorSpec
from pipeline.decode import preprocessing_record, preset
from pipeline.errors import WeightsError

DEFAULT_BACKBONE = "vgg16:classifier.1"
FEATURE_DIM = 4096
BACKBONE_NAME = "torchvision vgg16"
LAYER_NAME = "classifier.1 (fc6 after ReLU)"
CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # bf16: Arm's name

ComputeDType = Literal["bfloat16", "float32"]
_build_lock = threading.Lock()


class UntrainedWeightsWarning(UserWarning):
    """The weights are random: features tell images apart, but know nothing of what is in them."""


class Vgg16Fc6(nn.Module):
    """The layers of torchvision's VGG16 that fc6 needs, under its names, so that its state dict fits. No memory yet."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            full = vgg16(weights=None, init_weights=False)
        self.features = full.features
        self.avgpool = full.avgpool
        self.classifier = full.classifier[:2]

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Normalised pixels to features (B, D)."""
        maps_BCHW = self.avgpool(self.features(pixels_BCHW))
        features_BD: torch.Tensor = self.classifier(torch.flatten(maps_BCHW, 1))
        return features_BD


class Backbone:
    """The network with its weights, in evaluation, on the GPU when there is one; `spec` says which network it is.

    `warn` as in `load_weights`.
    """

    def __init__(self, weights: str, compute_dtype: ComputeDType, *, warn: bool = True) -> None:
        state = load_weights(weights, warn=warn)
        self.spec = ExtractorSpec(
            backbone=BACKBONE_NAME,
            layer=LAYER_NAME,
            weights_digest=weights_digest(state),
            preprocessing=preprocessing_record(),
            compute_dtype=compute_dtype,
        )
        self.dim = FEATURE_DIM
        self.dtype = getattr(torch, compute_dtype)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = Vgg16Fc6()
        network.load_state_dict(state, assign=True)
        network.to(self.device, self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network = network.eval().requires_grad_(False)
        self.lock = threading.Lock()  # one batch at a time: each uses all of the process's torch threads

    def normalise(self, pixels_BHWC: npt.NDArray[np.uint8]) -> torch.Tensor:
        """What the network takes, (B, C, H, W) channels-last in the compute dtype: torchvision's own scaling."""
        pixels_BCHW = torch.from_numpy(pixels_BHWC).to(self.device).permute(0, 3, 1, 2)
        scaled = functional.convert_image_dtype(pixels_BCHW, torch.float32)
        normal: torch.Tensor = functional.normalize(scaled, preset().mean, preset().std)
        return normal.to(self.dtype, memory_format=torch.channels_last)

    @torch.inference_mode()
    def features(self, pixels_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Features (B, D) of prepared images (B, 224, 224, 3)."""
        with self.lock, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features_BD: npt.NDArray[np.float32] = self.network(self.normalise(pixels_BHWC)).float().cpu().numpy()
        return features_BD


def feature_dim(name: str) -> int:
    """Numbers per image of the network `name` (MODEL:LAYER). Raises WeightsError."""
    if name != DEFAULT_BACKBONE:
        raise WeightsError(f"backbone {name!r} is unknown; the only one is {DEFAULT_BACKBONE}")
    return FEATURE_DIM


def backbone(name: str, weights: str, compute_dtype: ComputeDType) -> Backbone:
    """The network, built once per process and kept until another one is asked for. Raises WeightsError.

    For the workers: random weights give no warning here, `pipeline.extract.extract` gives it once for all of them.
    """
    with _build_lock:
        feature_dim(name)
        return _cached_backbone(weights, compute_dtype)


@functools.lru_cache(maxsize=1)
def _cached_backbone(weights: str, compute_dtype: ComputeDType) -> Backbone:
    return Backbone(weights, compute_dtype, warn=False)


def fastest_dtype() -> ComputeDType:
    """bfloat16 where this machine's processor (or GPU) multiplies it in hardware, else float32."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capabilities: Mapping[str, Any] = torch.cpu.get_capabilities()
    return "bfloat16" if any(capabilities.get(name) for name in CPU_BFLOAT16) else "float32"


def check_weights_name(weights: str) -> str:
    """`weights`, a path made absolute so that worker processes find it. Raises WeightsError on a malformed name."""
    if weights == "imagenet" or re.fullmatch(r"random:\d{1,18}", weights):
        return weights
    if weights.startswith("random"):
        raise WeightsError(f"weights {weights!r}: the seed of random weights is a number, as in random:0")
    path = Path(weights).absolute()
    if not path.is_file():
        raise WeightsError(f"weights {weights!r}: neither imagenet, random:SEED, nor a file (looked for {path})")
    return str(path)


def check_weights_file(weights: str) -> None:
    """Names and shapes of a file of weights, without its values; nothing for imagenet and random:SEED.

    For a job, before it starts a cluster. Raises WeightsError.
    """
    checked = check_weights_name(weights)
    if checked != "imagenet" and not checked.startswith("random:"):
        _check_fit(_from_file(Path(checked), values=False), weights)


def warn_if_untrained(weights: str) -> None:
    """An UntrainedWeightsWarning for random:SEED."""
    if weights.startswith("random:"):
        message = "are NOT pretrained: features tell images apart, but know nothing of what is in them"
        warnings.warn(f"weights {weights} {message}", UntrainedWeightsWarning, stacklevel=3)


def load_weights(weights: str, *, warn: bool = True) -> dict[str, torch.Tensor]:
    """The float32 tensors of the layers up to fc6, by torchvision's names.

    `imagenet` is torchvision's enum (downloaded once, cached, its hash checked), `random:SEED` a seeded He
    initialisation with an UntrainedWeightsWarning unless `warn` is false, everything else a file with a state dict.
    Raises WeightsError; none of the three ever stands in for another.
    """
    if weights == "imagenet":
        return _fitting(_downloaded(), "imagenet")
    if weights.startswith("random:"):
        if warn:
            warn_if_untrained(weights)
        return _random(int(weights.removeprefix("random:")))
    return _fitting(_from_file(Path(weights)), weights)


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """xxh3-128 over names, shapes and float32 values, in the order of the names."""
    digest = xxhash.xxh3_128()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)  # a view, no copy
    return f"xxh3-128:{digest.hexdigest()}"


def _downloaded() -> object:
    try:
        return VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
        url = VGG16_Weights.IMAGENET1K_V1.url
        raise WeightsError(
            f"cannot download the ImageNet weights ({error}). Fetch {url} on a machine with a network and pass"
            " --weights FILE, or try the pipeline without pretrained weights: --weights random:0"
        ) from error


def _from_file(path: Path, *, values: bool = True) -> object:
    try:
        if values:
            return torch.load(path, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # zip, pickle and torch each have their own errors for a file that is none of theirs
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise WeightsError(f"weights {path}: not a state dict that torch can load safely ({reason})") from error


def _check_fit(loaded: object, where: str) -> Mapping[str, torch.Tensor]:
    """`loaded` when it has the tensors up to fc6. Raises WeightsError."""
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise WeightsError(f"weights {where}: not a state dict, which maps names to tensors")
    expected = Vgg16Fc6().state_dict()
    missing = [name for name in expected if name not in loaded]
    if missing:
        raise WeightsError(f"weights {where}: not those of torchvision's vgg16, without {', '.join(missing[:3])}")
    for name, like in expected.items():
        if loaded[name].shape != like.shape:
            shape = tuple(loaded[name].shape)
            raise WeightsError(f"weights {where}: {name} has shape {shape}, not {tuple(like.shape)}")
    return loaded


def _fitting(loaded: object, where: str) -> dict[str, torch.Tensor]:
    """The tensors up to fc6 from a state dict of this part or of the whole VGG16. Raises WeightsError."""
    fitting = _check_fit(loaded, where)
    state = {}
    for name in Vgg16Fc6().state_dict():
        tensor = fitting[name].detach().float()
        if not tensor.isfinite().all():
            raise WeightsError(f"weights {where}: {name} holds NaN or infinity")
        state[name] = tensor
    return state


def _random(seed: int) -> dict[str, torch.Tensor]:
    """He's initialisation (2015) for ReLU: normal, variance 2 / fan-in, biases zero; equal for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, like in Vgg16Fc6().state_dict().items():
        tensor = torch.zeros(like.shape)
        if tensor.ndim > 1:
            nn.init.kaiming_normal_(tensor, nonlinearity="relu", generator=generator)
        state[name] = tensor
    return state
