"""An open bundle has the ID rows that the trainer reads, for every kind of run."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving.bundle.open import Bundle
from tests.serving.scoring.variants import Exported
from tests.trainer.conftest import Places
from tests.trainer.ids.exact_tables import vectors_of
from trainer.comm import SoloComm
from trainer.ids.exact import ExactTable
from trainer.runs.saved import TrainedRun, open_trained

IDS = np.r_[np.arange(-5, 70), 1_000:1_060, 2**62]


OTHERS = ("lr", "images_none", "contents", "din_inputs", "exact")
"""E in float64, no E, several E, many tables, and exact ones; visual vectors: test_offline_equals_online.py."""


@pytest.fixture(scope="module", params=["plain", *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)])
def pair(
    request: pytest.FixtureRequest, exported: Callable[[str], Exported], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Bundle, TrainedRun]]:
    """A bundle, and the run that it was made of, both open."""
    made = exported(request.param)
    trained = open_trained(made.run, SoloComm())
    bundle = Bundle.open(made.url, cache_dir=tmp_path_factory.mktemp("cache"))
    yield bundle, trained
    bundle.close()
    trained.close()


def ids_of(trained: TrainedRun, table: str) -> np.ndarray:
    shape = trained.engine.tables[table].shape
    return np.arange(shape.num_rows) if shape.direct else IDS


def test_id_rows_are_those_that_the_trainer_reads(pair: tuple[Bundle, TrainedRun]) -> None:
    bundle, trained = pair
    assert {each.name for each in bundle.manifest.tables} == set(trained.engine.tables)
    for name, table in trained.engine.tables.items():
        ids = ids_of(trained, name)
        request = table.serve(ids, "eval")
        wanted = vectors_of(table, request).detach().numpy()[request.inverse_R]
        rows, _ = bundle.ids.find([name], ids, np.array([len(ids)]))
        found = bundle.ids.gather(table.shape.width, rows)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, wanted.astype(np.float32))
        assert len(np.unique(found, axis=0)) > 2


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


def test_an_id_is_known_where_training_has_touched_its_row(
    pair: tuple[Bundle, TrainedRun], exported: Callable[[str], Exported]
) -> None:
    bundle, trained = pair
    for name, ids_in_training in trained_ids(exported("plain").places, bundle).items():
        table = trained.engine.tables[name]
        rows, known = bundle.ids.find([name], IDS, np.array([len(IDS)]))
        if isinstance(table, ExactTable):
            own = np.concatenate([table.map.ids_of(slot) for slot in range(len(table.shards))])
            np.testing.assert_array_equal(known, np.isin(IDS, own))
            continue
        touched = np.isin(rows, bundle.ids.find([name], ids_in_training, np.array([len(ids_in_training)]))[0])
        assert 0 < touched.sum() < len(IDS)
        if trained.config.optim.ids == "adam":
            np.testing.assert_array_equal(known, touched)
        else:  # a row whose gradients were all zero, as they often are with few small layers
            assert not known[~touched].any()
            assert known.sum() > 0.4 * touched.sum()


def test_rows_of_several_tables_are_found_at_once(pair: tuple[Bundle, TrainedRun]) -> None:
    bundle, trained = pair
    tables = [*trained.engine.tables, *trained.engine.tables]
    ids = [ids_of(trained, name)[: 3 * number] for number, name in enumerate(tables)]
    rows, known = bundle.ids.find(tables, np.concatenate(ids), np.array([len(each) for each in ids]))
    each = [bundle.ids.find([name], some, np.array([len(some)])) for name, some in zip(tables, ids, strict=True)]
    np.testing.assert_array_equal(rows, np.concatenate([one for one, _ in each]))
    np.testing.assert_array_equal(known, np.concatenate([one for _, one in each]))
