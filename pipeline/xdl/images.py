"""The features of a store as XDL's binary files: data.0 to data.1023, key k in file k modulo 1024.

Letters of shapes: K rows of a block, D feature width.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featurestore.console.files import write_json
from featurestore.keys import Int64Array
from featurestore.snapshot import Snapshot
from pipeline.samples.publish import MARK, FolderContent, replaced_folder
from pipeline.vectors.xdl import NUM_FILES, record_dtype

CONTENT = FolderContent("XDL's files", (MARK, "data.0"))


def export_images(snapshot: Snapshot, target: Path, advance: Callable[[int], None] = lambda rows: None) -> int:
    """Write each live row, as float32, below the folder `target`, which appears as a whole; return their number.

    Shard by shard; in a file the rows are in the order of shards. Equal snapshots give equal files. Raises SampleError
    where the folder holds anything else, or cannot be written; CorruptFileError.
    """
    num_rows = 0
    with replaced_folder(target, CONTENT) as folder:
        for number in range(NUM_FILES):
            (folder / f"data.{number}").touch()  # XDL opens all of them
        for shard in sorted(snapshot.manifest.shards):
            for block in _in_order(snapshot, shard):
                append_records(folder, *block)
                num_rows += len(block[0])
                advance(len(block[0]))
        content = {"store": snapshot.storage.url, "snapshot": snapshot.version, "rows": num_rows}
        write_json(folder / MARK, content | {"dim": snapshot.info.dim})
    return num_rows


def append_records(folder: Path, keys_K: Int64Array, features_KD: npt.NDArray[np.float32]) -> None:
    """Add records to the files of `folder`, each in the order given."""
    records_K = np.empty(len(keys_K), record_dtype(features_KD.shape[1]))
    records_K["key"], records_K["vector"] = keys_K, features_KD
    number_K = keys_K & (NUM_FILES - 1)
    for number in np.unique(number_K):
        with (folder / f"data.{number}").open("ab") as file:
            file.write(records_K[number_K == number].tobytes())


def _in_order(snapshot: Snapshot, shard: int) -> Iterator[tuple[Int64Array, npt.NDArray[np.float32]]]:
    """Read the shard's live rows, by splitmix64; as a whole where deltas put them out of order."""
    reader = snapshot.shard_reader(shard)
    if not reader.is_plain:
        rows = snapshot.read_shard(shard)
        yield rows.keys_N, snapshot.codec.decode(rows.features_ND)
        return
    for block in reader.verified_blocks():
        yield block.keys_K, snapshot.codec.decode(block.features_KD)
