"""The steps of a Dockerfile, run in a folder under a bare environment, where there is no Docker.

COPY, ENV, ARG, WORKDIR, USER and FROM of an earlier stage mean what they mean to Docker, with the folder in the place
of /. What would change this machine is left out: apt-get, groupadd and useradd only note what they were asked for.
COPY takes nothing that .dockerignore keeps from Docker. A base image is a copy of this Python in usr/local.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "docker" / "Dockerfile"
STUBS = ("apt-get", "groupadd", "useradd")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_ABSOLUTE = re.compile(r"(?<![\w.$}/])/(?=(?:opt|build|var|etc|home)(?:/|\b))")
"""Paths of an image in a command or a variable."""


@dataclass
class Stage:
    """What a stage has left: its files and its environment. `asked`: calls of apt-get and the like."""

    files: Path
    environment: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    command: list[str] = field(default_factory=list)


class Built:
    """Stages of the Dockerfile, built in `folder` one after the other, up to `target`.

    All of them lie at `folder`/root while they are built, as a virtual environment knows its own path.
    `machine`: variables of this machine that every RUN gets, such as those by which pip finds packages.
    """

    def __init__(self, folder: Path, target: str, machine: dict[str, str], replaced: dict[str, str]) -> None:
        """Run the steps. `replaced`: words of commands that become others. Raises CalledProcessError."""
        self.root, self._folder = folder / "root", folder
        self._machine, self._replaced = machine, replaced
        self.stages: dict[str, Stage] = {}
        self.asked = folder / "asked.txt"
        self._stubs()
        self.final = self._build(target)

    def _build(self, target: str) -> Stage:
        defaults: dict[str, str] = {}
        stage, name = Stage(self.root), ""
        for step in DockerfileParser(str(FILE)).structure:
            kind, value = step["instruction"], step["value"]
            if kind == "FROM":
                if name:
                    self._keep(name, stage)
                    if name == target:
                        return self._again(target)
                base, _, name = value.partition(" AS ")
                stage = self._begin(base)
                defaults = {}
            elif kind == "ARG":
                key, _, default = value.partition("=")
                defaults[key] = default
            elif kind != "COMMENT":
                self._step(kind, value, stage, defaults)
        self._keep(name, stage)
        return self._again(target)

    def _step(self, kind: str, value: str, stage: Stage, defaults: dict[str, str]) -> None:
        match kind:
            case "ENV":
                for word in shlex.split(value):
                    key, _, text = word.partition("=")
                    stage.environment[key] = _expanded(text, {"PATH": os.defpath} | stage.environment)
            case "WORKDIR":
                stage.workdir = value
                self.inside(value).mkdir(parents=True, exist_ok=True)
            case "USER":
                stage.user = value
            case "COPY":
                self._copy(shlex.split(value), stage)
            case "RUN":
                self._run(value, stage, defaults)
            case "CMD":
                stage.command = [word.strip(' "') for word in value.strip("[]").split(",")]
            case _:
                raise AssertionError(f"nobody knows what {kind} means")

    def inside(self, path: str) -> Path:
        """Where a path of the image is."""
        return self.root / path.lstrip("/")

    def environment(self, stage: Stage) -> dict[str, str]:
        """The variables of a process of the image: its own alone."""
        own = {"PATH": os.defpath} | {key: self._rewritten(value) for key, value in stage.environment.items()}
        own["PATH"] = own["PATH"].replace(os.defpath, f"{self.inside('/usr/local/bin')}:{os.defpath}")
        return own | {"LD_LIBRARY_PATH": str(self.inside("/usr/local/lib"))}  # of a Python that is built as a library

    def _begin(self, base: str) -> Stage:
        self.root.mkdir()
        if base not in self.stages:
            if base != "scratch" and sys.base_prefix not in ("/usr", "/usr/local"):
                shutil.copytree(sys.base_prefix, self.inside("/usr/local"), symlinks=True, ignore=_not_python)
            return Stage(self.root)
        before = self.stages[base]
        shutil.copytree(before.files, self.root, symlinks=True, dirs_exist_ok=True)
        return Stage(self.root, dict(before.environment), before.workdir, before.user, before.command)

    def _keep(self, name: str, stage: Stage) -> None:
        stage.files = self._folder / f"stage-{name}"
        self.root.rename(stage.files)
        self.stages[name] = stage

    def _again(self, target: str) -> Stage:
        stage = self.stages[target]
        stage.files.rename(self.root)
        return stage

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
                shutil.copytree(path, place, symlinks=True, dirs_exist_ok=True, ignore=_caches)
            else:
                into = place / path.name if target.endswith("/") else place
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, into)

    def _run(self, command: str, stage: Stage, defaults: dict[str, str]) -> None:
        for word, other in self._replaced.items():
            command = command.replace(word, other)
        environment = defaults | self.environment(stage) | self._machine
        environment["PATH"] = f"{self._folder / 'stubs'}:{environment['PATH']}"
        done = subprocess.run(
            ["/bin/sh", "-c", self._rewritten(command)],
            cwd=self.inside(stage.workdir),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"RUN {command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    def _rewritten(self, text: str) -> str:
        return _ABSOLUTE.sub(f"{self.root}/", text)

    def _stubs(self) -> None:
        """Programs that would change this machine."""
        folder = self._folder / "stubs"
        folder.mkdir()
        for name in STUBS:
            (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{shlex.quote(str(self.asked))}\n')
            (folder / name).chmod(0o755)


def _expanded(text: str, known: dict[str, str]) -> str:
    return _VARIABLE.sub(lambda found: known[found[1] or found[2]], text)


def _let_through() -> list[str]:
    """The lines of .dockerignore that let something through; it begins with a line that keeps all."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    return [line[1:] for line in lines if line.startswith("!")]


def _not_python(_: str, names: list[str]) -> set[str]:
    return {"__pycache__", "site-packages", "test", "share"} & set(names)


def _caches(_: str, names: list[str]) -> set[str]:
    return {"__pycache__"} & set(names)
