"""The runs of the benchmark: what each one is told, where its figures are kept, and how it is started."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One run, of ours or of FuxiCTR. `settings`: of the trainer, or arguments of FuxiCTR's class; no store: no images."""

    side: Literal["ours", "fuxictr"]
    net: str
    samples: str
    store: str | None = None
    schema: str | None = None
    train_days: Sequence[str] | None = None
    test_days: Sequence[str] | None = None
    batch_size: int
    epochs: int
    seed: int
    width: int = 12
    hidden: Sequence[int] = (200, 80)
    threads: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
