"""The frozen network with its values, ready to turn pixels into features.

Letters of shapes: B images of a batch, H and W pixels, C colours, D feature width.
"""

import functools
import threading

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms import functional

from featurestore.lookup.compute_dtype import AutoDType
from featurestore.spec import ExtractorSpec
from pipeline.network.layers import network_of
from pipeline.network.weights import load_weights, weights_digest

_build_lock = threading.Lock()


class Backbone:
    """The network MODEL:LAYER with its weights, in evaluation, on the GPU when there is one.

    `spec` says which network it is, `preset` what it wants done to images. Raises BackboneError, WeightsError; `warn`
    as in `load_weights`. That it gives one vector per image is not asked here: `feature_dim` does, for all workers.
    """

    def __init__(self, name: str, weights: str, compute_dtype: AutoDType, *, warn: bool = True) -> None:
        network = network_of(name, weights)
        state = load_weights(network, weights, warn=warn)
        self.preset = network.preset
        self.spec = ExtractorSpec(
            backbone=f"torchvision {network.model}",
            layer=network.layer,
            weights_digest=weights_digest(state),
            preprocessing=self.preset.record(),
            compute_dtype=compute_dtype,
        )
        self.dtype = getattr(torch, compute_dtype)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = network.filled(state)
        self.network.to(self.device, self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.lock = threading.Lock()  # one batch at a time: each uses all of the process's torch threads

    def normalise(self, pixels_BHWC: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Scale pixels to what the network takes, (B, C, H, W) channels-last in the compute dtype, by torchvision."""
        pixels_BCHW = torch.from_numpy(pixels_BHWC).to(self.device).permute(0, 3, 1, 2)
        scaled = functional.convert_image_dtype(pixels_BCHW, torch.float32)
        normal: torch.Tensor = functional.normalize(scaled, list(self.preset.mean), list(self.preset.std))
        return normal.to(self.dtype, memory_format=torch.channels_last)

    @torch.inference_mode()
    def features(self, pixels_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Compute features (B, D) of images that `pipeline.images.decode.prepare` made for this network's preset."""
        with self.lock, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features_BD: npt.NDArray[np.float32] = self.network(self.normalise(pixels_BHWC)).float().cpu().numpy()
        return features_BD


def backbone(name: str, weights: str, compute_dtype: AutoDType) -> Backbone:
    """Build the network once per process, and keep it until another one is asked for. Raises as `Backbone`.

    For the workers: random weights give no warning here, `pipeline.features.extract` gives it once for all of them.
    """
    with _build_lock:
        return _cached_backbone(name, weights, compute_dtype)


@functools.lru_cache(maxsize=1)
def _cached_backbone(name: str, weights: str, compute_dtype: AutoDType) -> Backbone:
    return Backbone(name, weights, compute_dtype, warn=False)
