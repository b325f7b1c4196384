"""Arrow Flight has one door. The import contracts of setup.cfg know packages alone, and this is a part of pyarrow."""

import ast
from pathlib import Path

from tests.featurestore.flight.conftest import ROOT

PACKAGES = ("featurestore", "pipeline", "trainer", "serving", "explorer", "jobs", "benchmarks")


def imports_flight(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)) if "flight" in text else ():
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.module == "pyarrow" and "flight" in names:
            return True
        if any(name.startswith("pyarrow.flight") for name in [*names, getattr(node, "module", None) or ""]):
            return True
    return False


def test_flight_is_imported_in_its_room_alone() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    found = {path.parent.relative_to(ROOT).as_posix() for path in files if imports_flight(path)}
    assert found == {"featurestore/flight"}
