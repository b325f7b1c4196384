"""Builds the network's inputs from decoded requests: looks up ID rows and image vectors for all fields at once.

The ids of all fields are one array: one hash, and one gather for each width. The images of a store are one lookup.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import numpy as np

from serving.bundle.open import Bundle
from serving.bundle.vectors import Float32
from serving.network.inputs import FieldRows, NearestRows, NetworkInputs
from serving.network.served import MOST_PAIRS
from serving.network.steps import Steps
from serving.scoring.decode import Bool, DecodedRequests
from trainer.engine.similarity import pairs_of_fields, similarity
from trainer.engine.wiring import model_name
from trainer.models.layers import width_of
from trainer.samples.columns import Index
from trainer.samples.reader import Batch
from trainer.schema import Field

_LOOKUP = 20_000
"""Images per lookup."""


class Lookups(NamedTuple):
    """The network's inputs, and for each field a mask of unknown IDs or images without a vector, (N,).

    Fields whose values are all known are left out.
    """

    inputs: NetworkInputs
    unknown: Mapping[str, Bool]
    missing: Mapping[str, Bool]


class _Images(NamedTuple):
    """The images of a field: rows of the vectors store, (N, D), which have none, (N,), and the visual vectors."""

    rows_ND: Float32
    missing_N: Bool
    visual_NV: Float32


class InputMaker:
    """Looks up the ids and images of requests in a bundle."""

    def __init__(self, bundle: Bundle) -> None:
        """The bundle must stay open, as its rows are not copied."""
        self._bundle, model = bundle, bundle.model
        of_ids = sorted((field for field in bundle.fields if field.is_id), key=lambda field: width_of(field, model))
        self._ids_by_width = {
            width: [field.name for field in fields] for width, fields in groupby(of_ids, lambda f: width_of(f, model))
        }
        self._column_of_id = {field.name: field.column_name for field in of_ids}
        self._rows_of_ids = bundle.ids.bulk_finder([field.table_name for field in of_ids])
        self._fields_of_store: dict[str, list[Field]] = {}
        for field in bundle.fields:
            if field.kind == "content":
                self._fields_of_store.setdefault(field.store_name, []).append(field)
        self._dense = [field.name for field in bundle.fields if field.kind == "dense"]
        self._pairs = pairs_of_fields(bundle.fields, model)

    def make(self, decoded: DecodedRequests) -> Steps[Lookups]:
        """Look up the ids and images of some requests, in pieces."""
        batch, missing = decoded.batch, dict[str, Bool]()
        fields, unknown = self._ids(decoded)
        yield
        found: dict[str, _Images] = {}
        for store, of_store in self._fields_of_store.items():
            found |= yield from self._images(store, of_store, decoded)
        for name, images in found.items():
            gallery = batch.galleries.get(name)
            lengths_M = (gallery or batch.fields[name]).lengths_M.astype(np.int64)
            fields[name] = FieldRows(
                rows_NV=images.visual_NV, lengths_M=lengths_M, sizes_K=None if gallery is None else gallery.values_N
            )
            if images.missing_N.any():
                missing[name] = images.missing_N
        similar: dict[str, NearestRows] = {}
        for name, ad in self._pairs.items():
            similar[name] = yield from self._nearest(batch, name, ad, found)
        inputs = NetworkInputs(
            group_of_sample_B=batch.group_of_sample_B,
            num_groups=len(decoded.counts_G),
            fields=fields,
            dense={name: batch.dense[name] for name in self._dense},
            similar=similar,
        )
        return Lookups(inputs, unknown, missing)

    def _ids(self, decoded: DecodedRequests) -> tuple[dict[str, FieldRows], dict[str, Bool]]:
        """Return the rows of all ID fields, and masks of the ids that no training sample had."""
        batch, ids = decoded.batch, self._bundle.ids
        of_field = [batch.fields[name] for name in self._column_of_id]
        lengths_T = np.array([len(each.values_N) for each in of_field], np.int64)
        rows_N, known_N = self._rows_of_ids.find(np.concatenate([each.values_N for each in of_field]), lengths_T)
        places = dict(zip(self._column_of_id, _slices(lengths_T), strict=True))
        fields: dict[str, FieldRows] = {}
        lengths = {id(each.lengths_M): each.lengths_M for each in of_field}  # most fields share theirs
        wide_of = {number: lengths_M.astype(np.int64) for number, lengths_M in lengths.items()}
        for width, names in self._ids_by_width.items():
            first = places[names[0]].start
            rows_NV = ids.gather(width, rows_N[first : places[names[-1]].stop])
            for name in names:
                here = places[name]
                rows = rows_NV[here.start - first : here.stop - first]
                fields[name] = FieldRows(rows, wide_of[id(batch.fields[name].lengths_M)], batch.weights.get(name))
        return fields, self._unknown(decoded, ~known_N, places)

    def _unknown(self, decoded: DecodedRequests, unknown_N: Bool, places: Mapping[str, slice]) -> dict[str, Bool]:
        """Return for each field a mask of the ids that no training sample had; fields without any are left out."""
        unknown = dict[str, Bool]()
        if decoded.nulls or unknown_N.any():
            counts = np.cumsum(unknown_N).tolist()
            before = 0
            for name, here in places.items():
                count = counts[here.stop - 1] if here.stop else 0
                is_null_N = decoded.nulls.get(self._column_of_id[name])
                if is_null_N is not None:
                    unknown[name] = unknown_N[here] | is_null_N
                elif count > before:
                    unknown[name] = unknown_N[here]
                before = count
        return unknown

    def _images(self, store: str, fields: list[Field], decoded: DecodedRequests) -> Steps[dict[str, _Images]]:
        table = self._bundle.vectors[store]
        keys = [decoded.batch.fields[field.name].values_N for field in fields]
        keys_N = np.concatenate(keys)
        parts = []
        for start in range(0, len(keys_N) or 1, _LOOKUP):
            parts.append(table.lookup(keys_N[start : start + _LOOKUP]))
            yield
        rows_ND, missing_N = parts[0]
        if len(parts) > 1:
            rows_ND, missing_N = (
                np.concatenate([part[0] for part in parts]),
                np.concatenate([part[1] for part in parts]),
            )
        found: dict[str, _Images] = {}
        places = _slices(np.array([len(keys_N) for keys_N in keys], np.int64))
        for field, here in zip(fields, places, strict=True):
            network = model_name(field, self._bundle.model)
            visual_NV, lacks_N = rows_ND[here, table.of(network)], missing_N[here]
            is_null_N = decoded.nulls.get(field.column_name)
            if is_null_N is not None:
                visual_NV = np.where(is_null_N[:, None], table.no_image[network], visual_NV)
                lacks_N = lacks_N | is_null_N
            found[field.name] = _Images(rows_ND[here], lacks_N, visual_NV)
        return found

    def _nearest(self, batch: Batch, behaviors: str, ad: str, found: Mapping[str, _Images]) -> Steps[NearestRows]:
        """Compare the images of a behaviour field with those of the candidates, as training does; some at a time."""
        model, stores = self._bundle.model, {field.name: field.store_name for field in self._bundle.fields}
        words = {
            name: self._bundle.vectors[stores[name]].words(found[name].rows_ND, found[name].missing_N)
            for name in (behaviors, ad)
        }
        longest = int(batch.fields[behaviors].lengths_M.max(initial=1))
        count = max(1, MOST_PAIRS // max(1, longest))
        parts = []
        for start in range(0, batch.num_samples or 1, count):
            here = slice(start, start + count)
            some = replace(batch, group_of_sample_B=batch.group_of_sample_B[here], label_B=batch.label_B[here])
            parts.append(
                similarity(
                    some, behaviors, words[ad][here], words[behaviors], model.similarity_tiers, model.similarity_top_k
                )
            )
            yield
        return NearestRows(
            tiers_BT=np.concatenate([each.tiers_BT for each in parts]),
            nearest_N=np.concatenate([each.nearest_N for each in parts]),
            lengths_B=np.concatenate([each.lengths_B for each in parts]),
        )


def _slices(lengths_T: Index) -> list[slice]:
    """Return the slices of concatenated arrays of these lengths."""
    ends = np.cumsum(lengths_T).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
