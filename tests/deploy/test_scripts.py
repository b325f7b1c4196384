"""Shell scripts: shellcheck finds nothing in any of them, wherever in the repository they are."""

import os
import re
import sys
from pathlib import Path

import pytest

from tests.cli import ran

ROOT = Path(__file__).parents[2]
SHELLCHECK = Path(sys.executable).with_name("shellcheck")


def scripts() -> list[Path]:
    """All tracked and new files that begin with the line of a shell, and what .sh and .sbatch are called."""
    listing = ran("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    files = [path for path in map(ROOT.joinpath, listing) if path.is_file()]
    shell = re.compile(rb"#!.*sh\s*\n")
    found = [path for path in files if path.suffix in (".sh", ".sbatch") or shell.match(path.read_bytes())]
    assert {ROOT / name for name in (".ci/run", "tools/install.sh", "tools/build_horovod.sh")} <= {*found}
    return found


def test_the_folder_of_a_key_is_of_its_job_alone(tmp_path: Path) -> None:
    """dask.sbatch: what each node does before it gets the key of the cluster."""
    text = (ROOT / "deploy" / "slurm" / "dask.sbatch").read_text()
    pattern = r"""srun "\$\{on_every_node\[@\]\}" bash -c '(.*?)' "\$tls"$"""
    (command,) = re.findall(pattern, text, re.DOTALL | re.MULTILINE)
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "own").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "own")
    for name, code in (("new", 0), ("own", 0), ("open", 1), ("link", 1), ("no/folder", 1)):
        environment = {"PATH": os.defpath, "SLURMD_NODENAME": "n2"}
        done = ran("bash", "-c", command, tmp_path / name, env=environment)
        assert done.returncode == code, name
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("path", scripts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck_finds_nothing(path: Path) -> None:
    done = ran(SHELLCHECK, "--shell=bash", "--external-sources", "--source-path=SCRIPTDIR", path, cwd=ROOT)
    assert done.returncode == 0, done.stdout
