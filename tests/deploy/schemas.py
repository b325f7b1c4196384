"""What a cluster with the operators takes: schemas of MPIJob, ServiceMonitor, InferenceService and DaskJob.

| kind | from |
|---|---|
| MPIJob | crds/mpijob.yaml.gz: the CustomResourceDefinition of kubeflow/mpi-operator v0.8.2, Apache-2.0, as published |
| DaskJob | the CustomResourceDefinition in the package dask-kubernetes, of which nothing is imported |
| ServiceMonitor, InferenceService | crds/*.yaml: the fields that deploy/ may use |

Unknown fields are refused. CRDS=FOLDER names definitions of a cluster that go before ours.
"""

import functools
import gzip
import importlib.metadata
import os
from pathlib import Path
from typing import Any

import jsonschema
import yaml

Validator = jsonschema.Draft202012Validator
Schema = dict[str, Any]
CRDS = Path(__file__).parent / "crds"
DASK_JOB = "operator/deployment/helm/dask-kubernetes-operator/crds/daskjob.yaml"


@functools.cache
def validators() -> dict[str, Validator]:
    """The validator of each kind that is not Kubernetes' own; a definition in the folder CRDS goes before ours."""
    folder = os.environ.get("CRDS")
    of_a_cluster = sorted(Path(folder).glob("*.yaml")) if folder else []
    assert of_a_cluster or not folder, f"CRDS={folder} holds no .yaml"
    (dask,) = [each for each in importlib.metadata.files("dask-kubernetes") or () if str(each).endswith(DASK_JOB)]
    files = [*CRDS.iterdir(), Path(dask.locate()), *of_a_cluster]
    return {_definition(file)["spec"]["names"]["kind"]: _of_definition(file) for file in files}


def predictor_fields() -> set[str]:
    """The fields of an InferenceService's predictor that are not a pod's."""
    (version,) = _definition(CRDS / "inferenceservice.yaml")["spec"]["versions"]
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return set(spec["properties"]["predictor"]["properties"])


def _definition(file: Path) -> Schema:
    """A CustomResourceDefinition as its operator publishes it, or as `kubectl get crd NAME -o yaml` writes it."""
    data = file.read_bytes()
    definition: Schema = yaml.load(gzip.decompress(data) if file.suffix == ".gz" else data, yaml.CSafeLoader)
    assert definition["kind"] == "CustomResourceDefinition", file
    return definition


def _of_definition(file: Path) -> Validator:
    """The validator of the version that is stored."""
    spec = _definition(file)["spec"]
    version = next(each for each in spec["versions"] if each["storage"])
    api = {"const": f"{spec['group']}/{version['name']}"}
    named = {"apiVersion": api, "kind": {"const": spec["names"]["kind"]}, "metadata": {"type": "object"}}
    schema = version["schema"]["openAPIV3Schema"]
    properties = {name: _strict(value) for name, value in schema["properties"].items()}
    return Validator(_strict(schema) | {"properties": properties | named})


def _strict(schema: Any) -> Any:
    """The same schema with unknown fields refused in every object whose fields it names."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _strict(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed
