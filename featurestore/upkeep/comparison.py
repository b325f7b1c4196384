"""What differs between the rows of two snapshots, of one store or of two.

Letters of shapes: C rows that both have, K rows whose features are compared, D feature width.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featurestore.format.datafile import KEY, numpy_column
from featurestore.keys import Int64Array
from featurestore.snapshot import Snapshot
from featurestore.storage.threads import Progress

DIGEST = "content_digest"
# Rounding moves a feature by less than a hundredth of its length, also in bfloat16 and on another processor; features
# of two images differ by a quarter and more (their mean cosine is .96 in the fc6 of a seeded VGG16).
SAME_WITHIN = 0.05
_SAMPLED_SHARDS = 16  # keys are dealt to shards by a hash, so rows of a few shards are a fair sample of all


@dataclass(frozen=True, kw_only=True)
class RowChanges:
    """What differs between the rows of two snapshots."""

    num_before: int
    num_now: int
    num_common: int
    num_changed: int
    """Of the common ones: rows with another image (content digest)."""
    num_compared: int
    """Of the common ones with the same image: rows whose features were compared."""
    num_other: int
    """Of these: further apart than SAME_WITHIN, so not of the same image, or not by the same network."""
    mean_difference: float | None
    """Of the features compared, in parts of their length; None where nothing was compared."""

    @property
    def is_same(self) -> bool:
        """Whether nothing is lost, no image is another one, and their features are the same but for rounding."""
        num_lost = self.num_before - self.num_common
        return self.num_compared > 0 and not (num_lost or self.num_changed or self.num_other)


def compare_rows(
    before: Snapshot, now: Snapshot, most: int = 10_000, progress: Progress = lambda done, total: None
) -> RowChanges:
    """Compare keys and content digests of both snapshots, shard by shard, and the features of about `most` rows.

    The two may have different numbers of shards; their features have to be of one kind. Raises CorruptFileError.
    """
    num_groups = min(before.info.num_shards, now.info.num_shards)
    chosen = np.random.default_rng(0).permutation(num_groups)[:_SAMPLED_SHARDS].tolist()
    counts, parts = np.zeros(4, np.int64), [np.empty(0)]
    for group in range(num_groups):
        old_keys, old_digests = _live_rows(before, group, num_groups)
        new_keys, new_digests = _live_rows(now, group, num_groups)
        common_C, at_C, other_C = np.intersect1d(old_keys, new_keys, assume_unique=True, return_indices=True)
        same_C = np.asarray(old_digests[at_C] == new_digests[other_C], np.bool_)
        counts += [len(old_keys), len(new_keys), len(common_C), int((~same_C).sum())]
        if group in chosen:
            parts.append(_differences(before, now, common_C[same_C][: -(-most // len(chosen))]))
        progress(group + 1, num_groups)
    apart_K = np.concatenate(parts)
    return RowChanges(
        num_before=int(counts[0]),
        num_now=int(counts[1]),
        num_common=int(counts[2]),
        num_changed=int(counts[3]),
        num_compared=len(apart_K),
        num_other=int((apart_K > SAME_WITHIN).sum()),
        mean_difference=float(apart_K.mean()) if len(apart_K) else None,
    )


def _live_rows(snapshot: Snapshot, group: int, num_groups: int) -> tuple[Int64Array, npt.NDArray[np.object_]]:
    """Read keys and content digests of one of `num_groups` groups of neighbouring shards."""
    size = snapshot.info.num_shards // num_groups
    readers = [snapshot.shard_reader(shard) for shard in range(group * size, (group + 1) * size)]
    tables = [reader.read([KEY, DIGEST]) for reader in readers if reader.entries]
    digests = [each for table in tables for each in table[DIGEST].to_pylist()]
    keys = [np.empty(0, np.int64), *(numpy_column(table, KEY) for table in tables)]
    return np.concatenate(keys), np.asarray(digests, object)


def _differences(before: Snapshot, now: Snapshot, keys_K: Int64Array) -> npt.NDArray[np.float64]:
    """Measure how far apart both features of each key are, in parts of the longer one's length (K,)."""
    old_KD, new_KD = (each.codec.decode(each.get(keys_K)).astype(np.float64) for each in (before, now))
    longer_K = np.maximum(np.linalg.norm(old_KD, axis=1), np.linalg.norm(new_KD, axis=1))
    apart_K: npt.NDArray[np.float64] = np.linalg.norm(old_KD - new_KD, axis=1) / np.maximum(longer_K, 1e-30)
    return apart_K
