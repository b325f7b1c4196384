"""Writes the settings' pages from their classes: trainer/presets/dicm.yaml, and docs/SETTINGS.md.

python tools/settings.py            rewrite both
python tools/settings.py --check    exit 1 when one of them does not say what the classes say
"""

import ast
import inspect
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types as limits
import yaml
from pydantic.fields import FieldInfo

from trainer.config.config import Config
from trainer.config.options import DECISIONS, ExactTableConfig, Section, decision_of

ROOT = Path(__file__).resolve().parent.parent
PRESET, PAGE = ROOT / "trainer/presets/dicm.yaml", ROOT / "docs/SETTINGS.md"
WIDTH, COLUMN = 120, 34
INTRODUCTION = """\
# Settings

Written by `python tools/settings.py` from the classes in `trainer/config`; `make lint` checks it. A setting is given by
`--set section.name=VALUE` or in a YAML file by `--config`; what is not given is as in `trainer/presets/dicm.yaml`. An
unknown name, a wrong type and a value out of its limits end the command, with one line each. A run's folder keeps all
settings in `config.yaml`.

The column `decides` tells which settings may differ between two runs, or two starts of one: resuming accepts other
values of what decides `training` or `nothing`; `trainer.daily` those of `nothing` alone, for all days of a table.
{decisions}
"""


def sections() -> Iterator[tuple[str, type[Section]]]:
    """List the sections by name."""
    for name, field in Config.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        yield name, field.annotation


def texts_of(section: type[Section]) -> dict[str, str]:
    """Read what is below each setting in the source of its class."""
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


def preset() -> str:
    """Write every setting with its default and its text as YAML."""
    lines = [
        "# The default run: DICM on the places where the jobs write. Any value is replaced by --config FILE or --set",
        "# section.field=value. Written from the classes in trainer/config by tools/settings.py.",
    ]
    for name, section in sections():
        lines += ["", f"{name}:"]
        texts = texts_of(section)
        for setting, field in section.model_fields.items():
            block = isinstance(field.default, dict) and bool(field.default)
            value = f"  {setting}:" if block else f"  {setting}: {_yaml(field.default)}"
            choices = f"{' | '.join(_choices(field.annotation))}. " if _choices(field.annotation) else ""
            text = textwrap.wrap(choices + texts[setting], WIDTH - COLUMN - 2, break_on_hyphens=False)
            for number, part in enumerate(text):
                lines.append(f"{'' if number else value:{COLUMN - 1}} # {part}")
            if block:
                lines += [f"    {key}: {_yaml(each)}" for key, each in field.default.items()]
    return "\n".join(lines) + "\n"


def page() -> str:
    """Write a table for each section as Markdown."""
    meanings = "\n".join(f"- `{name}`: {meaning}." for name, meaning in DECISIONS.items())
    parts = [INTRODUCTION.format(decisions=f"\n{meanings}")]
    shown: list[tuple[str, type[Section]]] = [*sections(), ("model.tables.NAME", ExactTableConfig)]
    for name, section in shown:
        texts = texts_of(section)
        rows = [
            (
                f"`{setting}`",
                _values(field.annotation, field.metadata),
                _default(field),
                decision_of(field),
                texts[setting],
            )
            for setting, field in section.model_fields.items()
        ]
        cells = [("name", "values", "default", "decides", "meaning"), ("---",) * 5, *rows]
        table = "\n".join("| " + " | ".join(each.replace("|", "\\|") for each in row) + " |" for row in cells)
        parts.append(f"## {name}\n\n{' '.join((inspect.getdoc(section) or '').split())}\n\n{table}\n")
    return "\n".join(parts)


def _yaml(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
        .removesuffix("\n")
        .removesuffix("\n...")
    )


def _default(field: FieldInfo) -> str:
    return "needed" if field.is_required() else f"`{_yaml(field.default)}`"


def _choices(kind: Any) -> list[str]:
    """List the words that a setting may be; none where it may be something else."""
    if get_origin(kind) in (Union, types.UnionType):
        each = [_choices(part) for part in get_args(kind)]
        return [word for words in each for word in words] if all(each) else []
    return [str(each) for each in get_args(kind)] if get_origin(kind) is Literal else []


def _values(kind: Any, metadata: list[Any]) -> str:
    """Say in words what a setting may be."""
    origin, inside = get_origin(kind), get_args(kind)
    if metadata or hasattr(kind, "__metadata__"):
        return _limited(kind.__origin__ if hasattr(kind, "__metadata__") else kind, [*metadata, *_unfolded(kind)])
    if words := _choices(kind):
        return ", ".join(f"`{word}`" for word in words)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_values(part, []) for part in inside))
    if origin in (list, dict):
        return f"{'list' if origin is list else 'names, each with'}: {_values(inside[-1], [])}"
    if isinstance(kind, type) and issubclass(kind, Section):
        return "a mapping, see below"
    return {int: "whole number", float: "number", bool: "`true`, `false`", str: "text", type(None): "`null`"}[kind]


def _unfolded(kind: Any) -> list[Any]:
    """List the limits of an annotated type, those in its Field(...)s too."""
    metadata = getattr(kind, "__metadata__", ())
    return [part for each in metadata for part in (each.metadata if isinstance(each, FieldInfo) else [each])]


def _limited(kind: Any, metadata: list[Any]) -> str:
    bounds = {type(each): each for each in metadata}
    said = [
        f"{words} {getattr(bounds[limit], name):,.15g}"
        for limit, words, name in (
            (limits.Ge, "from", "ge"),
            (limits.Gt, "above", "gt"),
            (limits.Le, "to", "le"),
            (limits.Lt, "below", "lt"),
        )
        if limit in bounds and getattr(bounds[limit], name) != 2**63
    ]
    return " ".join([_values(kind, []), *said])


def main() -> int:
    """Rewrite or check both files; returns the exit code."""
    wanted = {PRESET: preset(), PAGE: page()}
    if "--check" in sys.argv[1:]:
        wrong = [str(file.relative_to(ROOT)) for file, text in wanted.items() if file.read_text("utf-8") != text]
        if wrong:
            print(f"not as the classes say: {', '.join(wrong)}; run tools/settings.py", file=sys.stderr)
        return 1 if wrong else 0
    for file, text in wanted.items():
        file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
