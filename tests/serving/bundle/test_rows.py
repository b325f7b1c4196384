"""An open bundle knows the IDs that training has seen; that their rows are the trainer's, the scores of
tests/serving/scoring/test_offline_equals_online.py say."""

from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving.bundle.open import Bundle
from tests.serving.scoring.variants import Variants
from tests.trainer.conftest import Places
from trainer.comm import SoloComm
from trainer.ids.exact import ExactTable
from trainer.runs.saved import open_trained

IDS = np.r_[np.arange(-5, 70), 1_000:1_060, 2**62]
OTHERS = ("images_none", "din_inputs", "exact")
"""Another optimiser of rows, many tables, and exact ones."""


def trained_ids(places: Places, bundle: Bundle) -> dict[str, np.ndarray]:
    """The ids that training samples have of each hashed table that is not of texts."""
    files = sorted((places.folder / "samples" / "train").glob("*.parquet"))
    samples = pa.concat_tables([pq.read_table(file) for file in files])
    found: dict[str, list[np.ndarray]] = {}
    for field in bundle.fields:
        if field.is_id and not field.is_bucketed and not field.columns:
            column: Any = samples[field.column_name].combine_chunks()
            while not pa.types.is_integer(column.type) and not pa.types.is_string(column.type):
                column = column.flatten()
            if pa.types.is_integer(column.type):
                found.setdefault(field.table_name, []).append(column.to_numpy())
    return {name: np.unique(np.concatenate(values)) for name, values in found.items()}


@pytest.mark.parametrize("name", ["plain", *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)])
def test_an_id_is_known_where_training_has_touched_its_row(exported: Variants, name: str) -> None:
    made = exported(name)
    with closing(open_trained(made.run, SoloComm())) as trained, closing(Bundle.open(made.url)) as bundle:
        for of, ids_in_training in trained_ids(made.places, bundle).items():
            table = trained.engine.tables[of]
            rows, known = bundle.ids.find([of], IDS, np.array([len(IDS)]))
            if isinstance(table, ExactTable):
                own = np.concatenate([table.map.ids_of(slot) for slot in range(len(table.shards))])
                np.testing.assert_array_equal(known, np.isin(IDS, own))
                continue
            touched = np.isin(rows, bundle.ids.find([of], ids_in_training, np.array([len(ids_in_training)]))[0])
            assert 0 < touched.sum() < len(IDS)
            if trained.config.optim.ids == "adam":
                np.testing.assert_array_equal(known, touched)
            else:  # a row whose gradients were all zero, as they often are with few small layers
                assert not known[~touched].any()
                assert known.sum() > 0.4 * touched.sum()
