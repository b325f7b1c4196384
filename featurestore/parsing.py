"""Parsing of untrusted JSON and YAML files: any mistake is a ValueError with a message of one line."""

import json
import re
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from featurestore.problems import Problem
from featurestore.text import one_line, without_passwords

_SHORT = 60  # characters of a value that a message shows
_MOST_NESTED = 100
"""Lists and mappings inside each other in YAML: PyYAML takes a second for a thousand brackets, as each may begin a key,
and composes by recursion, where a finalizer that the collector runs at the stack's last frame fails."""


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError, also for nesting that would exhaust the stack."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(Problem.NESTED_TOO_DEEP.of()) from error


_EXPONENT = ("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


class _Loader(yaml.SafeLoader):
    """Loader by the rules of YAML 1.2: 1e-3 is a number, a date is a text."""

    _depth = 0  # of the node that is being composed

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose the next node, where it is not inside too many others."""
        if self._depth > _MOST_NESTED:
            raise yaml.YAMLError(Problem.NESTED_TOO_DEEP.of())
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        """Take the next bracket, where it is not inside too many others."""
        if self.flow_level >= _MOST_NESTED:
            raise yaml.YAMLError(Problem.NESTED_TOO_DEEP.of())
        super().fetch_flow_collection_start(TokenClass)


_Loader.yaml_implicit_resolvers = {
    first: [each for each in resolvers if each[0] != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader` would take for numbers."""


for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver(*_EXPONENT)


class _WithoutAliases(_Loader):
    """Aliases are refused: a few lines of them stand for more values than a machine can hold."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(Problem.HAS_ALIASES.of())
        return super().compose_node(parent, index)


def parse_yaml(text: str, aliases: bool = True) -> Any:
    """Return the value of a YAML text, of plain types alone. Raises ValueError.

    `aliases`: whether it may have some; not so for a file of somebody else's, as they can stand for endless values."""
    try:
        return yaml.load(text, _Loader if aliases else _WithoutAliases)
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from error
    except (LookupError, AttributeError, OverflowError) as error:  # of PyYAML's own for "!!bool x" and the like
        raise ValueError(Problem.NOT_WHAT_ITS_TAG_SAYS.of(error)) from error


def format_yaml(values: Any) -> str:
    """Format plain values as YAML; `parse_yaml` returns them."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def first_mistake(error: ValidationError) -> str:
    """Return the first of pydantic's complaints in one line, and how many more there are."""
    lines = mistakes(error)
    return lines[0] + (f", and {len(lines) - 1} more" if len(lines) > 1 else "")


def mistakes(error: ValidationError, whole: str = "") -> list[str]:
    """Return pydantic's complaints, one line for each: the field, what it should be, and its value if that is short.

    The value of a field that is not known is not shown: it may be a password. `whole`: what is named where the
    complaint is of no field."""
    return [_mistake(details, whole) for details in error.errors(include_url=False, include_context=False)]


def _mistake(details: ErrorDetails, whole: str) -> str:
    message = details["msg"].removeprefix("Value error, ")  # of checks of our own
    message = message.replace("Input should", "it should").replace("Extra inputs are", "it is")
    where, given = ".".join(map(str, details["loc"])), details["input"]
    if details["type"] == "missing":
        return f"{where} is missing"
    if isinstance(given, str | int | float | None) and where and details["type"] != "extra_forbidden":
        shown = without_passwords(repr(given))
        where += f"={shown}" if len(shown) <= _SHORT else ""
    return f"{where or whole}: {message}" if where or whole else message
