"""Files that commands write: complete or not at all; numbers that JSON does not have become null."""

import json
import math
from pathlib import Path
from typing import Any

from featurestore.errors import UserError


def replace_file(path: Path, content: str | bytes) -> None:
    """Write to a hidden file in the same folder and rename it, so that readers find all of the old or of the new
    content. Raises OSError."""
    part = path.with_name(f".{path.name}")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    part.replace(path)


def write_json(path: Path, values: Any) -> None:
    """Write `values` as JSON by `replace_file`; numbers that are not finite become null. Raises OSError."""
    replace_file(path, json_text(values))


def json_text(values: Any) -> str:
    """Format `values` as the JSON of a file; numbers that are not finite become null."""
    return json.dumps(_finite(values), indent=2, allow_nan=False) + "\n"


def write_json_option(path: Path | None, values: Any) -> None:
    """Write the figures of a command to the file of its option --json, if that is given. Raises UserError."""
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
