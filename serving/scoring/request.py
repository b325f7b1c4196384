"""A request to the scorer and its answer, whatever way they come and go."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.int64]
_LOWEST = -700.0  # its probability is 0 in float32, and exp does not overflow yet


@dataclass(frozen=True, kw_only=True)
class Request:
    """One user and C candidates, by columns of the samples, with the values that logs have.

    `user` has the columns of side user, lists for behaviours; `candidates` those of side ad, a list of C each;
    `context` columns of side ad that are the same for all candidates (the scene), one value each.
    """

    user: Mapping[str, Any]
    candidates: Mapping[str, Sequence[Any]]
    context: Mapping[str, Any] = field(default_factory=dict)
    as_tensors: bool = False
    """Whether its columns came as tensors of the Open Inference Protocol, which have no parts."""

    def name_of(self, part: str, column: str) -> str:
        """Name a column in a message as the client sent it: `candidates.ad_item`, or `input ad_item` of a tensor."""
        return f"input {column}" if self.as_tensors else f"{part}.{column}"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The answer to a request: a logit for each candidate, in their order, and what the model did not know.

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
