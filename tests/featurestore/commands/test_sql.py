"""The command sql: what it prints, and the files it writes."""

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from featurestore import FeatureStore, StoreInfo
from tests.commands.calls import call
from tests.featurestore.conftest import MakeRows


@pytest.fixture
def url(store: FeatureStore, info: StoreInfo, make_rows: MakeRows) -> str:
    store.put(make_rows(300, info))
    return store.url


def test_rows_are_printed_as_a_table(url: str) -> None:
    called = call(["featurestore", "sql", url, "select width, uri, feature from images where width < 2 order by width"])
    assert (called.code, called.err) == (0, "")
    lines = called.out.splitlines()
    assert lines[0].split() == ["width", "uri", "feature"] and len(lines) == 3
    assert lines[2].split()[:2] == ["1", "images/1.jpg"] and lines[2].rstrip().endswith("]")
    limited = call(["featurestore", "sql", url, "select uri from images", "--limit", "2"])
    assert len(limited.out.splitlines()) == 4 and "the first 2 rows" in limited.out
    assert len(call(["featurestore", "sql", url, "select uri from images"]).out.splitlines()) == 102


def test_rows_are_written(url: str, tmp_path: Path) -> None:
    expected = FeatureStore.open(url).snapshot().to_arrow(["key", "uri", "feature"])
    for ending, query in (("parquet", "key, uri, feature"), ("arrow", "key, uri, feature"), ("csv", "key, uri")):
        out = tmp_path / f"rows.{ending}"
        out.write_text("before")
        called = call(["featurestore", "sql", url, f"select {query} from images", "--out", str(out)])
        assert (called.code, called.out) == (0, f"wrote 300 rows to {out}\n"), called.err
        read = {"parquet": pq.read_table, "csv": pyarrow.csv.read_csv, "arrow": read_arrow}[ending](out)
        for name in query.split(", "):
            assert read[name].to_pylist() == expected[name].to_pylist()
    call(["featurestore", "sql", url, "select key from images", "--limit", "7", "--out", str(tmp_path / "few.parquet")])
    assert pq.read_table(tmp_path / "few.parquet").num_rows == 7


def test_a_query_that_fails_on_its_way_leaves_the_file_as_it_was(url: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    out.write_text("before")
    query = "select case when width = 299 then error('at the end') else width end from images"
    called = call(["featurestore", "sql", url, query, "--out", str(out)])
    assert called.code == 2 and "at the end" in called.err
    assert out.read_text() == "before" and [path.name for path in tmp_path.glob("*rows*")] == ["rows.parquet"]


def read_arrow(path: Path) -> pa.Table:
    with pa.ipc.open_file(path) as reader:
        return reader.read_all()
