"""Bounded staleness: an owner may answer with a visual vector that it made up to k steps ago, and skip E for it.

Letters of shapes: Q unique keys of a request, F of them computed now, V visual width, N rows of the partition.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featurestore.lookup.embedding import on_device
from trainer.exchange.exchange import ContentRequest, ContentSource
from trainer.exchange.routing import Int64, unique
from trainer.stages import Kind

_NEVER = -(2**31)


@dataclass
class ReusePlan:
    """A split of Q keys: those to compute now (rows `fresh_F`), and those in the cache (`stale_C`, at `place_C`)."""

    fresh_F: Tensor
    known_K: Tensor
    """Which of the F have a feature, so that they are kept, .."""
    place_K: Tensor
    """.. and where."""
    stale_C: Tensor
    place_C: Tensor


class VectorCache:
    """The newest vector of each row of a partition, when it was made, and gradients that wait for the next time.

    A gradient that arrives for a reused vector is added to that of the next computation of the same key, at most
    `reuse_steps` steps later: none is lost but those that still wait at the end of a run, or at a resumption. What is
    reused depends on the steps alone, not on the number of ranks. Memory: 8 V + 8 bytes a row (float32).
    """

    def __init__(self, num_rows: int, width: int, reuse_steps: int, device: torch.device, dtype: torch.dtype) -> None:
        self._reuse_steps, self._step = reuse_steps, 0
        self._made_at_N = np.full(num_rows, _NEVER, np.int64)
        self._vectors_NV = torch.zeros(num_rows, width, device=device, dtype=dtype)
        self._waiting_NV = torch.zeros(num_rows, width, device=device, dtype=dtype)

    def plan(self, place_Q: NDArray[np.int64]) -> tuple[ReusePlan, NDArray[np.bool_]]:
        """Plan what the next step computes, also as a mask (Q,). Called once a step, in order; reads no vector."""
        fresh_Q = np.ones(len(place_Q), np.bool_)
        known_Q = place_Q >= 0
        fresh_Q[known_Q] = self._step - self._made_at_N[place_Q[known_Q]] > self._reuse_steps
        self._made_at_N[place_Q[fresh_Q & known_Q]] = self._step
        self._step += 1
        device = self._vectors_NV.device
        place_F, stale_C = place_Q[fresh_Q], np.flatnonzero(~fresh_Q)
        known_K = np.flatnonzero(place_F >= 0)
        parts = (np.flatnonzero(fresh_Q), known_K, place_F[known_K], stale_C, place_Q[stale_C])
        return ReusePlan(*(on_device(part, device) for part in parts)), fresh_Q

    def combine(self, plan: ReusePlan, fresh_FV: Tensor) -> Tensor:
        """Return vectors (Q, V) of all keys: those computed now, which are kept, and the kept ones."""
        combined: Tensor = _Combine.apply(self, plan, fresh_FV)  # type: ignore[no-untyped-call]
        return combined

    def keep(self, plan: ReusePlan, fresh_FV: Tensor) -> Tensor:
        """Combine vectors as `combine` does, without gradients."""
        self._vectors_NV.index_copy_(0, plan.place_K, fresh_FV.index_select(0, plan.known_K))
        vectors_QV = fresh_FV.new_empty(len(plan.fresh_F) + len(plan.stale_C), fresh_FV.shape[1])
        vectors_QV.index_copy_(0, plan.fresh_F, fresh_FV)
        vectors_QV.index_copy_(0, plan.stale_C, self._vectors_NV.index_select(0, plan.place_C))
        return vectors_QV

    def collect(self, plan: ReusePlan, gradient_QV: Tensor) -> Tensor:
        """Return gradients (F, V) of the vectors computed now, with those that waited for them; the others wait."""
        self._waiting_NV.index_add_(0, plan.place_C, gradient_QV.index_select(0, plan.stale_C))
        gradient_FV = gradient_QV.index_select(0, plan.fresh_F)
        gradient_FV.index_add_(0, plan.known_K, self._waiting_NV.index_select(0, plan.place_K))  # all different
        self._waiting_NV.index_fill_(0, plan.place_K, 0.0)
        return gradient_FV


@dataclass
class ReusingRequest(ContentRequest):
    """Features of the unique keys that are computed now, and which those are."""

    plan: ReusePlan


class ReusingSource:
    """A `ContentSource` that skips E in training steps for what `cache` holds."""

    def __init__(self, source: ContentSource, cache: VectorCache) -> None:
        self._source, self._cache = source, cache
        self.width, self.owner_of = source.width, source.owner_of
        self.expect, self.release = source.expect, source.release

    def serve(self, keys_R: Int64, kind: Kind) -> ContentRequest:
        if kind != "step":
            return self._source.serve(keys_R, kind)
        keys_Q, inverse_R = unique(keys_R)
        plan, fresh_Q = self._cache.plan(self._source.places(keys_Q))
        fresh = self._source.serve(keys_Q[fresh_Q], kind)
        return ReusingRequest(fresh.gathered, inverse_R, len(keys_Q), plan)

    def vectors(self, served: ContentRequest) -> Tensor:
        computed = self._source.vectors(served)
        return self._cache.combine(served.plan, computed) if isinstance(served, ReusingRequest) else computed


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cache: VectorCache, plan: ReusePlan, fresh_FV: Tensor) -> Tensor:
        ctx.cache, ctx.plan = cache, plan
        return cache.keep(plan, fresh_FV)

    @staticmethod
    def backward(ctx: Any, gradient_QV: Tensor) -> tuple[None, None, Tensor]:
        return None, None, ctx.cache.collect(ctx.plan, gradient_QV)
