"""ID rows as float16 and int8: how far they are from float32, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from serving.bundle.open import Bundle
from serving.bundle.rows import decoded, encoded
from tests.serving.bundle.conftest import export
from tests.serving.scoring.variants import Exported

IDS = np.arange(200)


@pytest.mark.parametrize(("dtype", "bytes_of_row"), [("float16", 24), ("int8", 16)])
@pytest.mark.parametrize("variant", ["plain", "exact", "din_inputs"])
def test_rows_are_near_those_of_float32(
    exported: Callable[[str], Exported], tmp_path: Path, variant: str, dtype: str, bytes_of_row: int
) -> None:
    made = exported(variant)
    manifest = export(tmp_path / "model", made.run, id_dtype=dtype)
    whole, small = (Bundle.open(url, cache_dir=tmp_path) for url in (made.url, str(tmp_path / "model")))
    rows_file = next(each for each in manifest.rows if each.width == 12)
    file = manifest.file(rows_file.name)
    assert file is not None
    assert file.bytes == rows_file.num_rows * bytes_of_row
    for table in manifest.tables:
        rows, known = small.ids.find(table.name, IDS % table.num_rows)
        exact_rows, exact_known = whole.ids.find(table.name, IDS % table.num_rows)
        np.testing.assert_array_equal(rows, exact_rows)
        np.testing.assert_array_equal(known, exact_known)
        mine, theirs = (bundle.ids.gather(table.width, rows) for bundle in (small, whole))
        largest = np.abs(theirs).max(axis=1, keepdims=True)
        limit = largest / 254 * (1 + 1e-5) if dtype == "int8" else np.abs(theirs) * 2.0**-11 + 2.0**-25
        assert (np.abs(mine - theirs) <= limit).all()
        assert not np.array_equal(mine, theirs)


def test_int8_keeps_the_largest_number_of_a_row_and_zeros() -> None:
    rows = np.array([[0.5, -1.0, 0.25], [0, 0, 0], [1e-4, 2e-4, -2e-4], [1e-42, 0, 0]], np.float32)
    found = decoded(encoded(rows, "int8"), "int8")
    np.testing.assert_allclose(found[:3], rows[:3], atol=1 / 254, rtol=0.01)
    np.testing.assert_allclose(found[[0, 2, 2], [1, 1, 2]], [-1.0, 2e-4, -2e-4], rtol=1e-6)
    assert (found[1] == 0).all()
    assert np.isfinite(found).all()
