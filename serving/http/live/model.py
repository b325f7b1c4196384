"""The interfaces that the server needs of a model and of the place where models are published."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from serving.network.steps import Steps
from serving.scoring.request import Request, Scored, Sizes
from trainer.samples.columns import Rule
from trainer.schema import Field

Decoded = Sequence[Request] | pa.Table
"""A decoded body: requests, or a table with one request per row."""


class Identity(Protocol):
    """The identity of a model: two models with equal identities are the same."""

    @property
    def version(self) -> int:
        """Number of the bundle's version."""
        ...

    @property
    def vectors(self) -> Mapping[str, int]:
        """The snapshot of the visual vectors of each store."""
        ...


class Model(Protocol):
    """A loaded model: `serving.scoring.Scorer` has these methods."""

    @property
    def identity(self) -> Identity:
        """Version of the bundle and snapshots of its vectors."""
        ...

    @property
    def columns(self) -> Mapping[str, Rule]:
        """The columns of a request, with the rule for each."""
        ...

    @property
    def fields(self) -> Sequence[Field]:
        """The fields that the model uses."""
        ...

    @property
    def vectors_time_s(self) -> Mapping[str, float]:
        """When the vectors in use of each store were committed, in seconds since 1970."""
        ...

    def score(self, requests: Sequence[Request]) -> list[Scored]:
        """Score all requests. Raises RequestError, or NotFiniteError if a logit is not a finite number."""
        ...

    def score_table(self, table: pa.Table) -> list[Scored]:
        """Score a table with the columns of sample files, one request per row. Raises RequestError."""
        ...

    def steps(self, decoded: Decoded, sizes: Sizes) -> Steps[list[Scored]]:
        """Score a body of these sizes in pieces: the model stays open until the last one. Raises RequestError."""
        ...

    def sample(self) -> pa.Table | None:
        """Read the sample that this version is checked with, or None."""
        ...

    def close(self) -> None:
        """Unmap the files."""
        ...


class ModelSource(Protocol):
    """The place where versions of a model are published."""

    def newest(self) -> Identity:
        """Look up the version in use, and the newest snapshots of its vectors; a few small reads."""
        ...

    def open(self, identity: Identity, current: Model | None) -> Model:
        """Load a version with these vectors, reusing the parts that the current model shares.

        Takes seconds. Raises BundleNotFoundError, BrokenBundleError, StorageError.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The answers to one body, all of one model, and the seconds that each stage took."""

    identity: Identity
    fields: Sequence[Field]
    decoded: Decoded
    scored: Sequence[Scored]
    stages: dict[str, float]

    @property
    def num_candidates(self) -> int:
        """Candidates of all requests of the body."""
        return sum(len(each.logits_C) for each in self.scored)


def num_entries(column: Any) -> int:
    """Count the entries of all lists of a column of a table, or its rows if it has no lists."""
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return sum(len(chunk.flatten()) for chunk in column.chunks)
    return len(column)
