"""Data files of staged rows, one shard at a time, and commands of a store."""

from collections.abc import Sequence

from typer.testing import Result

from featurestore.__main__ import app
from featurestore.spec import FileEntry, FileKind
from featurestore.store import FeatureStore
from tests.cli import invoke


def build_shard(
    store: FeatureStore, run_id: str, shard: int, parts: Sequence[str], kind: FileKind = "delta"
) -> FileEntry | None:
    """The file of a shard; None where the parts have no row of it."""
    return store.build_shards(run_id, range(shard, shard + 1), parts, kind).get(shard)


def run(*arguments: object, code: int | None = None) -> Result:
    """A command of a store; it has to end with `code`, where one is given."""
    return invoke(app, *arguments, code=code)
