"""The visual vectors that a run's trained E makes of all images of a snapshot, into one file, some blocks at a time.

Neither samples, ID vectors nor a partition of the store are opened: shards are read once, one after the other, in the
memory of the largest data file. Letters of shapes: K rows of a block, D feature width, V visual width.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from featurestore.format.datafile import KEY, URI
from featurestore.identity import VECTORS_OF, SnapshotId
from featurestore.keys import Int64Array
from featurestore.lookup.embedding import EmbeddingModel, as_tensor
from featurestore.snapshot import Snapshot
from featurestore.storage.storage import Storage
from trainer.comm import SoloComm
from trainer.engine.machine import share_machine
from trainer.engine.wiring import image_model, networks_of
from trainer.errors import ConfigError, DataError
from trainer.models.fields import used_fields
from trainer.optim import check_names
from trainer.runs.checkpoint import read_dense
from trainer.runs.saved import SavedRun, finite, read_run
from trainer.runs.stores import store_places

VECTOR = "vector"
# Also rows of a row group. E takes .3 to .6 of the time an image that it takes in the store's blocks of 256.
_BATCH_ROWS = 4096

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImageNetwork:
    """One E of a run, and the images that it is to look at."""

    saved: SavedRun
    store: str
    name: str
    model: EmbeddingModel
    snapshot: Snapshot

    @property
    def num_images(self) -> int:
        """Live rows of the snapshot."""
        return self.snapshot.num_rows

    def describe(self) -> dict[str, Any]:
        """What its vectors are of."""
        return {
            **self.saved.named(),
            "network": f"{self.store}:{self.name}",
            "dim": self.model.out,
            **SnapshotId.of(self.snapshot).named(),
        }

    def tables(self) -> Iterator[pa.Table]:
        """Key, uri and visual vector of all images, some thousands at a time. Raises TrainerError for a number that is
        not finite."""
        waiting: list[_Rows] = []
        for rows in self._rows():
            waiting.append(rows)
            if sum(len(each.keys_K) for each in waiting) >= _BATCH_ROWS:
                yield self._table(waiting)
                waiting = []
        if waiting:
            yield self._table(waiting)

    def _rows(self) -> "Iterator[_Rows]":
        for shard in sorted(self.snapshot.manifest.shards):
            reader = self.snapshot.shard_reader(shard)
            uris = reader.read([URI])[URI]
            for block in reader.verified_blocks():
                yield _Rows(block.keys_K, uris.take(block.place_K).to_pylist(), block.features_KD.copy())

    def _table(self, parts: "list[_Rows]") -> pa.Table:
        features_KD = as_tensor(np.concatenate([part.features_KD for part in parts]))
        with torch.inference_mode():
            visual_KV = finite(self.model(features_KD.to(self.model.mean_D.device)).float().cpu().numpy())
        vectors: Any = pa.FixedSizeListArray.from_arrays(pa.array(visual_KV.reshape(-1)), self.model.out)
        columns: list[Any] = [
            pa.array(np.concatenate([part.keys_K for part in parts])),
            pa.array([uri for part in parts for uri in part.uris], pa.string()),
            vectors,
        ]
        return pa.Table.from_arrays(columns, [KEY, URI, VECTOR])


class _Rows(NamedTuple):
    """Images as the store has them; features in its dtype, (K, D)."""

    keys_K: Int64Array
    uris: list[Any]
    features_KD: NDArray[Any]


def open_network(
    folder: Path, *, which: str | None = None, network: str | None = None, store_version: int | None = None
) -> ImageNetwork:
    """An E of the run in `folder`, as the checkpoint `which` has it (see `find_checkpoint`), and a snapshot: the newest
    one by default, whichever the run was trained on.

    `network`: which E, where there are several; STORE:NAME, or as much of it as tells. Raises ConfigError,
    CheckpointError, SchemaError, DataError, FeatureStoreError.
    """
    saved = read_run(folder, which)
    config, schema = saved.config, saved.checked_schema()
    widths_of_store = networks_of(used_fields(schema, config.model), config.model)
    store, name = _chosen(
        folder, [(store, name) for store, names in widths_of_store.items() for name in names], network
    )
    place = next(place for place in store_places(config, schema) if place.name == store)
    snapshot = saved.snapshot(place, store_version)
    if snapshot.num_rows == 0:
        raise DataError(f"{place.url} has no features in snapshot {snapshot.version}; add them with: {place.make_it()}")
    model = image_model(snapshot.info.dim, widths_of_store[store][name], config.model)
    mine, prefix = model.state_dict(), f"stores.{store}.models.{name}."
    found = read_dense(saved.path, saved.state, [prefix + each for each in mine])
    found = {each.removeprefix(prefix): tensor for each, tensor in found.items()}
    check_names(mine, found)
    model.load_state_dict(found)
    return ImageNetwork(saved, store, name, model.to(share_machine(config, SoloComm())), snapshot)


def export(network: ImageNetwork, out: str, progress: Progress = lambda done, total: None) -> str | None:
    """Writes all vectors to `out`, NAME.parquet or NAME.npy; returns where the keys of a .npy are: NAME.keys.npy.

    `progress` is told images done and all of them. A file gets its name when it is whole; what was there stays until
    then. On an object store each is put in one piece, out of memory. Raises TrainerError, FeatureStoreError.
    """
    folder, slash, name = out.rpartition("/")
    storage = Storage(folder or slash or ".")
    tables = _told(network.tables(), progress, network.num_images)
    if not name.endswith(".npy"):
        _write_parquet(storage, name, network, tables)
        return None
    keys_name = f"{name.removesuffix('.npy')}.keys.npy"
    _write_npy(storage, name, keys_name, network, tables)
    return f"{folder}{slash}{keys_name}"


def _write_parquet(storage: Storage, name: str, network: ImageNetwork, tables: Iterator[pa.Table]) -> None:
    schema = _schema(network)
    with (
        storage.open_output(name) as output,
        pq.ParquetWriter(output, schema, compression="lz4", write_page_checksum=True) as writer,
    ):
        for table in tables:
            writer.write_table(table.cast(schema))


def _write_npy(storage: Storage, name: str, keys_name: str, network: ImageNetwork, tables: Iterator[pa.Table]) -> None:
    """The matrix is there with its own keys, or not at all: an older one goes before other keys come."""
    rows, width = network.num_images, network.model.out
    with storage.open_output(name) as matrix, storage.open_output(keys_name) as keys:
        for file, dtype, shape in ((matrix, "<f4", (rows, width)), (keys, "<i8", (rows,))):
            header = {"descr": dtype, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        for table in tables:
            numbers: Any = table[VECTOR].combine_chunks()
            matrix.write(numbers.flatten().to_numpy().astype("<f4").tobytes())
            keys.write(table[KEY].to_numpy().astype("<i8").tobytes())
        storage.delete(name)
        storage.write_bytes(f"{name}.json", (json.dumps(network.describe(), indent=1) + "\n").encode())


def _schema(network: ImageNetwork) -> pa.Schema:
    fields: list[Any] = [
        pa.field(KEY, pa.int64(), nullable=False),
        pa.field(URI, pa.string(), nullable=False),
        pa.field(VECTOR, pa.list_(pa.float32(), network.model.out), nullable=False),
    ]
    return pa.schema(fields, metadata={VECTORS_OF: json.dumps(network.describe())})


def _told(tables: Iterator[pa.Table], progress: Progress, total: int) -> Iterator[pa.Table]:
    done = 0
    for table in tables:
        yield table
        done += len(table)
        progress(done, total)


def _chosen(folder: Path, networks: list[tuple[str, str]], asked: str | None) -> tuple[str, str]:
    """The store and name of the E that is asked for."""
    if not networks:
        raise ConfigError(f"{folder} has model.images=none: it has no E for images; name another run by --run")
    found = [each for each in networks if asked in (None, ":".join(each), *each)]
    if len(found) == 1:
        return found[0]
    has = f"{folder} has the networks {', '.join(':'.join(each) for each in networks)}"
    if asked is None:
        raise ConfigError(f"{has}; choose one by --network")
    raise ConfigError(f"{has}, and --network {asked} names {len(found)} of them")
