"""Writes docs/SETTINGS.md, the page of all settings, from their classes.

python -m tools.settings            rewrite it
python -m tools.settings --check    exit 1 if it differs from the classes
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tools.tables import table
from trainer.config import DECISIONS, Config, ExactTableConfig, Section, decision_of

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/SETTINGS.md"
LIMITS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
TYPES = {
    "integer": "whole number",
    "number": "number",
    "boolean": "`true`, `false`",
    "string": "text",
    "null": "`null`",
    "object": "a mapping, see below",
}
INTRODUCTION = """\
# Settings

Written by `python -m tools.settings` from the classes in `trainer/config.py`; `make lint` checks it. A setting is given
by `--set section.name=VALUE` or in a YAML file by `--config`; what is not given has its default.
An unknown name, a wrong type and a value out of its limits end the command, with one line each. A run's folder keeps
all settings in `config.yaml`.

The column `decides` tells which settings may differ between two runs, or two starts of one: resuming accepts other
values of what decides `training` or `nothing`; `crossmedia daily` those of `nothing` alone, for all days of a table.
{decisions}
"""


def sections() -> Iterator[tuple[str, type[Section]]]:
    """List the sections by name."""
    for name, field in Config.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        yield name, field.annotation


def texts_of(section: type[Section]) -> dict[str, str]:
    """Read the text below each setting in the source of its class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for setting, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(setting, ast.AnnAssign) and isinstance(setting.target, ast.Name):
            says = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if not says:
                sys.exit(f"{section.__name__}.{setting.target.id} has no line below it that says what it means")
            found[setting.target.id] = " ".join(ast.literal_eval(text.value).split())  # type: ignore[attr-defined]
    return found


def page() -> str:
    """Write a table for each section as Markdown."""
    meanings = "\n".join(f"- `{name}`: {meaning}." for name, meaning in DECISIONS.items())
    parts = [INTRODUCTION.format(decisions=f"\n{meanings}")]
    shown: list[tuple[str, type[Section]]] = [*sections(), ("model.tables.NAME", ExactTableConfig)]
    for name, section in shown:
        texts, properties = texts_of(section), section.model_json_schema()["properties"]
        rows = [
            (
                f"`{setting}`",
                values(properties[setting]),
                "needed" if field.is_required() else f"`{_yaml(field.default)}`",
                decision_of(field),
                texts[setting],
            )
            for setting, field in section.model_fields.items()
        ]
        head = ("name", "values", "default", "decides", "meaning")
        about = " ".join((inspect.getdoc(section) or "").split())
        parts.append(f"## {name}\n\n{about}\n\n{table(head, rows)}")
    return "\n".join(parts)


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        value = {key: _plain(each) for key, each in value.items()}
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")


def _plain(value: Any) -> Any:
    """Give a section inside a value as a mapping of what it says itself."""
    return value.model_dump(exclude_unset=True) if isinstance(value, Section) else value


def _words(schema: dict[str, Any]) -> list[str]:
    """List the words that a setting may have; empty if it may have other values."""
    each = [_words(part) for part in schema.get("anyOf", [])]
    words = [word for part in each for word in part] if all(each) else []
    return words or schema.get("enum", [schema["const"]] if "const" in schema else [])


def values(schema: dict[str, Any]) -> str:
    """Describe the possible values of a setting, by its JSON schema."""
    if words := _words(schema):
        return ", ".join(f"`{word}`" for word in words)
    if parts := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(map(values, parts)))
    if "items" in schema:
        return f"list: {values(schema['items'])}"
    if "additionalProperties" in schema:
        return f"names, each with: {values(schema['additionalProperties'])}"
    limits = [f"{words} {schema[name]:,.15g}" for name, words in LIMITS.items() if schema.get(name, 2**63) != 2**63]
    return " ".join([TYPES[schema.get("type", "object")], *limits])


def main() -> int:
    """Rewrite or check the page; returns the exit code."""
    wanted = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(wanted, encoding="utf-8")
        return 0
    if PAGE.read_text("utf-8") == wanted:
        return 0
    print(f"out of date: {PAGE.relative_to(ROOT)}; run tools/settings.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
