"""The exchange: keys to their owners, vectors back, gradients the same way.

A *key source* finds what it has for keys: one E over one store, or one ID table. Fields of one key source share its
keys, so a key in several fields is asked for once. A *vector source* makes vectors of what key sources of one width
have found. All keys ride in one alltoall; vectors of one width in one. See trainer/samples/reader.py for the letters of
shapes; here also S key sources.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from featurestore.keys import Int64Array
from featurestore.lookup.ondevice import applied, on_device
from trainer.comm import Comm
from trainer.exchange import routing
from trainer.exchange.vectors import FieldVectors, sum_rows
from trainer.samples.reader import Jagged
from trainer.stages import Kind, Stages, StageSequence


class ServedKeys(Protocol):
    """A key source's state of a request: for each of R keys received, its row among the Q unique ones."""

    inverse_R: Int64Array
    num_unique: int


class KeySource(Protocol):
    """Finds what it has for keys that this rank owns; nothing in it depends on weights, so it runs ahead of them."""

    def owner_of(self, keys_U: Int64Array) -> Int64Array:
        """Return the rank that answers for each key."""

    def serve(self, keys_R: Int64Array, kind: Kind) -> Any:
        """Return a `ServedKeys` for keys that this rank owns; the same key may come several times."""

    def release(self, served: Any) -> None:
        """End a request: its memory may be used again."""


class VectorSource(Protocol):
    """Makes vectors of one width: an E, or all ID tables of that width."""

    width: int

    @property
    def key_sources(self) -> Mapping[str, KeySource]:
        """Return the sources that find keys for it, by name."""

    def vectors(self, served: Sequence[Any]) -> Sequence[Tensor]:
        """Return the vectors (Q, V) of the unique keys of each key source in turn, with autograd attached."""


@dataclass
class WidthPlan:
    """Layout of the answers of one width, for the owner that packs and the asker that unpacks them."""

    width: int
    sources: list[int]
    reply_rows: Tensor
    """Index of each row to send in [status row, unique rows of the sources]."""
    reply_splits_P: Tensor
    answer_splits_P: Tensor
    status_rows_P: Tensor
    """Index of each owner's status row in the answers."""
    slices_SP: list[list[slice]]
    """Slices of each source's vectors in the answers, owner by owner."""


@dataclass
class KeyRequest:
    """Keys asked for one batch, and the keys that this rank serves."""

    asked_S: list[routing.Bucketized]
    served_S: list[Any]
    plans: list[WidthPlan]
    fields: dict[str, tuple[Tensor, Tensor]]
    """Place of each value of a field among the unique keys asked of its source, and the lengths of its rows."""
    kind: Kind
    """The first part of its collectives' names, so that one request of each kind may be under way at a time."""
    error: Exception | None = field(default=None)
    """An error of this rank while it served. It is not raised at once, as the other ranks would wait for this one in
    the next collective: `Exchange.check` raises it on all ranks together."""
    failures: Tensor | None = field(default=None)
    """Number of errors that owners sent in place of vectors, on the device; the same on every rank."""
    backward: StageSequence | None = field(default=None)
    """Stages of the backward pass, which its middle switches."""


class Exchange:
    """Asks the owners for the vectors of a batch's keys, and answers the other ranks at the same time.

    `source_of_field` names the key source of each field; sources and fields are the same, in the same order, on every
    rank.
    """

    def __init__(
        self,
        comm: Comm,
        sources: Sequence[VectorSource],
        source_of_field: Mapping[str, str],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        stages: Stages | None = None,
    ) -> None:
        self._comm, self._device, self._dtype = comm, torch.device(device), dtype
        self.is_alone = comm.size == 1
        """Whether this rank answers its own keys, so that nothing has to be packed, sent and put in order again."""
        self._sources, self._stages = sources, stages or Stages()
        self._keys_S: list[KeySource] = [each for source in sources for each in source.key_sources.values()]
        self._width_S = [source.width for source in sources for _ in source.key_sources]
        names_S = [name for source in sources for name in source.key_sources]
        self._fields_S = [[f for f, source in source_of_field.items() if source == name] for name in names_S]

    def request(self, fields: Mapping[str, Jagged], kind: Kind) -> KeyRequest:
        """Ask for the keys of `fields` in one alltoall; owners find unique keys and gather all that needs no weights.

        Raises RemoteRankError if another rank refuses. Errors while an owner serves (a missing key) are kept and raised
        by `check`. May run in a thread of its own, during the step of an earlier request; requests of one kind must be
        sequential.
        """
        asked_S, blocks = self._exchange_keys(fields, kind, routing.OK)
        if (blocks.status_P != routing.OK).any():
            self._comm.agree(None, name=f"{kind}.keys.agree")
        served_S: list[Any] = []
        error: Exception | None = None
        try:
            with self._stages.timed("gather", kind):
                for source, keys_R in zip(self._keys_S, blocks.keys_SR, strict=True):
                    served_S.append(source.serve(keys_R, kind))
        except Exception as failure:  # any error: the other ranks are blocked on this rank's answer
            error = failure
        if self.is_alone:
            index_S = [a.inverse_N for a in asked_S] if error else _rows_of_values(asked_S, served_S)
            return KeyRequest(asked_S, served_S, [], self._places_of(index_S, fields), kind, error)
        widths = sorted(set(self._width_S))
        plans = [self._plan(w, asked_S, None if error else served_S, blocks.counts_PS) for w in widths]
        index_S = [each.inverse_N for each in asked_S]
        return KeyRequest(asked_S, served_S, plans, self._places_of(index_S, fields), kind, error)

    def refuse(self, error: Exception, kind: Kind) -> NoReturn:
        """Stand in for `request` on a rank that has no batch; raises `error`, on the other ranks RemoteRankError."""
        self._exchange_keys({}, kind, routing.FAILED)
        self._comm.agree(error, name=f"{kind}.keys.agree")
        raise error

    def vectors(self, request: KeyRequest) -> dict[str, FieldVectors]:
        """Return the vectors of every field, with autograd attached: by one alltoall per width, as in backward.

        If one rank runs backward, all must. If a rank has an error, they are meaningless zeros: call `check` before any
        state is updated from them; a rank alone raises its error at once.
        """
        unique_S: list[Tensor] = []
        try:
            if request.error is None:
                with self._stages.timed("embed images", request.kind):
                    served_S = iter(request.served_S)
                    for source in self._sources:
                        unique_S += source.vectors([next(served_S) for _ in source.key_sources])
        except Exception as failure:  # as above
            request.error = failure
        if request.error is not None:
            if self.is_alone:
                raise request.error
            none = torch.zeros(0, dtype=self._dtype, device=self._device, requires_grad=torch.is_grad_enabled())
            unique_S = [none.view(0, width) for width in self._width_S]
            for plan in request.plans:  # nothing but status rows
                plan.reply_rows = torch.zeros_like(plan.reply_rows)
        with self._stages.timed("exchange vectors", request.kind):
            *vectors_S, request.failures = applied(_Answers, self._comm, request, *unique_S)
        return {
            name: FieldVectors(vectors_UV, *request.fields[name])
            for vectors_UV, names in zip(vectors_S, self._fields_S, strict=True)
            for name in names
        }

    def check(self, request: KeyRequest, num_failures: int) -> None:
        """Raise this rank's error, or RemoteRankError, on all ranks where one had an error in `request` or `vectors`.

        `num_failures`: `request.failures`, which the caller has fetched from the device, along with other numbers.
        """
        if num_failures:
            self._comm.agree(request.error, name=f"{request.kind}.vectors.agree")

    def release(self, request: KeyRequest) -> None:
        """End a step: the sources may use the request's memory again."""
        for source, served in zip(self._keys_S, request.served_S, strict=False):
            source.release(served)
        request.served_S = []

    def _exchange_keys(
        self, fields: Mapping[str, Jagged], kind: Kind, status: int
    ) -> tuple[list[routing.Bucketized], routing.KeyBlocks]:
        """Return this rank's requests to each source, and all ranks' requests to this one."""
        with self._stages.timed("unique", kind):
            asked_S = [self._bucketize(source, fields) for source in range(len(self._keys_S))]
            if self.is_alone:
                counts_1S = np.array([[len(asked.keys_U) for asked in asked_S]])
                return asked_S, routing.KeyBlocks(np.array([status]), counts_1S, [asked.keys_U for asked in asked_S])
            payload, lengths_P = routing.pack_key_blocks(status, asked_S, self._comm.size)
        with self._stages.timed("exchange keys", kind):
            received, recv_lengths_P = self._comm.alltoall(
                torch.from_numpy(payload), splits_of(lengths_P), name=f"{kind}.keys"
            )
        recv_int64_P = recv_lengths_P.numpy().astype(np.int64)
        return asked_S, routing.unpack_key_blocks(received.numpy(), recv_int64_P, len(self._keys_S))

    def _bucketize(self, source: int, fields: Mapping[str, Jagged]) -> routing.Bucketized:
        values = [fields[name].values_N for name in self._fields_S[source] if name in fields]
        keys_U, inverse_N = routing.unique(np.concatenate([np.empty(0, dtype=np.int64), *values]))
        if self.is_alone:
            return routing.Bucketized(keys_U, np.array([len(keys_U)]), inverse_N)
        return routing.bucketize_by_owner(keys_U, inverse_N, self._keys_S[source].owner_of(keys_U), self._comm.size)

    def _plan(
        self, width: int, asked_S: list[routing.Bucketized], served_S: list[ServedKeys] | None, counts_PS: Int64Array
    ) -> WidthPlan:
        sources = [s for s, each in enumerate(self._width_S) if each == width]
        recv_counts_PS = counts_PS[:, sources]
        send_counts_PS = np.stack([asked_S[s].send_counts_P for s in sources], axis=1)
        status_rows_P, slices_SP = routing.answer_slices(send_counts_PS)
        reply_splits_P = recv_counts_PS.sum(axis=1) + 1
        if served_S is None:  # nothing but status rows
            rows = np.zeros(reply_splits_P.sum(), dtype=np.int64)
        else:
            rows = routing.reply_rows(
                recv_counts_PS, [served_S[s].inverse_R for s in sources], [served_S[s].num_unique for s in sources]
            )
        return WidthPlan(
            width,
            sources,
            on_device(rows, self._device),
            splits_of(reply_splits_P),
            splits_of(send_counts_PS.sum(axis=1) + 1),
            on_device(status_rows_P, self._device),
            slices_SP,
        )

    def _places_of(self, index_S: list[Int64Array], fields: Mapping[str, Jagged]) -> dict[str, tuple[Tensor, Tensor]]:
        places = {}
        for index_of_all_N, names in zip(index_S, self._fields_S, strict=True):
            start = 0
            for name in names:
                end = start + len(fields[name].values_N)
                index_N, lengths_M = index_of_all_N[start:end], fields[name].lengths_M
                places[name] = (on_device(index_N, self._device), on_device(lengths_M, self._device))
                start = end
        return places


class _Answers(torch.autograd.Function):
    """Carries unique vectors of all sources from their owners to the ranks that asked, and gradients back.

    One function for all widths, so that backward has its collectives in one order on every rank. Backward sends each
    key's gradient to its owner, which sums those of equal keys in the order of ranks: the same bits in every run.
    """

    @staticmethod
    def forward(ctx: Any, comm: Comm, request: KeyRequest, *unique_S: Tensor) -> tuple[Tensor, ...]:
        ctx.comm, ctx.request = comm, request
        ctx.num_unique_S = [len(unique_QV) for unique_QV in unique_S]
        vectors_S = list(unique_S)
        failures = torch.zeros((), dtype=torch.int64, device=unique_S[0].device)
        for plan in request.plans:
            code = routing.OK if request.error is None else routing.FAILED
            status = unique_S[plan.sources[0]].new_full((1, plan.width), code)
            table = torch.cat([status, *(unique_S[s] for s in plan.sources)])
            name = f"{request.kind}.vectors.{plan.width}"
            answers, _ = comm.alltoall(table.index_select(0, plan.reply_rows), plan.reply_splits_P, name=name)
            failures += (answers[plan.status_rows_P, 0] != routing.OK).sum()
            for source, slices_P in zip(plan.sources, plan.slices_SP, strict=True):
                pieces_P = [answers[rows] for rows in slices_P]
                vectors_S[source] = torch.cat(pieces_P) if len(pieces_P) > 1 else pieces_P[0]  # of one rank, no copy
        ctx.mark_non_differentiable(failures)
        return (*vectors_S, failures)

    @staticmethod
    def backward(ctx: Any, *gradient_S: Tensor) -> tuple[Tensor | None, ...]:
        unique_S: list[Tensor] = list(gradient_S[:-1])
        stages = ctx.request.backward
        if stages is not None:
            stages.switch("exchange gradients")
        for plan in ctx.request.plans:
            like = gradient_S[plan.sources[0]]
            answers = like.new_empty(int(plan.answer_splits_P.numpy().sum()), plan.width)
            answers[plan.status_rows_P] = 0
            for source, slices_P in zip(plan.sources, plan.slices_SP, strict=True):
                pieces_P = torch.split(gradient_S[source], [rows.stop - rows.start for rows in slices_P])
                for rows, piece in zip(slices_P, pieces_P, strict=True):
                    answers[rows] = piece
            name = f"{ctx.request.kind}.gradients.{plan.width}"
            received, _ = ctx.comm.alltoall(answers, plan.answer_splits_P, name=name)
            counts = [1, *(ctx.num_unique_S[s] for s in plan.sources)]
            table = sum_rows(received, plan.reply_rows, sum(counts))
            for source, summed_QV in zip(plan.sources, torch.split(table, counts)[1:], strict=True):
                unique_S[source] = summed_QV
        if stages is not None:
            stages.switch("embed backward")
        return (None, None, *unique_S)


def _rows_of_values(asked_S: list[routing.Bucketized], served_S: Sequence[ServedKeys]) -> list[Int64Array]:
    """Return of each value its row among the unique ones that a rank alone serves itself.

    Gradients of two ids of one hashed row are then summed value by value, not id by id: last digits may differ.
    """
    return [served.inverse_R[asked.inverse_N] for asked, served in zip(asked_S, served_S, strict=True)]


def splits_of(counts_P: Int64Array) -> Tensor:
    """Convert counts to the type that Horovod requires."""
    return torch.from_numpy(counts_P.astype(np.int32))
