"""The Chromium to use: a named one, the one that tools/browser_packages.sh unpacks, or one of the path."""

import os
import shutil
from pathlib import Path

PACKAGES = Path(os.environ.get("BROWSER_PACKAGES") or Path(__file__).parent.parent.parent / "data" / "browser")
"""Where tools/browser_packages.sh has unpacked Chromium."""
PROGRAMS = ("chromium", "chromium-headless-shell", "google-chrome")
WAY_OUT = f"tools/browser_packages.sh {PACKAGES} fetches it, or name one by CHROMIUM=/path/to/chromium"


def find_chromium() -> str | None:
    """Find the program: that of the variable CHROMIUM, the unpacked one, or one of the path; else None."""
    named, unpacked = os.environ.get("CHROMIUM"), PACKAGES / "bin" / "chromium"
    if named:
        return named
    return str(unpacked) if unpacked.exists() else next(filter(None, map(shutil.which, PROGRAMS)), None)
