"""Our Kubernetes manifests as `kubectl kustomize` builds them, and what a cluster with the operators would say to each.

| kind | from |
|---|---|
| MPIJob | crds/mpijob.yaml.gz, of kubeflow/mpi-operator v0.8.2 |
| ServiceMonitor | crds/servicemonitor.yaml.gz, of prometheus-operator/prometheus-operator at 6adcebc5, after v0.93.0 |
| InferenceService | crds/inferenceservice.yaml.gz, of kserve/kserve at aaac4e29, after v0.20.0 |
| DaskJob | a file of the package dask-kubernetes, of which nothing is imported |

Each is a CustomResourceDefinition as published; those in crds/ are under Apache-2.0. Unknown fields are refused.
"""

import copy
import functools
import gzip
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

PUBLISHED = Path(__file__).parent / "crds"
KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
OVERLAYS = sorted(path.parent.name for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))
VERSION = "1.33"
Manifest = dict[str, Any]
Validator = jsonschema.Draft202012Validator
ROLES = {"required": ["Launcher", "Worker"], "propertyNames": {"enum": ["Launcher", "Worker"]}}
"""Of an MPIJob: mpi-operator looks for these names, and its schema takes any."""
MODES = {"enum": ["Serverless", "RawDeployment", "ModelMesh"]}
ANNOTATIONS = {"properties": {"serving.kserve.io/deploymentMode": MODES}, "additionalProperties": False}
"""Of an InferenceService: no schema knows them."""


@functools.cache
def validators() -> dict[str, Validator]:
    """The validator of each kind that is not Kubernetes' own; a definition in the folder CRDS goes before ours."""
    (daskjob,) = [each for each in importlib.metadata.files("dask-kubernetes") or () if each.match("crds/daskjob.yaml")]
    folder = os.environ.get("CRDS")
    theirs = sorted(Path(folder).glob("*.yaml")) if folder else []
    assert theirs or not folder, f"CRDS={folder} holds no .yaml"
    definitions = map(_definition, [*PUBLISHED.glob("*.gz"), Path(daskjob.locate()), *theirs])
    return {each["spec"]["names"]["kind"]: _of_definition(each["spec"]) for each in definitions}


def _definition(file: Path) -> Manifest:
    """A CustomResourceDefinition as its operator publishes it, or as `kubectl get crd NAME -o yaml` writes it."""
    data = file.read_bytes()
    definition: Manifest = yaml.load(gzip.decompress(data) if file.suffix == ".gz" else data, yaml.CSafeLoader)
    assert definition["kind"] == "CustomResourceDefinition", file
    return definition


def _of_definition(spec: Manifest) -> Validator:
    """The validator of the version that is stored."""
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


@functools.cache
def build(folder: Path) -> list[Manifest]:
    """All objects of a kustomization, as `kubectl apply -k` would send them."""
    kubectl = Path(sys.executable).with_name("kubectl")
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.load_all(done.stdout, yaml.CSafeLoader) if each]


def overlay(name: str) -> list[Manifest]:
    """The objects of one of our overlays, fresh copies."""
    return copy.deepcopy(build(KUBERNETES / "overlays" / name))


def check(manifest: Manifest) -> None:
    """Raise ValidationError where a cluster with the operators would not take it, unknown fields included."""
    if manifest["kind"] not in validators():
        kubernetes_validate.validate(manifest, VERSION, strict=True)
        return
    validators()[manifest["kind"]].validate(manifest)
    if manifest["kind"] == "MPIJob":
        jsonschema.validate(manifest["spec"]["mpiReplicaSpecs"], ROLES)
    if manifest["kind"] == "InferenceService":
        jsonschema.validate(manifest["metadata"]["annotations"], ANNOTATIONS)
        return  # the definition has all of a pod's fields
    for pod in pods(manifest):
        as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"} | pod.get("metadata", {})}
        kubernetes_validate.validate(as_pod | {"spec": pod["spec"]}, VERSION, strict=True)


def pods(manifest: Manifest) -> Iterator[Manifest]:
    """Every pod template of an object, or of a part of one, wherever it is in it."""
    if manifest.get("kind") == "InferenceService":
        predictor = manifest["spec"]["predictor"]
        yield {"metadata": {"labels": predictor["labels"]}, "spec": predictor}
        return

    def found(value: Any) -> Iterator[Manifest]:
        if isinstance(value, dict):
            if isinstance(value.get("spec"), dict) and "containers" in value["spec"]:
                yield value
            for each in value.values():
                yield from found(each)
        elif isinstance(value, list):
            for each in value:
                yield from found(each)

    yield from found(manifest)
