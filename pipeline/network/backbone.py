"""Frozen backbones: which there are, their weights, and what identifies them.

Letters of shapes: B images of a batch, H and W pixels, C colours, D feature width.
"""

import functools
import re
import threading
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import nn

from featurestore.keys import Float32Array
from featurestore.spec import ExtractorSpec
from pipeline.errors import WeightsError
from pipeline.network import Precision, check_weights_name
from pipeline.network.compute import Compute, compute_of, normalised
from pipeline.network.int8 import rounded
from pipeline.network.layers import Network, feature_dim, network_of

_build_lock = threading.Lock()


class Backbone:
    """The network MODEL:LAYER with its weights, in evaluation.

    `spec` says which network it is, `preset` what it wants done to images. Raises BackboneError, WeightsError. That it
    gives one vector per image is not asked here: `feature_dim` does, for all workers.
    """

    def __init__(self, name: str, weights: str, precision: Precision) -> None:
        network = network_of(name, weights)
        state = load_weights(network, weights)
        self.preset = network.preset
        self.spec = ExtractorSpec(
            backbone=f"torchvision {network.model}",
            layer=network.layer,
            weights_digest=weights_digest(state),
            preprocessing=self.preset.record(),
            compute_dtype=precision if isinstance(precision, str) else "int8",
            int8=None if isinstance(precision, str) else precision,
        )
        self._layers: nn.Module = network.filled(state)
        self._lock = threading.Lock()  # one batch at a time: each uses all of the process's torch threads

    def features(self, pixels_BHWC: npt.NDArray[np.uint8]) -> Float32Array:
        """Compute features (B, D) of images that `pipeline.images.decode.prepare` made for this network's preset."""
        with self._lock:
            return self._compute(normalised(pixels_BHWC, self.preset))

    @functools.cached_property
    def _compute(self) -> Compute:
        """Make what computes, when it is first needed: this takes seconds, and a spec does without."""
        layers = self.__dict__.pop("_layers")
        if self.spec.int8 is not None:
            layers = rounded(layers, self.spec.int8.ranges)
        return compute_of(layers, self.preset.crop_height_width, self.spec.compute_dtype)


def backbone(name: str, weights: str, precision: Precision) -> Backbone:
    """Build the network once per process, and keep it until another one is asked for. Raises as `Backbone`."""
    with _build_lock:
        return _cached_backbone(name, weights, precision)


@functools.lru_cache(maxsize=1)
def _cached_backbone(name: str, weights: str, precision: Precision) -> Backbone:
    return Backbone(name, weights, precision)


NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
DENSENET_NAME = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")  # a dot that torchvision has since dropped


class UntrainedWeightsWarning(UserWarning):
    """The weights are random: features distinguish images, but know nothing of what is in them."""


def check_network(backbone: str, weights: str) -> None:
    """Check that the network exists, and that a file of weights has its names and shapes; reads no values.

    For a job, before it starts a cluster. Raises BackboneError, WeightsError.
    """
    checked = check_weights_name(weights)
    feature_dim(backbone, checked)
    if not checked.startswith(("imagenet", "random:")):
        _check_fit(_from_file(Path(checked), values=False), network_of(backbone, checked), weights)


def warn_if_untrained(weights: str) -> None:
    """Give an UntrainedWeightsWarning for random:SEED."""
    if weights.startswith("random:"):
        message = "are NOT pretrained: features distinguish images, but know nothing of what is in them"
        warnings.warn(f"weights {weights} {message}", UntrainedWeightsWarning, stacklevel=3)


def load_weights(network: Network, weights: str) -> dict[str, torch.Tensor]:
    """Load the tensors of the network's layers, by torchvision's names; floating point ones in float32.

    `imagenet` is the model's default in torchvision's enum and `imagenet:ENTRY` another one (downloaded once, cached,
    the hash checked), `random:SEED` a seeded He initialisation, everything else a file with a state dict. Raises
    WeightsError.
    """
    if weights.startswith("imagenet"):
        return _fitting(_downloaded(network), network, weights)
    if weights.startswith("random:"):
        return _random(network, int(weights.removeprefix("random:")))
    return _fitting(_from_file(Path(weights)), network, weights)


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Digest names, shapes and values by xxh3-128, in the order of the names."""
    digest = xxhash.xxh3_128()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)  # a view, no copy
    return f"xxh3-128:{digest.hexdigest()}"


def _downloaded(network: Network) -> object:
    entry = network.weights_entry
    try:
        return entry.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
        raise WeightsError(
            f"cannot download the ImageNet weights ({error}). Fetch {entry.url} on a machine with a network and pass"
            " --weights FILE, or try the pipeline without pretrained weights: --weights random:0"
        ) from error


def _from_file(path: Path, *, values: bool = True) -> object:
    try:
        if values:
            return torch.load(path, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # zip, pickle and torch each have their own errors for a file that is none of theirs
        # torch's own texts are essays, and say how to load a file unsafely
        reason = str(error) if isinstance(error, OSError) else type(error).__name__
        raise WeightsError(
            f"weights {path}: not a state dict that torch can load safely ({reason}); one is written by"
            " torch.save(model.state_dict(), FILE)"
        ) from error


def _check_fit(loaded: object, network: Network, where: str) -> dict[str, torch.Tensor]:
    """Pick the tensors of the network's layers. Raises WeightsError unless all are there in their shapes."""
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise WeightsError(f"weights {where}: not a state dict, which maps names to tensors")
    found: dict[str, Any] = {DENSENET_NAME.sub(r"\1\2", name): tensor for name, tensor in loaded.items()}
    expected = network.tensors()
    missing = [name for name in expected if name not in found]
    if missing:
        model = network.model
        raise WeightsError(f"weights {where}: not those of torchvision's {model}, without {', '.join(missing[:3])}")
    for name, like in expected.items():
        if found[name].shape != like.shape:
            shape = tuple(found[name].shape)
            raise WeightsError(f"weights {where}: {name} has shape {shape}, not {tuple(like.shape)}")
    return {name: found[name] for name in expected}


def _fitting(loaded: object, network: Network, where: str) -> dict[str, torch.Tensor]:
    """Pick the tensors up to the layer from a state dict of this part or of the whole model. Raises WeightsError."""
    state = {}
    for name, found in _check_fit(loaded, network, where).items():
        tensor = found.detach()
        if tensor.is_floating_point():
            tensor = tensor.float()
            if not tensor.isfinite().all():
                raise WeightsError(f"weights {where}: {name} holds NaN or infinity")
        state[name] = tensor
    return state


def _random(network: Network, seed: int) -> dict[str, torch.Tensor]:
    """Draw He's initialisation (2015) for ReLU: normal, variance 2 / fan-in, biases zero; by the seed alone.

    Norms start as the identity; what is neither (a class token, tables of positions) as torchvision starts it.
    """
    generator = torch.Generator().manual_seed(seed)
    own: dict[str, torch.Tensor] | None = None
    state = {}
    for name, like in network.tensors().items():
        path, _, kind = name.rpartition(".")
        owner = network.layers.extractor.get_submodule(path)
        if isinstance(owner, nn.Conv2d | nn.Linear):
            tensor = torch.zeros(like.shape)
            if kind == "weight":
                nn.init.kaiming_normal_(tensor, nonlinearity="relu", generator=generator)
        elif isinstance(owner, NORMS):
            tensor = torch.ones(like.shape) if kind in ("weight", "running_var") else torch.zeros(like.shape)
        else:
            own = network.initialised(seed) if own is None else own
            tensor = own[name]
        state[name] = tensor
    return state
