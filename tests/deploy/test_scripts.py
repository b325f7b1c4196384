"""Shell scripts: shellcheck finds nothing in any of them, wherever in the repository they are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHELLCHECK = Path(sys.executable).with_name("shellcheck")


def scripts() -> list[Path]:
    """All tracked and new files that begin with the line of a shell, and what .sh and .sbatch are called."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    found = []
    for name in listing:
        path = ROOT / name
        if not path.is_file():
            continue
        with path.open("rb") as file:
            head = file.readline(80)
        if path.suffix in (".sh", ".sbatch") or (head.startswith(b"#!") and head.rstrip().endswith((b"sh", b"bash"))):
            found.append(path)
    return found


def test_all_are_looked_at() -> None:
    names = {str(path.relative_to(ROOT)) for path in scripts()}
    assert {".ci/run", "tools/install.sh", "tools/build_horovod.sh"} <= names


def test_the_folder_of_a_key_is_of_its_job_alone(tmp_path: Path) -> None:
    """dask.sbatch: what each node does before it gets the key of the cluster."""
    text = (ROOT / "deploy" / "slurm" / "dask.sbatch").read_text()
    (command,) = re.findall(
        r"""srun "\$\{on_every_node\[@\]\}" bash -c '(.*?)' "\$tls"$""", text, re.DOTALL | re.MULTILINE
    )
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "own").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "own")
    for name, code in (("new", 0), ("own", 0), ("open", 1), ("link", 1), ("no/folder", 1)):
        environment = {"PATH": os.defpath, "SLURMD_NODENAME": "n2"}
        done = subprocess.run(
            ["bash", "-c", command, tmp_path / name], env=environment, capture_output=True, check=False
        )
        assert done.returncode == code, name
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("path", scripts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck_finds_nothing(path: Path) -> None:
    command = [SHELLCHECK, "--shell=bash", "--external-sources", "--source-path=SCRIPTDIR", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
