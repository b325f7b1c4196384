"""Frozen backbones: torchvision classifiers up to a named layer, their weights, what identifies and what computes them.

A network's name is MODEL:LAYER. A layer is named as `torchvision.models.feature_extraction` names it: the path of its
module, or of the operation (`flatten`, `layer4.1.add`); the path of a block means the last operation in it.

It is computed by torch on a GPU, and on a processor by OpenVINO where it is installed, else by torch. Both take the
same layers and multiply in the same precision, so their features differ by rounding alone.

In int8 convolutions, linear layers and pools take inputs and weights of 8 bits. Those that take pixels and depthwise
convolutions stay in floating point: they lose most and gain least. With them efficientnet-lite2 kept a cosine of .974
with float32, without it keeps .997. The range of each layer's inputs is measured on images once, and is in the store.
Weights are rounded where they are loaded, those of each output channel by the largest of them. torch rounds both and
multiplies in float32; OpenVINO finds the rounding in what it compiles, and multiplies integers.

Letters of shapes: N images, B images of a batch, C colours, H and W pixels, O output channels, D feature width.
"""

import difflib
import functools
import importlib.util
import math
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torchvision import models
from torchvision.models import feature_extraction
from torchvision.transforms import functional

from featurestore.keys import Float32Array, UInt8Array
from featurestore.spec import ExtractorSpec, Int8Spec
from pipeline.errors import BackboneError, WeightsError
from pipeline.images.decode import Preset
from pipeline.network import Precision, check_weights_name
from pipeline.problems import Problem

BATCH = 16  # images of a pass; for OpenVINO fewer are filled up, so a feature depends on its image alone
UNITS = {
    "float32": (),
    "bfloat16": ("amx_bf16", "avx512_bf16"),
    "int8": ("amx_int8", "avx512_vnni", "avx_vnni"),  # without, OpenVINO adds two products in 16 bits: too few
}
"""Units of which a processor needs one for OpenVINO to be quick and right in a precision."""

Compute = Callable[[torch.Tensor], Float32Array]
"""Computes features (B, D) of normalised pixels (B, C, H, W); one call at a time."""
INPUT_STEPS = 255  # 256 numbers, zero among them
WEIGHT_STEPS = 127  # on each side of zero
SMALLEST = 1e-12  # of what is divided by
NUM_COLOURS = 3
Ranges = tuple[tuple[str, float, float], ...]  # layer, smallest and largest input
NUM_NEAR = 5  # names in a message
NUM_VECTOR_LAYERS = 8
DRY_IMAGES = 2  # a number that no layer's own shape begins with by chance, as 1 does
SCALES_ITS_INPUT = ("googlenet", "inception_v3")  # their weights want it, and torchvision sets it only with weights
COUNTER = "num_batches_tracked"  # of batch norm in training: no part of what is computed here
_build_lock = threading.Lock()
NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
DENSENET_NAME = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")  # a dot that torchvision has since dropped


def normalised(pixels_BHWC: UInt8Array, preset: Preset) -> torch.Tensor:
    """Scale pixels to a network's input, (B, C, H, W) float32, by torchvision; on the GPU where there is one."""
    pixels_BCHW = torch.from_numpy(pixels_BHWC).to(_device()).permute(0, 3, 1, 2)
    scaled = functional.convert_image_dtype(pixels_BCHW, torch.float32)
    normal: torch.Tensor = functional.normalize(scaled, list(preset.mean), list(preset.std))
    return normal


def compute_of(layers: nn.Module, height_width: tuple[int, int], precision: str) -> Compute:
    """Make a function that computes the layers on this machine; it takes them over."""
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
            raise BackboneError(Problem.RANGE_OF_NO_LAYER, name)
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


class Layers(nn.Module):
    """The layers of a model up to the named one, its own names kept below `extractor`."""

    def __init__(self, extractor: nn.Module, layer: str) -> None:
        super().__init__()
        self.extractor = extractor
        self.layer = layer

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Compute features (B, D) of normalised pixels."""
        features_BD: torch.Tensor = torch.flatten(self.extractor(pixels_BCHW)[self.layer], 1)
        return features_BD


@dataclass(frozen=True)
class Network:
    """A model up to a layer, on the meta device: names and shapes, no memory."""

    name: str  # MODEL:LAYER, as it was given
    model: str
    layer: str
    weights_entry: Any  # the member of torchvision's enum that `preset` is from, and --weights imagenet
    layers: Layers

    @property
    def preset(self) -> Preset:
        """The preprocessing that the weights' own record asks for."""
        return _preset(self.weights_entry)

    @functools.cached_property
    def dim(self) -> int:
        """The numbers per image, by a pass without values. Raises BackboneError where they are not one vector."""
        pixels_BCHW = _pixels_without_values(self.preset)
        shape = _shape(self.layers.extractor(pixels_BCHW)[self.layer])
        if not _is_vector(shape):
            gives = tuple(shape[1:]) if shape else "no tensor"
            near = _vector_layers(_without_memory(self.model, self.preset), self.model, pixels_BCHW)
            raise BackboneError(Problem.NOT_ONE_VECTOR, self.name, self.layer, gives, near)
        return shape[1]

    def tensors(self) -> dict[str, torch.Tensor]:
        """List the tensors that weights have to fill, by torchvision's names, without values."""
        state = self.layers.extractor.state_dict()
        return {name: tensor for name, tensor in state.items() if not name.endswith(COUNTER)}

    def filled(self, state: Mapping[str, torch.Tensor]) -> Layers:
        """Fill the layers with the values of `state`, which are not copied; this network is used up."""
        counters = {name: torch.tensor(0) for name in self.layers.extractor.state_dict() if name.endswith(COUNTER)}
        self.layers.extractor.load_state_dict({**state, **counters}, assign=True)
        return self.layers.eval().requires_grad_(False)

    def initialised(self, seed: int) -> dict[str, torch.Tensor]:
        """Fill `tensors()` with torchvision's starting values; the whole model is in memory for a moment."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            state = _model(self.model, self.preset).state_dict()
        return {name: state[name] for name in self.tensors()}


def network_of(name: str, weights: str) -> Network:
    """Cut out the network MODEL:LAYER for `weights` (imagenet, imagenet:ENTRY, a file, random:SEED), without values.

    Raises BackboneError for an unknown model or layer; WeightsError for an unknown ENTRY. That the layer gives one
    vector per image is asked by `dim`.
    """
    model, _, query = name.partition(":")
    entry = _known_entry(name, weights)
    whole = _without_memory(model, _preset(entry))
    input_name, names = _node_names(whole)
    layer = next((node for node in reversed(names) if query and (node + ".").startswith(query + ".")), None)
    if layer is None:
        near = _vector_layers(whole, model, _pixels_without_values(_preset(entry)))
        if not query:
            raise BackboneError(Problem.LAYER_NEEDED, name, model, near)
        raise BackboneError(Problem.NO_SUCH_LAYER, name, model, query, _near(query, names), near)
    return Network(name, model, layer, entry, Layers(_up_to(whole, input_name, [layer]), layer))


def preset_of(name: str, weights: str) -> Preset:
    """Return the preprocessing of a network's images. Raises BackboneError for an unknown model; WeightsError."""
    return _preset(_known_entry(name, weights))


@functools.cache
def feature_dim(name: str, weights: str) -> int:
    """Count the numbers per image of a network. Raises as `network_of`, and where they are not one vector."""
    return network_of(name, weights).dim


def _known_entry(name: str, weights: str) -> Any:
    """Find the entry of torchvision's enum that `weights` of the network `name` go by."""
    model = name.partition(":")[0]
    known = models.list_models(module=models)
    if model not in known:
        raise BackboneError(Problem.NO_SUCH_MODEL, name, model, _near(model, known))
    entries = models.get_model_weights(model)
    if not weights.startswith("imagenet:"):
        return entries.DEFAULT
    wanted = weights.removeprefix("imagenet:")
    if wanted not in entries.__members__:
        known = ", ".join(f"imagenet:{entry.name}" for entry in entries)
        raise WeightsError(Problem.NO_SUCH_ENTRY, weights, model, known)
    return entries[wanted]


def _preset(entry: Any) -> Preset:
    own = entry.transforms()
    return Preset(
        name=f"torchvision {type(entry).__name__}.{entry.name}",
        resize=tuple(own.resize_size),
        crop=tuple(own.crop_size),
        mean=tuple(own.mean),
        std=tuple(own.std),
        interpolation=own.interpolation,
        antialias=own.antialias,
    )


def _model(model: str, preset: Preset) -> nn.Module:
    """Build the model as torchvision does with the weights that `preset` is from."""
    arguments: dict[str, Any] = {}
    if model in SCALES_ITS_INPUT:
        arguments = {"transform_input": True, "init_weights": True}
    elif model.startswith("vit_"):
        arguments = {"image_size": preset.crop_height_width[0]}
    built: nn.Module = models.get_model(model, weights=None, **arguments)
    return built.eval()


class _EmptyOnMeta(TorchFunctionMode):
    """Parameters take no memory while a model is built; the small tensors that RegNets compute with stay real."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return func(*args, **({**(kwargs or {}), "device": "meta"} if func is torch.empty else kwargs or {}))


def _without_memory(model: str, preset: Preset) -> nn.Module:
    with torch.random.fork_rng(devices=[]), _EmptyOnMeta():  # the caller's random numbers stay
        whole = _model(model, preset)
    return whole.to("meta")


class _Tracer(feature_extraction.NodePathTracer):  # type: ignore[misc] # which has no types
    """Leaves other threads alone: while torch.fx traces a model, it takes the calls of all modules of the process."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


feature_extraction.NodePathTracer = _Tracer  # the functions below take no tracer


def _node_names(whole: nn.Module) -> tuple[str, list[str]]:
    """Name the input, and everything computed in evaluation, in its order."""
    _, names = feature_extraction.get_graph_node_names(whole, suppress_diff_warning=True)
    return names[0], names[1:]


def _up_to(whole: nn.Module, input_name: str, layers: Iterable[str]) -> nn.Module:
    """Cut out the part that computes `layers` in evaluation; torchvision's graph for training is left empty."""
    extractor: nn.Module = feature_extraction.create_feature_extractor(
        whole, train_return_nodes=[input_name], eval_return_nodes=list(layers), suppress_diff_warning=True
    )
    return extractor.eval()


def _pixels_without_values(preset: Preset) -> torch.Tensor:
    return torch.empty(DRY_IMAGES, 3, *preset.crop_height_width, device="meta")


def _shape(output: object) -> tuple[int, ...]:
    return tuple(output.shape) if isinstance(output, torch.Tensor) else ()


def _is_vector(shape: tuple[int, ...]) -> bool:
    return len(shape) >= 2 and shape[0] == DRY_IMAGES and math.prod(shape[2:]) == 1


def _vector_layers(whole: nn.Module, model: str, pixels_BCHW: torch.Tensor) -> str:
    """Name the last layers of a model that give one vector per image, and its width."""
    input_name, names = _node_names(whole)
    outputs = _up_to(whole, input_name, names)(pixels_BCHW)
    shapes = {name: _shape(outputs[name]) for name in names}
    found = [f"{model}:{name} ({shape[1]})" for name, shape in shapes.items() if _is_vector(shape)]
    return f"One vector per image come from: {', '.join(found[-NUM_VECTOR_LAYERS:])}"


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), NUM_NEAR, cutoff=0.5)
    return f"; near: {', '.join(near)}" if near else ""


class Backbone:
    """The network MODEL:LAYER with its weights, in evaluation.

    `spec` says which network it is, `preset` how it preprocesses images. Raises BackboneError, WeightsError. That it
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

    def features(self, pixels_BHWC: UInt8Array) -> Float32Array:
        """Compute features (B, D) of images that `pipeline.images.decode.prepare` made for this network's preset."""
        with self._lock:
            return self._compute(normalised(pixels_BHWC, self.preset))

    @functools.cached_property
    def _compute(self) -> Compute:
        """Make the function that computes, at its first use: this takes seconds, and a spec does without."""
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


def check_network(name: str, weights: str) -> None:
    """Check, before a cluster starts, that the network exists and that a file of weights fits it.

    Raises BackboneError, WeightsError.
    """
    checked = check_weights_name(weights)
    feature_dim(name, checked)
    if not checked.startswith(("imagenet", "random:")):
        load_weights(network_of(name, checked), checked)


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
        raise WeightsError(Problem.NOT_DOWNLOADED, error, entry.url) from error


def _from_file(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each have their own errors for a file that is none of theirs
        # torch's own texts are essays, and say how to load a file unsafely
        reason = str(error) if isinstance(error, OSError) else type(error).__name__
        raise WeightsError(Problem.WEIGHTS_UNREAD, path, reason) from error


def _fitting(loaded: object, network: Network, where: str) -> dict[str, torch.Tensor]:
    """Pick the tensors up to the layer from a state dict of this part or of the whole model. Raises WeightsError."""
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise WeightsError(Problem.NOT_A_STATE_DICT, where)
    found: dict[str, Any] = {DENSENET_NAME.sub(r"\1\2", name): tensor.detach() for name, tensor in loaded.items()}
    expected = network.tensors()
    missing = [name for name in expected if name not in found]
    if missing:
        raise WeightsError(Problem.OTHER_MODEL, where, network.model, ", ".join(missing[:3]))
    state = {}
    for name, like in expected.items():
        tensor = found[name].float() if found[name].is_floating_point() else found[name]
        if tensor.shape != like.shape:
            raise WeightsError(Problem.WRONG_SHAPE, where, name, tuple(tensor.shape), tuple(like.shape))
        if not tensor.isfinite().all():
            raise WeightsError(Problem.NOT_FINITE, where, name)
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
