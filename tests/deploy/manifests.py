"""Our Kubernetes manifests as `kubectl kustomize` builds them, and what a cluster would say to each."""

import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.deploy.schemas import fields_of, validators

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
OVERLAYS = sorted(path.parent.name for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))
VERSION = "1.33"
Manifest = dict[str, Any]
ROLES = {"required": ["Launcher", "Worker"], "propertyNames": {"enum": ["Launcher", "Worker"]}}
"""Of an MPIJob: mpi-operator looks for these names, and its schema takes any."""
MODES = {"enum": ["Serverless", "RawDeployment", "ModelMesh"]}
ANNOTATIONS = {"properties": {"serving.kserve.io/deploymentMode": MODES}, "additionalProperties": False}
"""Of an InferenceService: no schema knows them."""


def build(folder: Path) -> list[Manifest]:
    """All objects of a kustomization, as `kubectl apply -k` would send them."""
    kubectl = Path(sys.executable).with_name("kubectl")
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.load_all(done.stdout, yaml.CSafeLoader) if each]


@functools.cache
def _built(name: str) -> str:
    return json.dumps(build(KUBERNETES / "overlays" / name))


def overlay(name: str) -> list[Manifest]:
    """The objects of one of our overlays, fresh copies."""
    return json.loads(_built(name))


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
    for pod in pods(manifest):
        as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"} | pod.get("metadata", {})}
        kubernetes_validate.validate(as_pod | {"spec": pod["spec"]}, VERSION, strict=True)


def pods(manifest: Manifest) -> Iterator[Manifest]:
    """Every pod template of an object, or of a part of one, wherever it is in it."""
    if manifest.get("kind") == "InferenceService":
        of_kserve, predictor = fields_of("V1beta1ComponentExtensionSpec"), manifest["spec"]["predictor"]
        spec = {name: value for name, value in predictor.items() if name not in of_kserve}
        yield {"metadata": {"labels": predictor["labels"]}, "spec": spec}
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
