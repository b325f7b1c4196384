"""The command line of the torchrun overlay, run as its two nodes would run it, with places of this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.commandlines import expanded
from tests.deploy.manifests import overlay, pods
from tests.ranks import ROOT, environment
from tests.servers import free_ports
from tests.trainer.conftest import make_places

pytestmark = pytest.mark.cluster


def test_two_nodes_train_a_day(tmp_path: Path) -> None:
    places = make_places(tmp_path / "data")
    (job,) = [each for each in overlay("train-torchrun") if each["kind"] == "Job"]
    (pod,) = pods(job)
    (container,) = pod["spec"]["containers"]
    here = {
        "NODES": "2",
        "RANKS_PER_NODE": "1",
        "SAMPLES": str(places.folder / "samples"),
        "STORE": str(places.folder / "features"),
        "RUNS": str(tmp_path / "runs"),
    }
    (port,) = free_ports(1)
    small = [f"--set={each}" for each in places.settings() if not each.startswith(("data.s", "run.dir", "run.name"))]
    nodes = []
    for index in range(2):
        words = expanded([*container["command"], *container["args"]], here | {"JOB_COMPLETION_INDEX": str(index)})
        words = [word.replace("train-0.train", "127.0.0.1").replace("29500", str(port)) for word in words]
        words[0] = str(Path(sys.executable).with_name(words[0]))
        variables = environment() | {"GLOO_SOCKET_IFNAME": "lo"}
        nodes.append(
            subprocess.Popen(
                [*words, *small], cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    said = [node.communicate(timeout=250)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    table = json.loads((tmp_path / "runs" / "daily" / "days.json").read_text())
    assert len(table) >= 1 and "2 ranks" in "".join(said)
