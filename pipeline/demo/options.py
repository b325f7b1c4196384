"""What a person may choose of a demo; quick to import, for the help of its job."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Taste = Literal["items", "pictures"]
"""What shows a taste: IDs and pictures of well-known items, or pictures alone, where the IDs are rarely seen."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What to make. `items` counts drawings; with `images` all readable ones of that folder are the items."""

    out: Path
    items: int = 1400
    users: int = 8000
    days: int = 19
    seed: int = 0
    images: Path | None = None
    labels: Path | None = None
    taste: Taste = "items"
    force: bool = False
