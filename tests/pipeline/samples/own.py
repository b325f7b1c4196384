"""A person's own tables and samples of them, as tests write, build and read them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from distributed import Client

from pipeline.options import SampleOptions
from pipeline.samples.build import build_samples
from tests.pipeline.samples.rows import Row, read


@dataclasses.dataclass
class Shop:
    """Tables in a folder, and samples made of them by a mapping."""

    folder: Path
    client: Client

    @property
    def options(self) -> SampleOptions:
        return SampleOptions(
            logs=str(self.folder / "logs"),
            samples=str(self.folder / "samples"),
            mapping=str(self.folder / "mapping.yaml"),
            test_days=0,
        )

    def put(self, name: str, content: Any) -> None:
        """Write a table: text as it is, columns or an Arrow table as Parquet."""
        path = self.folder / "logs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content)
        else:
            pq.write_table(content if isinstance(content, pa.Table) else pa.table(content), path)

    def map(self, mapping: Mapping[str, Any]) -> None:
        (self.folder / "mapping.yaml").write_text(yaml.safe_dump(dict(mapping)))

    def build(self, mapping: Mapping[str, Any], **changes: Any) -> tuple[list[Row], dict[str, Any]]:
        self.map(mapping)
        summary = build_samples(dataclasses.replace(self.options, **changes), self.client)
        return read(self.folder / "samples"), summary
