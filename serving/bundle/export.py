"""Export of a trained run as the next version of a bundle: files first, then the manifest that lists them.

Each file is read back after it was written. A version becomes visible, as a whole, when its manifest is written. A
later export removes the leftovers of killed ones.
"""

import json
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save

from featurestore.errors import StoreNotFoundError
from featurestore.log import writer_name
from featurestore.published.channels import VersionName
from featurestore.published.paths import RunPath
from featurestore.storage.safety import refuse_unsafe
from featurestore.storage.storage import Storage
from featurestore.storage.threads import Progress
from featurestore.store import FeatureStore
from serving.bundle import SAMPLE_GROUPS, RowDType, log
from serving.bundle.files import WrittenFiles
from serving.bundle.images import export_vectors
from serving.bundle.manifest import BUNDLES, IMAGES, MODEL, SCHEMA, BundleManifest, LogitDrift, Missing, VectorsOf
from serving.bundle.sample import write_sample
from serving.bundle.upkeep.expiry import remove_leftovers
from serving.bundle.writerows import SavedTables, write_rows
from serving.errors import BrokenBundleError
from serving.network.exporting import export_network
from trainer.models.nets import build_model
from trainer.runs.checkpoint import read_dense
from trainer.runs.export import load_part
from trainer.runs.folder import report_of
from trainer.runs.saved import SavedRun, read_run

_COPY_BYTES = 8 << 20

WriteNetwork = Callable[[SavedRun, WrittenFiles], None]
MeasureRows = Callable[[SavedRun, BundleManifest, Storage], LogitDrift | None]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is exported, and how."""

    run: RunPath
    checkpoint: str | None = None
    """Name of the checkpoint, see `find_checkpoint`; by default the newest."""
    id_dtype: RowDType = "float32"
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
    measure: MeasureRows,
    progress: Progress | None = None,
) -> Exported:
    """Publish a run's checkpoint as the next version of the bundle at `url`.

    `network` writes the files of the network, see `write_network`; `measure` measures how far logits move if ID rows
    are not float32. Memory holds one shard of ID rows or vectors at a time, or one file on an object store. Raises
    TrainerError, FeatureStoreError or ServingError without publishing anything.
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
    id_tables, rows = write_rows(tables, files, options.id_dtype)
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
        id_dtype=options.id_dtype,
        id_error=None,
        rows=rows,
        tables=id_tables,
        vectors=vectors,
        missing=_missing(saved),
        missing_in_training=saved.missing_in_training,
        metrics=_metrics(saved),
        files=tuple(files.files),
    )
    if options.id_dtype != "float32":
        draft = draft.model_copy(update={"id_error": measure(saved, draft, storage)})
    num_images = _count_images(storage, draft)
    published = log.publish(storage, lambda version: draft.model_copy(update={"version": version}))
    if options.use:
        log.use(storage, published.version)
    if report_of(saved.folder) is None:
        notes.append(f"the run has not ended (it has no report.json): what is published is its {saved.checkpoint.name}")
    if no_sample:
        notes.append(f"the bundle has no test samples, so changes of scores cannot be measured: {no_sample}")
    return Exported(manifest=published, num_images=num_images, notes=notes)


def write_network(saved: SavedRun, files: WrittenFiles, *, compiled: bool = False) -> None:
    """Export the network of the checkpoint, in float32, into the files of a version.

    `compiled`: also compile it for this machine. Raises CheckpointError, OSError."""
    model = build_model(saved.schema, saved.config.model)
    load_part(model, read_dense(saved.checkpoint, saved.state, "model.", saved.config.data.cache_dir))
    with tempfile.TemporaryDirectory(prefix="export-") as folder:
        for path in export_network(model.float().eval(), saved.config.model, Path(folder), compiled=compiled):
            with files.output(path.name) as output, path.open("rb") as written:
                shutil.copyfileobj(written, output, _COPY_BYTES)


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
    """Write the networks E, and a vectors store for each feature store that the model reads."""
    if not saved.places:
        return ()
    state = read_dense(saved.checkpoint, saved.state, "stores.", saved.config.data.cache_dir)
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
    try:
        for file in draft.files:
            storage.size(f"{draft.folder}/{file.name}")
        stores = {of.store: FeatureStore.open(storage.full(f"{draft.folder}/{of.folder}")) for of in draft.vectors}
        return {name: store.snapshot().num_rows for name, store in stores.items()}
    except (FileNotFoundError, StoreNotFoundError) as error:
        raise BrokenBundleError(f"{storage.full(draft.folder)} was removed while it was written: {error}") from error
