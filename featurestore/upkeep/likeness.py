"""Likeness of two snapshots, of one store or two: which images both have, and whether with the same features.

Letters of shapes: C rows that both have, K rows whose features are compared, D feature width.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featurestore.errors import SpecMismatchError
from featurestore.format.datafile import KEY, numpy_column
from featurestore.keys import Int64Array
from featurestore.snapshot import Snapshot
from featurestore.storage.threads import Progress

DIGEST = "content_digest"
# Rounding moves a feature by less than a hundredth of its length, also in bfloat16 and on another processor; features
# of two images differ by a quarter and more (their mean cosine is .96 in the fc6 of a seeded VGG16).
SAME_WITHIN = 0.05
_SAMPLED_SHARDS = 16  # keys are dealt to shards by a hash, so rows of a few shards are a fair sample of all

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How alike the rows of two snapshots are.

    `num_changed`: of the common rows, those with another image (content digest). Of the other common ones `num_sampled`
    had their features compared: differences are in parts of a feature's length; None where nothing was compared."""

    num_old: int
    num_new: int
    num_common: int
    num_changed: int
    num_sampled: int
    num_equal: int
    """To the bit."""
    num_other: int
    """Further apart than SAME_WITHIN: not the same image, or not the same network."""
    mean_cosine: float | None
    largest_difference: float | None

    @property
    def num_gained(self) -> int:
        return self.num_new - self.num_common

    @property
    def num_lost(self) -> int:
        return self.num_old - self.num_common


def compare(
    old: Snapshot, new: Snapshot, sample_rows: int, seed: int = 0, progress: Progress | None = None
) -> Likeness:
    """Compare keys and content digests of both snapshots, shard by shard, and the features of about `sample_rows` rows.

    The two may have different numbers of shards. Raises SpecMismatchError where their features are of different kinds,
    CorruptFileError.
    """
    kinds = [each.info.model_copy(update={"num_shards": 1, "name": "", "codec": None}).digest for each in (old, new)]
    if kinds[0] != kinds[1]:
        raise SpecMismatchError(
            f"{old.storage.url} and {new.storage.url} have features of different kinds: nothing to compare"
        )
    num_groups = min(old.info.num_shards, new.info.num_shards)
    chosen = np.random.default_rng(seed).permutation(num_groups)[:_SAMPLED_SHARDS].tolist()
    counts, features = np.zeros(4, np.int64), [np.empty((0, old.info.dim), np.float32)] * 2
    equal = 0
    for group in range(num_groups):
        old_keys, old_digests = _live_rows(old, group, num_groups)
        new_keys, new_digests = _live_rows(new, group, num_groups)
        common_C, at_C, other_C = np.intersect1d(old_keys, new_keys, assume_unique=True, return_indices=True)
        same_C = np.asarray(old_digests[at_C] == new_digests[other_C], np.bool_)
        counts += [len(old_keys), len(new_keys), len(common_C), int((~same_C).sum())]
        if group in chosen:
            keys_K = old_keys[np.sort(at_C[same_C])][: -(-sample_rows // len(chosen))]
            stored = [each.get(keys_K) for each in (old, new)]
            equal += int((stored[0] == stored[1]).all(axis=1).sum())
            decoded = [each.codec.decode(rows) for each, rows in zip((old, new), stored, strict=True)]
            features = [np.concatenate(pair) for pair in zip(features, decoded, strict=True)]
        if progress is not None:
            progress(group + 1, num_groups)
    num_other, mean_cosine, largest = _differences(*features)
    return Likeness(
        num_old=int(counts[0]),
        num_new=int(counts[1]),
        num_common=int(counts[2]),
        num_changed=int(counts[3]),
        num_sampled=len(features[0]),
        num_equal=equal,
        num_other=num_other,
        mean_cosine=mean_cosine,
        largest_difference=largest,
    )


def _live_rows(snapshot: Snapshot, group: int, num_groups: int) -> tuple[Int64Array, npt.NDArray[np.object_]]:
    """Read keys and content digests of one of `num_groups` groups of neighbouring shards."""
    size = snapshot.info.num_shards // num_groups
    readers = [snapshot.shard_reader(shard) for shard in range(group * size, (group + 1) * size)]
    tables = [reader.read([KEY, DIGEST]) for reader in readers if reader.entries]
    digests = [each for table in tables for each in table[DIGEST].to_pylist()]
    keys = [np.empty(0, np.int64), *(numpy_column(table, KEY) for table in tables)]
    return np.concatenate(keys), np.asarray(digests, object)


def _differences(old_KD: Float32Array, new_KD: Float32Array) -> tuple[int, float | None, float | None]:
    """Count rows that are not the same; return that, mean cosine, and the largest difference.

    The difference is in parts of the longer one's length."""
    if not len(old_KD):
        return 0, None, None
    length_K, other_K = (np.linalg.norm(each.astype(np.float64), axis=1) for each in (old_KD, new_KD))
    longer_K = np.maximum(np.maximum(length_K, other_K), 1e-30)
    apart_K = np.linalg.norm(old_KD.astype(np.float64) - new_KD, axis=1) / longer_K
    dot_K = np.einsum("kd,kd->k", old_KD, new_KD, dtype=np.float64)
    cosine_K = np.where(apart_K == 0, 1.0, dot_K / np.maximum(length_K * other_K, 1e-30))
    return int((apart_K > SAME_WITHIN).sum()), float(cosine_K.mean()), float(apart_K.max())
