"""The visual vectors of all images of a snapshot, as a run's E makes them, in a file; and files that appear when whole.

No engine, no samples and no partition of a store are opened. Images are read shard by shard, in the memory of the
largest data file.

Letters of shapes: K rows of a block, D feature width, V visual width.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from featurestore.format.datafile import KEY, URI
from featurestore.keys import AnyArray, Float32Array, Int64Array
from featurestore.lookup.embedding import EmbeddingModel
from featurestore.lookup.ondevice import as_tensor
from featurestore.published.paths import RunPath
from featurestore.published.versions import VersionName
from featurestore.storage.storage import cached_property, file_at
from featurestore.store import VECTORS_OF, Snapshot, SnapshotId
from trainer.comm import SoloComm
from trainer.engine.machine import share_machine
from trainer.engine.wiring import image_model, widths_of_stores
from trainer.errors import ConfigError, DataError
from trainer.ids.shards import check_names
from trainer.models.layers import used_fields
from trainer.runs.checkpoint import read_dense
from trainer.runs.saved import SavedRun, finite, read_run

VECTOR = "vector"
# Also rows of a row group. E takes .3 to .6 of the time an image that it takes in the store's blocks of 256.
BATCH_ROWS = 4096

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class ImageNetwork:
    """The E of a run for one store, and the images that it is to look at: what is exported of a store."""

    saved: SavedRun
    store: str
    width: int
    """Numbers of a visual vector."""
    snapshot: Snapshot

    @cached_property
    def model(self) -> EmbeddingModel:
        """E with its weights, which are read when they are first asked for. Raises CheckpointError."""
        saved, config = self.saved, self.saved.config
        model = image_model(self.snapshot.info.dim, self.width, config.model)
        part = f"stores.{self.store}.model."
        load_part(model, read_dense(saved.checkpoint, saved.state, config.data.cache_dir, part))
        return model.to(share_machine(config, SoloComm()))

    def describe(self) -> dict[str, Any]:
        """Say what its vectors are of."""
        return {
            **self.saved.named(),
            "network": self.store,
            "dim": self.width,
            **SnapshotId.of(self.snapshot).named(),
        }

    def schema(self) -> pa.Schema:
        """Describe the columns of the file: key, uri and vector."""
        fields: list[Any] = [
            pa.field(KEY, pa.int64(), nullable=False),
            pa.field(URI, pa.string(), nullable=False),
            pa.field(VECTOR, pa.list_(pa.float32(), self.width), nullable=False),
        ]
        return pa.schema(fields, metadata={VECTORS_OF: json.dumps(self.describe())})

    def tables(self) -> Iterator[pa.Table]:
        """Compute key, uri and visual vector of all images, some thousands at a time.

        Raises TrainerError for a number that is not finite.
        """
        keys, uris, features = list[Int64Array](), list[Any](), list[AnyArray]()
        for shard in sorted(self.snapshot.manifest.shards):
            reader = self.snapshot.shard_reader(shard)
            uris_of_shard = reader.read([URI])[URI]
            for block in reader.verified_blocks():
                keys.append(block.keys_K)
                uris += uris_of_shard.take(block.place_K).to_pylist()
                features.append(block.features_KD.copy())
                if len(uris) >= BATCH_ROWS:
                    yield self._table(np.concatenate(keys), uris, np.concatenate(features))
                    keys, uris, features = [], [], []
        if uris:
            yield self._table(np.concatenate(keys), uris, np.concatenate(features))

    def _table(self, keys_K: Int64Array, uris: list[Any], features_KD: AnyArray) -> pa.Table:
        """Compute the vectors of some images; features are in the store's dtype."""
        visual_KV = visual_vectors(self.model, features_KD)
        columns: list[Any] = [pa.array(keys_K), pa.array(uris, pa.string()), vector_lists(visual_KV)]
        return pa.Table.from_arrays(columns, [KEY, URI, VECTOR])


def visual_vectors(model: EmbeddingModel, features_KD: AnyArray) -> Float32Array:
    """Compute the visual vectors (K, V) of features in a store's dtype. Raises TrainerError if one is not finite."""
    with torch.inference_mode():
        return finite(model(as_tensor(features_KD).to(model.mean_D.device)).float().cpu().numpy())


def open_network(
    folder: RunPath,
    *,
    which: str | None = None,
    network: str | None = None,
    store_version: VersionName | None = None,
    store: str | None = None,
) -> ImageNetwork:
    """Find an E of the run in `folder`, as the checkpoint `which` has it (see `find_checkpoint`), and open a snapshot.

    The snapshot is the newest one by default, whichever the run was trained on. `network`: which E, by its store's name
    in the schema, where there are several. `store`: where data.store is now, if elsewhere. A few small files are read.
    Raises ConfigError, CheckpointError, SchemaError, DataError, FeatureStoreError.
    """
    saved = read_run(folder, which)
    if store is not None:
        saved = replace(saved, config=saved.config.changed(data={"store": store}))
    widths = network_widths(saved)
    if not widths:
        raise ConfigError(f"{folder} has model.images=none: it has no E for images; name another run by --run")
    at = next(iter(widths)) if network is None and len(widths) == 1 else network
    if at not in widths:
        wrong = "" if network is None else f"--network {network}: "
        raise ConfigError(f"{wrong}{folder} has the networks {', '.join(widths)}; choose one by --network")
    place = next(place for place in saved.places if place.name == at)
    snapshot = saved.snapshot(place, store_version)
    if snapshot.num_rows == 0:
        raise DataError(f"{place.url} has no features in snapshot {snapshot.version}; add them with: {place.make_it()}")
    return ImageNetwork(saved=saved, store=at, width=widths[at], snapshot=snapshot)


def network_widths(saved: SavedRun) -> dict[str, int]:
    """List the networks E of a run, by store, with the width of their vectors. Raises as `open_network`."""
    return widths_of_stores(used_fields(saved.schema, saved.config.model), saved.config.model)


def load_part(part: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill a part of a run's networks, which gets the type of the checkpoint's numbers. Raises CheckpointError."""
    check_names(part.state_dict(), state)
    part.to(next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32))
    part.load_state_dict(dict(state))


def export_vectors(network: ImageNetwork, out: str, progress: Progress = lambda done, total: None) -> None:
    """Write the vectors of all images to `out`, NAME.parquet, and report images done and all of them.

    On an object store the file is put in one piece, out of memory. Raises TrainerError, FeatureStoreError.
    """
    done = 0
    with parquet_file(out, network.schema()) as write:
        for table in network.tables():
            write(table)
            done += len(table)
            progress(done, network.snapshot.num_rows)


def vector_lists(vectors_NV: Float32Array) -> Any:
    """Turn the rows of a matrix into lists of one width."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors_NV.reshape(-1)), vectors_NV.shape[1])


@contextlib.contextmanager
def parquet_file(address: str, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """Give what adds rows to the Parquet file at an address, which gets its name at the end of the block.

    Raises, before the block if there is no such object store, AddressError, BucketNotFoundError, StorageError."""
    storage, name = file_at(address)
    storage.check_bucket()
    with (
        storage.open_output(name) as output,
        pq.ParquetWriter(output, schema, compression="lz4", write_page_checksum=True) as writer,
    ):
        yield lambda table: writer.write_table(table.cast(schema))
