"""Export of a trained run as the next version of a bundle: files first, then the manifest that lists them.

Each file is read back after it was written. A version becomes visible, as a whole, when its manifest is written. A
later export removes the leftovers of killed ones.

ID rows are copied one shard at a time. A checkpoint's `weight` is the value that a lookup would return at that step,
even if rows in memory lag behind (`trainer.ids.optimizers`). Letters of shapes: R rows of a shard, V numbers in a row.
"""

import json
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from featurestore.errors import StorageError
from featurestore.keys import UInt64Array, splitmix64
from featurestore.log import writer_name
from featurestore.published.paths import RunPath
from featurestore.published.versions import VersionName
from featurestore.storage.safety import refuse_unsafe
from featurestore.storage.storage import Progress, Storage
from featurestore.text import one_line
from serving.bundle import SAMPLE_GROUPS, log
from serving.bundle.files import WrittenFiles, find_damage, open_vectors
from serving.bundle.images import export_vectors
from serving.bundle.log import remove_leftovers
from serving.bundle.manifest import (
    BUNDLES,
    IMAGES,
    MODEL,
    SAMPLE,
    SCHEMA,
    TRAINED,
    BundleManifest,
    Missing,
    RowsFile,
    TableRows,
    VectorsOf,
)
from serving.bundle.rows import Bool, Float32
from serving.errors import BrokenBundleError
from serving.network.exporting import export_network
from trainer.comm import SoloComm
from trainer.engine.wiring import table_shapes
from trainer.errors import TrainerError
from trainer.ids.exact import IDS, ExactShape
from trainer.ids.optimizers import state_of
from trainer.ids.shards import WEIGHT, TableShape, initial_rows
from trainer.models.layers import used_fields
from trainer.models.nets import build_model
from trainer.runs.checkpoint import read_dense, read_rows
from trainer.runs.folder import report_of
from trainer.runs.saved import SavedRun, finite, load_part, open_test, read_run
from trainer.samples.columns import rules_of, source_columns
from trainer.samples.index import read_row_group

WriteNetwork = Callable[[SavedRun, WrittenFiles], None]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is exported, and how."""

    run: RunPath
    checkpoint: str | None = None
    """Name of the checkpoint, see `find_checkpoint`; by default the newest."""
    sample_groups: int = SAMPLE_GROUPS
    """Number of groups of the run's test samples to include in the bundle."""
    use: bool = True
    """Serve this version from now on."""
    store_version: VersionName | None = None
    """Snapshot of the first feature store, by default the newest; the others always use the newest."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A version that was published."""

    manifest: BundleManifest
    num_images: dict[str, int]
    """Images with vectors, by feature store."""
    notes: list[str]
    """Notes to print for the user."""


def export_model(
    url: str,
    options: ExportOptions,
    *,
    network: WriteNetwork,
    progress: Progress | None = None,
) -> Exported:
    """Publish a run's checkpoint as the next version of the bundle at `url`.

    `network` writes the files of the network, see `write_network`. Memory holds one shard of ID rows or vectors at a
    time, or one file on an object store. Raises TrainerError, FeatureStoreError or ServingError without publishing
    anything.
    """
    saved, storage = read_run(options.run, options.checkpoint), Storage(url)
    tables = SavedTables(saved)
    log.refuse_others(storage)
    refuse_unsafe(storage)
    notes = _clean(storage)
    bundle_id = uuid.uuid4().hex
    files = WrittenFiles(storage, f"{BUNDLES}/{bundle_id}")
    files.write(SCHEMA, yaml.safe_dump(saved.schema.model_dump(mode="json", exclude_none=True)).encode())
    files.write(MODEL, (json.dumps(saved.config.model.model_dump(mode="json"), indent=1) + "\n").encode())
    network(saved, files)
    id_tables, rows = write_rows(tables, files)
    vectors = _write_vectors(saved, files, options.store_version, progress)
    no_sample = write_sample(saved, files, options.sample_groups)
    draft = BundleManifest(
        version=1,
        bundle_id=bundle_id,
        time_s=time.time(),
        writer=writer_name(),
        run=str(saved.folder.absolute()),
        checkpoint=saved.checkpoint.name,
        checkpoint_digest=saved.digest,
        rows=rows,
        tables=id_tables,
        vectors=vectors,
        missing=_missing(saved),
        missing_in_training=saved.missing_in_training,
        metrics=_metrics(saved),
        files=tuple(files.files),
    )
    num_images = _count_images(storage, draft)
    published = log.publish(storage, draft)
    if options.use:
        log.use(storage, published.version)
    if report_of(saved.folder) is None:
        notes.append(f"the run has not ended (it has no report.json): what is published is its {saved.checkpoint.name}")
    if no_sample:
        notes.append(f"the bundle has no test samples, so a scorer does not judge it: {no_sample}")
    return Exported(manifest=published, num_images=num_images, notes=notes)


def write_network(saved: SavedRun, files: WrittenFiles, *, compiled: bool = False) -> None:
    """Export the network of the checkpoint, in float32, into the files of a version.

    `compiled`: also compile it for this machine. Raises CheckpointError, OSError."""
    model = build_model(saved.schema, saved.config.model)
    load_part(model, read_dense(saved.checkpoint, saved.state, saved.config.data.cache_dir, "model."))
    with tempfile.TemporaryDirectory(prefix="export-") as folder:
        for path in export_network(model.float().eval(), saved.config.model, Path(folder), compiled=compiled):
            files.write(path.name, path.read_bytes())


def _clean(storage: Storage) -> list[str]:
    """Remove leftovers; return a note if a damaged manifest prevents it, which does not stop the export."""
    try:
        remove_leftovers(storage)
    except BrokenBundleError as error:
        return [f"leftovers of killed exports were not removed, as a damaged version may need them: {error}"]
    return []


def _write_vectors(
    saved: SavedRun, files: WrittenFiles, version: VersionName | None, progress: Progress | None
) -> tuple[VectorsOf, ...]:
    """Write the E of each store, and a vectors store for each feature store that the model reads."""
    if not saved.places:
        return ()
    state = read_dense(saved.checkpoint, saved.state, saved.config.data.cache_dir, "stores.")
    files.write(IMAGES, save(state, saved.named()))
    url, missing = files.storage.full(files.folder), _missing(saved)
    versions = {saved.places[0].name: version}
    return tuple(
        export_vectors(saved, place, state, missing, url, progress, versions.get(place.name)) for place in saved.places
    )


def _missing(saved: SavedRun) -> Missing:
    policy = saved.config.data.missing
    assert policy != "error"  # read_run replaces it by zeros
    return policy


def _metrics(saved: SavedRun) -> dict[str, Any]:
    """Return the metrics on the test samples at the checkpoint's step; empty if none were measured."""
    report, step = report_of(saved.folder), saved.state.step
    if report is not None and report.get("global_step") == step:
        metrics: dict[str, Any] = report["metrics"]
        return metrics
    measured: dict[str, Any] = next((entry for entry in reversed(saved.state.history) if entry["step"] == step), {})
    return {name: value for name, value in measured.items() if name != "step"}


def _count_images(storage: Storage, draft: BundleManifest) -> dict[str, int]:
    """Count the images of each vectors store. Raises BrokenBundleError if a file was removed after it was written."""
    if damage := find_damage(storage, draft):
        raise BrokenBundleError(f"{storage.full(draft.folder)} was removed while it was written: {damage[0]}")
    return {of.store: open_vectors(storage, draft, of).snapshot.num_rows for of in draft.vectors}


class ShardRows(NamedTuple):
    """The rows of one shard in the bundle's order: those of an exact table by hash, after the cold row."""

    rows_RV: Float32
    is_trained_R: Bool
    hash_M: UInt64Array
    """Hashes of the ids of an exact table, ascending; empty for other tables."""


class SavedTables:
    """The ID tables in a checkpoint of a run."""

    def __init__(self, saved: SavedRun) -> None:
        """Raises CheckpointError, SchemaError, ConfigError."""
        self._saved, self._config = saved, saved.config
        self.shapes = table_shapes(used_fields(saved.schema, self._config.model), self._config.model)
        state = state_of(self._config.optim)
        counts = [part for part in state if part.kind == "count"]  # alone has this, in few bytes
        self._marks = [part.name for part in counts or state]

    def shards(self, shape: TableShape) -> Iterator[ShardRows]:
        """Read a table's shards in order. Raises CheckpointError, and TrainerError if numbers are not finite."""
        is_exact = isinstance(shape, ExactShape)
        parts = [WEIGHT, IDS] if is_exact else [WEIGHT, *self._marks]
        names = [_name(shape, shard, part) for shard in range(shape.num_shards) for part in parts]
        rows = read_rows(self._saved.checkpoint, self._saved.state, names, self._saved.config.data.cache_dir)
        for shard in range(shape.num_shards):
            weight_RV, *others = (rows[_name(shape, shard, part)] for part in parts)
            finite(weight_RV.numpy())
            if is_exact:
                yield _exact(weight_RV, others[0])
            else:
                yield ShardRows(
                    weight_RV.float().numpy(),
                    self._is_trained(shape, shard, weight_RV, others),
                    np.empty(0, np.uint64),
                )

    def _is_trained(self, shape: TableShape, shard: int, weight_RV: Tensor, marks: Sequence[Tensor]) -> Bool:
        """Return which rows training has touched, (N,).

        The optimiser's state shows it. For rows copied from another run their numbers show it, as they differ from this
        run's initial values."""
        trained_R = np.zeros(len(weight_RV), np.bool_)
        for mark in marks:
            trained_R |= mark.numpy().reshape(len(mark), -1).any(axis=1)
        seed, scale = self._config.train.seed, self._config.model.id_init_std
        first_RV = initial_rows(shape, shard, seed, scale).astype(weight_RV.numpy().dtype)
        moved_R: Bool = (weight_RV.numpy() != first_RV).any(axis=1)
        return trained_R | moved_R


def write_rows(tables: SavedTables, files: WrittenFiles) -> tuple[tuple[TableRows, ...], tuple[RowsFile, ...]]:
    """Write the rows of all tables, one file for each width, and a bit for each row that training has touched.

    Raises CheckpointError, TrainerError, StorageError."""
    written: list[TableRows] = []
    rows_files: list[RowsFile] = []
    bits: list[NDArray[np.uint8]] = []
    for width in dict.fromkeys(shape.width for shape in tables.shapes):
        name, first_row = f"ids-{width}.bin", 0
        trained: list[Bool] = []
        with files.output(name) as output:
            for shape in tables.shapes:
                if shape.width != width:
                    continue
                table = _write_table(tables, shape, first_row, files, output, trained)
                written.append(table)
                first_row += table.num_rows
        first_bit = 8 * sum(map(len, bits))
        rows_files.append(RowsFile(width=width, name=name, num_rows=first_row, first_bit=first_bit))
        bits.append(np.packbits(np.concatenate(trained), bitorder="little"))
    files.write(TRAINED, b"".join(part.tobytes() for part in bits))
    return tuple(written), tuple(rows_files)


def _write_table(
    tables: SavedTables,
    shape: TableShape,
    first_row: int,
    files: WrittenFiles,
    output: IO[bytes],
    trained: list[Bool],
) -> TableRows:
    """Append the rows of one table, and append to `trained` which of them training has touched."""
    num_rows, hashes = 0, list[UInt64Array]()
    for shard in tables.shards(shape):
        output.write(shard.rows_RV.astype("<f4", copy=False).tobytes())
        trained.append(shard.is_trained_R)
        hashes.append(shard.hash_M)
        num_rows += len(shard.rows_RV)
    is_exact = isinstance(shape, ExactShape)
    name = f"ids-{shape.name}.hashes.bin" if is_exact else None
    if name is not None:
        files.write(name, np.concatenate(hashes).astype("<u8").tobytes())
    return TableRows(
        name=shape.name,
        kind="exact" if is_exact else "direct" if shape.direct else "hashed",
        width=shape.width,
        num_shards=shape.num_shards,
        num_rows=num_rows,
        first_row=first_row,
        hashes=name,
    )


def _exact(weight_RV: Tensor, ids_M: Tensor) -> ShardRows:
    hash_M = splitmix64(ids_M.numpy())
    order_M = np.argsort(hash_M)
    rows_RV = weight_RV.float().numpy()
    rows_RV = np.concatenate([rows_RV[:1], rows_RV[1:][order_M]])
    return ShardRows(rows_RV, np.arange(len(rows_RV)) > 0, hash_M[order_M])


def _name(shape: TableShape, shard: int, part: str) -> str:
    return f"{shape.name}/{shard:04d}/{part}"


_MOST_ROW_GROUPS = 8


def write_sample(saved: SavedRun, files: WrittenFiles, num_groups: int) -> str | None:
    """Write `num_groups` sample groups, spread over the run's test samples, with the columns that the schema reads.

    If there are none, returns the reason; a bundle without them is still complete."""
    if num_groups == 0:
        return "none were asked for"
    try:
        index = open_test(SoloComm(), saved.config, saved.schema, None)
        count = min(_MOST_ROW_GROUPS, len(index.row_groups))
        chosen = np.linspace(0, len(index.row_groups) - 1, count).astype(int)
        columns = list(source_columns(rules_of(saved.schema)))
        tables = [read_row_group(index.storage, index.row_groups[n], columns) for n in chosen]
    except (TrainerError, StorageError, pa.ArrowException) as error:
        return one_line(error)
    share = -(-num_groups // count)
    rows = pa.concat_tables([table.slice(0, share) for table in tables], promote_options="permissive")
    with files.output(SAMPLE) as output:
        pq.write_table(rows.slice(0, num_groups), output, compression="zstd")
    return None
