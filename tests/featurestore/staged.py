"""Data files of staged rows, one shard at a time, what a snapshot holds beside features, and commands of a store."""

from collections.abc import Sequence

import pyarrow as pa
from typer.testing import Result

from featurestore import Snapshot
from featurestore.__main__ import app
from featurestore.format.datafile import METADATA_COLUMNS, schema_of
from featurestore.spec import FileEntry, FileKind
from featurestore.store import FeatureStore
from tests.cli import invoke


def build_shard(
    store: FeatureStore, run_id: str, shard: int, parts: Sequence[str], kind: FileKind = "delta"
) -> FileEntry | None:
    """The file of a shard; None where the parts have no row of it."""
    return store.build_shards(run_id, range(shard, shard + 1), parts, kind).get(shard)


def metadata_of(snapshot: Snapshot) -> pa.Table:
    """Read key, uri, content_digest, source_tag, width and height of all live rows."""
    readers = [snapshot.shard_reader(shard) for shard in sorted(snapshot.manifest.shards)]
    empty = schema_of(snapshot.info).empty_table().select(METADATA_COLUMNS)
    return pa.concat_tables([empty, *(reader.read(METADATA_COLUMNS) for reader in readers)])


def run(*arguments: object, code: int | None = None) -> Result:
    """A command of a store; it has to end with `code`, where one is given."""
    return invoke(app, *arguments, code=code)
