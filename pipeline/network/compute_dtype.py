"""Which network a run uses: asked of a worker, who builds it and keeps it."""

from typing import Literal

from distributed import Client

from featurestore.lookup.compute_dtype import dtype_of_environment
from featurestore.spec import ExtractorSpec
from pipeline.cluster.tasks import Killed, run_alone
from pipeline.errors import BackboneError, ExtractionError, PipelineError, WeightsError
from pipeline.network.backbone import ComputeDType, backbone, fastest_dtype


def describe_network(
    client: Client, backbone_name: str, weights: str, compute_dtype: ComputeDType | Literal["auto"]
) -> ExtractorSpec:
    """The spec of the network as a worker builds it, who keeps it. `auto` is what our environment names, else
    what all workers are fast in.

    Raises BackboneError, WeightsError; ExtractionError where the workers die of it.
    """
    if compute_dtype == "auto":
        compute_dtype = _settled_dtype(client)
    spec: ExtractorSpec | PipelineError | Killed = run_alone(client, _spec_of, backbone_name, weights, compute_dtype)
    if isinstance(spec, Killed):
        raise ExtractionError("building the network brings the workers down: is there memory for 1 GB more in each?")
    if isinstance(spec, PipelineError):
        raise spec
    return spec


def _settled_dtype(client: Client) -> ComputeDType:
    try:
        named = dtype_of_environment()
    except ValueError as failure:
        raise BackboneError(str(failure)) from failure
    if named:
        return named
    return "bfloat16" if set(client.run(fastest_dtype).values()) == {"bfloat16"} else "float32"


def _spec_of(backbone_name: str, weights: str, compute_dtype: ComputeDType) -> ExtractorSpec | PipelineError:
    """The error as a result: Dask would log a raised one with its traceback, and try again."""
    try:
        return backbone(backbone_name, weights, compute_dtype).spec
    except (BackboneError, WeightsError) as error:
        return error
