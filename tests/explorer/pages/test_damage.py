"""Damaged and half-written files of a store and of runs are sentences on pages, which show the rest."""

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from featurestore import key_of_uri
from tests.explorer.serving import Reader, page
from tests.explorer.stores import make_store, rows, storied


def test_damaged_files_are_a_sentence_on_the_page(tmp_path):
    store = storied(tmp_path / "store")
    for file in (tmp_path / "store" / "data").rglob("*.parquet"):
        file.write_bytes(file.read_bytes()[:-20])
    reader = Reader(store=store.url)
    for path in ("/store", "/store/snapshots/2"):
        assert "bytes instead of" in reader.read(path).text


def test_a_damaged_feature_is_a_sentence_on_the_page(tmp_path):
    store = make_store(tmp_path / "store", num_shards=1)
    store.put(rows(["a", "b"], 1))
    (file,) = (tmp_path / "store" / "data").rglob("*.parquet")
    data, feature = file.read_bytes(), store.snapshot().get([key_of_uri("a")]).tobytes()
    assert data.count(feature) == 1
    file.write_bytes(data.replace(feature, bytes(len(feature))))
    text = Reader(store=store.url).read(f"/images/{key_of_uri('a')}").text
    assert "is damaged" in text
    assert "Nearest neighbours" in text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("report.json", content) for content in ('{"metrics": {"ga', "", "[1, 2]", "\x00\xff", '{"metrics": []}')),
        ("report.json", '{"metrics": {"gauc": null}}'),
        ("report.json", '{"stages": [], "stores": 3, "metrics": 4}'),
        ("report.json", '{"metrics": {"gauc": "high", "auc": [1], "logloss": true, "new_ad_auc": 1e999}}'),
        ("report.json", '{"metrics": {"gauc": 1' + "0" * 400 + '}, "wall_s": 1' + "0" * 400 + ', "samples": NaN}'),
        ("report.json", '{"metrics": {}, "wall_s": "long", "global_step": [], "samples": {}, "devices": [{}, 4]}'),
        ("report.json", '{"wall_s": {}, "samples_per_s": "fast", "num_ranks": "two", "devices": null}'),
        ("config.yaml", "model: ["),
        ("evaluation/report.json", '{"whole": '),
        ("evaluation/report.json", "{}"),
        ("evaluation/report.json", "[]"),
    ],
)
def test_half_written_files_break_no_page(own_runs: tuple[TestClient, Path], file: str, content: str) -> None:
    client, runs = own_runs
    place = runs / "both" / file
    before = place.read_bytes()
    place.write_text(content)
    try:
        for address in ("/runs", "/runs/both", "/runs/compare?run=both&run=ids-only", "/worth"):
            page(client, address)
    finally:
        place.write_bytes(before)
