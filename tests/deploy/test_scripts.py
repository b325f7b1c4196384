"""Shell scripts: shellcheck finds nothing in any of them, wherever in the repository they are."""

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


@pytest.mark.parametrize("path", scripts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck_finds_nothing(path: Path) -> None:
    command = [SHELLCHECK, "--shell=bash", "--external-sources", "--source-path=SCRIPTDIR", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
