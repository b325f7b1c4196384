"""A network as the workers of a cluster build it, described to a job, which need not import torch: seconds less."""

import re
from pathlib import Path
from typing import Literal

from distributed import Client

from featurestore.lookup.compute_dtype import AutoDType, dtype_of_environment, dtype_of_machine
from featurestore.spec import ExtractorSpec
from pipeline.cluster.tasks import Killed, run_alone
from pipeline.errors import BackboneError, ClusterError, WeightsError


def check_weights_name(weights: str) -> str:
    """Return `weights`, a path made absolute for worker processes. Raises WeightsError on a malformed name."""
    if weights == "imagenet" or re.fullmatch(r"imagenet:\w+|random:\d{1,18}", weights):
        return weights
    if weights.startswith("random"):
        raise WeightsError(f"weights {weights!r}: the seed of random weights is a number, as in random:0")
    path = Path(weights).absolute()
    if not path.is_file():
        raise WeightsError(f"weights {weights!r}: neither imagenet, random:SEED, nor a file (looked for {path})")
    return str(path)


def describe_network(
    client: Client, backbone_name: str, weights: str, compute_dtype: AutoDType | Literal["auto"]
) -> ExtractorSpec:
    """Give the spec of the network as a worker builds it, which keeps it.

    `auto` is what our environment names, else bfloat16 where the hardware of all workers is quick at it, else float32.
    Raises BackboneError, WeightsError; ClusterError where the workers die of it.
    """
    if compute_dtype == "auto":
        compute_dtype = _settled_dtype(client)
    spec: ExtractorSpec | Killed = run_alone(client, _spec_of, backbone_name, weights, compute_dtype)
    if isinstance(spec, Killed):
        raise ClusterError("building the network brings the workers down: is there memory for 1 GB more in each?")
    return spec


def _settled_dtype(client: Client) -> AutoDType:
    try:
        named = dtype_of_environment()
    except ValueError as failure:
        raise BackboneError(str(failure)) from failure
    if named:
        return named
    return "bfloat16" if set(client.run(dtype_of_machine).values()) == {"bfloat16"} else "float32"


def _spec_of(backbone_name: str, weights: str, compute_dtype: AutoDType) -> ExtractorSpec:
    from pipeline.network.backbone import backbone

    return backbone(backbone_name, weights, compute_dtype).spec
