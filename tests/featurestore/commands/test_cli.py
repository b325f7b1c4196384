"""python -m featurestore as a person types it: what it prints, its exit codes, its errors."""

from pathlib import Path

import numpy as np
import pytest

from featurestore import FeatureStore, QuarantineRow, to_float32
from tests.featurestore.conftest import make_rows
from tests.featurestore.contents import run


@pytest.fixture
def filled(store: FeatureStore) -> FeatureStore:
    store.put(make_rows(40, store.info), "extract")
    store.add_quarantine([QuarantineRow(1, "bad.jpg", "truncated", 0.0)])
    return store


def test_info_and_quarantine_show_what_a_store_holds(filled: FeatureStore) -> None:
    output = run("info", filled.url, code=0).output
    shown = dict(line.split(maxsplit=1) for line in output.splitlines() if not line.startswith("extractor"))
    assert shown["dim"] == "8" and shown["dtype"] == "bfloat16" and shown["rows"] == "40"
    assert shown["quarantined"] == "1" and shown["snapshot"] == "1 (extract)" and shown["store"] == filled.url
    assert "extractor backbone       vgg16\n" in output
    filled.add_quarantine([QuarantineRow(-2, "a/empty.jpg", "0 bytes: no image", 86400.0)])
    lines = run("quarantine", filled.url, code=0).output.splitlines()
    _, first, second = (line.rstrip().split(maxsplit=2) for line in lines)
    assert first[:2] == ["-2", "a/empty.jpg"] and first[2].startswith("1970-01-02")
    assert first[2].endswith("0 bytes: no image") and second[1] == "bad.jpg" and second[2].endswith("truncated")


def test_get_prints_or_writes_float32(filled: FeatureStore, tmp_path: Path) -> None:
    rows = make_rows(40, filled.info)
    negative = int(rows.keys_N[rows.keys_N < 0][0])
    expected = to_float32(filled.snapshot().get([negative]), "bfloat16")[0]
    for arguments in ([negative], ["--", negative], ["--uri", rows.uris[rows.keys_N.tolist().index(negative)]]):
        result = run("get", filled.url, *arguments)
        key, values = result.output.split(": ")
        assert int(key) == negative
        np.testing.assert_allclose([float(v) for v in values.split()], expected, rtol=1e-5)
    out = tmp_path / "x.npy"
    assert run("get", filled.url, negative, "--uri", rows.uris[0], "--out", out).exit_code == 0
    written = np.load(out)
    assert written.dtype == np.float32 and written.shape == (2, 8)
    assert np.array_equal(written[0], expected)
