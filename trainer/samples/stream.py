"""One stream of sample groups: decoded and shuffled window by window, and cut into the pieces that batches need.

Letters of shapes: W windows, G groups.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from trainer.samples.columns import DecodedGroups, Index, concatenate


class Piece(NamedTuple):
    """Part of a batch: of the groups in memory the rows `group_G`, of each its samples `begin_G` to before `end_G`."""

    groups: DecodedGroups
    group_G: Index
    begin_G: Index
    end_G: Index


class Stream:
    """The row groups of each window, by number, with its count of samples, and the windows that are in memory.

    `seed`: its last number is that of the first window, and counts on; None leaves the groups in their order.
    """

    def __init__(
        self,
        windows: Sequence[Sequence[int]],
        counts_W: Sequence[int],
        seed: tuple[int, int, int] | None,
        decode: Callable[[int], DecodedGroups],
    ) -> None:
        self._windows, self._seed, self._decode = windows, seed, decode
        self._starts = np.concatenate([[0], np.cumsum(counts_W)]).astype(np.int64)
        self.num_samples = int(self._starts[-1])
        self._held: dict[int, tuple[DecodedGroups, Index, Index]] = {}

    def cut(self, span: range) -> Iterator[Piece]:
        """Cut out the samples at these positions: one piece for each window that they are in."""
        if not span:
            return
        first = int(np.searchsorted(self._starts, span.start, side="right")) - 1
        last = int(np.searchsorted(self._starts, span.stop, side="left"))
        self._held = {window: held for window, held in self._held.items() if window >= first}
        for window in range(first, last):
            groups, order_G, ends_G = self._hold(window)
            low = max(span.start - int(self._starts[window]), 0)
            high = min(span.stop - int(self._starts[window]), groups.num_samples)
            chosen = slice(int(np.searchsorted(ends_G, low, side="right")), int(np.searchsorted(ends_G, high)) + 1)
            group_G = order_G[chosen]
            begin_G, end_G = groups.sample_offsets[group_G], groups.sample_offsets[group_G + 1]
            cut_before_G = np.maximum(low - (ends_G[chosen] - (end_G - begin_G)), 0)
            cut_after_G = np.maximum(ends_G[chosen] - high, 0)
            yield Piece(groups, group_G, begin_G + cut_before_G, end_G - cut_after_G)

    def _hold(self, window: int) -> tuple[DecodedGroups, Index, Index]:
        """Return the window's groups, its order, and where each group of that order ends in the window's samples."""
        if window not in self._held:
            groups = concatenate([self._decode(each) for each in self._windows[window]])
            order_G = np.arange(len(groups.sample_offsets) - 1)
            if self._seed is not None:
                *seed, first = self._seed
                order_G = np.random.default_rng([*seed, first + window]).permutation(order_G)
            self._held[window] = groups, order_G, np.cumsum(np.diff(groups.sample_offsets)[order_G])
        return self._held[window]
