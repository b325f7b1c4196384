"""Exact ID tables: a row for each id that was seen often enough, as long as the id is used.

An id is removed when it is no longer used, or when it is the one longest unused in a full shard.

Every shard has room for its part of `max_rows` rows and one more, row 0, the *cold row*: it stands in for all ids of
the shard that have no row of their own, is trained by their samples, and begins with zeros. All that a shard holds
depends on the ids that training has brought to it, step by step, and neither on the number of ranks nor on the order of
the ids within a step. Letters of shapes: R ids received, Q unique among them, S shards owned; a *slot* is a shard's
place among those.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featurestore.keys import UInt64Array, owned_shards, shard_of_hash, splitmix64, stream_start
from featurestore.lookup.embedding import on_device
from trainer.config.options import ExactTableConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.exchange.routing import Int64, unique
from trainer.exchange.sums import take_rows
from trainer.ids.admission import CountingFilter, counters_for
from trainer.ids.eviction import CLOCK, USED_AT, count_to_evict, longest_unused, order_of_use
from trainer.ids.optimizers import LAST_WEIGHT
from trainer.ids.rowmap import RowMap, map_bytes
from trainer.ids.rows import WEIGHT, IdRows
from trainer.ids.tables import IdTable, RowRequest, TableShape, uniform

IDS, LAST_USE, COUNTS, FADED = "ids", "last_use", "counts", "faded"
_WARM = (IDS, WEIGHT, LAST_USE, COUNTS, FADED)


@dataclass(frozen=True, kw_only=True)
class ExactShape(TableShape):
    """Shape of an exact table: `num_rows` is the most ids that have rows; every shard takes its part, rounded up."""

    rules: ExactTableConfig

    @property
    def rows_per_shard(self) -> int:
        """Rows of each shard, the cold row among them."""
        return 1 + -(-self.num_rows // self.num_shards)

    def table(self, rank: int, num_ranks: int, **others: Any) -> "ExactTable":
        return ExactTable(self, rank, num_ranks, **others)

    @property
    def counters_per_shard(self) -> int:
        """Counters of a shard's filter; none where ids are admitted at first sight."""
        return counters_for(self.rows_per_shard - 1) if self.rules.admit_after > 1 else 0

    @property
    def setting(self) -> str:
        return f"model.tables.{self.name}.max_rows={self.num_rows}"

    @property
    def evicts(self) -> bool:
        """Whether rows make room for new ids in a full shard."""
        return self.rules.when_full == "evict"

    @property
    def index_bytes(self) -> int:
        marks = 2 if self.evicts else 1
        return map_bytes(self.rows_per_shard) + marks * 4 * self.rows_per_shard + self.counters_per_shard


@dataclass
class ExactRequest(RowRequest):
    """Unique ids (Q,), ascending, their hashes and slots, and their places as they were when they were asked for."""

    ids_Q: Int64
    hash_Q: UInt64Array
    slot_Q: Int64
    place_Q: Int64
    is_training: bool
    settled: RowRequest | None = None
    """The rows that the ids have in the step that is under way."""


@dataclass
class ExactCounts:
    """Counts of what happened on this rank since the run, or its resumption, began.

    `served`: unique ids of training steps, summed over steps; `cold`: those of them that got the cold row; `refused`:
    those that got it because their shard was full. `evicted`: rows that made room for others; `expired`: rows that were
    let go at the beginning of a day.
    """

    served: int = 0
    cold: int = 0
    refused: int = 0
    evicted: int = 0
    expired: int = 0


class ExactTable(IdTable):
    """The shards of one exact table that this rank owns."""

    shape: ExactShape

    def __init__(self, shape: ExactShape, rank: int, num_ranks: int, **others: Any) -> None:
        num_slots = len(owned_shards(shape.num_shards, rank, num_ranks))
        self.map = RowMap(num_slots, shape.rows_per_shard)
        self.filter = CountingFilter(num_slots, shape.counters_per_shard) if shape.counters_per_shard else None
        self.last_use: NDArray[np.int32] = np.zeros(num_slots * shape.rows_per_shard, np.int32)
        """The day on which each place was last used in training, in days since 1970-01-01."""
        self.used_at: NDArray[np.int32] = np.zeros(len(self.last_use) if shape.evicts else 0, np.int32)
        """The step in which each place was last used in training, by the shard's clock."""
        self._clock_S = np.zeros(num_slots, np.int32)
        """Training steps that a shard has been through, those of the runs before included that a warm start took."""
        self._faded_S = np.zeros(num_slots, np.int32)
        """The day on which a shard's counts were last halved, or first counted."""
        self.counts, self._day = ExactCounts(), 0
        super().__init__(shape, rank, num_ranks, **others)

    def serve(self, ids_R: Int64, kind: str = "step") -> ExactRequest:
        """Find the unique ids, and the rows of those that have one.

        Runs ahead of the steps, so ids without a row are looked for again by `vectors`."""
        ids_Q, inverse_R = unique(ids_R)
        if kind == "step":
            self.seen = self.seen.with_values(ids_Q)
        hash_Q = splitmix64(ids_Q)
        slot_Q = self._slot_of_shard[shard_of_hash(hash_Q, self.shape.num_shards)]
        assert (slot_Q >= 0).all(), f"table {self.shape.name}: asked for rows that another rank owns"
        place_Q = self.map.places(slot_Q, hash_Q, ids_Q)
        none = torch.empty(0, dtype=torch.int64)
        return ExactRequest(none, inverse_R, len(ids_Q), ids_Q, hash_Q, slot_Q, place_Q, kind == "step")

    def expect(self, request: RowRequest) -> None:
        assert isinstance(request, ExactRequest)
        super().expect(self._settle(request))

    def vectors(self, request: RowRequest) -> Tensor:
        """Return the vectors of the ids (Q, V), with autograd attached.

        In a training step, ids are counted and admitted before: one that has occurred in `admit_after` steps, this one
        included, gets a row of its own."""
        assert isinstance(request, ExactRequest)
        if request.settled is None:
            self.expect(request)
        settled, request.settled = request.settled, None
        assert settled is not None
        rows_UV = super().vectors(settled)
        if settled.num_unique == request.num_unique:
            return rows_UV
        return take_rows(rows_UV, self._on_device(settled.inverse_R))

    def _settle(self, request: ExactRequest) -> RowRequest:
        """Which rows the ids of a request have in this step, (U,), and the one of each id, (Q,): several ids have one
        cold row, which is read once, so that it is moved once."""
        is_training = request.is_training and torch.is_grad_enabled()
        place_Q = self._places(request, request.place_Q)
        if is_training:
            place_Q = self._use(request, place_Q)
        cold_Q = place_Q % self.shape.rows_per_shard == 0
        if is_training:
            self.counts.served += len(place_Q)
            self.counts.cold += int(cold_Q.sum())
        rows_U, inverse_Q = _once(place_Q, cold_Q)
        request.settled = RowRequest(self._on_device(rows_U), inverse_Q, len(rows_U))
        return request.settled

    def tally(self) -> dict[str, int]:
        return {"rows": int(self.map.used_S.sum()), **asdict(self.counts)}

    def begin_day(self, date_: date | None) -> None:
        """Use rows on this day from now on, and free those that were last used more than `expire_days` before.

        Counts of ids without a row are halved every `expire_days` days. Called before the first step alone, with no
        request under way. Raises ConfigError where rows go by days and there is none.
        """
        days = self.shape.rules.expire_days
        if date_ is None:
            if days is None:
                return
            raise ConfigError(
                f"model.tables.{self.shape.name}.expire_days={days} counts the days of the training samples, and not "
                "all of their files are named by day, as day=2026-01-31.parquet; leave it out, or write the samples "
                "with: python jobs/build_samples.py"
            )
        day = self._day = (date_ - date(1970, 1, 1)).days
        self._faded_S[self._faded_S == 0] = day
        if days is None:
            return
        for slot in range(len(self.shards)):
            self._expire(slot, day - days)
            if self.filter and day - self._faded_S[slot] >= days:
                self.filter.fade(slot)
                self._faded_S[slot] = day

    def restart(self, epoch: int) -> None:
        """Begin all rows in use anew for this epoch; ids keep theirs. Memory that no row has used stays untouched."""
        for slot in range(len(self.shards)):
            for part in self._of_slot(slot).parts.values():
                part.zero_()
        self._fill(epoch)

    def import_shards(self, state: Mapping[str, Tensor]) -> None:
        """Take the owned shards out of `state`, which may hold others. Raises CheckpointError."""
        for slot in range(len(self.shards)):
            self._import(slot, self._parts_of(slot, state, list(self._kept_of(slot))))

    def warm_names(self) -> list[str]:
        """List names of the tensors that `begin_with` takes; those of `used_at` and `clock` may be lacking."""
        parts = (*_WARM, USED_AT, CLOCK) if self.shape.evicts else _WARM
        return [self._name(shard, part) for shard in self.shards for part in parts]

    def begin_with(self, state: Mapping[str, Tensor]) -> None:
        """Take ids, weights and days of last use; and counts, where there are as many counters here."""
        for slot in range(len(self.shards)):
            parts = self._parts_of(slot, state, _WARM)
            if self.optimizer.lags:
                parts[LAST_WEIGHT] = parts[WEIGHT]
            if self.shape.evicts:
                parts |= order_of_use(state, self._name(self.shards[slot], ""), parts[LAST_USE])
            if len(parts[COUNTS]) != self.shape.counters_per_shard:
                del parts[COUNTS], parts[FADED]
            self._import(slot, parts)

    def _parts_of(self, slot: int, state: Mapping[str, Tensor], parts: Sequence[str]) -> dict[str, Tensor]:
        """Parts of a shard out of a checkpoint. Raises CheckpointError where it lacks one."""
        name_of = {part: self._name(self.shards[slot], part) for part in parts}
        if lacking := [name for name in name_of.values() if name not in state]:
            raise CheckpointError(
                f"{lacking[0]} is not in the checkpoint; was it written with another "
                f"model.tables.{self.shape.name}, model.table_shards or optim.ids?"
            )
        return {part: state[name] for part, name in name_of.items()}

    def _places(self, request: ExactRequest, before_Q: Int64) -> Int64:
        """The place of each id as it is now, (Q,), whatever has come, gone and moved since they were `before_Q`."""
        place_Q = before_Q.copy()
        lost_Q = np.flatnonzero(~self.map.holds(request.slot_Q, place_Q, request.ids_Q))
        if len(lost_Q):
            place_Q[lost_Q] = self.map.places(request.slot_Q[lost_Q], request.hash_Q[lost_Q], request.ids_Q[lost_Q])
        return place_Q

    def _use(self, request: ExactRequest, place_Q: Int64) -> Int64:
        """Notes the use of the ids in a training step, counts those without a row and gives rows to some; the places of
        all then. Rows that the step uses are marked before, so that none of them makes room."""
        self._clock_S += 1
        is_cold_Q = place_Q % self.shape.rows_per_shard == 0
        self._mark(request.slot_Q, place_Q, np.flatnonzero(~is_cold_Q))
        waiting_M, evicted = np.flatnonzero(is_cold_Q), self.counts.evicted
        if len(waiting_M):
            place_Q[waiting_M] = self._admit(
                request.slot_Q[waiting_M], request.hash_Q[waiting_M], request.ids_Q[waiting_M]
            )
            self._mark(request.slot_Q, place_Q, waiting_M)
        return place_Q if self.counts.evicted == evicted else self._places(request, place_Q)

    def _mark(self, slot_Q: Int64, place_Q: Int64, which_M: Int64) -> None:
        """Notes that these places are used today, in this step."""
        self.last_use[place_Q[which_M]] = self._day
        if self.shape.evicts:
            self.used_at[place_Q[which_M]] = self._clock_S[slot_Q[which_M]]

    def _admit(self, slot_M: Int64, hash_M: UInt64Array, ids_M: Int64) -> Int64:
        """Counts ids that have no row, and gives rows to those that have occurred often enough; the places of all."""
        place_M = slot_M * self.shape.rows_per_shard
        wanting_M = np.arange(len(ids_M))
        if self.filter:
            wanting_M = np.flatnonzero(self.filter.add(slot_M, hash_M) >= self.shape.rules.admit_after)
        if not len(wanting_M):
            return place_M
        if self.shape.evicts:
            self._make_room(slot_M[wanting_M])
        place_M[wanting_M] = self.map.insert(slot_M[wanting_M], hash_M[wanting_M], ids_M[wanting_M])
        new_M = wanting_M[place_M[wanting_M] % self.shape.rows_per_shard != 0]
        self.counts.refused += len(wanting_M) - len(new_M)
        first_MV = first_vectors(self.shape, hash_M[new_M], self._seed, self._scale)
        self.rows.weight.index_copy_(
            0, self._on_device(place_M[new_M]), self._on_device(first_MV).to(self.rows.weight.dtype)
        )
        return place_M

    def _make_room(self, slot_M: Int64) -> None:
        """Lets go of rows in each shard that has fewer free ones than it is asked for, one for each of `slot_M`: the
        rows longest unused, and none that this step uses."""
        capacity = self.shape.rows_per_shard - 1
        lacking_S = self.map.used_S + np.bincount(slot_M, minlength=len(self.shards)) - capacity
        for slot in np.flatnonzero(lacking_S > 0).tolist():
            wanted = count_to_evict(int(lacking_S[slot]), capacity)
            used_at = self._of_rows(self.used_at, slot)[1:]
            gone = longest_unused(used_at, self.map.ids_of(slot), wanted, int(self._clock_S[slot]))
            self.counts.evicted += len(gone)
            self._let_go(slot, 1 + gone)

    def _expire(self, slot: int, before: int) -> None:
        """Lets go of a shard's rows that were last used before that day."""
        gone = np.flatnonzero(self._of_rows(self.last_use, slot)[1:] < before)
        self.counts.expired += len(gone)
        self._let_go(slot, 1 + gone)

    def _let_go(self, slot: int, gone_K: Int64) -> None:
        """Frees these rows of a shard, ascending; the last rows move into their places, and what they leave is zero."""
        if not len(gone_K):
            return
        parts = self._of_slot(slot).parts.values()
        marks = [self._of_rows(each, slot) for each in self._marks().values()]
        from_M, to_M = self.map.remove(slot, gone_K)
        free = 1 + int(self.map.used_S[slot])
        for values in parts:
            values[self._on_device(to_M)] = values[self._on_device(from_M)]
            values[free:] = 0
        for mark in marks:
            mark[to_M] = mark[from_M]
            mark[free:] = 0

    def _import(self, slot: int, parts: Mapping[str, Tensor]) -> None:
        """Makes those parts the shard's; what `parts` lacks stays as it is, zeros before the first step."""
        ids_N, num_rows = parts[IDS].numpy(), 1 + len(parts[IDS])
        if num_rows > self.shape.rows_per_shard:
            raise CheckpointError(
                f"table {self.shape.name}: a shard of the checkpoint has {num_rows - 1:,} rows, and this run room for "
                f"{self.shape.rows_per_shard - 1:,}; raise model.tables.{self.shape.name}.max_rows"
            )
        self.map.set_ids(slot, ids_N)
        for part, values in self._kept_of(slot).items():
            if part == IDS or part not in parts:
                continue
            if values.shape != parts[part].shape:
                raise CheckpointError(
                    f"{self._name(self.shards[slot], part)} has shape {tuple(parts[part].shape)} in the checkpoint and "
                    f"{tuple(values.shape)} in this run; set model.tables.{self.shape.name} and the table's width as "
                    "they were"
                )
            values.copy_(parts[part])

    def _of_slot(self, slot: int) -> IdRows:
        """A view of a shard's rows in use, the cold row first."""
        return self.rows.narrow(slot * self.shape.rows_per_shard, 1 + int(self.map.used_S[slot]))

    def _of_rows(self, each: NDArray[np.int32], slot: int) -> NDArray[np.int32]:
        """A view of what an array by place has of a shard's rows in use, the cold row first."""
        start = slot * self.shape.rows_per_shard
        return each[start : start + 1 + int(self.map.used_S[slot])]

    def _marks(self) -> dict[str, NDArray[np.int32]]:
        """When each place was used, by the last part of the name in a checkpoint."""
        return {LAST_USE: self.last_use, **({USED_AT: self.used_at} if self.shape.evicts else {})}

    def _kept_of(self, slot: int) -> dict[str, Tensor]:
        marks = {part: torch.from_numpy(self._of_rows(each, slot)) for part, each in self._marks().items()}
        if self.shape.evicts:
            marks[CLOCK] = torch.from_numpy(self._clock_S[slot : slot + 1])
        counts = self.filter.counts_SC[slot] if self.filter else np.empty(0, np.uint8)
        return super()._kept_of(slot) | {
            IDS: torch.from_numpy(self.map.ids_of(slot)),
            **marks,
            COUNTS: torch.from_numpy(counts),
            FADED: torch.from_numpy(self._faded_S[slot : slot + 1]),
        }

    def _fill(self, epoch: int) -> None:
        """First values of the rows in use; a cold row's are zeros."""
        for slot in range(len(self.shards)):
            ids_N = self.map.ids_of(slot)
            first_NV = first_vectors(self.shape, splitmix64(ids_N), self._seed, self._scale, epoch)
            self._of_slot(slot).weight[1:].copy_(torch.from_numpy(first_NV))

    def _on_device(self, places: NDArray[Any]) -> Tensor:
        return on_device(places, self.rows.weight.device)


def first_vectors(
    shape: TableShape, hash_N: UInt64Array, seed: int, scale: float, epoch: int = 0
) -> NDArray[np.float64]:
    """Draw the first values of the rows of ids with these splitmix64 hashes, (N, width).

    As those of hashed rows they are uniform with mean 0 and standard deviation `scale`, and by counter; here from
    (seed, table, id) and, after the first one, the epoch."""
    stream = f"{seed}/{shape.name}" + (f"/{epoch}" if epoch else "")
    start_N = splitmix64((hash_N ^ stream_start(stream)).view(np.int64))
    counter_NV: UInt64Array = start_N[:, None] + np.arange(shape.width, dtype=np.uint64)[None, :]
    return uniform(counter_NV.reshape(-1), scale).reshape(-1, shape.width)


def _once(place_Q: Int64, cold_Q: NDArray[np.bool_]) -> tuple[Int64, Int64]:
    """Different places (U,), and for each of `place_Q` its index among them: as they are where all differ, else those
    of ids with a row first."""
    cold_U, cold_inverse = unique(place_Q[cold_Q])
    if len(cold_U) == len(cold_inverse):
        return place_Q, np.arange(len(place_Q))
    num_own = len(place_Q) - len(cold_inverse)
    inverse_Q = np.empty(len(place_Q), np.int64)
    inverse_Q[~cold_Q], inverse_Q[cold_Q] = np.arange(num_own), num_own + cold_inverse
    return np.concatenate([place_Q[~cold_Q], cold_U]), inverse_Q
