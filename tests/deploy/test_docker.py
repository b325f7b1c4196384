"""deploy/docker: what hadolint says to it, that its pins are enough, and its steps, run in a folder without Docker.

COPY, ENV, WORKDIR, USER and CMD mean what they mean to Docker, with the folder in the place of /; no ARG is given a
value. What would change this machine is left out: apt-get, groupadd and useradd only note what they were asked for.
COPY takes nothing that .dockerignore keeps from Docker. A base image is a copy of this Python in usr/local.
"""

import configparser
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from string import Template

import pytest
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from tests.cli import ran

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "docker" / "Dockerfile"
PINS = FILE.with_name("requirements.txt")
STUBS = ("apt-get", "groupadd", "useradd")
"""Programs that would change this machine."""
NOT_PYTHON = shutil.ignore_patterns("__pycache__", "site-packages", "test", "share")
_ABSOLUTE = re.compile(r"(?<![\w.$}/])/(?=(?:opt|build|var|etc|home)(?:/|\b))")
"""Paths of an image in a command or a variable."""


@dataclass
class Stage:
    """What a stage has left: its files and its environment."""

    files: Path
    environment: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    command: list[str] = field(default_factory=list)


class Built:
    """Stages of the Dockerfile, built in `folder` one after the other, up to `target`.

    All of them lie at `folder`/root while they are built, as a virtual environment knows its own path.
    `machine`: variables of this machine that every RUN gets, such as those by which pip finds packages.
    `asked`: a file with the calls of apt-get and the like.
    """

    def __init__(self, folder: Path, target: str, machine: dict[str, str], replaced: dict[str, str]) -> None:
        """Run the steps. `replaced`: words of commands that become others."""
        self.root, self.asked, self._folder = folder / "root", folder / "asked.txt", folder
        self._machine, self._replaced = machine, replaced
        self.stages: dict[str, Stage] = {}
        (folder / "stubs").mkdir()
        for name in STUBS:
            (folder / "stubs" / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{shlex.quote(str(self.asked))}\n')
            (folder / "stubs" / name).chmod(0o755)
        steps = [(each["instruction"], each["value"]) for each in DockerfileParser(str(FILE)).structure]
        begins = [place for place, (kind, _) in enumerate(steps) if kind == "FROM"]
        for begin, end in itertools.pairwise([*begins, len(steps)]):
            base, _, name = steps[begin][1].partition(" AS ")
            assert base not in self.stages, "a stage that begins with another one has never been built here"
            self.root.mkdir()
            if sys.base_prefix not in ("/usr", "/usr/local"):
                shutil.copytree(sys.base_prefix, self.inside("/usr/local"), symlinks=True, ignore=NOT_PYTHON)
            self.stages[name] = self.final = Stage(self.root)
            for kind, value in steps[begin + 1 : end]:
                self._step(kind, value, self.final)
            if name == target:
                break
            self.final.files = self.root.rename(folder / f"stage-{name}")

    def _step(self, kind: str, value: str, stage: Stage) -> None:
        match kind:
            case "ENV":
                for word in shlex.split(value):
                    key, _, text = word.partition("=")
                    stage.environment[key] = Template(text).substitute({"PATH": os.defpath} | stage.environment)
            case "WORKDIR":
                stage.workdir = value
                self.inside(value).mkdir(parents=True, exist_ok=True)
            case "USER":
                stage.user = value
            case "COPY":
                self._copy(shlex.split(value), stage)
            case "RUN":
                self._run(value, stage)
            case "CMD":
                stage.command = json.loads(value)
            case _:
                assert kind in ("ARG", "COMMENT"), f"nobody knows what {kind} means"

    def inside(self, path: str) -> Path:
        """Where a path of the image is."""
        return self.root / path.lstrip("/")

    def environment(self, stage: Stage) -> dict[str, str]:
        """The variables of a process of the image: its own alone."""
        own = {"PATH": os.defpath} | {key: self._rewritten(value) for key, value in stage.environment.items()}
        own["PATH"] = own["PATH"].replace(os.defpath, f"{self.inside('/usr/local/bin')}:{os.defpath}")
        return own | {"LD_LIBRARY_PATH": str(self.inside("/usr/local/lib"))}  # of a Python that is built as a library

    def _copy(self, words: list[str], stage: Stage) -> None:
        source = ROOT
        if words[0].startswith("--from="):
            source = self.stages[words.pop(0).removeprefix("--from=")].files
        *names, target = words
        place = self.inside(target if target.startswith("/") else f"{stage.workdir}/{target.removeprefix('./')}")
        for name in names:
            path = source / name.lstrip("/")
            if source == ROOT:
                assert name in _let_through(), f".dockerignore keeps {name} from Docker"
            if path.is_dir():
                pycache = shutil.ignore_patterns("__pycache__")
                shutil.copytree(path, place, symlinks=True, dirs_exist_ok=True, ignore=pycache)
            else:
                into = place / path.name if target.endswith("/") else place
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, into)

    def _run(self, command: str, stage: Stage) -> None:
        for word, other in self._replaced.items():
            command = command.replace(word, other)
        environment = self.environment(stage) | self._machine
        environment["PATH"] = f"{self._folder / 'stubs'}:{environment['PATH']}"
        done = ran("/bin/sh", "-c", self._rewritten(command), cwd=self.inside(stage.workdir), env=environment)
        assert done.returncode == 0, f"RUN {command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    def _rewritten(self, text: str) -> str:
        return _ABSOLUTE.sub(f"{self.root}/", text)


def _let_through() -> list[str]:
    """The lines of .dockerignore that let something through; it begins with a line that keeps all."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    return [line[1:] for line in lines if line.startswith("!")]


def test_hadolint_finds_nothing_and_every_image_ends_as_a_user_without_rights() -> None:
    """The user of the manifests: cpu has it, and mpi, which installs as root, ends with it."""
    done = ran(Path(sys.executable).with_name("hadolint"), "--config", FILE.with_name("hadolint.yaml"), FILE)
    assert done.returncode == 0, done.stdout
    assert re.findall(r"^USER (.*)", FILE.read_text(), re.MULTILINE) == ["1000:1000", "0:0", "1000:1000"]


def pinned() -> dict[str, Version]:
    """Name and version of every line of requirements.txt and torch.txt."""
    lines = [line for file in (PINS, PINS.with_name("torch.txt")) for line in file.read_text().splitlines()]
    found = {}
    for line in lines:
        if not line.startswith("#"):
            name, _, version = line.partition(" ")[0].partition("==")
            found[canonicalize_name(name)] = Version(version)
    return found


def test_scripts_are_copied_with_the_scripts_that_they_source() -> None:
    copied = " ".join(re.findall(r"^COPY (?!--)(.*) \S+$", FILE.read_text(), re.MULTILINE)).split()
    scripts = {word for word in copied if word.endswith(".sh")}
    texts = "\n".join((ROOT / each).read_text() for each in scripts)
    sourced = {f"tools/{name}" for name in re.findall(r"^\. .*/(\w+\.sh)\"$", texts, re.MULTILINE)}
    assert sourced and sourced <= scripts
    assert {f"!{each}" for each in scripts} <= {*(ROOT / ".dockerignore").read_text().splitlines()}


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
        lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        assert lines and all(re.fullmatch(r"\S+==\S+( ;[^#]*)?( --hash=sha256:[0-9a-f]{64})+", line) for line in lines)
    installs = re.findall(r"pip install .*--requirement", FILE.read_text())
    assert len(installs) == 2 and all("--no-deps --require-hashes" in install for install in installs)


def torch_of(machine: dict[str, str], folder: Path) -> Path:
    """torch.txt; where this machine has the CPU build, as torch.txt says to make it for that."""
    if "+cpu" not in metadata.version("torch"):
        return PINS.with_name("torch.txt")
    asked = [f"{name}=={pinned()[name]}" for name in ("torch", "torchvision")]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder / "wheels", *asked]
    subprocess.run(command, env=os.environ | machine, check=True)
    lines = []
    for wheel in (folder / "wheels").iterdir():
        name, version, *_ = parse_wheel_filename(wheel.name)
        lines.append(f"{name}=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
    (folder / "torch.txt").write_text("".join(lines))
    return folder / "torch.txt"


@pytest.fixture
def image() -> Iterator[Built]:
    """The target cpu, in a folder that every user may look into.

    pip finds packages as on this machine, and Horovod is built once per machine, as for `make install`.
    """
    machine = {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "SSL_", "http", "HTTP"))}
    wheels = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crossmedia"
    with tempfile.TemporaryDirectory(prefix="image-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        ours = {"HOME": name, "PIP_CACHE_DIR": str(Path.home() / ".cache" / "pip"), "PIP_NO_CACHE_DIR": "0"}
        replaced = {"/build/cache": str(wheels), "deploy/docker/torch.txt": str(torch_of(machine, folder))}
        yield Built(folder, "cpu", machine | ours, replaced)


def call(image: Built, *words: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command of the image as its user, with its environment and nothing of ours."""
    user = int(image.final.user.partition(":")[0])
    identity = {"user": user, "group": user, "extra_groups": []} if os.geteuid() == 0 else {}
    environment = image.environment(image.final) | ({"HOME": str(home), "TMPDIR": str(home)} if home else {})
    return ran(*words, cwd=image.inside(image.final.workdir), env=environment, timeout=250, **identity)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(1500)
def test_the_image_starts_without_tools_of_the_build_and_two_ranks_train_as_its_user(image: Built) -> None:
    """From drawn clothes to a trained run, by the commands of the manifests, and the root stays as it was."""
    done = call(image, *image.final.command)
    assert done.returncode == 0 and "serve" in done.stdout, done.stderr
    asked = image.asked.read_text()
    assert "apt-get install --yes --no-install-recommends g++ make" in asked
    assert "useradd --uid 1000" in asked
    listing = "import importlib.metadata as m; print(*[d.name for d in m.distributions()])"
    packages = set(call(image, "python", "-c", listing).stdout.split())
    assert {"crossmedia", "horovod", "torch", "dask"} <= packages
    assert not {"pip", "cmake", "wheel", "pytest", "mypy"} & packages
    assert not list(image.inside("/opt").rglob("*.whl")) and not image.inside("/build").exists()
    before = {path for path in image.root.rglob("*") if "__pycache__" not in path.parts}
    with tempfile.TemporaryDirectory(prefix="home-") as name:
        home = Path(name)
        os.chown(home, 1000 if os.geteuid() == 0 else -1, -1)
        for line in (
            "python -m jobs.make_demo_data --out {home}/demo --items 60 --users 40 --days 3",
            "dask-submit -n 1 jobs/extract_features.py --images {home}/demo/images --store {home}/features"
            " --backbone resnet18:avgpool --weights random:0",
            "python -m jobs.build_samples --logs {home}/demo/logs --samples {home}/samples --scratch {home}",
            "horovodrun --gloo -np 2 python -m trainer.main --set=data.samples={home}/samples"
            " --set=data.store={home}/features --set=run.dir={home}/runs --set=run.name=a --set=train.max_steps=3"
            " --set=data.global_batch_size=64",
        ):
            done = call(image, *line.format(home=home).split(), home=home)
            assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert (home / "runs" / "a" / "report.json").is_file()
    assert {path for path in image.root.rglob("*") if "__pycache__" not in path.parts} == before
