"""trainer.plan --emit kubernetes: its component, applied to the training overlays, is what Kubernetes takes."""

import shutil
from pathlib import Path

import pytest

from tests.deploy.commandlines import horovodrun, torchrun
from tests.deploy.manifests import KUBERNETES, Manifest, build, check, pods
from tests.deploy.test_kubernetes import words_in
from trainer.plan.build import PAPER, load_input, plan_input
from trainer.plan.emit import ResourceRequest, emit, kubernetes_component

COMPONENT = Path("plan", "kustomization.yaml")


def applied(request: ResourceRequest, overlay: str, folder: Path) -> list[Manifest]:
    """The objects of an overlay with the component of `request` in the place of ours."""
    shutil.copytree(KUBERNETES, folder / "kubernetes")
    (folder / "kubernetes" / COMPONENT).write_text(kubernetes_component(request))
    return build(folder / "kubernetes" / "overlays" / overlay)


def test_the_one_in_the_repository_is_of_the_papers_cluster() -> None:
    assert (KUBERNETES / COMPONENT).read_text() == emit(plan_input(load_input(PAPER)), "kubernetes")


@pytest.mark.parametrize("gpus", [0, 2])
@pytest.mark.parametrize("overlay", ["train-torchrun", "train-mpi"])
def test_it_changes_what_it_says_and_nothing_else(gpus: int, overlay: str, tmp_path: Path) -> None:
    request = ResourceRequest(
        nodes=3, ranks_per_node=2, cores_per_rank=4, memory_bytes=18 * 2**30, gpus_per_node=gpus, reason="6 ranks: many"
    )
    manifests = applied(request, overlay, tmp_path)
    for manifest in manifests:
        check(manifest)
    (job,) = [each for each in manifests if each["kind"] in ("Job", "MPIJob")]
    *launchers, node = [pod["spec"]["containers"][0] for pod in pods(job)]
    gpu = {"nvidia.com/gpu": "2"} if gpus else {}
    disk = [{"ephemeral-storage": size} for size in ("20Gi", "112Gi")]
    requests, limits = {"cpu": "8", "memory": "18Gi"} | gpu | disk[0], {"memory": "18Gi"} | gpu | disk[1]
    assert node["resources"] == {"requests": requests, "limits": limits}
    if overlay == "train-torchrun":
        options = torchrun(words_in(manifests, node)[1:])
        assert (options.nnodes, options.nproc_per_node) == ("3", "2")
        assert job["spec"]["completions"] == job["spec"]["parallelism"] == 3
        assert {"name": "GLOO_SOCKET_IFNAME", "value": "eth0"} in node["env"]
    else:
        (launcher,) = launchers
        assert horovodrun(words_in(manifests, launcher)[1:]).num_proc == 6
        assert job["spec"]["slotsPerWorker"] == 2 and job["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"] == 3
        assert "nvidia.com/gpu" not in str(launcher["resources"])
