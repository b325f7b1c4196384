"""A residual quantiser for vectors of one kind: standardised, then codes level by level; kept in one safetensors file.

Letters of shapes: N rows, D feature width, L levels, C codes of each.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors import numpy as tensors

from featurestore.errors import StorageError
from featurestore.format.codec import file_metadata
from featurestore.identity import SnapshotId
from featurestore.index import encode_residual, train_residual_quantizer
from featurestore.storage.storage import Storage
from featurestore.text import one_line, parse_json
from pipeline.errors import SampleError

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Codebook:
    """A residual quantiser: `source` says of what it was trained; `digest` is the sha256 of its file."""

    codebooks_LCD: Float32Array
    mean_D: Float32Array
    std_D: Float32Array
    source: dict[str, Any]

    @property
    def num_levels(self) -> int:
        return int(self.codebooks_LCD.shape[0])

    @property
    def num_codes(self) -> int:
        return int(self.codebooks_LCD.shape[1])

    @property
    def dim(self) -> int:
        return int(self.codebooks_LCD.shape[2])

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Write the file's content; equal codebooks give equal bytes."""
        arrays = {"codebooks": self.codebooks_LCD, "mean": self.mean_D, "std": self.std_D}
        return bytes(tensors.save(arrays, {"source": json.dumps(self.source, sort_keys=True)}))

    @classmethod
    def from_bytes(cls, data: bytes, place: str) -> "Codebook":
        """Read what `to_bytes` wrote. Raises SampleError, which names the place."""
        try:
            arrays = tensors.load(data)
            source = parse_json(file_metadata(data)["source"])
            return cls(arrays["codebooks"], arrays["mean"], arrays["std"], source)
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise SampleError(f"{place} is no codebook of this job: {error}") from error

    def standardize(self, vectors_ND: Float32Array) -> Float32Array:
        """Move vectors to the space in which codes are nearest neighbours."""
        return ((vectors_ND - self.mean_D) / self.std_D).astype(np.float32, copy=False)

    def encode(
        self, vectors_ND: Float32Array
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Compute codes (N, L), squared lengths of the standardised vectors (N,), what each level leaves (N, L)."""
        rows_ND = self.standardize(vectors_ND)
        length_N = np.einsum("nd,nd->n", rows_ND, rows_ND, dtype=np.float64)
        codes_NL, left_NL = encode_residual(self.codebooks_LCD, rows_ND)
        return codes_NL, length_N, left_NL


def fit(
    sample_ND: Float32Array,
    num_levels: int,
    num_codes: int,
    seed: int,
    source: dict[str, Any],
    standardize: bool = True,
) -> Codebook:
    """Train on a sample.

    Every dimension counts alike after `standardize`: features of a ReLU are close to their mean, and a few large
    dimensions would take all codes. Raises SampleError where there are fewer rows than codes."""
    if len(sample_ND) < num_codes:
        raise SampleError(
            f"{len(sample_ND):,} vectors are too few for {num_codes} codes a level; give more, or fewer --codes"
        )
    mean_D, std_D = np.zeros(sample_ND.shape[1], np.float32), np.ones(sample_ND.shape[1], np.float32)
    if standardize:
        mean_D = sample_ND.mean(axis=0, dtype=np.float64).astype(np.float32)
        std_D = sample_ND.std(axis=0, dtype=np.float64).astype(np.float32)
        std_D[std_D == 0] = 1
    codebooks_LCD = train_residual_quantizer((sample_ND - mean_D) / std_D, num_levels, num_codes, seed)
    return Codebook(codebooks_LCD, mean_D, std_D, source)


def check_source(fitted: dict[str, Any], found: dict[str, Any], path: str, accept_store: bool) -> None:
    """Refuse vectors among which the codes of a codebook do not mean what they meant where it was fitted.

    `fitted` and `found`: what the vectors of then and of now say of themselves. Features have to be of one network,
    exported vectors of one checkpoint, and both of one store, unless `accept_store`: another one of the same network,
    computed anew, say. Raises SampleError, AnotherStoreError.
    """
    then, now = ({**each, **each.get("of", {})} for each in (fitted, found))
    for name in ("extractor", "checkpoint_digest", "network"):
        if name in then and name in now and then[name] != now[name]:
            shown = "checkpoint" if name == "checkpoint_digest" else name
            raise SampleError(
                f"{path} was fitted to vectors of another {shown}: {then.get(shown)}, these are of {now.get(shown)}; "
                "fit a new one, without --codebook"
            )
    try:
        recorded, mine = SnapshotId.from_named(then), SnapshotId.from_named(now)
    except ValueError as error:
        raise SampleError(f"{path}, or the vectors, name a snapshot that no store has: {one_line(error)}") from error
    if recorded and mine and not accept_store:
        recorded.check(
            mine,
            f"the codebook {path}",
            "fit a new one, without --codebook, or, where it holds the same images computed anew, add --accept-store",
        )


def load(address: str | os.PathLike[str]) -> Codebook:
    """Load the codebook of an earlier run, from a file or an address. Raises SampleError."""
    address = os.fspath(address)
    folder, slash, name = address.rpartition("/")
    try:
        data = Storage(folder or slash or ".").read_bytes(name)
    except (OSError, StorageError) as error:
        raise SampleError(f"{address} is no codebook of this job: {error}") from error
    return Codebook.from_bytes(data, address)
