"""deploy/docker: what hadolint says to it, that its pins are enough and, where Docker is, that its image trains."""

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "docker" / "Dockerfile"
PINS = FILE.with_name("requirements.txt")


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [hadolint, "--config", FILE.with_name("hadolint.yaml"), FILE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_every_image_ends_as_a_user_without_rights() -> None:
    """Users and targets are those that the manifests name."""
    user, users, name = "", {}, ""
    for step in DockerfileParser(str(FILE)).structure:
        if step["instruction"] == "FROM":
            base, _, name = step["value"].partition(" AS ")
            user = users.get(base, "0:0")
        elif step["instruction"] == "USER":
            user = step["value"]
        users[name] = user
    assert {target: users[target] for target in ("cpu", "mpi")} == {"cpu": "1000:1000", "mpi": "1000:1000"}


def test_what_is_copied_is_there_and_reaches_docker() -> None:
    """.dockerignore keeps all from Docker but what it names."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    let_through = {line[1:] for line in lines if line.startswith("!")}
    steps = [step["value"].split() for step in DockerfileParser(str(FILE)).structure if step["instruction"] == "COPY"]
    copied = {name for words in steps if not words[0].startswith("--from=") for name in words[:-1]}
    assert len(copied) > 8 and copied <= let_through
    assert not [name for name in copied if not (ROOT / name).exists()]
    packages = set(re.findall(r"^    (\w+)\*$", (ROOT / "setup.cfg").read_text(), re.MULTILINE))
    assert "trainer" in packages and packages - {"explorer"} <= copied


def pinned() -> dict[str, Version]:
    """Name and version of every line of requirements.txt and torch.txt."""
    lines = [line for file in (PINS, PINS.with_name("torch.txt")) for line in file.read_text().splitlines()]
    found = {}
    for line in lines:
        if line.strip() and not line.startswith((" ", "#")):
            name, _, version = line.removesuffix("\\").partition(";")[0].strip().partition("==")
            found[canonicalize_name(name)] = Version(version)
    return found


def test_all_that_we_need_is_pinned() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    needed = [Requirement(line) for line in parser["options"]["install_requires"].splitlines() if line]
    assert len(needed) > 20
    have = pinned()
    for requirement in needed:
        name = canonicalize_name(requirement.name)
        assert name in have and have[name] in requirement.specifier, f"pin {requirement} in {PINS.name}"
    for file in FILE.parent.glob("*.txt"):
        blocks = file.read_text().split("\n")
        heads = [number for number, line in enumerate(blocks) if line and not line.startswith((" ", "#"))]
        assert heads and all(re.match(r"    --hash=sha256:[0-9a-f]{64}", blocks[number + 1]) for number in heads)
    installs = re.findall(r"pip install .*--requirement", FILE.read_text())
    assert len(installs) == 2 and all("--no-deps --require-hashes" in install for install in installs)


TRAINS = """
python -m jobs.make_demo_data --out /tmp/demo --items 60 --users 40 --days 3
dask-submit -n 1 jobs/extract_features.py --images /tmp/demo/images --store /tmp/features \
    --backbone resnet18:avgpool --weights random:0
python -m jobs.build_samples --logs /tmp/demo/logs --samples /tmp/samples --scratch /tmp
horovodrun --gloo -np 2 python -m trainer.main --set=data.samples=/tmp/samples --set=data.store=/tmp/features \
    --set=run.dir=/tmp/runs --set=run.name=a --set=train.max_steps=3 --set=data.global_batch_size=64
! command -v pip gcc cmake
"""
"""From drawn clothes to a trained run, by the commands of the manifests; no tool of the build is left."""


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(3000)
@pytest.mark.skipif(shutil.which("docker") is None, reason="the image was not built: there is no docker here")
def test_two_ranks_train_in_the_image_as_its_user() -> None:
    build = ["docker", "build", "--file", FILE, "--target", "cpu", "--quiet", ROOT]
    image = subprocess.run(build, capture_output=True, text=True, check=True).stdout.strip()
    run = ["docker", "run", "--rm", "--read-only", "--tmpfs", "/tmp", "--env", "HOME=/tmp", image, "sh", "-ec", TRAINS]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
