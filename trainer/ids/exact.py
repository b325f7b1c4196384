"""Exact ID tables: one row for each ID, with admission and eviction; and figures of tables of both kinds.

An id is removed when it is no longer used, or when it is the one longest unused in a full shard. Letters of shapes: R
ids received, Q unique among them, N ids, S shards owned, C counters of a shard; a *slot* is a shard's place among those
owned.

Every shard has room for its part of `max_rows` rows and one more, row 0, the *cold row*: it stands in for all ids of
the shard that have no row of their own, is trained by their samples, and begins with zeros. Rows 1, 2, ... are given
out in the order of arrival and, among ids that arrive together, of the ids. A shard's clock counts its training steps,
and each row has the step in which it was last used. So all that a shard holds depends on the ids that training has
brought to it, step by step, and neither on the number of ranks nor on the order of the ids within a step.

Memory is asked for at once for as many rows as there may be, and the system hands it out when it is first written to.
So a table grows without being copied. A row's *place* is row x slots + slot: shards fill evenly, so rows in use lie
side by side, and what was never used takes no memory, though the system hands out pages of 2 MB. The map from ids to
rows is spread over all of its memory, 8 to 16 bytes for each row that there may be.

Ids are counted by a count-min sketch with conservative update (Cormode and Muthukrishnan, "An improved data stream
summary", 2005; Estan and Varghese, "New directions in traffic measurement and accounting", 2002): each id has two
counters, shared with other ids; its count is the smaller one, and only what is below the new count is raised. So a
count is never too low, and it is too high where both counters belong to others too.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featurestore import keys
from featurestore.keys import BoolArray, Int64Array, UInt64Array
from featurestore.lookup.ondevice import on_device
from trainer.comm import Comm
from trainer.config import ExactTableConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.exchange.routing import unique
from trainer.exchange.vectors import take_rows
from trainer.ids.shards import IdRows, TableShape, uniform
from trainer.ids.tables import IdTable, RowRequest
from trainer.problems import Problem

IDS, LAST_USE, USED_AT, CLOCK, COUNTS, FADED = "ids", "last_use", "used_at", "clock", "counts", "faded"
"""Names in a checkpoint of a shard's arrays other than rows and their optimiser's state."""


@dataclass(frozen=True, kw_only=True)
class ExactShape(TableShape):
    """Shape of an exact table: `num_rows` is the most ids that have rows; every shard takes its part, rounded up."""

    rules: ExactTableConfig

    @property
    def rows_per_shard(self) -> int:
        """Rows of each shard, the cold row among them."""
        return 1 + -(-self.num_rows // self.num_shards)

    @property
    def counters_per_shard(self) -> int:
        """Counters of a shard's filter; none where ids are admitted at first sight."""
        return keys.power_of_two(_COUNTERS_A_ROW * (self.rows_per_shard - 1)) if self.rules.admit_after > 1 else 0

    @property
    def setting(self) -> str:
        return f"model.tables.{self.name}.max_rows={self.num_rows}"

    @property
    def index_bytes(self) -> int:
        of_map = 8 * self.rows_per_shard + 4 * keys.power_of_two(_ENTRIES_A_ROW * (self.rows_per_shard - 1))
        return of_map + 2 * 4 * self.rows_per_shard + self.counters_per_shard


@dataclass
class ExactRequest(RowRequest):
    """Unique ids (Q,), ascending, their hashes and slots; `settle` finds their rows."""

    ids_Q: Int64Array
    hash_Q: UInt64Array
    slot_Q: Int64Array
    is_training: bool
    inverse_Q: Int64Array | None = None
    """Place of each id among the rows that `settle` has returned."""


class ExactTable(IdTable):
    """The shards of one exact table that this rank owns."""

    shape: ExactShape

    def __init__(self, shape: ExactShape, rank: int, num_ranks: int, **others: Any) -> None:
        num_slots = len(keys.owned_shards(shape.num_shards, rank, num_ranks))
        self.map = RowMap(num_slots, shape.rows_per_shard)
        self.filter = CountingFilter(num_slots, shape.counters_per_shard) if shape.counters_per_shard else None
        self.last_use: NDArray[np.int32] = np.zeros(num_slots * shape.rows_per_shard, np.int32)
        """The day on which each place was last used in training, in days since 1970-01-01."""
        self.used_at: NDArray[np.int32] = np.zeros(len(self.last_use), np.int32)
        """The step in which each place was last used in training, by the shard's clock."""
        self._clock_S = np.zeros(num_slots, np.int32)
        """Training steps that a shard has been through, those of the runs before included that a warm start took."""
        self._faded_S = np.zeros(num_slots, np.int32)
        """The day on which a shard's counts were last halved, or first counted."""
        self.counts, self._day = dict.fromkeys(("served", "cold", "refused", "evicted", "expired"), 0), 0
        """Counts of events on this rank since the run, or its resumption, began.

        served: unique ids of training steps, summed over steps; cold: those of them that got the cold row; refused:
        those that got it because their shard was full. evicted: rows that made room for others; expired: rows that were
        removed at the beginning of a day.
        """
        super().__init__(shape, rank, num_ranks, **others)

    def serve(self, ids_R: Int64Array, kind: str = "step") -> ExactRequest:
        """Find the unique ids, their hashes and slots, ahead of the steps; `settle` finds their rows in the step."""
        ids_Q, inverse_R = unique(ids_R)
        hash_Q = keys.splitmix64(ids_Q)
        slot_Q = self._slot_of_shard[keys.shard_of_hash(hash_Q, self.shape.num_shards)]
        assert (slot_Q >= 0).all(), f"table {self.shape.name}: asked for rows that another rank owns"
        none = torch.empty(0, dtype=torch.int64)
        return ExactRequest(none, inverse_R, len(ids_Q), ids_Q, hash_Q, slot_Q, kind == "step")

    def settle(self, request: RowRequest) -> Tensor:
        """Return the rows (U,) that the ids of a request have in this step, each once.

        Several ids have one cold row, which is read once, so that it is moved once. In a training step, ids are counted
        and admitted before: one that has occurred in `admit_after` steps, this one included, gets a row of its own."""
        assert isinstance(request, ExactRequest)
        is_training = request.is_training and torch.is_grad_enabled()
        place_Q = self.map.places(request.slot_Q, request.hash_Q, request.ids_Q)
        if is_training:
            place_Q = self._use(request, place_Q)
        cold_Q = place_Q < self.map.num_slots
        if is_training:
            self.counts["served"] += len(place_Q)
            self.counts["cold"] += int(cold_Q.sum())
        rows_U, request.inverse_Q = _once(place_Q, cold_Q)
        return self._on_device(rows_U)

    def of_ids(self, request: RowRequest, rows_UV: Tensor) -> Tensor:
        assert isinstance(request, ExactRequest) and request.inverse_Q is not None
        return rows_UV if len(rows_UV) == request.num_unique else take_rows(rows_UV, self._on_device(request.inverse_Q))

    def tally(self) -> dict[str, int]:
        return {"used_rows": int(self.map.used_S.sum()), **self.counts}

    def expire_rows(self, date_: date | None) -> None:
        """Use rows on this day from now on, and free those that were last used more than `expire_days` before.

        Counts of ids without a row are halved every `expire_days` days. Called before the first step alone, with no
        request under way. Raises ConfigError where rows go by days and there is none.
        """
        days = self.shape.rules.expire_days
        if date_ is None:
            if days is None:
                return
            raise ConfigError(Problem.EXPIRY_WITHOUT_DAYS, self.shape.name, days)
        day = self._day = (date_ - date(1970, 1, 1)).days
        self._faded_S[self._faded_S == 0] = day
        if days is None:
            return
        for slot in range(len(self.shards)):
            gone = np.flatnonzero(self._of_rows(self.last_use, slot)[1:] < day - days)
            self.counts["expired"] += len(gone)
            self._let_go(slot, 1 + gone)
            if self.filter and day - self._faded_S[slot] >= days:
                self.filter.counts_SC[slot] >>= 1
                self._faded_S[slot] = day

    def _use(self, request: ExactRequest, place_Q: Int64Array) -> Int64Array:
        """Notes the use of the ids in a training step, counts those without a row and gives rows to some; the places of
        all then. Rows that the step uses are marked before, so that none of them makes room."""
        self._clock_S += 1
        is_cold_Q = place_Q < self.map.num_slots
        self._mark(request.slot_Q, place_Q, np.flatnonzero(~is_cold_Q))
        waiting_M, evicted = np.flatnonzero(is_cold_Q), self.counts["evicted"]
        if len(waiting_M):
            place_Q[waiting_M] = self._admit(
                request.slot_Q[waiting_M], request.hash_Q[waiting_M], request.ids_Q[waiting_M]
            )
            self._mark(request.slot_Q, place_Q, waiting_M)
        if self.counts["evicted"] != evicted:  # the rows that are left may have moved
            return self.map.places(request.slot_Q, request.hash_Q, request.ids_Q)
        return place_Q

    def _mark(self, slot_Q: Int64Array, place_Q: Int64Array, which_M: Int64Array) -> None:
        """Notes that these places are used today, in this step."""
        self.last_use[place_Q[which_M]] = self._day
        self.used_at[place_Q[which_M]] = self._clock_S[slot_Q[which_M]]

    def _admit(self, slot_M: Int64Array, hash_M: UInt64Array, ids_M: Int64Array) -> Int64Array:
        """Counts ids that have no row, and gives rows to those that have occurred often enough; the places of all."""
        place_M = slot_M.copy()
        wanting_M = np.arange(len(ids_M))
        if self.filter:
            wanting_M = np.flatnonzero(self.filter.add(slot_M, hash_M) >= self.shape.rules.admit_after)
        if not len(wanting_M):
            return place_M
        if self.shape.rules.when_full == "evict":
            self._make_room(slot_M[wanting_M])
        place_M[wanting_M] = self.map.insert(slot_M[wanting_M], hash_M[wanting_M], ids_M[wanting_M])
        new_M = wanting_M[place_M[wanting_M] >= self.map.num_slots]
        self.counts["refused"] += len(wanting_M) - len(new_M)
        first_MV = first_vectors(self.shape, hash_M[new_M], self._seed, self._scale)
        self.rows.weight.index_copy_(
            0, self._on_device(place_M[new_M]), self._on_device(first_MV).to(self.rows.weight.dtype)
        )
        return place_M

    def _make_room(self, slot_M: Int64Array) -> None:
        """Lets go of rows in each shard that has fewer free ones than it is asked for, one for each of `slot_M`: the
        rows longest unused, and none that this step uses."""
        capacity = self.shape.rows_per_shard - 1
        lacking_S = self.map.used_S + np.bincount(slot_M, minlength=len(self.shards)) - capacity
        for slot in np.flatnonzero(lacking_S > 0).tolist():
            wanted = max(int(lacking_S[slot]), math.ceil(_AT_ONCE * capacity))
            used_at = self._of_rows(self.used_at, slot)[1:]
            gone = longest_unused(used_at, self.map.ids_of(slot), wanted, int(self._clock_S[slot]))
            self.counts["evicted"] += len(gone)
            self._let_go(slot, 1 + gone)

    def _let_go(self, slot: int, gone_K: Int64Array) -> None:
        """Free these rows of a shard, ascending; the last rows move to their positions, and leave zeros behind."""
        if not len(gone_K):
            return
        parts = self._of_slot(slot).parts.values()
        marks = [self._of_rows(each, slot) for each in (self.last_use, self.used_at)]
        from_M, to_M = self.map.remove(slot, gone_K)
        free = 1 + int(self.map.used_S[slot])
        for values in parts:
            values[self._on_device(to_M)] = values[self._on_device(from_M)]
            values[free:] = 0
        for mark in marks:
            mark[to_M] = mark[from_M]
            mark[free:] = 0

    def _import(self, slot: int, parts: Mapping[str, Tensor]) -> None:
        ids_N, num_rows = parts[IDS].numpy(), 1 + len(parts[IDS])
        if num_rows > self.shape.rows_per_shard:
            raise CheckpointError(Problem.TABLE_TOO_SMALL, self.shape.name, num_rows - 1, self.shape.rows_per_shard - 1)
        self.map.set_ids(slot, ids_N)
        super()._import(slot, parts)

    def _of_slot(self, slot: int) -> IdRows:
        """A view of a shard's rows in use, the cold row first."""
        slots = self.map.num_slots
        return self.rows[slot : slots * (1 + int(self.map.used_S[slot])) : slots]

    def _of_rows(self, each: NDArray[np.int32], slot: int) -> NDArray[np.int32]:
        """A view of what an array by place has of a shard's rows in use, the cold row first."""
        return each[slot :: self.map.num_slots][: 1 + int(self.map.used_S[slot])]

    def _kept_of(self, slot: int) -> dict[str, Tensor]:
        counts = self.filter.counts_SC[slot] if self.filter else np.empty(0, np.uint8)
        return super()._kept_of(slot) | {
            IDS: torch.from_numpy(self.map.ids_of(slot)),
            LAST_USE: torch.from_numpy(self._of_rows(self.last_use, slot)),
            USED_AT: torch.from_numpy(self._of_rows(self.used_at, slot)),
            CLOCK: torch.from_numpy(self._clock_S[slot : slot + 1]),
            COUNTS: torch.from_numpy(counts),
            FADED: torch.from_numpy(self._faded_S[slot : slot + 1]),
        }

    def _fill(self) -> None:
        """Do nothing: no row is in use yet, and a cold row begins with zeros."""

    def _on_device(self, places: NDArray[Any]) -> Tensor:
        return on_device(places, self.rows.weight.device)


def first_vectors(shape: TableShape, hash_N: UInt64Array, seed: int, scale: float) -> NDArray[np.float64]:
    """Draw the first values of the rows of ids with these splitmix64 hashes, (N, width).

    As those of hashed rows they are uniform with mean 0 and standard deviation `scale`, and by counter; here from
    (seed, table, id)."""
    start_N = keys.splitmix64((hash_N ^ keys.stream_start(f"{seed}/{shape.name}")).view(np.int64))
    counter_NV: UInt64Array = start_N[:, None] + np.arange(shape.width, dtype=np.uint64)[None, :]
    return uniform(counter_NV.reshape(-1), scale).reshape(-1, shape.width)


def _once(place_Q: Int64Array, cold_Q: BoolArray) -> tuple[Int64Array, Int64Array]:
    """Different places (U,), and for each of `place_Q` its index among them: as they are where all differ, else those
    of ids with a row first."""
    cold_U, cold_inverse = unique(place_Q[cold_Q])
    if len(cold_U) == len(cold_inverse):
        return place_Q, np.arange(len(place_Q))
    num_own = len(place_Q) - len(cold_inverse)
    inverse_Q = np.empty(len(place_Q), np.int64)
    inverse_Q[~cold_Q], inverse_Q[cold_Q] = np.arange(num_own), num_own + cold_inverse
    return np.concatenate([place_Q[~cold_Q], cold_U]), inverse_Q


_ENTRIES_A_ROW = 2  # at least


class RowMap:
    """The rows of ids in `num_slots` shards of `rows_per_shard` rows each, row 0 included."""

    def __init__(self, num_slots: int, rows_per_shard: int) -> None:
        self.num_slots, self.rows_per_shard = num_slots, rows_per_shard
        self.used_S: Int64Array = np.zeros(num_slots, np.int64)
        """Rows in use, without row 0: they are 1 .. used."""
        self.id_of_place: Int64Array = np.zeros(num_slots * rows_per_shard, np.int64)
        """The id of the row at row x num_slots + slot."""
        self._span = keys.power_of_two(_ENTRIES_A_ROW * (rows_per_shard - 1))
        self.row_of_entry: NDArray[np.int32] = np.zeros(num_slots * self._span, np.int32)
        """The row that each entry of the open addressing leads to, `_span` entries a shard; 0: empty."""

    def places(self, slot_N: Int64Array, hash_N: UInt64Array, ids_N: Int64Array) -> Int64Array:
        """Find the place row x num_slots + slot of each id, (N,); row 0 of its shard where it has none.

        `hash_N`: splitmix64 of the ids.
        """
        first_N, at_N = slot_N * self._span, self._first_entry(hash_N)
        row_N = self.row_of_entry[first_N + at_N].astype(np.int64)
        found_N: Int64Array = row_N * self.num_slots + slot_N
        open_N = np.flatnonzero((row_N != 0) & (self.id_of_place[found_N] != ids_N))
        while len(open_N):  # the entry is another id's: the next one
            at_N[open_N] = (at_N[open_N] + 1) & (self._span - 1)
            row_M = self.row_of_entry[first_N[open_N] + at_N[open_N]]
            place_M = row_M.astype(np.int64) * self.num_slots + slot_N[open_N]
            found_N[open_N] = place_M
            open_N = open_N[(row_M != 0) & (self.id_of_place[place_M] != ids_N[open_N])]
        return found_N

    def insert(self, slot_N: Int64Array, hash_N: UInt64Array, ids_N: Int64Array) -> Int64Array:
        """Assign rows to different new ids, ascending; returns their places, row 0 where a shard is full."""
        order_N = np.argsort(slot_N, kind="stable")
        slot_M = slot_N[order_N]
        count_S = np.bincount(slot_M, minlength=len(self.used_S))
        before_S = np.cumsum(count_S) - count_S
        row_M = self.used_S[slot_M] + 1 + np.arange(len(slot_M)) - before_S[slot_M]
        row_M[row_M >= self.rows_per_shard] = 0
        row_N = np.empty_like(row_M)
        row_N[order_N] = row_M
        place_N = row_N * self.num_slots + slot_N
        fits_N = row_N != 0
        self.id_of_place[place_N[fits_N]] = ids_N[fits_N]
        self.used_S = np.minimum(self.used_S + count_S, self.rows_per_shard - 1)
        self._enter(slot_N[fits_N], hash_N[fits_N], row_N[fits_N])
        return place_N

    def remove(self, slot: int, gone_K: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Take the rows `gone_K` of a shard, ascending, from their ids; the last rows get their numbers.

        So 1 .. used are in use again. Returns which rows those are, (M,), and their new numbers, (M,), both ascending.
        The shard's part of the map is made again: remove many rows at once.
        """
        used, ids_N = int(self.used_S[slot]) - len(gone_K), self._ids(slot)
        last_K = np.arange(used + 1, used + 1 + len(gone_K))
        from_M, to_M = np.setdiff1d(last_K, gone_K, assume_unique=True), gone_K[gone_K <= used]
        ids_N[to_M] = ids_N[from_M]
        self.used_S[slot] = used
        self._enter_again(slot)
        return from_M, to_M

    def set_ids(self, slot: int, ids_N: Int64Array) -> None:
        """Make `ids_N` the ids of rows 1, 2, .. of a shard, in the place of those that were there."""
        assert len(ids_N) < self.rows_per_shard
        self._ids(slot)[1 : 1 + len(ids_N)] = ids_N
        self.used_S[slot] = len(ids_N)
        self._enter_again(slot)

    def ids_of(self, slot: int) -> Int64Array:
        """Return the ids of rows 1, 2, .. of a shard."""
        return self._ids(slot)[1 : 1 + int(self.used_S[slot])]

    def _ids(self, slot: int) -> Int64Array:
        """A view of the ids of rows 0, 1, .. of a shard."""
        return self.id_of_place[slot :: self.num_slots]

    def _first_entry(self, hash_N: UInt64Array) -> Int64Array:
        """The entry of its shard where the search for an id begins: its hash has chosen the shard by its top bits."""
        return (hash_N & np.uint64(self._span - 1)).view(np.int64)

    def _enter_again(self, slot: int) -> None:
        """Empties a shard's part of the map and enters all its rows."""
        self.row_of_entry[slot * self._span : (slot + 1) * self._span] = 0
        ids_N = self.ids_of(slot)
        self._enter(np.full(len(ids_N), slot), keys.splitmix64(ids_N), np.arange(1, len(ids_N) + 1))

    def _enter(self, slot_N: Int64Array, hash_N: UInt64Array, row_N: Int64Array) -> None:
        """Writes rows into the first empty entries from their hash on. Of rows that want one entry the last one to be
        written gets it, and the others look further; a row that is in already stays."""
        first_N, at_N = slot_N * self._span, self._first_entry(hash_N)
        entries, open_N = self.row_of_entry, np.arange(len(row_N))
        while len(open_N):
            entry_M = first_N[open_N] + at_N[open_N]
            row_M = row_N[open_N]
            is_empty_M = entries[entry_M] == 0
            entries[entry_M[is_empty_M]] = row_M[is_empty_M]
            open_N = open_N[entries[entry_M] != row_M]
            at_N[open_N] = (at_N[open_N] + 1) & (self._span - 1)


Counts = NDArray[np.uint8]

MOST_COUNT = 255
_COUNTERS_A_ROW = 8  # at least
_SALT = np.uint64(0xD1B54A32D192ED03)


class CountingFilter:
    """Counters of the ids without a row, in `num_slots` shards; `slot` is a shard's place among those."""

    def __init__(self, num_slots: int, counters_per_shard: int) -> None:
        """`counters_per_shard` is a power of two."""
        self.counts_SC: Counts = np.zeros((num_slots, counters_per_shard), np.uint8)

    def add(self, slot_N: Int64Array, hash_N: UInt64Array) -> Counts:
        """Count different ids once more, all at the same time, and return their counts, (N,), up to 255.

        `hash_N`: splitmix64 of the ids. What the counters are then does not depend on the order of the ids.
        """
        one_N, other_N = self._places(slot_N, hash_N)
        counts = self.counts_SC.reshape(-1)
        count_N = np.minimum(counts[one_N], counts[other_N])
        count_N += count_N < MOST_COUNT
        np.maximum.at(counts, one_N, count_N)
        np.maximum.at(counts, other_N, count_N)
        return count_N

    def _places(self, slot_N: Int64Array, hash_N: UInt64Array) -> tuple[Int64Array, Int64Array]:
        """Two counters of each id, by 64 bits of their own: the hash itself has chosen the shard."""
        num_counters = self.counts_SC.shape[1]
        bits_N = keys.splitmix64((hash_N ^ _SALT).view(np.int64))
        first_N, last = slot_N * num_counters, np.uint64(num_counters - 1)
        one_N, other_N = ((each & last).view(np.int64) for each in (bits_N, bits_N >> np.uint64(32)))
        return first_N + one_N, first_N + other_N


_AT_ONCE = 1 / 16
"""Share of a full shard's rows to free at least, because finding them reads all rows and its map is made again."""


def longest_unused(used_at_N: NDArray[np.int32], ids_N: Int64Array, most: int, now: int) -> Int64Array:
    """Find which `most` of N rows were used longest ago, before step `now`, by their index, ascending; or fewer.

    Of rows that were last used in one step those with the smaller ids come first."""
    most = min(most, int(np.count_nonzero(used_at_N < now)))
    if not most:
        return np.empty(0, np.int64)
    limit = np.partition(used_at_N, most - 1)[most - 1]
    older, tied = np.flatnonzero(used_at_N < limit), np.flatnonzero(used_at_N == limit)
    tied = tied[np.argsort(ids_N[tied])[: most - len(older)]]
    return np.sort(np.concatenate([older, tied]))


Figures = dict[str, Any]
"""Figures of one table, as report.json has them."""
WARNED_SHARE = 0.25
"""Share of a table's ids: where more of them share a row, the run warns; with four rows for each id 22 % do."""


def gather_figures(comm: Comm, tables: Mapping[str, IdTable]) -> dict[str, Figures]:
    """Gather the figures of the tables of all ranks; every rank calls it."""
    own = {name: table.tally() for name, table in tables.items()}
    everyone = comm.allgather_object(own, name="tables")
    return {
        name: figures_of(table.shape, sum((Counter(each[name]) for each in everyone), Counter[str]()))
        for name, table in tables.items()
    }


def figures_of(shape: TableShape, tally: Mapping[str, int]) -> Figures:
    """Return the figures of a table of which all ranks together have this tally.

    `share` is the part of the ids that share a row with another one. In a hashed table any row is as likely, so it is
    that of the rows that others use. In an exact one it is the part of the ids served that got the cold row.
    """
    if isinstance(shape, ExactShape):
        counts = {name: tally.get(name, 0) for name in ("used_rows", "served", "cold", "refused", "evicted", "expired")}
        share = counts["cold"] / counts["served"] if counts["served"] else None
        return {"kind": "exact", "rows": shape.num_rows, **counts, "share": share}
    used = tally.get("used_rows", 0)
    share = (used - 1) / shape.size if used else None
    return {"kind": "hashed", "rows": shape.size, "used_rows": used, "share": share}


def warning_of(name: str, figures: Figures) -> str | None:
    """Warn in one line, with the way out, where too many ids share a row, or have none of their own for long."""
    rows, used = figures["rows"], figures["used_rows"]
    if figures["kind"] == "hashed":
        if not used or figures["share"] <= WARNED_SHARE:
            return None
        return (
            f"table {name}: about {figures['share']:.0%} of its ids share one of its {rows:,} rows with another id; "
            f"give each a row: model.tables.{name}={{kind: exact, max_rows: {2 * num_ids(rows, used)}}}"
        )
    if figures["evicted"] > rows:
        what = f"{figures['evicted']:,} rows made room for other ids, so few are trained for long"
    elif figures["refused"]:
        what = f"{figures['refused']:,} times an id stayed at the cold row because its shard was full"
    else:
        return None
    return (
        f"table {name}: {what}, with {used:,} of {rows:,} rows in use; raise model.tables.{name}.max_rows, or set a "
        "smaller expire_days, a larger admit_after or when_full=refuse"
    )


def num_ids(rows: int, used_rows: int) -> int:
    """Estimate how many different ids use `used_rows` of the rows of a hashed table, at least if they use all.

    Of m rows n ids leave m (1 - 1/m)^n empty (linear counting: Whang et al., "A linear-time probabilistic counting
    algorithm for database applications", 1990).
    """
    empty = max(rows - used_rows, 0.5)
    return used_rows if rows == 1 else round(math.log(empty / rows) / math.log1p(-1 / rows))
