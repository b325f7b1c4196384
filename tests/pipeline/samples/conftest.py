"""Samples made in a test's folder."""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from distributed import Client

from pipeline.options import SampleOptions
from pipeline.samples.added import add_days
from pipeline.samples.build import build_samples
from tests.pipeline.samples.rows import Call, Row, Shop, read, write


@pytest.fixture
def options(tmp_path: Path) -> SampleOptions:
    return SampleOptions(logs=str(tmp_path / "logs"), samples=str(tmp_path / "samples"), test_days=0)


@pytest.fixture
def log(tmp_path: Path) -> Call:
    """Writes rows or tables as the logs; without behaviours, those that are there stay."""

    def write_log(impressions: list[Row] | pa.Table, *behaviors: list[Row] | pa.Table) -> None:
        write(tmp_path / "logs", [impressions], behaviors)

    return write_log


@pytest.fixture
def build(options: SampleOptions, client: Client, log: Call) -> Call:
    """Makes samples of rows or tables; returns their rows and the summary."""

    def run(impressions: Any, *behaviors: Any, **changes: Any) -> tuple[list[Row], dict[str, Any]]:
        log(impressions, *behaviors)
        summary = build_samples(dataclasses.replace(options, **changes), client)
        return read(options.samples), summary

    return run


@pytest.fixture
def add(options: SampleOptions, client: Client) -> Call:
    """Adds days of the logs to the samples."""
    return lambda **changes: add_days(SampleOptions(**{"samples": options.samples} | changes), client)


@pytest.fixture
def shop(client: Client, tmp_path: Path) -> Shop:
    return Shop(tmp_path, client)
