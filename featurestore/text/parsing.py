"""JSON and YAML of files that anybody may have written: whatever is wrong with them is a ValueError of one line."""

import json
from typing import Any

import yaml
from pydantic import ValidationError

from featurestore.text.plain import one_line

_TOO_DEEP = "its lists and mappings are nested too deep"


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError, also for nesting that would exhaust the stack."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text, of plain types alone. Raises ValueError."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from error
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error


def first_mistake(error: ValidationError) -> str:
    """Return the first of pydantic's complaints in one line, and how many more there are."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    where = ".".join(map(str, found[0]["loc"]))
    message = found[0]["msg"].removeprefix("Value error, ")  # of checks of our own
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return f"{where}: {message}{more}" if where else f"{message}{more}"
