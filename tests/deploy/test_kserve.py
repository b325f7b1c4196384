"""The overlay kserve is what KServe and Kubernetes take, and what our own command line takes.

Of InferenceService, KServe's own fields and types are known (tests/deploy/schemas.py); the pod in it is checked by
Kubernetes' schema, with unknown fields refused.
"""

import copy
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from typer.main import get_command

from tests.deploy.manifests import overlay
from tests.deploy.schemas import fields_of, validators

MODE = "serving.kserve.io/deploymentMode"


def service() -> dict[str, Any]:
    (found,) = [each for each in overlay("kserve") if each["kind"] == "InferenceService"]
    return found


def check(manifest: dict[str, Any]) -> None:
    """Raise ValidationError where KServe or Kubernetes would not take it."""
    validators()["InferenceService"].validate(manifest)
    assert list(manifest["metadata"]["annotations"]) == [MODE]  # which no schema knows
    assert manifest["metadata"]["annotations"][MODE] in ("Serverless", "RawDeployment", "ModelMesh")
    of_kserve = fields_of("V1beta1ComponentExtensionSpec")
    pod = {name: value for name, value in manifest["spec"]["predictor"].items() if name not in of_kserve}
    manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "scorer"}, "spec": pod}
    kubernetes_validate.validate(manifest, "1.33", strict=True)


def test_kserve_and_kubernetes_take_it() -> None:
    check(service())
    manifest = service()
    manifest["spec"]["predictor"]["logger"] = {"mode": "all", "url": "http://log"}  # which we do not use
    check(manifest)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "predictor", "minReplica"], 2),
        (["spec", "predictor", "scaleMetric"], "gpu"),
        (["spec", "predictors"], {}),
        (["metadata", "annotations", "serving.kserve.io/deployMode"], "RawDeployment"),
        (["metadata", "annotations", "serving.kserve.io/deploymentMode"], "raw"),
        (["spec", "predictor", "containers", 0, "livenessProbe", "httpGet", "paths"], "/"),
        (["spec", "predictor", "containers", 0, "ports", 0, "containerPort"], "8080"),
        (["spec", "predictor", "volumes", 0, "secret", "name"], "x"),
    ],
)
def test_a_misspelt_field_is_found(path: list[Any], value: Any) -> None:
    manifest = copy.deepcopy(service())
    place: Any = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError, AssertionError)):
        check(manifest)


def test_the_arguments_are_those_of_our_command() -> None:
    from serving.commands import app

    (container,) = service()["spec"]["predictor"]["containers"]
    assert container["command"] == ["python", "-m", "serving", "serve"]
    values = get_command(app).commands["serve"].make_context("serve", list(container["args"])).params
    (port,) = container["ports"]
    assert values["port"] == port["containerPort"]
    assert values["host"] == "0.0.0.0"
    mounts = [Path(mount["mountPath"]) for mount in container["volumeMounts"]]
    assert values["cache_dir"].parent in mounts
    assert values["token_file"].parent in mounts
    pod = service()["spec"]["predictor"]
    wait_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > values["drain_s"] + wait_s
    names = {volume["name"] for volume in pod["volumes"]}
    assert names == {mount["name"] for mount in container["volumeMounts"]}


def test_the_probes_ask_addresses_that_need_no_token() -> None:
    from serving.http.access import OPEN_PATHS

    (container,) = service()["spec"]["predictor"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in OPEN_PATHS
