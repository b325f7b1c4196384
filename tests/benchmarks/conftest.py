"""What tests of benchmarks share."""

import os

import pytest

from tests.running.spared import WITHOUT_PANDAS


@pytest.fixture(autouse=True)
def with_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    """FuxiCTR needs it, in processes of its own."""
    monkeypatch.setenv("PYTHONPATH", os.environ["PYTHONPATH"].replace(WITHOUT_PANDAS, ""))
