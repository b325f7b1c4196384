"""From a mapping that a person wrote (YAML, --set) to a checked model, with messages that name field and way out."""

import difflib
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from featurestore.text import without_passwords
from trainer.errors import TrainerError

KIND = "kind:"
"""The beginning of the tag of one kind of a value that may be of several; a message does not show it."""
Model = TypeVar("Model", bound=BaseModel)


class Section(BaseModel):
    """A part of a configuration: immutable, no unknown names, no silent conversion of a string to a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


LONGEST_NAME = 200
"""Characters of a name that is compared with the known ones: to compare takes the product of both lengths."""


def near_match(name: str, known: Sequence[str], prefix: str = "") -> str:
    """End a message about an unknown name: with the nearest known one, or with all of them when none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6) if len(name) <= LONGEST_NAME else []
    if near:
        return f"did you mean {prefix}{near[0]}?"
    return f"known: {', '.join(prefix + each for each in sorted(known))}"


def validated(model: type[Model], values: Mapping[str, Any], source: str, error: type[TrainerError]) -> Model:
    """Check `values` and return them as `model`.

    Raises `error`, one line per mistake: the field, the value, the limit, the way out.
    """
    try:
        return model.model_validate(values)
    except ValidationError as failure:
        lines = [_explain(model, details) for details in failure.errors(include_url=False)]
        raise error("\n".join(f"{source}: {line}" for line in lines)) from failure


def _explain(model: type[BaseModel], details: ErrorDetails) -> str:
    path = [str(part) for part in details["loc"] if not str(part).startswith(KIND)]
    name = ".".join(path)
    match details["type"]:
        case "extra_forbidden":
            known = _names_at(model, path[:-1])
            return f"{name} is unknown; {near_match(path[-1], known, '.'.join([*path[:-1], '']).lstrip('.'))}"
        case "missing":
            return f"{name} is missing"
        case "model_type" | "model_attributes_type":
            return f"{name or 'the file'}={details['input']!r} has to be a mapping of names to values"
        case _:
            message = details["msg"].removeprefix("Value error, ").replace("Input should", "it should")
            if not name or (details["type"] == "value_error" and isinstance(details["input"], Mapping)):
                return message  # of several fields, which it names itself
            return without_passwords(f"{name}={details['input']!r}: {message}")


def _names_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Names of the fields of the model at `path` inside `model`; list positions in the path are skipped."""
    for part in path:
        if part in model.model_fields:
            model = _model_inside(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _model_inside(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in {list, tuple, dict, Union, UnionType, Annotated}:
        return next((found for each in get_args(annotation) if (found := _model_inside(each))), None)
    return None
