"""Files that commands write: whole or not at all, and JSON that every reader takes."""

import json
import math
from pathlib import Path
from typing import Any

from featurestore.errors import UserError


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file beside `path` and rename it: readers find all of the old or of the new content. Raises OSError."""
    part = path.with_name(f".{path.name}")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    part.replace(path)


def write_json(path: Path, values: Any) -> None:
    """Write `values` as JSON, what is not finite as null, by `replace_file`. Raises OSError."""
    replace_file(path, json.dumps(_finite(values), indent=2, allow_nan=False) + "\n")


def write_json_option(path: Path | None, values: Any) -> None:
    """Write what a command found to the file of its option --json, where that is given. Raises UserError."""
    try:
        if path is not None:
            write_json(path, values)
    except OSError as error:
        raise UserError(f"cannot write --json {path}: {error}") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
