"""How many different keys there are: drawn batches beside the readers."""

from typing import Any

import numpy as np
import pytest

from featurestore.keys import owner_of, shard_of
from trainer.config import load_config
from trainer.errors import ConfigError
from trainer.plan.calibrate import DrawnSamples, sample
from trainer.runs.open import train_reader
from trainer.samples.reader import Batch, Jagged, SampleReader

Places = Any


def batch_of(groups: int, seed: int) -> Batch:
    """Groups of one to four samples with up to five behaviours; one key for each ad."""
    draw = np.random.default_rng(seed)
    samples_G, lengths_G = draw.integers(1, 5, groups), draw.integers(0, 6, groups)
    group_B = np.repeat(np.arange(groups), samples_G)
    keys = np.random.default_rng(9).integers(-(2**62), 2**62, 300)
    one_B = np.ones(len(group_B), np.int32)
    fields = {
        "seen": Jagged(draw.choice(keys, int(lengths_G.sum())), lengths_G.astype(np.int32)),
        "ad": Jagged(draw.choice(keys, len(group_B)), one_B),
    }
    zeros_B = np.zeros(len(group_B), np.float32)
    return Batch(fields, {}, group_B, zeros_B, group_B, len(group_B))


def values_by_hand(batch: Batch, samples: range) -> list[int]:
    """Keys of these samples: the ads', and the behaviours of every group that has one of them."""
    starts_G = np.r_[0, np.cumsum(batch.fields["seen"].lengths_M)]
    groups = sorted({int(batch.group_of_sample_B[b]) for b in samples})
    seen = [int(v) for g in groups for v in batch.fields["seen"].values_N[starts_G[g] : starts_G[g + 1]]]
    return seen + [int(batch.fields["ad"].values_N[b]) for b in samples]


class TestDraws:
    def test_keys_of_a_rank_and_of_owners(self) -> None:
        batch, shards, ranks = batch_of(60, seed=3), 16, 3
        drawn = DrawnSamples(batch, (("seen", "ad"),), frozenset({"seen"}), shards)
        size = batch.num_samples
        found = drawn.keys(size, ranks)
        asked = []
        for rank in range(ranks):
            keys_U = np.unique(values_by_hand(batch, range(size * rank // ranks, size * (rank + 1) // ranks)))
            asked.append(len(keys_U))
        whole_U = np.unique(values_by_hand(batch, range(size)))
        owned = np.bincount(owner_of(shard_of(whole_U, shards), ranks), minlength=ranks)
        assert (found.asked, found.unique, found.owned) == (np.mean(asked), len(whole_U), owned.max())

    def test_sources_do_not_share_keys(self) -> None:
        batch = batch_of(60, seed=3)
        both = DrawnSamples(batch, (("seen",), ("ad",)), frozenset({"seen"}), 16)
        alone = [DrawnSamples(batch, ((name,),), frozenset({"seen"}), 16) for name in ("seen", "ad")]
        size = batch.num_samples
        expected = sum(each.keys(size, 2).unique for each in alone)
        assert both.keys(size, 2).unique == expected

    def test_counts_of_drawn_batches_are_those_of_the_readers(self, places: Places) -> None:
        """What the plan counts for two ranks is what two readers hand to two ranks, images and ids."""
        config = load_config(settings=places.settings())
        sampled = sample(config, 64)
        assert sampled.images.num_samples == sampled.index.num_samples
        found, asked, whole = sampled.images.keys(64, 2), [], []
        for rank in range(2):
            options: dict[str, Any] = {"rank": rank, "num_ranks": 2, "window": 75}
            reader = SampleReader(sampled.index, sampled.schema, batch_size=64, seed=0, **options)
            fields = [batch.fields for batch in reader.batches()]
            parts = [np.r_[each["behavior_image"].values_N, each["ad_image"].values_N] for each in fields]
            asked.append([len(np.unique(keys_N)) for keys_N in parts[:-1]])
            whole.append(parts[:-1])
        unique = [len(np.unique(np.r_[a, b])) for a, b in zip(*whole, strict=True)]
        assert found.asked == pytest.approx(np.mean(asked), rel=0.05)
        assert found.unique == pytest.approx(np.mean(unique), rel=0.05)
        assert sampled.ids.keys(64, 2).unique > found.unique

    @pytest.mark.parametrize(("size", "ranks", "streams"), [(64, 2, 1), (64, 2, 4), (300, 4, 8)])
    def test_decoded_samples_are_those_of_the_reader(self, size: int, ranks: int, streams: int, places: Places) -> None:
        """Of the rank that decodes most, over an epoch."""
        settings = places.settings(data__shuffle_streams=streams)
        sampled = sample(load_config(settings=settings), size)
        config = sampled.config.changed(data={"global_batch_size": size})
        decoded = []
        for rank in range(ranks):
            reader = train_reader(config, sampled.index, sampled.schema, rank, ranks)
            steps = len(list(reader.batches()))
            decoded.append(reader.num_decoded / steps)
        mean_size = sampled.index.num_samples / steps  # the last batch is smaller
        assert max(decoded) == pytest.approx(sampled.counts(size, ranks).decoded * mean_size / size, rel=0.15)
        assert (max(decoded) > 0.9 * mean_size) == (streams == 1)

    def test_a_batch_above_all_samples_is_refused(self, places: Places) -> None:
        config = load_config(settings=places.settings())
        with pytest.raises(
            ConfigError, match=r"of 100,000 samples is larger than all .* give --global-batch-size of at"
        ):
            sample(config, 100_000)
