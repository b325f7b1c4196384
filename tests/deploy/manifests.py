"""Our Kubernetes manifests as `kubectl kustomize` builds them, and what a cluster with the operators would say to each.

| kind | from |
|---|---|
| MPIJob | crds/mpijob.yaml.gz: the CustomResourceDefinition of kubeflow/mpi-operator v0.8.2, Apache-2.0, as published |
| DaskJob | the CustomResourceDefinition in the package dask-kubernetes |
| ServiceMonitor | prometheus-operator's, as the package cloudcoil-models-prometheus-operator has made classes of it |
| InferenceService | the classes of KServe's API in the package kserve: its CustomResourceDefinition is in no package |

Unknown fields are refused. Nothing of these packages is imported, as that would need all that they need.
"""

import ast
import functools
import gzip
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Dict, List, Literal, Optional, Union  # noqa: UP035 - of the generated classes

import jsonschema
import kubernetes_validate
import pydantic
import yaml

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
OVERLAYS = sorted(path.parent.name for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))
VERSION = "1.33"
Manifest = dict[str, Any]
ROLES = {"required": ["Launcher", "Worker"], "propertyNames": {"enum": ["Launcher", "Worker"]}}
"""Of an MPIJob: mpi-operator looks for these names, and its schema takes any."""
MODES = {"enum": ["Serverless", "RawDeployment", "ModelMesh"]}
ANNOTATIONS = {"properties": {"serving.kserve.io/deploymentMode": MODES}, "additionalProperties": False}
"""Of an InferenceService: no schema knows them."""


Validator = jsonschema.Draft202012Validator
Schema = dict[str, Any]


def validators() -> dict[str, Validator]:
    """The validator of each kind that is not Kubernetes' own; a definition in the folder CRDS goes before ours."""
    return _ours() | _of_a_cluster()


@functools.cache
def _ours() -> dict[str, Validator]:
    daskjob = _of_package("dask-kubernetes", "operator/deployment/helm/dask-kubernetes-operator/crds/daskjob.yaml")
    return {
        "MPIJob": _of_definition(Path(__file__).parent / "crds" / "mpijob.yaml.gz"),
        "DaskJob": _of_definition(daskjob),
        "ServiceMonitor": _service_monitor(),
        "InferenceService": Validator(inference_service()),
    }


@functools.cache
def _of_a_cluster() -> dict[str, Validator]:
    folder = os.environ.get("CRDS")
    files = sorted(Path(folder).glob("*.yaml")) if folder else []
    assert files or not folder, f"CRDS={folder} holds no .yaml"
    return {_definition(file)["spec"]["names"]["kind"]: _of_definition(file) for file in files}


def _of_package(name: str, suffix: str) -> Path:
    (found,) = [each for each in importlib.metadata.files(name) or () if str(each).endswith(suffix)]
    return Path(found.locate())


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


class Closed(pydantic.BaseModel, extra="forbid"):
    """The base of the classes of ServiceMonitor, which refuses unknown fields."""


def _service_monitor() -> Validator:
    """Made of the fields of the classes that ServiceMonitor needs, without their methods."""
    text = _of_package("cloudcoil-models-prometheus-operator", "prometheus_operator/v1.py").read_text()
    classes = {name: source for source in re.split(r"^(?=class )", text, flags=re.MULTILINE) for name in _name(source)}
    known: Schema = {"Any": Any, "List": List, "Dict": Dict, "Optional": Optional, "Union": Union}  # noqa: UP006
    known |= {"Annotated": Annotated, "Literal": Literal, "Field": pydantic.Field, "Closed": Closed}
    _make("ServiceMonitor", classes, known)
    made: type[pydantic.BaseModel] = known["ServiceMonitor"]
    return Validator(made.model_json_schema())


def _name(source: str) -> list[str]:
    return re.findall(r"\Aclass (\w+)\(", source)


def _make(name: str, classes: dict[str, str], known: Schema) -> None:
    """Add the class to `known`, after those of its fields."""
    (tree,) = ast.parse(classes[name]).body
    assert isinstance(tree, ast.ClassDef)
    fields = [each for each in tree.body if isinstance(each, ast.AnnAssign)]
    lines = [ast.unparse(each).replace("apimachinery.ObjectMeta", "Dict[str, Any]") for each in fields]
    for used in re.findall(r"\w+", " ".join(lines)):
        if used in classes and used not in known and used != name:
            _make(used, classes, known)
    base = ast.unparse(tree.bases[0])
    base = base.replace("RootModel", "pydantic.RootModel") if base.startswith("RootModel") else "Closed"
    exec(f"class {name}({base}):\n " + "\n ".join(lines or ["pass"]), known | {"pydantic": pydantic}, known)


SIMPLE = {"str": "string", "int": "integer", "bool": "boolean", "float": "number"}
BY_HAND = {
    "scaleMetric": {"enum": ["cpu", "memory", "concurrency", "rps"]},
    "canaryTrafficPercent": {"type": "integer", "minimum": 0, "maximum": 100},
}
"""Bounds of KServe's fields, which its classes do not have."""


@functools.cache
def _of_kserve() -> dict[str, str]:
    files = [each for each in importlib.metadata.files("kserve") or () if "kserve/models/" in str(each)]
    sources = [Path(each.locate()).read_text() for each in files if each.suffix == ".py"]
    return {name: source for source in sources for name in re.findall(r"^class (\w+)\(object\)", source, re.MULTILINE)}


def fields_of(name: str) -> dict[str, str]:
    """The fields of one of KServe's classes with their types, as in a manifest."""
    source = _of_kserve()[name]
    types, names = (
        ast.literal_eval(re.findall(rf"^    {each} = (\{{.*?\}})$", source, re.MULTILINE | re.DOTALL)[0])
        for each in ("openapi_types", "attribute_map")
    )
    return {names[field]: kind for field, kind in types.items()}


def inference_service() -> Schema:
    """InferenceService; the pod in it is any object, as Kubernetes' own schema says more of it."""
    schema = _schema("V1beta1InferenceService")
    named = {"apiVersion": {"const": "serving.kserve.io/v1beta1"}, "kind": {"const": "InferenceService"}}
    return schema | {"properties": schema["properties"] | named, "required": ["apiVersion", "kind", "metadata", "spec"]}


def _schema(kind: str) -> Schema:
    if kind in SIMPLE:
        return {"type": SIMPLE[kind]}
    if of := re.fullmatch(r"list\[(.*)\]", kind):
        return {"type": "array", "items": _schema(of[1])}
    if of := re.fullmatch(r"dict\(str, (.*)\)", kind):
        return {"type": "object", "additionalProperties": _schema(of[1])}
    if kind not in _of_kserve():
        return {}  # Kubernetes' own
    required = re.findall(r"Invalid value for `(\w+)`, must not be `None`\"", _of_kserve()[kind])
    fields = {name: BY_HAND.get(name) or _schema(of) for name, of in fields_of(kind).items()}
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}


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
