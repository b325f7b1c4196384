"""The scorer: computes the logits of users' candidates with an open bundle, and reports unknown values."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from serving.bundle.manifest import SAMPLE
from serving.bundle.open import Bundle, BundleIdentity
from serving.errors import NotFiniteError, RequestError
from serving.network.steps import Steps, run_steps
from serving.scoring.arrow import check_columns, scorable_rows, table_steps
from serving.scoring.columns import RequestColumns
from serving.scoring.decode import Bool, DecodedRequests, request_steps
from serving.scoring.inputs import InputMaker, Lookups
from serving.scoring.request import Places, Request, Scored, Sizes, sizes_of
from trainer.errors import DataError
from trainer.models.nets import behaviors_of, check_equal_lists
from trainer.samples.columns import Rule
from trainer.schema import Field


class Scorer:
    """Scores requests by one version of a bundle and one snapshot of its vectors. Thread-safe.

    Ids that training has not seen use their untrained row; images that are null or have no vector follow the run's
    `data.missing`; an empty list of behaviours pools to zeros. All three are reported.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Use `open` instead, unless the bundle is open already; `close` closes it."""
        self._bundle = bundle
        self._columns = RequestColumns(bundle.schema, bundle.fields)
        self._maker = InputMaker(bundle)
        self._network = bundle.network
        self._field_of = {field.name: field for field in bundle.fields}
        self._equal_lists = behaviors_of(bundle.fields) if bundle.model.base == "din" else []

    @classmethod
    def open(
        cls,
        url: str,
        version: int | None = None,
        *,
        vectors: Mapping[str, int] | None = None,
        cache_dir: str | Path | None = None,
    ) -> "Scorer":
        """Open a version of the bundle at `url`, by default the one in use, with the newest or these vectors.

        Takes seconds. Raises BundleNotFoundError, BrokenBundleError, StorageError; see `Bundle.open`.
        """
        bundle = Bundle.open(url, version, vectors=vectors, cache_dir=cache_dir)
        try:
            return cls(bundle)
        except BaseException:
            bundle.close()
            raise

    @property
    def identity(self) -> BundleIdentity:
        """The version, and the snapshots of its vectors."""
        return self._bundle.identity

    @property
    def bundle(self) -> Bundle:
        """The bundle that it scores with."""
        return self._bundle

    @property
    def columns(self) -> Mapping[str, Rule]:
        """The columns of a request, with the rule for each."""
        return self._columns.sources

    @property
    def fields(self) -> Sequence[Field]:
        """The fields that the model uses."""
        return self._bundle.fields

    @property
    def vectors_time_s(self) -> Mapping[str, float]:
        """When the vectors of each store were committed, in seconds since 1970."""
        return {name: table.time_s for name, table in self._bundle.vectors.items()}

    def sample(self) -> pa.Table | None:
        """Read the bundle's own sample, without rows that no version can score; None if it has no sample."""
        if self._bundle.manifest.file(SAMPLE) is None:
            return None
        return scorable_rows(self._columns, pq.read_table(self._bundle.files.path(SAMPLE)))

    def score(self, requests: Sequence[Request]) -> list[Scored]:
        """Score all requests, or none if one is wrong. Raises RequestError, or NotFiniteError for bad logits."""
        return run_steps(self.steps(requests, sizes_of(requests, self.columns)))

    def score_table(self, table: pa.Table) -> list[Scored]:
        """Score a table with the columns of sample files, one request per row; labels are optional."""
        return run_steps(self.steps(table, sizes_of(table, self.columns)))

    def steps(self, decoded: Sequence[Request] | pa.Table, sizes: Sizes) -> Steps[list[Scored]]:
        """Score requests or a table in pieces; `sizes`: the sizes of the requests."""
        if isinstance(decoded, pa.Table):
            check_columns(self._columns, decoded)
        scored: list[Scored] = []
        for piece in sizes.pieces():
            first = None if len(sizes) == 1 else piece.start
            if isinstance(decoded, pa.Table):
                some = table_steps(self._columns, decoded.slice(piece.start, piece.stop - piece.start), piece.start)
            else:
                some = request_steps(self._columns, decoded[piece], first)
            scored += yield from self._scored((yield from some), first)
        return scored

    def close(self) -> None:
        """Close the bundle."""
        self._bundle.close()

    def _scored(self, decoded: DecodedRequests, first: int | None) -> Steps[list[Scored]]:
        if self._equal_lists:
            try:
                check_equal_lists(decoded.batch, self._equal_lists)
            except DataError as failure:
                raise RequestError(str(failure)) from None
        lookups = yield from self._maker.make(decoded)
        logits_B = yield from self._network.steps(lookups.inputs)
        if not np.isfinite(logits_B).all():
            raise _not_finite(decoded, lookups, logits_B, first)
        ends = np.cumsum(decoded.counts_G).tolist()
        parts = [logits_B[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        unknown, missing = self._unknown_and_missing(decoded, lookups)
        return [
            Scored(logits_C=part, unknown=unknown.get(place, {}), missing=missing.get(place, {}))
            for place, part in enumerate(parts)
        ]

    def _unknown_and_missing(
        self, decoded: DecodedRequests, lookups: Lookups
    ) -> tuple[dict[int, dict[str, Places]], dict[int, dict[str, Places]]]:
        """Return what is unknown and missing, by request and field."""
        found_in: tuple[dict[int, dict[str, Places]], dict[int, dict[str, Places]]] = ({}, {})
        for found, masks in zip(found_in, (lookups.unknown, lookups.missing), strict=True):
            for name, mask_N in masks.items():
                for request, places in _by_request(decoded, self._field_of[name], mask_N):
                    found.setdefault(request, {})[name] = places
        return found_in


def _not_finite(
    decoded: DecodedRequests, lookups: Lookups, logits_B: NDArray[np.float32], first: int | None
) -> NotFiniteError:
    """Name the first candidate without a finite logit, and the field with the largest number, which may be why."""
    place = int((~np.isfinite(logits_B)).argmax())
    request = int(decoded.batch.group_of_sample_B[place])
    candidate = place - int(decoded.counts_G[:request].sum())
    numbers = dict(lookups.inputs.dense)
    numbers |= {name: rows.weights_N for name, rows in lookups.inputs.fields.items() if rows.weights_N is not None}
    largest = {name: float(np.abs(values).max(initial=0)) for name, values in numbers.items()}
    name = max(largest, key=lambda each: largest[each], default="")
    why = f"; the largest number is {largest[name]:g}, of field {name}: send smaller ones" if name else ""
    where = "" if first is None else f"requests[{first + request}]: "
    return NotFiniteError(f"{where}the logit of candidate {candidate} is not a finite number{why}")


def _by_request(decoded: DecodedRequests, field: Field, mask_N: Bool) -> Iterator[tuple[int, Places]]:
    """Yield for each request the positions of a field's marked values, as behaviours or candidates."""
    batch = decoded.batch
    gallery, rows = batch.galleries.get(field.name), batch.fields[field.name]
    if gallery is not None:  # an ad or behaviour counts as missing if one of its images is missing
        mask_N, rows = _any(mask_N, gallery.values_N), gallery
    if field.side == "ad" and field.kind == "multi_id":
        mask_N = _any(mask_N, rows.lengths_M)
    if len(decoded.counts_G) == 1:  # a fifth of the time of what follows
        yield 0, mask_N.nonzero()[0]
        return
    counts_G = decoded.counts_G if field.side == "ad" else rows.lengths_M
    for request, of_request in enumerate(np.split(mask_N, np.cumsum(counts_G)[:-1])):
        if of_request.any():
            yield request, np.flatnonzero(of_request)


def _any(mask_N: Bool, lengths_K: NDArray[np.integer]) -> Bool:
    """Return for each list whether one of its values is marked, (K,)."""
    list_N = np.repeat(np.arange(len(lengths_K)), lengths_K)
    marked_K: Bool = np.bincount(list_N[mask_N], minlength=len(lengths_K)) > 0
    return marked_K
