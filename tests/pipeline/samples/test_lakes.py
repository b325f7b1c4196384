"""Logs in tables of Delta, Iceberg and Lance: samples are those of the same rows in plain files."""

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from featurestore.storage.storage import Storage
from pipeline.samples.requests import with_behaviors
from tests.cli import invoke
from tests.pipeline.samples.rows import DAY_S, START_S, Shop, all_bytes, read
from tests.raised import raises
from trainer.errors import DataError
from trainer.problems import Problem
from trainer.schema import __main__ as schema_command
from trainer.schema.lakes import PACKAGES, Kind, versions_of

MAPPING: dict[str, Any] = {
    "impressions": {"files": "shown", "ad": {"price": "dense"}},
    "behaviors": "clicks",
    "join": {"item": {"files": "products", "column": "sku"}},
}
PRODUCTS = pa.table({"sku": ["a", "b"], "price": [1.5, 2.5]})
Write = Callable[[Path, pa.Table], None]


def shown(days: int) -> pa.Table:
    """Impressions of two users, some on each day."""
    rows = range(12 * days)
    time_s = pa.array([START_S + DAY_S * (n // 12) + 600 * (n % 12) for n in rows], pa.int64())
    label = pa.array([int(n % 4 == 0) for n in rows], pa.int64())
    columns = {"timestamp": time_s, "user": [f"user {n % 2}" for n in rows], "item": ["ab"[n % 3 % 2] for n in rows]}
    return pa.table(columns | {"image": [f"{n % 3}.jpg" for n in rows], "label": label})


def write_lance(place: Path, table: pa.Table) -> None:
    import lance

    lance.write_dataset(table, str(place), mode="overwrite")


def write_delta(place: Path, table: pa.Table) -> None:
    from deltalake import write_deltalake

    write_deltalake(str(place), table, mode="overwrite")


def write_iceberg(place: Path, table: pa.Table) -> None:
    from pyiceberg.catalog import load_catalog

    where = {"uri": f"sqlite:///{place.parent.parent}/{place.name}.db", "warehouse": f"file://{place.parent.parent}"}
    catalog = load_catalog("shop", type="sql", **where)
    catalog.create_namespace_if_not_exists(place.parent.name)
    name = f"{place.parent.name}.{place.name}"
    catalog.create_table_if_not_exists(name, schema=table.schema, location=f"file://{place}").overwrite(table)


WRITERS: dict[Kind, tuple[Write, str]] = {
    "Lance": (write_lance, "version 2"),
    "Delta": (write_delta, "version 1"),
    "Iceberg": (write_iceberg, "snapshot "),
}


@pytest.fixture(params=list(WRITERS))
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def lake(kind: Kind, shop: Shop) -> Shop:
    """A shop whose logs and products are tables of one kind, with rows that were removed."""
    pytest.importorskip(PACKAGES[kind][0], reason=f"{PACKAGES[kind][1]} is not installed")
    write, _ = WRITERS[kind]
    (shop.folder / "logs").mkdir(exist_ok=True)
    for name, table in (("shown", shown(1).slice(0, 5)), ("shown", shown(2)), ("products", PRODUCTS)):
        write(shop.folder / "logs" / name, table)
    return shop


@pytest.fixture
def plain(shop: Shop) -> Shop:
    """The same rows in plain files."""
    other = dataclasses.replace(shop, folder=shop.folder / "plain")
    other.put("shown/a.parquet", shown(2))
    other.put("products/a.parquet", PRODUCTS)
    return other


def test_samples_are_those_of_plain_files(lake: Shop, plain: Shop, kind: Kind) -> None:
    found, summary = lake.build(MAPPING)
    expected, of_files = plain.build(MAPPING)
    assert found == expected and {price for row in found for price in row["ad_price"]} == {1.5, 2.5}
    assert summary["tables"].keys() == {"shown", "products"} and "tables" not in of_files
    assert summary["tables"]["shown"].startswith(f"{kind}, {WRITERS[kind][1]}")
    assert versions_of(Storage(lake.folder / "samples")) == summary["tables"]
    assert versions_of(Storage(plain.folder / "samples")) == {} == versions_of(Storage(plain.folder))
    assert not list(lake.folder.glob(".crossmedia-tables-*"))
    rows = with_behaviors(shown(1), shown(1), str(lake.folder / "samples")).to_pylist()
    assert len(rows) == 12 and {row["ad_price"][0] for row in rows} == {1.5, 2.5}


def test_a_day_is_added_from_the_newest_version(lake: Shop, plain: Shop, kind: Kind) -> None:
    _, before = lake.build(MAPPING)
    WRITERS[kind][0](lake.folder / "logs" / "shown", shown(3))
    plain.put("shown/a.parquet", shown(3))
    lake.add(since="2026-01-01")
    expected, _ = plain.build(MAPPING)
    assert read(lake.folder / "samples") == expected
    version = versions_of(Storage(lake.folder / "samples"))["shown"]
    assert version.startswith(f"{kind}, ") and version != before["tables"]["shown"]
    assert kind == "Iceberg" or version == f"{kind}, version {2 if kind == 'Delta' else 3}"
    assert all_bytes(lake.folder / "samples" / "train") == all_bytes(plain.folder / "samples" / "train")


def test_a_first_mapping_names_the_tables(lake: Shop, shop: Shop) -> None:
    shop.put("more.csv", "sku,weight\na,1.5\nb,2\n")
    for place, tables in (("logs", {"shown", "products"}), ("logs/shown", {"shown"})):
        text = invoke(schema_command.app, "inspect", shop.folder / place, code=0).stdout
        mapping = yaml.safe_load(text)
        assert mapping["impressions"]["files"] == "shown" and "--logs " + str(shop.folder / "logs") + " " in text
        assert {each["files"] for each in mapping.get("join", {}).values()} <= {*tables, "more.csv"}
    lake.build(mapping)
    said = invoke(schema_command.app, "inspect", shop.folder / "logs", "--label", "no", code=1).stderr
    assert said.startswith(f"error: {shop.folder}/logs: --label no "), "as it is called, not as its copy"


def test_without_its_package_a_table_is_named(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.put("products/a.parquet", PRODUCTS)
    shop.put("shown/_delta_log/0.json", "{}")
    monkeypatch.setitem(sys.modules, "deltalake", None)
    lacking = {"where": shop.folder / "logs/shown", "kind": "Delta", "package": "deltalake"}
    with raises(DataError, Problem.NO_TABLE_PACKAGE, **lacking):
        shop.build(MAPPING)
    assert not list(shop.folder.glob(".crossmedia-tables-*"))


def test_a_damaged_table_is_named(shop: Shop) -> None:
    pytest.importorskip("lance")
    shop.put("products/a.parquet", PRODUCTS)
    shop.put("shown/_versions/1.manifest", "nothing")
    with raises(DataError, Problem.REFUSED, action="read", where=re.compile("/shown, a table of Lance")):
        shop.build(MAPPING)
