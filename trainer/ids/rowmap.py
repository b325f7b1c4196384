"""Id -> row for the shards that one rank owns: open addressing over arrays, whole batches of ids at a time.

Row 0 of a shard belongs to no id: an id that has no row is given that one. Rows 1, 2, ... are given
out in the order of arrival and, among ids that arrive together, of the ids; so they do not depend on the number of
ranks. Letters of shapes: N ids, S shards owned; a *slot* is a shard's place among those.

Memory is asked for at once for as many rows as there may be, and the system hands it out when it is first written to.
So a table grows without being copied; what is done again when a shard's part of the map has become too small is that
part alone.
"""

import numpy as np
from numpy.typing import NDArray

from featurestore.keys import UInt64Array, splitmix64
from trainer.exchange.routing import Int64

Bool = NDArray[np.bool_]

_FIRST_ENTRIES = 64
_ENTRIES_A_ROW = 2  # at least


class RowMap:
    """The rows of ids in `num_slots` shards of `rows_per_shard` rows each, row 0 included.

    A thread may call `places` while another one calls `insert` or `remove`: a row that it finds is the id's until one
    is removed, which `holds` tells afterwards; an id that it does not find may have come by then. Nothing else may run
    beside another call.
    """

    def __init__(self, num_slots: int, rows_per_shard: int) -> None:
        """Raises MemoryError where the system refuses the memory."""
        self.rows_per_shard = rows_per_shard
        self.used_S: Int64 = np.zeros(num_slots, np.int64)
        """Rows in use, without row 0: they are 1 .. used."""
        self.id_of_place: Int64 = np.zeros(num_slots * rows_per_shard, np.int64)
        """The id of the row at slot x rows_per_shard + row."""
        self._span = _entries_for(rows_per_shard - 1)
        self._first_S = np.arange(num_slots, dtype=np.int64) * self._span
        self._mask_S = np.full(num_slots, min(self._span, _FIRST_ENTRIES) - 1, np.int64)
        self._entries_a_row_S = _ENTRIES_A_ROW * 2.0 ** (np.arange(num_slots) / max(num_slots, 1))
        self.row_of_entry: NDArray[np.int32] = np.zeros(num_slots * self._span, np.int32)
        """The row that each entry of the open addressing leads to; 0: empty."""

    def places(self, slot_N: Int64, hash_N: UInt64Array, ids_N: Int64) -> Int64:
        """Find the place slot x rows_per_shard + row of each id, (N,); row 0 of its shard where it has none.

        `hash_N`: splitmix64 of the ids.
        """
        first_N, mask_N = self._first_S[slot_N], self._mask_S[slot_N]
        base_N: Int64 = slot_N * self.rows_per_shard
        at_N = (hash_N & mask_N.view(np.uint64)).view(np.int64)
        row_N = self.row_of_entry[first_N + at_N].astype(np.int64)
        found_N: Int64 = base_N + row_N
        open_N = np.flatnonzero((row_N != 0) & (self.id_of_place[found_N] != ids_N))
        while len(open_N):  # the entry is another id's: the next one
            at_N[open_N] = (at_N[open_N] + 1) & mask_N[open_N]
            row_M = self.row_of_entry[first_N[open_N] + at_N[open_N]]
            place_M = base_N[open_N] + row_M
            found_N[open_N] = place_M
            open_N = open_N[(row_M != 0) & (self.id_of_place[place_M] != ids_N[open_N])]
        return found_N

    def insert(self, slot_N: Int64, hash_N: UInt64Array, ids_N: Int64) -> Int64:
        """Give rows to different ids, ascending, that have none; returns their places, row 0 where a shard is full."""
        order_N = np.argsort(slot_N, kind="stable")
        slot_M = slot_N[order_N]
        count_S = np.bincount(slot_M, minlength=len(self.used_S))
        before_S = np.cumsum(count_S) - count_S
        row_M = self.used_S[slot_M] + 1 + np.arange(len(slot_M)) - before_S[slot_M]
        row_M[row_M >= self.rows_per_shard] = 0
        row_N = np.empty_like(row_M)
        row_N[order_N] = row_M
        place_N = slot_N * self.rows_per_shard + row_N
        fits_N = row_N != 0
        self.id_of_place[place_N[fits_N]] = ids_N[fits_N]  # before the entry, for a thread that finds the entry
        self.used_S = np.minimum(self.used_S + count_S, self.rows_per_shard - 1)
        self._grow()
        self._enter(slot_N[fits_N], hash_N[fits_N], row_N[fits_N])
        return place_N

    def holds(self, slot_N: Int64, place_N: Int64, ids_N: Int64) -> Bool:
        """Tell whether each place, found by an earlier `places`, is a row that still belongs to the id, (N,)."""
        row_N = place_N - slot_N * self.rows_per_shard
        holds_N: Bool = (row_N > 0) & (row_N <= self.used_S[slot_N]) & (self.id_of_place[place_N] == ids_N)
        return holds_N

    def remove(self, slot: int, gone_K: Int64) -> tuple[Int64, Int64]:
        """Take the rows `gone_K` of a shard, ascending, from their ids; the last rows get their numbers.

        So 1 .. used are in use again. Returns which rows those are, (M,), and their new numbers, (M,), both ascending.
        The shard's part of the map is made again: remove many rows at once.
        """
        used, start = int(self.used_S[slot]) - len(gone_K), slot * self.rows_per_shard
        last_K = np.arange(used + 1, used + 1 + len(gone_K))
        from_M, to_M = np.setdiff1d(last_K, gone_K, assume_unique=True), gone_K[gone_K <= used]
        self.id_of_place[start + to_M] = self.id_of_place[start + from_M]
        self.used_S[slot] = used
        self._enter_again(np.array([slot]))
        return from_M, to_M

    def set_ids(self, slot: int, ids_N: Int64) -> None:
        """Make `ids_N` the ids of rows 1, 2, .. of a shard, in the place of those that were there."""
        assert len(ids_N) < self.rows_per_shard
        start = slot * self.rows_per_shard + 1
        self.id_of_place[start : start + len(ids_N)] = ids_N
        self.used_S[slot] = len(ids_N)
        self._mask_S[slot] = min(self._span, max(_FIRST_ENTRIES, _entries_for(len(ids_N)))) - 1
        self._enter_again(np.array([slot]))

    def ids_of(self, slot: int) -> Int64:
        """Return the ids of rows 1, 2, .. of a shard."""
        start = slot * self.rows_per_shard + 1
        return self.id_of_place[start : start + int(self.used_S[slot])]

    def _grow(self) -> None:
        """Doubles the parts of the map that are too full, a quarter to half; called before new rows are entered.

        Each shard has a limit of its own, so that shards that fill evenly do not all grow in one step.
        """
        grown_S = np.zeros(len(self.used_S), np.bool_)
        while (small_S := self._too_full()).any():
            self._mask_S[small_S] = 2 * self._mask_S[small_S] + 1
            grown_S |= small_S
        if grown_S.any():
            self._enter_again(np.flatnonzero(grown_S))

    def _too_full(self) -> Bool:
        entries_S = self._mask_S + 1
        return (self.used_S * self._entries_a_row_S > entries_S) & (entries_S < self._span)

    def _enter_again(self, slots: Int64) -> None:
        """Empties the shards' parts of the map and enters all their rows."""
        for slot in slots:
            start = self._first_S[slot]
            self.row_of_entry[start : start + self._mask_S[slot] + 1] = 0
            ids_N = self.ids_of(int(slot))
            if not len(ids_N):
                continue
            row_N = np.arange(1, len(ids_N) + 1)
            self._enter(np.full(len(ids_N), slot), splitmix64(ids_N), row_N)

    def _enter(self, slot_N: Int64, hash_N: UInt64Array, row_N: Int64) -> None:
        """Writes rows into the first empty entries from their hash on. Of rows that want one entry the last one to be
        written gets it, and the others look further; a row that is in already stays."""
        first_N, mask_N = self._first_S[slot_N], self._mask_S[slot_N]
        at_N = (hash_N & mask_N.view(np.uint64)).view(np.int64)
        entries, open_N = self.row_of_entry, np.arange(len(row_N))
        while len(open_N):
            entry_M = first_N[open_N] + at_N[open_N]
            row_M = row_N[open_N]
            is_empty_M = entries[entry_M] == 0
            entries[entry_M[is_empty_M]] = row_M[is_empty_M]
            open_N = open_N[entries[entry_M] != row_M]
            at_N[open_N] = (at_N[open_N] + 1) & mask_N[open_N]


def map_bytes(rows_per_shard: int) -> int:
    """Compute the bytes of a shard's part of a map."""
    return 8 * rows_per_shard + 4 * _entries_for(rows_per_shard - 1)


def _entries_for(rows: int) -> int:
    """A power of two, at least twice the rows."""
    return 1 << max(1, (_ENTRIES_A_ROW * rows - 1).bit_length())
