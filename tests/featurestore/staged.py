"""What a snapshot holds beside features, and commands of a store."""

import pyarrow as pa
from typer.testing import Result

from featurestore import Snapshot
from featurestore.__main__ import app
from featurestore.format.datafile import METADATA_COLUMNS, schema_of
from tests.cli import invoke


def metadata_of(snapshot: Snapshot) -> pa.Table:
    """Read key, uri, content_digest, source_tag, width and height of all live rows."""
    readers = [snapshot.shard_reader(shard) for shard in sorted(snapshot.manifest.shards)]
    empty = schema_of(snapshot.info).empty_table().select(METADATA_COLUMNS)
    return pa.concat_tables([empty, *(reader.read(METADATA_COLUMNS) for reader in readers)])


def run(*arguments: object, code: int | None = None) -> Result:
    """A command of a store; it has to end with `code`, where one is given."""
    return invoke(app, *arguments, code=code)
