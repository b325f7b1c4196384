"""A request to the scorer with the columns of its model, and its answer, independent of the protocol.

Letter of shapes: C candidates of a request.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.text import near_match
from serving.errors import RequestError
from serving.problems import Problem
from trainer.samples.columns import Rule, aligned_columns, rules_of, source_columns
from trainer.schema.fields import Field, Schema

Places = NDArray[np.int64]
_LOWEST = -700.0  # its probability is 0 in float32, and exp does not overflow yet


@dataclass(frozen=True, kw_only=True)
class Request:
    """One user and C candidates, with the columns of the samples and the raw values of logs.

    `user` has the columns of side user, lists for behaviours; `candidates` those of side ad, a list of C each;
    `context` columns of side ad that are the same for all candidates (the scene), one value each. Values are those of
    JSON: lists, whole and real numbers, texts, null.
    """

    user: Mapping[str, Any]
    candidates: Mapping[str, Sequence[Any]]
    context: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The answer to a request: a logit for each candidate, in order, and its unknown IDs and missing images.

    `unknown`: by field, the places (ad side: of candidates; user side: of values) whose ID no training sample had.
    `missing`: by content field, the places whose image has no vector; the run's policy replaced it.
    """

    logits_C: NDArray[np.float32]
    unknown: Mapping[str, Places]
    missing: Mapping[str, Places]

    def probabilities(self) -> NDArray[np.float32]:
        """Compute the probability of a click of each candidate, 1 / (1 + exp(-logit)), (C,)."""
        logits_C = np.maximum(self.logits_C.astype(np.float64), _LOWEST)
        return (1 / (1 + np.exp(-logits_C))).astype(np.float32)


_SHOWN = 60  # characters


def short_repr(value: Any) -> str:
    """Show a value in a message: as JSON where it can be, and short."""
    text = ""
    try:
        for part in json.JSONEncoder().iterencode(value[: _SHOWN + 1] if isinstance(value, str) else value):
            text += part
            if len(text) > _SHOWN:  # the rest of a large value is not written
                break
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def unfit(where: str, value: Any, wanted: str) -> RequestError:
    """Make the error of a value that has to be another."""
    return RequestError(Problem.UNFIT, where, short_repr(value), wanted)


class RequestColumns:
    """The columns of a request to a model with these fields of a schema."""

    def __init__(self, schema: Schema, fields: Sequence[Field]) -> None:
        self.schema = schema.model_copy(update={"fields": tuple(fields)})
        """The schema, restricted to the fields that the model uses."""
        every = rules_of(schema)  # an image's text is a uri, whichever field reads its column
        used = {column for field in fields for column in (field.column_name, field.weights) if column}
        self.rules: Mapping[str, Rule] = {column: rule for column, rule in every.items() if column in used}
        """Rules of the decoded columns; a crossed column counts as one."""
        self.sources: Mapping[str, Rule] = source_columns(self.rules)
        """Rules of the columns in a request."""
        self.integers = [name for name, rule in self.rules.items() if not rule.is_real and not rule.crossed]
        """Decoded columns of whole numbers, or of texts that become such."""
        self.measured = {name: rule for name, rule in self.rules.items() if rule.width is not None or rule.lengths_of}
        """Rules of the decoded columns whose lists have a length of the schema, or that of another column."""
        self.aligned = aligned_columns(self.rules)
        self.nullable = {field.column_name for field in fields if field.kind == "content"}
        """Columns of images, whose nulls are missing images."""
        self._of_side = {
            side: frozenset(column for column, rule in self.sources.items() if rule.side == side)
            for side in ("user", "ad")
        }
        roles = {schema.label, schema.group, schema.time}
        self._ignored = (roles | set(source_columns(every))) - set(self.sources)

    def check_parts(self, request: Request, where: str) -> None:
        """Raise RequestError for a column that is unknown, in the wrong part or in two; `where` begins the message."""
        user, context, candidates = request.user, request.context, request.candidates
        for part, side, found in (("user", "user", user), ("context", "ad", context), ("candidates", "ad", candidates)):
            if found.keys() <= self._of_side[side]:
                continue
            for name in found.keys() & self.sources.keys() - self._of_side[side]:
                problem = Problem.OF_USER if self.sources[name].side == "user" else Problem.OF_AD
                raise RequestError(problem, f"{where}{part}.{name}")
            self.check_known(found, f"{where}{part}.")
        if context and (twice := context.keys() & candidates.keys() - self._ignored):
            raise RequestError(Problem.IN_BOTH, where, min(twice))

    def check_known(self, names: Iterable[str], prefix: str) -> None:
        """Raise RequestError for a name that is not a column of the schema; `prefix` is that of the name."""
        for name in names:
            if name not in self.sources and name not in self._ignored:
                near = near_match(str(name), list(self.sources))
                raise RequestError(Problem.UNKNOWN_COLUMN, prefix + short_repr(name), near)


def expected(rule: Rule, depth: int) -> str:
    """Describe the values of a column inside of `depth` lists."""
    one, several = ("number", "numbers") if rule.is_real else ("whole number", "whole numbers")
    if rule.text:
        one, several = f"{one} or text", f"{several} or texts"
    inner = rule.depth - max(depth, rule.side == "ad")
    each = f"a {one}" if inner == 0 else "a list of " + "lists of " * (inner - 1) + several
    return f"a list with {each} for each candidate" if rule.side == "ad" and depth == 0 else each
