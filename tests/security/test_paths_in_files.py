"""Every path and id in a model of a file is of a type that refuses what leads elsewhere, in models to come as well."""

import importlib
import pkgutil
import re
from collections.abc import Iterator
from typing import Annotated

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

import featurestore
import pipeline
import serving
import trainer

PACKAGES = (featurestore, pipeline, serving, trainer)
NAMES = re.compile(r"(?:\w+_)?(?:path|folder|file_name|hashes|id|nonce|publication|parent)")
NAMES_OF_FILES = {"BundleFile.name", "RowsFile.name"}
BY_FILE_NAME = {"PublishedVersion.files": {"path": "a", "size_bytes": 1}, "CheckpointState.files": "0"}
COMPARED_ALONE = {"CacheSeal.boot_id"}
OUTSIDE = ["../../x", "/etc/passwd", "..", ".", "a/../../b", "a\\b", "a\0", "a" * 2_000, "\ud800"]


def fields() -> Iterator[tuple[str, FieldInfo]]:
    """All fields of all models of the packages, by model and name."""
    for package in PACKAGES:
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith(("__main__", "horovod", "horovod_store", "rendezvous")):
                importlib.import_module(module.name)
    models = [BaseModel]
    while models:
        model = models.pop()
        models += model.__subclasses__()
        if model.__module__.partition(".")[0] in {package.__name__ for package in PACKAGES}:
            yield from ((f"{model.__name__}.{name}", field) for name, field in model.model_fields.items())


def test_every_path_and_id_is_checked_where_it_is_read() -> None:
    found = dict(fields())
    checked = {name for name in found if NAMES.fullmatch(name.partition(".")[2])} - COMPARED_ALONE | NAMES_OF_FILES
    assert len(checked) > 25 and BY_FILE_NAME.keys() <= found.keys()
    for name in sorted(checked | BY_FILE_NAME.keys()):
        field = found[name]
        adapter = TypeAdapter(Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation)
        for value in OUTSIDE:
            with pytest.raises(ValidationError):
                adapter.validate_python({value: BY_FILE_NAME[name]} if name in BY_FILE_NAME else value)
                pytest.fail(f"{name} takes {value[:20]!r}")
