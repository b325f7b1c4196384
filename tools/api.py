"""Write docs/API.md, the Python API, from the signatures and docstrings of the sources; nothing is imported.

python tools/api.py            write the page
python tools/api.py --check    write nothing; exit 1 where the page is not what the sources say
"""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "API.md"
NAMES = {
    "The store": [
        "featurestore.FeatureStore",
        "featurestore.Snapshot",
        "featurestore.StoreInfo",
        "featurestore.ExtractorSpec",
        "featurestore.FeatureRows",
        "featurestore.FeatureStatistics",
        "featurestore.QuarantineRow",
        "featurestore.Codec",
        "featurestore.CodecSpec",
        "featurestore.to_bits",
        "featurestore.to_float32",
    ],
    "Keys": [
        "featurestore.key_of_uri",
        "featurestore.keys_of_uris",
        "featurestore.shard_of",
        "featurestore.owner_of",
    ],
    "Lookups": [
        "featurestore.FeaturePartition",
        "featurestore.Lookup",
        "featurestore.connect",
        "featurestore.FeatureClient",
        "featurestore.lookup.embedding.EmbeddingService",
        "featurestore.lookup.embedding.EmbeddingModel",
    ],
    "The trainer": [
        "trainer.config.config.load_config",
        "trainer.comm.comm.Comm",
        "trainer.comm.connecting.connect",
        "trainer.evaluation.predict.predict_run",
        "trainer.evaluation.predict.Predictions",
    ],
    "Serving": [
        "serving.bundle.open.Bundle",
        "serving.bundle.open.BundleIdentity",
        "serving.scoring.scorer.Scorer",
        "serving.scoring.request.Request",
        "serving.scoring.request.Scored",
    ],
}
"""What is public, by the part of the page; all else may change without a word."""
HEAD = """# Python

Written by `python tools/api.py` from the docstrings; `make lint` checks it. What this page has is meant for your
programs; all else may change without a word. Commands are the other way in: [COMMANDS.md](COMMANDS.md).

Letters at the end of an array's name are its shape: P ranks, N rows, M live rows, U unique keys asked, Q unique
keys of all ranks, C candidates, D width of a feature, V width of a visual vector. Errors are in
`featurestore.errors`, `trainer.errors` and `serving.errors`; all of them are a `featurestore.errors.UserError`, and
[ERRORS.md](ERRORS.md) explains their texts.
"""


def found(path: str, modules: griffe.ModulesCollection) -> griffe.Object:
    """Find an object by its path, where it is defined. Raises KeyError."""
    each = modules[path]
    target = each.final_target if isinstance(each, griffe.Alias) else each
    assert isinstance(target, griffe.Object)
    return target


def text_of(each: griffe.Object) -> str:
    """Return a docstring as Markdown."""
    return inspect.cleandoc(each.docstring.value) if each.docstring else ""


def shown(parameter: griffe.Parameter) -> str:
    """Write one parameter as the source does."""
    prefix = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}.get(
        parameter.kind or griffe.ParameterKind.positional_or_keyword, ""
    )
    annotation = f": {parameter.annotation}" if parameter.annotation else ""
    has_default = parameter.default is not None and not prefix
    default = f" = {parameter.default}" if has_default and annotation else f"={parameter.default}"
    return f"{prefix}{parameter.name}{annotation}{default if has_default else ''}"


def signature(function: griffe.Function, name: str) -> str:
    """Write how a function is called, on one line or, if it is long, with a line for each parameter."""
    parameters = [each for each in function.parameters if each.name not in ("self", "cls")]
    words: list[str] = []
    for each in parameters:
        is_first_keyword = each.kind is griffe.ParameterKind.keyword_only and "*" not in words
        if is_first_keyword and not any(word.startswith("*") for word in words):
            words.append("*")
        words.append(shown(each))
    returns = f" -> {function.returns}" if function.returns else ""
    line = f"{name}({', '.join(words)}){returns}"
    return line if len(line) <= 110 else f"{name}(\n    " + ",\n    ".join(words) + f",\n){returns}"


def is_public(name: str, member: griffe.Object | griffe.Alias) -> bool:
    """Tell whether a member of a class belongs on the page: it is its own, has a docstring and no underscore."""
    return not member.is_alias and not name.startswith("_") and member.docstring is not None


def of_class(each: griffe.Class) -> Iterator[str]:
    """Yield the sections of a class: what makes one, its values, and its methods."""
    public = {name: member for name, member in each.members.items() if is_public(name, member)}
    fields = [
        f"{name}: {member.annotation}"
        for name, member in each.attributes.items()
        if "dataclass" in str([decorator.value for decorator in each.decorators])
        and not name.startswith("_")
        and member.annotation
    ]
    if fields:
        yield "```python\n" + "\n".join(fields) + "\n```\n"
    values = [(name, text_of(member)) for name, member in public.items() if isinstance(member, griffe.Attribute)]
    if values:
        rows = [f"| `{name}` | {' '.join(text.split())} |".replace("||", "\\|\\|") for name, text in values]
        yield "\n".join(["| | |", "|---|---|", *rows, ""])
    for name, member in public.items():
        if isinstance(member, griffe.Function):
            yield f"#### `{each.name}.{name}`\n"
            yield f"```python\n{signature(member, f'{each.name}.{name}')}\n```\n\n{text_of(member)}\n"


def section(path: str, each: griffe.Object) -> Iterator[str]:
    """Yield the section of one public object."""
    yield f"### `{each.name}`\n"
    yield f"`from {path.rpartition('.')[0]} import {each.name}`\n"
    if isinstance(each, griffe.Function):
        yield f"```python\n{signature(each, each.name)}\n```\n"
    yield text_of(each) + "\n"
    if isinstance(each, griffe.Class):
        yield from of_class(each)


def page() -> str:
    """Write the whole page."""
    loader = griffe.GriffeLoader(search_paths=[ROOT], allow_inspection=False)
    for package in ("featurestore", "trainer", "serving"):
        loader.load(package)
    parts = [HEAD]
    for title, paths in NAMES.items():
        parts.append(f"## {title}\n")
        for path in paths:
            parts += section(path, found(path, loader.modules_collection))
    return "\n".join(parts)


def main() -> int:
    """Write or check the page and return the exit code."""
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print("docs/API.md is not what the sources say: run python tools/api.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
