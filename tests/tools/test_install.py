"""The installation's scripts, with Pythons that only write down what they were asked to do; and the Makefile."""

import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli import ran

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
TAG = "torch2.13.0-cp311-x86_64"
FAKE_PYTHON = """\
#!/usr/bin/env bash
# Python {version} as far as the scripts see it: it writes down its packages and makes environments of itself.
me=$0
home=$(dirname "$(dirname "$me")")
case "$*" in
  "-c import sys; print("*version_info*) echo {version} ;;
  "-c import ensurepip, venv") ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$me" "$3/bin/python" && touch "$3/pyvenv.cfg" ;;
  *purelib*) echo "$home" ;;
  *find_spec*) echo "$home/horovod" ;;
  "-m pip install "*fuxictr*) [ -z "${{NO_FUXICTR:-}}" ] || {{ echo "no wheel for this Python"; exit 1; }} ;;
  "-m pip install "*"-e ."*) echo "$*" >>"$home/installs" ;;
  "-m pip download "*) env >"$home/environment"; for n in {{1..5000}}; do echo "error: $n"; done; exit 1 ;;
  "-m pip list "*) cat "$home/packages" 2>/dev/null || true ;;
  "-m pip uninstall "*) rm -f "$home/packages" ;;
  "-m pip install "*horovod*)
    echo "horovod==0.28.1" >"$home/packages"
    echo "${{@: -1}}" >>"$home/wheels"
    mkdir -p "$home/horovod/runner/util"
    echo "            addr = ('', port)" >"$home/horovod/runner/util/network.py"
    printf 'def run_commandline():\n    _run(args)\n' >"$home/horovod/runner/launch.py"
    echo "    global_rendezv_port = rendezvous.start()" >"$home/horovod/runner/gloo_run.py" ;;
  "-c import sys; print(sys.prefix)") echo "$home" ;;
  *"import platform"*) echo {tag} ;;
esac
"""


@dataclass(frozen=True)
class Place:
    """A project of the scripts alone, with a Python 3.11 and others on its path."""

    folder: Path

    @property
    def venv(self) -> Path:
        return self.folder / ".venv"

    def python(self, name: str, version: str) -> None:
        file = self.folder / "bin" / name
        file.write_text(FAKE_PYTHON.format(version=version, tag=TAG))
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": str(self.folder / "bin"), "HOME": str(self.folder), **environment}
        return ran(*command, cwd=self.folder, env=env, timeout=60)

    def install(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("tools/install.sh", ".venv", **environment)

    def build(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("tools/build_horovod.sh", ".venv/bin/python", "cache", **environment)

    def wheels(self) -> list[str]:
        """The Horovod wheels that were installed so far, by the names of their folders."""
        file = self.venv / "wheels"
        return [Path(line).parent.name for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "tools").mkdir()
    (tmp_path / "bin").mkdir()
    for name in ("install.sh", "install_for.sh", "build_horovod.sh", "telling.sh"):
        shutil.copy(ROOT / "tools" / name, tmp_path / "tools" / name)
    names = "bash c++ cat cp dirname env grep ln ls mkdir mktemp rm sed sleep tail touch"
    for name in names.split():
        found = shutil.which(name)
        assert found
        (tmp_path / "bin" / name).symlink_to(found)
    for build in (f"horovod-0.28.1-{TAG}", f"horovod-0.28.1-{TAG}-NCCL"):
        (tmp_path / "cache" / build).mkdir(parents=True)
        (tmp_path / "cache" / build / "horovod-0.28.1-any.whl").touch()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "crossmedia").symlink_to(tmp_path / "cache")
    made = Place(tmp_path)
    made.python("python3", "3.11")
    return made


def version_of(place: Place) -> str:
    found = place.run(str(place.venv / "bin" / "python"), "-c", "import sys; print(version_info)")
    return found.stdout.strip()


class TestPython:
    @pytest.mark.parametrize(
        ("pythons", "expected"),
        [
            ({"python3": "3.13"}, "3.13"),
            ({"python3": "3.12", "python3.13": "3.13"}, "3.12"),
            ({"python3": "3.10", "python3.11": "3.11", "python3.13": "3.13"}, "3.13"),
            ({"python3": "3.14", "python3.11": "3.11"}, "3.11"),
        ],
    )
    def test_default(self, place: Place, pythons: dict[str, str], expected: str) -> None:
        for name, version in pythons.items():
            place.python(name, version)
        done = place.install()
        assert done.returncode == 0, done.stderr
        assert version_of(place) == expected

    @pytest.mark.parametrize(
        ("asked", "told"),
        [
            ({}, "No Python 3.11, 3.12 or 3.13 "),
            ({"PYTHON": "python9"}, "PYTHON=python9 does not run; name a Python 3.11, 3.12 or 3.13\n"),
            ({"PYTHON": "python3.10"}, "PYTHON=python3.10 is Python 3.10; name a Python 3.11, 3.12 or 3.13\n"),
            ({"PYTHON": "cat"}, "PYTHON=cat does not run; name a Python 3.11, 3.12 or 3.13\n"),
            ({"HOROVOD": "none"}, "HOROVOD=none: it should be no, to leave Horovod out, or yes\n"),
            ({"HOROVOD": "no", "HOROVOD_GPU_OPERATIONS": "NCCL"}, "HOROVOD=no leaves out what "),
        ],
    )
    def test_a_wrong_wish_is_one_line(self, place: Place, asked: dict[str, str], told: str) -> None:
        for name in ("python3", "python3.10"):
            place.python(name, "3.10")
        done = place.install(**asked)
        assert (done.returncode, done.stdout) == (1, "") and not place.venv.exists()
        assert done.stderr.startswith(told) and done.stderr.count("\n") == 1

    def test_an_environment_of_another_python_is_made_anew_and_another_folder_left_alone(self, place: Place) -> None:
        place.python("python3.13", "3.13")
        place.venv.mkdir()
        (place.venv / "thesis.txt").touch()
        done = place.install()
        assert done.returncode == 1
        assert "not a virtual environment" in done.stderr and done.stderr.count("\n") == 1
        (place.venv / "thesis.txt").unlink()
        place.venv.rmdir()
        assert place.install().returncode == 0
        (place.venv / "old").touch()
        assert ".venv is of Python" not in place.install(PYTHON="python3").stdout
        assert (place.venv / "old").exists()
        assert ".venv is of Python 3.11; it is made again with Python 3.13" in place.install(PYTHON="python3.13").stdout
        assert version_of(place) == "3.13" and not (place.venv / "old").exists()
        place.install()
        assert version_of(place) == "3.13", "without PYTHON the environment stays what it is"


def test_what_takes_long_is_told_as_it_goes_on_and_ends_as_its_command_does(place: Place) -> None:
    (place.folder / "bin" / "sleep").unlink()
    (place.folder / "bin" / "sleep").write_text("#!/bin/bash\nread -rt 0.05 <> <(:) || true\n")
    (place.folder / "bin" / "sleep").chmod(0o755)
    work = "work() { (set -e; read -rt 0.5 <> <(:) || true; false; true) }"
    steps = f"set -e; . tools/telling.sh; {work}; telling waiting work"
    done = place.run("bash", "-c", steps + "; echo unreachable")
    assert done.returncode == 1 and re.match(r"waiting\nwaiting: \d+ s\n", done.stdout), done
    assert "unreachable" not in done.stdout


def test_horovod_can_be_built_beside_other_work_and_releases_of_torch_be_named(place: Place) -> None:
    torch = {"TORCH": "torch==2.13.0 torchvision==0.28.0"}
    assert place.run("tools/install.sh", ".venv", "packages", **torch).returncode == 0
    assert place.wheels() == [] and not (place.venv / ".installed").exists()
    assert place.run("tools/install.sh", ".venv", "horovod").returncode == 0
    assert len(place.wheels()) == 1 and (place.venv / ".installed").exists()
    installs = (place.venv / "installs").read_text()
    assert installs.count("\n") == 1, "the packages were installed once"
    assert f"-e .[explorer,notebook] {torch['TORCH']}" in installs


@pytest.fixture
def installed(place: Place) -> Place:
    assert place.install().returncode == 0
    return place


def test_what_targets_add_is_noted_and_a_peer_that_cannot_be_installed_is_one_line(installed: Place) -> None:
    for purpose in ("docs", "peers", "tests"):
        done = installed.run("tools/install_for.sh", ".venv", purpose)
        assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
        assert done.stdout.startswith("installing ")
        assert (installed.venv / f".for-{purpose}").exists()
        packages = (installed.venv / "installs").read_text()
        assert ("-e .[dev,bench,explorer]" in packages) is (purpose == "tests")
    done = installed.run("tools/install_for.sh", ".venv", "peers", NO_FUXICTR="1")
    assert done.returncode == 0, done.stderr
    assert "FuxiCTR could not be installed (.venv/fuxictr.log says why); the benchmarks leave it out" in done.stdout
    assert "no wheel" in (installed.venv / "fuxictr.log").read_text()
    assert not (installed.venv / "fuxictr").exists(), "where it is, benchmarks.quality takes it"


class TestHorovod:
    CPU, NCCL = f"horovod-0.28.1-{TAG}", f"horovod-0.28.1-{TAG}-NCCL"

    def test_is_installed_once_and_stays_where_another_is_unknown_or_does_not_build(self, installed: Place) -> None:
        assert installed.wheels() == [self.CPU]
        done = installed.build()
        assert (done.returncode, done.stdout) == (0, "horovod 0.28.1 is installed (CPU)\n")
        assert installed.wheels() == [self.CPU]
        runner = installed.venv / "horovod" / "runner"
        for file in (runner / "gloo_run.py", runner / "util" / "network.py"):
            assert file.read_text().count("HOROVOD_RENDEZVOUS_BIND") == 1, "its rendezvous listens at one address"
        ended = 'except RuntimeError as failure:\n        sys.exit(" ".join(str(failure).split()))\n'
        assert (runner / "launch.py").read_text().count(ended) == 1, "a failed job ends in a line, not in a traceback"
        done = installed.build(HOROVOD_GPU_OPERATIONS="MPI")
        told = "HOROVOD_GPU_OPERATIONS=MPI: it should be NCCL, or CPU for collectives by Gloo\n"
        assert (done.returncode, done.stdout, done.stderr) == (1, "", told)
        shutil.rmtree(installed.folder / "cache" / self.NCCL)
        done = installed.build(HOROVOD_GPU_OPERATIONS="NCCL")
        assert done.returncode == 1
        lines = done.stderr.splitlines()
        assert "error: 1" in lines and len(lines) < 20
        assert lines[-1] == "horovod did not build; all that the build said: cache/horovod-build.log"
        assert "error: 5000" in (installed.folder / "cache" / "horovod-build.log").read_text()
        assert installed.wheels() == [self.CPU]
        assert installed.build().stdout == "horovod 0.28.1 is installed (CPU)\n"

    def test_nccl_replaces_what_is_installed_and_it_can_be_taken_away(self, installed: Place) -> None:
        done = installed.build(HOROVOD_GPU_OPERATIONS="NCCL")
        assert (done.returncode, done.stdout) == (0, "horovod 0.28.1 is installed (NCCL)\n"), done.stderr
        assert installed.wheels() == [self.CPU, self.NCCL]
        assert installed.build().stdout == "horovod 0.28.1 is installed (NCCL)\n", "as it was last asked for"
        assert installed.wheels() == [self.CPU, self.NCCL]
        installed.build(HOROVOD_GPU_OPERATIONS="CPU")
        assert installed.wheels() == [self.CPU, self.NCCL, self.CPU]
        packages = installed.venv / "packages"
        assert packages.read_text() == "horovod==0.28.1\n"
        assert installed.install(HOROVOD="no").returncode == 0
        assert not packages.exists()
        assert installed.install(HOROVOD_GPU_OPERATIONS="CPU").returncode == 0
        assert packages.read_text() == "horovod==0.28.1\n"

    @pytest.mark.parametrize(
        ("operations", "passed"), [("CPU", []), ("NCCL", ["HOROVOD_GPU_ALLREDUCE=NCCL", "HOROVOD_GPU_OPERATIONS=NCCL"])]
    )
    def test_horovods_build_gets_what_was_asked_for(self, installed: Place, operations: str, passed: list[str]) -> None:
        """For the CPU none of its variables for GPUs, of which one alone would ask for a CUDA toolkit."""
        shutil.rmtree(installed.folder / "cache")
        (installed.venv / ".horovod").unlink()
        others = {"HOROVOD_GPU_ALLREDUCE": "NCCL", "HOROVOD_NCCL_HOME": "/nccl"}
        done = installed.build(HOROVOD_GPU_OPERATIONS=operations, **others)
        assert done.returncode == 1, "the download fails"
        got = (installed.venv / "environment").read_text().splitlines()
        assert sorted(line for line in got if line.startswith("HOROVOD_GPU")) == passed
        assert "HOROVOD_NCCL_HOME=/nccl" in got


def test_without_horovod_it_needs_no_compiler_and_stays_so_until_asked(place: Place) -> None:
    (place.folder / "bin" / "c++").unlink()
    shutil.rmtree(place.folder / "cache")
    done = place.install(HOROVOD="no")
    assert done.returncode == 0, done.stderr
    assert "Horovod is left out: torchrun starts several ranks" in done.stdout
    assert (place.venv / ".installed").read_text() == "PYTHON= HOROVOD_GPU_OPERATIONS= HOROVOD=no\n"
    assert place.install().returncode == 0
    assert place.wheels() == []
    done = place.install(HOROVOD="yes")
    assert done.returncode == 1 and "No C++ compiler" in done.stderr


@pytest.mark.parametrize(
    ("asked", "runs"),
    [
        ({}, False),
        ({"PYTHON": "python3.13"}, False),
        ({"PYTHON": "python3.12"}, True),
        ({"PYTHON": "python3.13", "HOROVOD_GPU_OPERATIONS": "NCCL"}, True),
        ({"HOROVOD": "no"}, True),
    ],
)
def test_make_runs_the_script_where_more_was_asked_for(tmp_path: Path, asked: dict[str, str], runs: bool) -> None:
    (tmp_path / ".packages").touch()
    (tmp_path / ".installed").write_text("PYTHON=python3.13 HOROVOD_GPU_OPERATIONS=\n")
    choices = ("PYTHON", "HOROVOD", "HOROVOD_GPU_OPERATIONS", "MAKEFLAGS")  # its own, where make runs the tests
    clean = {name: value for name, value in os.environ.items() if name not in choices}
    by_environment = ["make", "-n", "install", f"VENV={tmp_path}"]
    by_argument = [*by_environment, *(f"{name}={value}" for name, value in asked.items())]
    for command, environment in ((by_environment, clean | asked), (by_argument, clean)):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert ("tools/install.sh" in done.stdout) is runs, done.stdout


def test_newest_and_oldest_versions_have_environments_and_pythons_are_the_same_everywhere(tmp_path: Path) -> None:
    command = ["make", "-n", "test-versions", f"VERSIONS_DIR={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in ("newest", "oldest"):
        assert f"tools/install.sh {tmp_path / name} horovod\n" in done.stdout
        assert f" {tmp_path / name}/bin/python -m pytest " in done.stdout
    bounds = dict(re.findall(r"^    (torch\w*)>=(.*),", (ROOT / "setup.cfg").read_text(), re.MULTILINE))
    oldest = " ".join(f"{package}=={version}.0" for package, version in bounds.items())
    assert f'PYTHON=python3.11 TORCH="{oldest}"' in done.stdout
    setup, script = (ROOT / "setup.cfg").read_text(), (ROOT / "tools" / "install.sh").read_text()
    versions = ["3.11", "3.12", "3.13"]
    assert [line.split()[-1] for line in setup.splitlines() if "Python :: 3." in line] == versions
    assert "python_requires = >=3.11,<3.14" in setup
    assert f"case $1 in {' | '.join(versions)}) ;;" in script
    assert 'target-version = "py311"' in (ROOT / ".ruff.toml").read_text()
    assert "NEWEST_PYTHON := 3.13" in (ROOT / "Makefile").read_text()
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in versions
