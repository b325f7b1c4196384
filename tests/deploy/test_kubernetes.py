"""deploy/kubernetes: every overlay builds, suits Kubernetes and its operators, is closed in, and calls our commands."""

import re
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from tests.deploy.commandlines import expanded, horovodrun, parse, torchrun
from tests.deploy.manifests import KUBERNETES, OVERLAYS, Manifest, build, check, overlay, pods

INJECTED = {"JOB_COMPLETION_INDEX": "1", "DASK_WORKER_NAME": "worker-1"}
"""Variables that a Job and Dask's operator set."""
FROM_OUTSIDE = ("/etc/mpi/", "/usr/sbin/", "/dev/null", "/secrets/ssh/", "/v2/")
"""Paths that an operator or the image brings."""
MPI = ("train-mpi", "MPIJob", "train")
KSERVE = ("kserve", "InferenceService", "ctr")


def find(name: str, kind: str, called: str) -> Manifest:
    (found,) = [each for each in overlay(name) if each["kind"] == kind and each["metadata"]["name"] == called]
    return found


def containers(name: str) -> Iterator[tuple[str, Manifest, Manifest]]:
    """Who, pod and container of each container of an overlay."""
    for manifest in overlay(name):
        for pod in pods(manifest):
            for container in pod["spec"]["containers"]:
                yield f"{manifest['kind']} {manifest['metadata']['name']}", pod, container


def words_of(name: str, container: Manifest) -> list[str]:
    """Command and arguments with the variables that the container has."""
    maps = {each["metadata"]["name"]: each["data"] for each in overlay(name) if each["kind"] == "ConfigMap"}
    variables = dict(INJECTED)
    for source in container.get("envFrom", []):
        variables |= maps[source["configMapRef"]["name"]]
    variables |= {each["name"]: each["value"] for each in container.get("env", [])}
    return expanded([*container["command"], *container["args"]], variables)


@pytest.mark.long
def test_there_is_one_for_each_way_and_kubernetes_and_the_operators_take_all() -> None:
    assert OVERLAYS == ["extract", "kserve", "operations", "serving", "train-mpi", "train-torchrun"]
    manifests = [manifest for name in OVERLAYS for manifest in overlay(name)]
    for manifest in manifests:
        check(manifest)
    assert {manifest["kind"] for manifest in manifests} == {
        "ConfigMap", "CronJob", "DaskJob", "Deployment", "HorizontalPodAutoscaler", "InferenceService", "Job", "MPIJob",
        "NetworkPolicy", "PodDisruptionBudget", "Service", "ServiceAccount", "ServiceMonitor",
    }  # fmt: skip
    jobs = [pod["spec"] for each in manifests if each["kind"] in ("CronJob", "Job") for pod in pods(each)]
    assert {spec["restartPolicy"] for spec in jobs} == {"Never"}  # Kubernetes refuses Always, which no schema says
    names = {m["metadata"]["name"] for m in overlay("operations") if m["kind"] == "CronJob"}
    assert names == {"refresh", "build-day", "daily", "upkeep", "verify"}


@pytest.mark.parametrize(
    ("where", "path", "value"),
    [
        (("extract", "DaskJob", "extract"), ["spec", "cluster", "spec", "worker", "replica"], 8),
        (MPI, ["spec", "mpiReplicaSpecs", "Workers"], {}),
        (MPI, ["spec", "mpiReplicaSpecs", "Worker", "template", "spec", "securityContext", "runAsRoot"], False),
        (("serving", "ServiceMonitor", "scorer"), ["spec", "endpoints", 0, "tlsConfig", "servername"], "scorer"),
        (("operations", "CronJob", "upkeep"), ["spec", "concurrency"], "Forbid"),
        (("train-torchrun", "NetworkPolicy", "crossmedia-closed"), ["spec", "egress", 0, "port"], 1),
        (KSERVE, ["spec", "predictor", "minReplica"], 2),
        (KSERVE, ["spec", "predictor", "scaleMetric"], "gpu"),
        (KSERVE, ["metadata", "annotations", "serving.kserve.io/deploymentMode"], "raw"),
        (KSERVE, ["spec", "predictor", "containers", 0, "ports", 0, "containerPort"], "8080"),
        (KSERVE, ["spec", "predictor", "volumes", 0, "secret", "name"], "x"),
    ],
)
def test_a_misspelt_field_is_found(where: tuple[str, str, str], path: list[Any], value: Any) -> None:
    place: Any = (manifest := find(*where))
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(manifest)


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_have_no_rights_a_read_only_root_and_secrets_by_name_and_fill_no_disk(name: str) -> None:
    found = list(containers(name))
    assert found
    for who, pod, container in found:
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 1000, who
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, who
        assert spec["serviceAccountName"] == "crossmedia" and not spec["automountServiceAccountToken"], who
        rights = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        assert container["securityContext"] == rights, who
        resources = container["resources"]
        assert set(resources["requests"]) >= {"cpu", "memory"}, who
        assert resources["limits"]["memory"] == resources["requests"]["memory"], who
        volumes = {each["name"]: each for each in spec["volumes"]}
        mounts = {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}
        assert set(volumes) == {each["name"] for each in container["volumeMounts"]}, who
        assert all("emptyDir" in mounts[path] for path in ("/tmp", "/cache")), who  # HOME and XDG_CACHE_HOME
        assert all("secret" in volume for path, volume in mounts.items() if path.startswith("/secrets/")), who
        sizes = [each["emptyDir"]["sizeLimit"] for each in volumes.values() if "emptyDir" in each]
        assert all(re.fullmatch(r"\d+Gi", size) for size in sizes), who
        asked, limit = (int(resources[part]["ephemeral-storage"][:-2]) for part in ("requests", "limits"))
        assert 0 < asked <= limit and limit > sum(int(size[:-2]) for size in sizes), who
    for manifest in overlay(name):  # no variable is made of a secret: horovodrun puts variables into command lines
        assert manifest["kind"] != "Secret" and not re.search("secretKeyRef|secretRef", str(manifest))
    settings = find(name, "ConfigMap", "crossmedia-settings")["data"]
    assert not [key for key in settings if re.search("SECRET|TOKEN|PASSWORD|ACCESS_KEY", key)]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_programs_take_the_command_lines_and_their_paths_are_in_volumes(name: str) -> None:
    for who, _, container in containers(name):
        words = words_of(name, container)
        parse(words)
        mounts = [PurePosixPath(each["mountPath"]) for each in container["volumeMounts"]]
        for path in re.findall(r"(?<![\w:/.])/[\w./-]+", " ".join(words)):
            inside = any(PurePosixPath(path).is_relative_to(mount) for mount in mounts)
            assert inside or path.startswith(FROM_OUTSIDE), f"{who}: {path} is in no volume"


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_pod_is_closed_in_and_nothing_goes_out_but_to_what_is_named(name: str) -> None:
    """Its labels are those of the policy that lets nobody in, and of the one that opens what its component needs."""
    policies = {each["metadata"]["name"]: each["spec"] for each in overlay(name) if each["kind"] == "NetworkPolicy"}
    closed = policies["crossmedia-closed"]
    assert closed["policyTypes"] == ["Ingress", "Egress"] and not closed.get("ingress")
    for manifest in overlay(name):
        for pod in pods(manifest):
            labels = pod["metadata"]["labels"].items()
            assert closed["podSelector"]["matchLabels"].items() <= labels, manifest["metadata"]["name"]
            component = pod["metadata"]["labels"]["app.kubernetes.io/component"]
            opened = [p for p in policies.values() if p["podSelector"]["matchLabels"].items() <= labels]
            assert len(opened) == (2 if component == "operations" else 3), component
    rules = [rule for policy in policies.values() for rule in policy.get("egress", [])]
    assert rules and all(rule.get("to") for rule in rules)
    blocks = [(to["ipBlock"], rule["ports"]) for rule in rules for to in rule["to"] if "ipBlock" in to]
    assert blocks == [({"cidr": "192.0.2.0/24"}, [{"protocol": "TCP", "port": 443}])]
    for rule in rules:
        for to in rule["to"]:
            labels = to.get("podSelector", {}).get("matchLabels", {})
            is_own = labels.get("app.kubernetes.io/part-of") == "crossmedia" and "namespaceSelector" not in to
            assert is_own or "ipBlock" in to or (labels == {"k8s-app": "kube-dns"} and len(rule["ports"]) == 2)


def test_the_ports_of_the_policies_are_those_of_the_programs() -> None:
    def ports(policy: str) -> set[int]:
        rules = find("extract", "NetworkPolicy", policy)["spec"]["ingress"]
        return {port["port"] for rule in rules for port in rule.get("ports", [])}

    lines = {c["command"][1]: parse(words_of("extract", c)) for _, _, c in containers("extract") if c["command"][1:]}
    worker, scheduler = lines["worker"], lines["scheduler"]
    assert ports("crossmedia-dask") == {int(scheduler["port"]), int(worker["worker_port"]), int(worker["nanny_port"])}
    assert scheduler["protocol"] == "tls" and scheduler["dashboard_address"].startswith("127.0.0.1:")
    assert worker["dashboard"] is False
    (scorer,) = [parse(words_of("serving", container)) for _, _, container in containers("serving")]
    assert ports("crossmedia-scorer") == {scorer["port"]}
    for who, _, container in containers("extract"):
        words = " ".join(words_of("extract", container))
        assert "tcp://" not in words and ("tls://extract-scheduler:8786" in words or "--protocol=tls" in words), who
        assert {"configMapRef": {"name": "dask-tls"}} in container["envFrom"], who


@pytest.mark.parametrize("name", ["serving", "kserve"])
def test_the_scorer_speaks_tls_is_probed_without_a_token_and_drains(name: str) -> None:
    from serving.http.access import OPEN_PATHS

    ((_, pod, container),) = containers(name)
    assert container["name"] == {"serving": "main", "kserve": "kserve-container"}[name]  # KServe looks for this one
    values = parse(words_of(name, container))
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["path"] in OPEN_PATHS and asked["port"] == "health" and asked["scheme"] == "HTTP"
    assert container["ports"] == [
        {"name": "https", "containerPort": values["port"], "protocol": "TCP"},  # the first: KServe's service takes it
        {"name": "health", "containerPort": values["health_port"], "protocol": "TCP"},
    ]
    policies = [each["spec"] for each in overlay(name) if each["kind"] == "NetworkPolicy"]
    opened = [port["port"] for spec in policies for rule in spec.get("ingress", []) for port in rule.get("ports", [])]
    assert values["health_port"] not in opened
    assert values["host"] == "0.0.0.0" and values["tls_cert"] and values["tls_key"] and values["token_file"]
    wait_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["spec"]["terminationGracePeriodSeconds"] > values["drain_s"] + wait_s


def test_the_scorer_is_found_and_kept() -> None:
    deployment = find("serving", "Deployment", "scorer")
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    matching = [find("serving", kind, "scorer")["spec"]["selector"] for kind in ("PodDisruptionBudget", "Deployment")]
    selectors = [find("serving", "Service", "scorer")["spec"]["selector"], *(each["matchLabels"] for each in matching)]
    assert all(selector and selector.items() <= labels for selector in selectors)
    scaled = find("serving", "HorizontalPodAutoscaler", "scorer")["spec"]["scaleTargetRef"]
    assert scaled == {"apiVersion": deployment["apiVersion"], "kind": "Deployment", "name": "scorer"}
    assert "replicas" not in deployment["spec"]
    service, monitor = find("serving", "Service", "scorer"), find("serving", "ServiceMonitor", "scorer")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]


def test_the_nodes_of_a_training_fit_together() -> None:
    """Ranks and nodes are said in several places: all say the same."""
    job = find("train-torchrun", "Job", "train")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    options = torchrun(words_of("train-torchrun", container)[1:])
    assert int(options.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    service = find("train-torchrun", "Service", "train")
    name = f"{job['metadata']['name']}-0.{job['spec']['template']['spec']['subdomain']}"
    assert options.master_addr == name and service["metadata"]["name"] == "train"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}

    mpijob = find("train-mpi", "MPIJob", "train")["spec"]
    launcher, worker = (mpijob["mpiReplicaSpecs"][role] for role in ("Launcher", "Worker"))
    (starts,), (sshd,) = (role["template"]["spec"]["containers"] for role in (launcher, worker))
    run = horovodrun(words_of("train-mpi", starts)[1:])
    assert run.num_proc == worker["replicas"] * mpijob["slotsPerWorker"]
    server = parse(words_of("train-mpi", sshd))
    assert run.ssh_port == int(server["Port"])
    assert run.ssh_identity_file == server["HostKey"] == f"{mpijob['sshAuthMountPath']}/id_rsa"


def test_the_overlay_of_the_page_is_built(tmp_path: Path) -> None:
    """docs/RANKS.md shows an overlay of one's own: its image, namespace and places are those of all objects."""
    page = (KUBERNETES.parents[1] / "docs" / "RANKS.md").read_text()
    (text,) = re.findall(r"```\n( *# kustomization\.yaml\n.*?)```", page, re.DOTALL)
    shutil.copytree(KUBERNETES, tmp_path / "deploy" / "kubernetes")
    (tmp_path / "kustomization.yaml").write_text(textwrap.dedent(text))
    manifests = build(tmp_path)
    for manifest in manifests:
        check(manifest)
        assert manifest["metadata"]["namespace"] == "shop"
    settings = next(each["data"] for each in manifests if each["metadata"]["name"] == "crossmedia-settings")
    assert settings["STORE"] == "s3://mine/features" and settings["SAMPLES"] == "s3://shop/samples"
    images = {container["image"] for each in manifests for pod in pods(each) for container in pod["spec"]["containers"]}
    assert images == {"registry.example/crossmedia:0.1.0"}
    store = next(each["spec"] for each in manifests if each["metadata"]["name"] == "crossmedia-object-store")
    assert store["egress"][0]["to"] == [{"ipBlock": {"cidr": "10.1.0.0/24"}}]
    secrets = set(re.findall(r"create secret generic ([\w-]+)", page))
    named = {
        volume["secret"]["secretName"]
        for name in OVERLAYS for each in overlay(name) for pod in pods(each) for volume in pod["spec"]["volumes"]
        if "secret" in volume
    }  # fmt: skip
    assert secrets == named | {"scorer-metrics-token"}
