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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

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
from serving.bundle.rows import Bool
from serving.errors import BrokenBundleError
from serving.network.exporting import export_network
from serving.problems import Problem
from trainer.comm import SoloComm
from trainer.config import Config
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
    url: str, options: ExportOptions, *, network: WriteNetwork, progress: Progress | None = None
) -> Exported:
    """Publish a run's checkpoint as the next version of the bundle at `url`.

    `network` writes the files of the network, see `write_network`. Memory holds one shard of ID rows or vectors at a
    time, or one file on an object store. Raises TrainerError, FeatureStoreError or ServingError without publishing
    anything.
    """
    saved, storage = read_run(options.run, options.checkpoint), Storage(url)
    shapes = table_shapes(used_fields(saved.schema, saved.config.model), saved.config.model)
    log.refuse_others(storage)
    refuse_unsafe(storage)
    notes = []
    try:
        remove_leftovers(storage)
    except BrokenBundleError as error:
        notes.append(f"leftovers of killed exports were not removed, as a damaged version may need them: {error}")
    bundle_id = uuid.uuid4().hex
    files = WrittenFiles(storage, f"{BUNDLES}/{bundle_id}")
    files.write(SCHEMA, yaml.safe_dump(saved.schema.model_dump(mode="json", exclude_none=True)).encode())
    files.write(MODEL, (json.dumps(saved.config.model.model_dump(mode="json"), indent=1) + "\n").encode())
    network(saved, files)
    id_tables, rows = write_rows(saved, shapes, files)
    missing = saved.config.data.missing
    assert missing != "error"  # read_run replaces it by zeros
    vectors = _write_vectors(saved, files, missing, options.store_version, progress)
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
        missing=missing,
        missing_in_training=saved.missing_in_training,
        metrics=_metrics(saved),
        files=tuple(files.files),
    )
    if damage := find_damage(storage, draft):
        raise BrokenBundleError(Problem.REMOVED_MEANWHILE, storage.full(draft.folder), damage[0])
    num_images = {of.store: open_vectors(storage, draft, of).snapshot.num_rows for of in vectors}
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


def _write_vectors(
    saved: SavedRun, files: WrittenFiles, missing: Missing, version: VersionName | None, progress: Progress | None
) -> tuple[VectorsOf, ...]:
    """Write the E of each store, and a vectors store for each feature store that the model reads."""
    if not saved.places:
        return ()
    state = read_dense(saved.checkpoint, saved.state, saved.config.data.cache_dir, "stores.")
    files.write(IMAGES, save(state, saved.named()))
    url = files.storage.full(files.folder)
    versions = {saved.places[0].name: version}
    return tuple(
        export_vectors(saved, place, state, missing, url, progress, versions.get(place.name)) for place in saved.places
    )


def _metrics(saved: SavedRun) -> dict[str, Any]:
    """Return the metrics on the test samples at the checkpoint's step; empty if none were measured."""
    report, step = report_of(saved.folder), saved.state.step
    if report is not None and report.get("global_step") == step:
        return dict(report["metrics"])
    measured: dict[str, Any] = next((entry for entry in reversed(saved.state.history) if entry["step"] == step), {})
    return {name: value for name, value in measured.items() if name != "step"}


def write_rows(
    saved: SavedRun, shapes: Sequence[TableShape], files: WrittenFiles
) -> tuple[tuple[TableRows, ...], tuple[RowsFile, ...]]:
    """Write the rows of all tables, one file for each width, and a bit for each row that training has touched.

    Raises CheckpointError, StorageError, and TrainerError if numbers are not finite."""
    written: list[TableRows] = []
    rows_files: list[RowsFile] = []
    bits: list[NDArray[np.uint8]] = []
    for width in dict.fromkeys(shape.width for shape in shapes):
        name, first_row = f"ids-{width}.bin", 0
        trained: list[Bool] = []
        with files.output(name) as output:
            for shape in shapes:
                if shape.width == width:
                    written.append(_write_table(saved, shape, first_row, files, output, trained))
                    first_row += written[-1].num_rows
        first_bit = 8 * sum(map(len, bits))
        rows_files.append(RowsFile(width=width, name=name, num_rows=first_row, first_bit=first_bit))
        bits.append(np.packbits(np.concatenate(trained), bitorder="little"))
    files.write(TRAINED, b"".join(part.tobytes() for part in bits))
    return tuple(written), tuple(rows_files)


def _write_table(
    saved: SavedRun, shape: TableShape, first_row: int, files: WrittenFiles, output: IO[bytes], trained: list[Bool]
) -> TableRows:
    """Append the rows of one table, and append to `trained` which of them training has touched."""
    is_exact, state = isinstance(shape, ExactShape), state_of(saved.config.optim)
    marks = [part for part in state if part.kind == "count"] or state  # a count alone tells, in few bytes
    parts = [WEIGHT, IDS] if is_exact else [WEIGHT, *(part.name for part in marks)]
    names = [[f"{shape.name}/{shard:04d}/{part}" for part in parts] for shard in range(shape.num_shards)]
    rows = read_rows(saved.checkpoint, saved.state, list(chain(*names)), saved.config.data.cache_dir)
    num_rows, hashes = 0, list[UInt64Array]()
    for shard, of_shard in enumerate(names):
        weight_RV, *others = (rows[name] for name in of_shard)
        finite(weight_RV.numpy())
        rows_RV = weight_RV.float().numpy()
        if is_exact:  # the cold row, then the others by hash
            hash_M = splitmix64(others[0].numpy())
            order_M = np.argsort(hash_M)
            rows_RV = np.concatenate([rows_RV[:1], rows_RV[1:][order_M]])
            hashes.append(hash_M[order_M])
            trained.append(np.arange(len(rows_RV)) > 0)
        else:
            trained.append(_is_trained(saved.config, shape, shard, weight_RV, others))
        output.write(rows_RV.astype("<f4", copy=False).tobytes())
        num_rows += len(rows_RV)
    hashes_name = f"ids-{shape.name}.hashes.bin" if is_exact else None
    if hashes_name is not None:
        files.write(hashes_name, np.concatenate(hashes).astype("<u8").tobytes())
    return TableRows(
        name=shape.name,
        kind="exact" if is_exact else "direct" if shape.direct else "hashed",
        width=shape.width,
        num_shards=shape.num_shards,
        num_rows=num_rows,
        first_row=first_row,
        hashes=hashes_name,
    )


def _is_trained(config: Config, shape: TableShape, shard: int, weight_RV: Tensor, marks: Sequence[Tensor]) -> Bool:
    """Return which rows training has touched, (R,).

    The optimiser's state shows it. For rows copied from another run their numbers show it, as they differ from this
    run's initial values."""
    trained_R = np.zeros(len(weight_RV), np.bool_)
    for mark in marks:
        trained_R |= mark.numpy().reshape(len(mark), -1).any(axis=1)
    first_RV = initial_rows(shape, shard, config.train.seed, config.model.id_init_std)
    moved_R: Bool = (weight_RV.numpy() != first_RV.astype(weight_RV.numpy().dtype)).any(axis=1)
    return trained_R | moved_R


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
