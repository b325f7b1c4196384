"""Samples made in a test's folder."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from pipeline.options import SampleOptions
from pipeline.samples.build import build_samples
from tests.pipeline.samples.rows import Row, Shop, read, table, write


@pytest.fixture
def options(tmp_path: Path) -> SampleOptions:
    return SampleOptions(logs=str(tmp_path / "logs"), samples=str(tmp_path / "samples"), test_days=0)


@pytest.fixture
def build(options: SampleOptions, client: Client, tmp_path: Path):
    def run(impressions: list[Row], behaviors: list[Row], **changes: Any) -> tuple[list[Row], dict[str, Any]]:
        write(tmp_path / "logs", [table(impressions)], [table(behaviors)])
        summary = build_samples(dataclasses.replace(options, **changes), client)
        return read(tmp_path / "samples"), summary

    return run


@pytest.fixture
def shop(client: Client, tmp_path: Path) -> Shop:
    return Shop(tmp_path, client)
