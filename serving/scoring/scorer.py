"""The scorer: computes the logits of users' candidates with an open bundle, and reports unknown values.

The ids of all fields are one array: one hash, and one gather for each width. The images of a store are one lookup.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from featurestore.keys import Int64Array
from featurestore.storage.storage import Storage
from serving.bundle.manifest import SAMPLE, BundleManifest
from serving.bundle.open import Bundle
from serving.errors import NotFiniteError, RequestError
from serving.network import Steps, run_steps
from serving.network.served import FieldRows, NetworkInputs
from serving.problems import Problem
from serving.scoring.decode import decode
from serving.scoring.request import Places, Request, RequestColumns, Scored
from serving.scoring.sent import Bool, SentTable, Sizes, sent_requests, sent_table
from trainer.errors import DataError
from trainer.models.layers import width_of
from trainer.models.nets import behaviors_of, check_equal_lists
from trainer.samples.reader import Batch
from trainer.schema.fields import Field

_LOOKUP = 20_000
"""Images per lookup."""


Masks = Mapping[str, Bool]
"""By field: which ids are unknown or which images have no vector, (N,). Fields without any are left out."""


class Scorer(Bundle):
    """Scores requests by one version of a bundle and one snapshot of its vectors. Thread-safe; takes seconds to open.

    Ids that training has not seen use their untrained row; images that are null or have no vector follow the run's
    `data.missing`; an empty list of behaviours pools to zeros. All three are reported.
    """

    def __init__(self, storage: Storage, manifest: BundleManifest, cache_dir: Path | None) -> None:
        """Use `open` instead."""
        super().__init__(storage, manifest, cache_dir)
        self.inputs = RequestColumns(self.schema, self.fields)
        """The columns of a request."""
        self.network  # noqa: B018 (loaded once, also for those `with_vectors`)
        width = partial(width_of, config=self.model)
        of_ids = sorted((field for field in self.fields if field.is_id), key=width)
        by_width = groupby(of_ids, width)
        self._ids_by_width = {width: [field.name for field in fields] for width, fields in by_width}
        self._column_of_id = {field.name: field.column_name for field in of_ids}
        self._tables_of_ids = [field.table_name for field in of_ids]
        self._fields_of_store: dict[str, list[Field]] = {}
        for field in self.fields:
            if field.kind == "content":
                self._fields_of_store.setdefault(field.store_name, []).append(field)
        self._dense = [field.name for field in self.fields if field.kind == "dense"]
        self._field_of = {field.name: field for field in self.fields}
        self._equal_lists = behaviors_of(self.fields) if self.model.base == "din" else []

    def sample(self) -> pa.Table | None:
        """Read the bundle's own sample; None if it has none."""
        return pq.read_table(self.files.path(SAMPLE)) if self.manifest.file(SAMPLE) else None

    def score(self, requests: Sequence[Request] | pa.Table) -> list[Scored]:
        """Score requests, or a table with the columns of sample files, whose labels are optional.

        Raises RequestError if one of them is wrong, or NotFiniteError if a logit is not a finite number.
        """
        if isinstance(requests, pa.Table):
            sent = run_steps(sent_table(self.inputs, requests))
        else:
            sent = run_steps(sent_requests(self.inputs, requests))
        return run_steps(self.steps(sent, sent.sizes(self.inputs)))

    def steps(self, sent: SentTable, sizes: Sizes) -> Steps[list[Scored]]:
        """Convert and score a body in pieces; `sizes`: those of the table. Raises RequestError."""
        scored: list[Scored] = []
        for piece in sizes.pieces():
            scored += yield from self._scored(sent.piece(piece))
        return scored

    def _scored(self, sent: SentTable) -> Steps[list[Scored]]:
        batch, nulls = yield from decode(self.inputs, sent)
        if self._equal_lists:
            try:
                check_equal_lists(batch, self._equal_lists)
            except DataError as failure:
                raise RequestError(*failure.args) from None
        fields, unknown_of_field = self._id_rows(batch, nulls)
        missing_of_field = dict[str, Bool]()
        yield
        for store, of_store in self._fields_of_store.items():
            rows, missing_of_store = yield from self._images(store, of_store, batch, nulls)
            fields |= rows
            missing_of_field |= missing_of_store
        inputs = NetworkInputs(
            group_of_sample_B=batch.group_of_sample_B,
            num_groups=len(sent.counts_G),
            fields=fields,
            dense={name: batch.dense[name] for name in self._dense},
        )
        logits_B = yield from self.network.steps(inputs)
        if not np.isfinite(logits_B).all():
            raise _not_finite(sent, batch, logits_B)
        unknown = self._places(sent.counts_G, batch, unknown_of_field)
        missing = self._places(sent.counts_G, batch, missing_of_field)
        return [
            Scored(logits_C=logits_B[here], unknown=unknown.get(place, {}), missing=missing.get(place, {}))
            for place, here in enumerate(_slices(sent.counts_G))
        ]

    def _id_rows(self, batch: Batch, nulls: Mapping[str, Bool]) -> tuple[dict[str, FieldRows], Masks]:
        """Return the rows of all ID fields, and which ids no training sample had. `nulls`: images, by column."""
        of_field = [batch.fields[name] for name in self._column_of_id]
        lengths_T = np.array([len(each.values_N) for each in of_field], np.int64)
        ids_N = np.concatenate([each.values_N for each in of_field])
        rows_N, known_N = self.ids.find(self._tables_of_ids, ids_N, lengths_T)
        places = dict(zip(self._column_of_id, _slices(lengths_T), strict=True))
        fields: dict[str, FieldRows] = {}
        for width, names in self._ids_by_width.items():
            first = places[names[0]].start
            rows_NV = self.ids.gather(width, rows_N[first : places[names[-1]].stop])
            for name in names:
                here = places[name]
                rows = rows_NV[here.start - first : here.stop - first]
                fields[name] = FieldRows(rows, batch.fields[name].lengths_M, batch.weights.get(name))
        unknown, unknown_N = dict[str, Bool](), ~known_N
        if nulls or unknown_N.any():
            counts = np.cumsum(unknown_N).tolist()
            before = 0
            for name, here in places.items():
                count = counts[here.stop - 1] if here.stop else 0
                is_null_N = nulls.get(self._column_of_id[name])
                if is_null_N is not None:
                    unknown[name] = unknown_N[here] | is_null_N
                elif count > before:
                    unknown[name] = unknown_N[here]
                before = count
        return fields, unknown

    def _images(
        self, store: str, fields: list[Field], batch: Batch, nulls: Mapping[str, Bool]
    ) -> Steps[tuple[dict[str, FieldRows], Masks]]:
        """Return the visual vectors of a store's fields, and which images have none. `nulls`: images, by column."""
        table = self.vectors[store]
        keys = [batch.fields[field.name].values_N for field in fields]
        keys_N = np.concatenate(keys)
        parts = []
        for start in range(0, len(keys_N) or 1, _LOOKUP):
            parts.append(table.lookup(keys_N[start : start + _LOOKUP]))
            yield
        rows_NV, missing_N = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
        found, missing = dict[str, FieldRows](), dict[str, Bool]()
        places = _slices(np.array([len(keys_N) for keys_N in keys], np.int64))
        for field, here in zip(fields, places, strict=True):
            visual_NV, lacks_N = rows_NV[here], missing_N[here]
            is_null_N = nulls.get(field.column_name)
            if is_null_N is not None:
                visual_NV = np.where(is_null_N[:, None], table.no_image_V, visual_NV)
                lacks_N = lacks_N | is_null_N
            found[field.name] = FieldRows(visual_NV, batch.fields[field.name].lengths_M)
            if lacks_N.any():
                missing[field.name] = lacks_N
        return found, missing

    def _places(self, counts_G: Int64Array, batch: Batch, masks: Masks) -> dict[int, dict[str, Places]]:
        """Return where the masks are true, by request and field."""
        found: dict[int, dict[str, Places]] = {}
        for name, mask_N in masks.items():
            for request, places in _by_request(counts_G, batch, self._field_of[name], mask_N):
                found.setdefault(request, {})[name] = places
        return found


def _slices(lengths_T: Int64Array) -> list[slice]:
    """Return the slices of concatenated arrays of these lengths."""
    ends = np.cumsum(lengths_T).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _not_finite(sent: SentTable, batch: Batch, logits_B: NDArray[np.float32]) -> NotFiniteError:
    """Name the first candidate without a finite logit."""
    place = int((~np.isfinite(logits_B)).argmax())
    request = int(batch.group_of_sample_B[place])
    candidate = place - int(sent.counts_G[:request].sum())
    return NotFiniteError(Problem.LOGIT_NOT_FINITE, sent.names.of_request(request), candidate)


def _by_request(counts_G: Int64Array, batch: Batch, field: Field, mask_N: Bool) -> Iterator[tuple[int, Places]]:
    """Yield for each request the positions of a field's marked values, as behaviours or candidates."""
    rows = batch.fields[field.name]
    if field.side == "ad" and field.kind == "multi_id":
        list_N = np.repeat(np.arange(len(rows.lengths_M)), rows.lengths_M)
        mask_N = np.bincount(list_N[mask_N], minlength=len(rows.lengths_M)) > 0
    if len(counts_G) == 1:  # a fifth of the time of what follows
        yield 0, mask_N.nonzero()[0]
        return
    of_G = counts_G if field.side == "ad" else rows.lengths_M
    for request, of_request in enumerate(np.split(mask_N, np.cumsum(of_G)[:-1])):
        if of_request.any():
            yield request, np.flatnonzero(of_request)
