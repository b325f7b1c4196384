"""Data files of staged rows, one shard at a time, and commands of a store."""

from collections.abc import Sequence

from typer.testing import CliRunner, Result

from featurestore.__main__ import app
from featurestore.spec import FileEntry, FileKind
from featurestore.store import FeatureStore


def build_shard(
    store: FeatureStore, run_id: str, shard: int, parts: Sequence[str], kind: FileKind = "delta"
) -> FileEntry | None:
    """The file of a shard; None where the parts have no row of it."""
    return store.build_shards(run_id, range(shard, shard + 1), parts, kind).get(shard)


def run(*arguments: object) -> Result:
    """A command of a store."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
