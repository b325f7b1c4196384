"""Our Kubernetes manifests as `kubectl kustomize` builds them, and what a cluster would say to each."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
OVERLAYS = sorted(path.parent.name for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))
VERSION = "1.33"
Manifest = dict[str, Any]

_COUNT = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string"}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "additionalProperties": False, "properties": properties}


_REPLICA = _object(
    ["template"],
    replicas=_COUNT,
    restartPolicy={"enum": ["Never", "OnFailure"]},
    template=_object(["spec"], metadata={"type": "object"}, spec={"type": "object"}),
)
MPIJOB = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "kubeflow.org/v2beta1"},
    kind={"const": "MPIJob"},
    metadata={"type": "object"},
    spec=_object(
        ["mpiReplicaSpecs"],
        launcherCreationPolicy={"enum": ["AtStartup", "WaitForWorkersReady"]},
        mpiImplementation={"enum": ["OpenMPI", "Intel", "MPICH"]},
        mpiReplicaSpecs=_object(["Launcher", "Worker"], Launcher=_REPLICA, Worker=_REPLICA),
        runPolicy=_object(
            [],
            activeDeadlineSeconds=_COUNT,
            backoffLimit=_COUNT,
            cleanPodPolicy={"enum": ["None", "Running", "All"]},
            suspend={"type": "boolean"},
            ttlSecondsAfterFinished=_COUNT,
        ),
        slotsPerWorker=_COUNT,
        sshAuthMountPath=_TEXT,
    ),
)
"""Of mpi-operator's CustomResourceDefinition (kubeflow.org/v2beta1) what we use; no package ships it."""
_KEY = _object(["key", "name"], key=_TEXT, name=_TEXT)
SERVICE_MONITOR = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "monitoring.coreos.com/v1"},
    kind={"const": "ServiceMonitor"},
    metadata={"type": "object"},
    spec=_object(
        ["selector", "endpoints"],
        selector=_object([], matchLabels={"type": "object", "additionalProperties": _TEXT}),
        endpoints={
            "type": "array",
            "items": _object(
                [],
                port=_TEXT,
                path=_TEXT,
                scheme={"enum": ["http", "https"]},
                interval={"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
                authorization=_object([], type=_TEXT, credentials=_KEY),
                tlsConfig=_object([], serverName=_TEXT, ca=_object([], secret=_KEY, configMap=_KEY)),
            ),
        },
    ),
)
"""Of prometheus-operator's CustomResourceDefinition (monitoring.coreos.com/v1) what we use."""


@functools.cache
def daskjob() -> jsonschema.Draft202012Validator:
    """The schema that Dask's operator brings, with unknown fields refused."""
    package = importlib.util.find_spec("dask_kubernetes")
    assert package is not None and package.origin is not None
    file = "operator/deployment/helm/dask-kubernetes-operator/crds/daskjob.yaml"
    return validator_of(Path(package.origin).parent / file)


@functools.cache
def of_a_cluster() -> dict[str, jsonschema.Draft202012Validator]:
    """The schemas of the CustomResourceDefinitions in the folder that CRDS names, by kind; none where it is not set."""
    folder = os.environ.get("CRDS")
    files = sorted(Path(folder).glob("*.yaml")) if folder else []
    assert files or not folder, f"CRDS={folder} holds no .yaml"
    return {definition_of(file)["spec"]["names"]["kind"]: validator_of(file) for file in files}


def definition_of(file: Path) -> Manifest:
    """A CustomResourceDefinition as its operator publishes it, or as `kubectl get crd NAME -o yaml` writes it."""
    definition = yaml.load(file.read_text(), yaml.CSafeLoader)
    assert definition["kind"] == "CustomResourceDefinition", file
    return definition


def validator_of(file: Path) -> jsonschema.Draft202012Validator:
    """The schema of a CustomResourceDefinition, of the version that is stored, with unknown fields refused."""
    spec = definition_of(file)["spec"]
    version = next(each for each in spec["versions"] if each["storage"])
    api = {"const": f"{spec['group']}/{version['name']}"}
    named = {"apiVersion": api, "kind": {"const": spec["names"]["kind"]}, "metadata": {"type": "object"}}
    schema = version["schema"]["openAPIV3Schema"]
    properties = {name: strict(value) for name, value in schema["properties"].items()}
    return jsonschema.Draft202012Validator(strict(schema) | {"properties": properties | named})


def strict(schema: Any) -> Any:
    """The same schema with unknown fields refused in every object whose fields it names."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: strict(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def build(folder: Path) -> list[Manifest]:
    """All objects of a kustomization, as `kubectl apply -k` would send them."""
    kubectl = Path(sys.executable).with_name("kubectl")
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.load_all(done.stdout, yaml.CSafeLoader) if each]


@functools.cache
def _built(overlay: str) -> str:
    return json.dumps(build(KUBERNETES / "overlays" / overlay))


def overlay(name: str) -> list[Manifest]:
    """The objects of one of our overlays, fresh copies."""
    return json.loads(_built(name))


def check(manifest: Manifest) -> None:
    """Raise ValidationError where a cluster with the operators would not take it, unknown fields included."""
    kind = manifest["kind"]
    if kind in of_a_cluster():
        of_a_cluster()[kind].validate(manifest)
    if kind == "DaskJob":
        daskjob().validate(manifest)
    elif kind == "MPIJob":
        jsonschema.validate(manifest, MPIJOB)
    elif kind == "ServiceMonitor":
        jsonschema.validate(manifest, SERVICE_MONITOR)
    else:
        kubernetes_validate.validate(manifest, VERSION, strict=True)
        return
    for pod in pods(manifest):
        as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"} | pod.get("metadata", {})}
        kubernetes_validate.validate(as_pod | {"spec": pod["spec"]}, VERSION, strict=True)


def pods(manifest: Manifest) -> Iterator[Manifest]:
    """Every pod template of an object, wherever it is in it."""

    def found(value: Any) -> Iterator[Manifest]:
        if isinstance(value, dict):
            if isinstance(value.get("spec"), dict) and "containers" in value["spec"]:
                yield value
            for each in value.values():
                yield from found(each)
        elif isinstance(value, list):
            for each in value:
                yield from found(each)

    return found(manifest)
