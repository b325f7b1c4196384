"""The page API of the site: the Python API, from the signatures and docstrings of the sources; nothing is imported."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill

import griffe

from tools.tables import table

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    "import crossmedia as cm": [
        "crossmedia.make_demo",
        "crossmedia.extract",
        "crossmedia.build_samples",
        "crossmedia.open_store",
        "crossmedia.Store",
        "crossmedia.train",
        "crossmedia.open_run",
        "crossmedia.Run",
        "crossmedia.Evaluation",
        "crossmedia.load_model",
        "crossmedia.Model",
        "crossmedia.Client",
        "crossmedia.with_behaviors",
        "crossmedia.FeatureDataset",
        "crossmedia.SampleDataset",
    ],
    "The store": [
        "featurestore.FeatureStore",
        "featurestore.Snapshot",
        "featurestore.StoreInfo",
        "featurestore.ExtractorSpec",
        "featurestore.FeatureRows",
        "featurestore.FeatureStatistics",
        "featurestore.QuarantineRow",
        "featurestore.Codec",
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
        "trainer.config.load_config",
        "trainer.comm.comm.Comm",
        "trainer.comm.comm.connect",
        "trainer.evaluation.predict.predict_run",
        "trainer.evaluation.predict.Predictions",
        "trainer.models.ctr.CtrModel",
        "trainer.models.layers.Mlp",
    ],
    "Serving": [
        "serving.bundle.open.Bundle",
        "serving.bundle.log.BundleIdentity",
        "serving.scoring.scorer.Scorer",
        "serving.scoring.request.Request",
        "serving.scoring.request.Scored",
    ],
}
"""The public names, by section of the page; all others may change without notice."""
HEAD = """# Python

The public names for your programs, from the docstrings; all others may change without notice. For commands see
[COMMANDS.md](COMMANDS.md).

Letters at the end of an array's name are its shape: P ranks, N rows, M live rows, U unique keys asked, Q unique
keys of all ranks, C candidates, D width of a feature, V width of a visual vector. Errors are in
`featurestore.errors`, `trainer.errors` and `serving.errors`; all of them are a `featurestore.errors.UserError`, and
[TROUBLE.md](TROUBLE.md) explains their texts.
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


def signature(function: griffe.Function, name: str) -> str:
    """Write the signature of a function as a block of code."""
    line = fill(function.signature(name=name), 110, subsequent_indent="    ", break_long_words=False)
    return f"```python\n{line}\n```\n"


def is_value(member: griffe.Object) -> bool:
    """Return whether a member is read without a call: an attribute, a property, or a cached property."""
    return not isinstance(member, griffe.Function) or "cached_property" in str([d.value for d in member.decorators])


def of_class(each: griffe.Class) -> Iterator[str]:
    """Yield a class's constructor, values and methods, those with a docstring and without an underscore."""
    own = {
        name: member
        for name, member in each.members.items()
        if isinstance(member, griffe.Object) and not name.startswith("_")
    }
    fields = [
        f"{name}: {member.annotation}"
        for name, member in own.items()
        if isinstance(member, griffe.Attribute) and "dataclass" in each.labels and member.annotation
    ]
    if fields:
        yield "```python\n" + "\n".join(fields) + "\n```\n"
    public = {name: member for name, member in own.items() if member.docstring}
    yield table(
        ("", ""),
        [(f"`{name}`", " ".join(text_of(member).split())) for name, member in public.items() if is_value(member)],
    )
    for name, member in public.items():
        if isinstance(member, griffe.Function) and not is_value(member):
            yield f"#### `{each.name}.{name}`\n"
            yield signature(member, f"{each.name}.{name}")
            yield text_of(member) + "\n"


def section(path: str, each: griffe.Object) -> Iterator[str]:
    """Yield the section of one public object."""
    yield f"### `{each.name}`\n"
    yield f"`from {path.rpartition('.')[0]} import {each.name}`\n"
    if isinstance(each, griffe.Function):
        yield signature(each, each.name)
    yield text_of(each) + "\n"
    if isinstance(each, griffe.Class):
        yield from of_class(each)


def page() -> str:
    """Write the whole page."""
    loader = griffe.GriffeLoader(search_paths=[ROOT], allow_inspection=False)
    for package in ("crossmedia", "featurestore", "pipeline", "trainer", "serving"):
        loader.load(package)
    parts = [HEAD]
    for title, paths in NAMES.items():
        parts.append(f"## {title}\n")
        for path in paths:
            parts += section(path, found(path, loader.modules_collection))
    return "\n".join(parts)
