"""Who has which row in an exact ID table: one id at a time, by dictionaries. Part of the reference."""

from collections import Counter
from collections.abc import Iterable

import torch
from scenarios import SEED
from torch import Tensor
from worlds import Sample

from featurestore.keys import shard_of, splitmix64
from trainer.ids.exact import ExactShape, first_vectors


class PlainIds:
    """Rows of ids by their place in the whole table, shard by shard; the first row of a shard is the cold one."""

    def __init__(self, shape: ExactShape, std: float) -> None:
        self.shape, self.std = shape, std
        self.place_of: dict[int, int] = {}
        self.times = Counter[int]()
        self.used = [0] * shape.num_shards

    def place(self, each: int) -> int:
        """Its own, or that of its shard's cold row."""
        return self.place_of.get(each, self.shard(each) * self.shape.rows_per_shard)

    def shard(self, each: int) -> int:
        """By the hash."""
        return int(shard_of([each], self.shape.num_shards)[0])

    def admit(self, ids: Iterable[int], weight: Tensor) -> None:
        """A step with these ids: who has come often enough gets the next row, and its first value."""
        for each in sorted(set(ids)):
            shard = self.shard(each)
            self.times[each] += 1
            is_full = self.used[shard] == self.shape.rows_per_shard - 1
            if each in self.place_of or self.times[each] < self.shape.rules.admit_after or is_full:
                continue
            self.used[shard] += 1
            self.place_of[each] = shard * self.shape.rows_per_shard + self.used[shard]
            weight.detach()[self.place_of[each]] = self.first(each, 0).to(weight.dtype)

    def first(self, each: int, epoch: int) -> Tensor:
        """The values that its row begins with."""
        return torch.from_numpy(first_vectors(self.shape, splitmix64([each]), SEED, self.std, epoch)[0])

    def first_rows(self, epoch: int) -> Tensor:
        """Of the whole table; rows of no id, and cold ones, are zeros."""
        rows = torch.zeros(self.shape.size, self.shape.width, dtype=torch.float64)
        for each, place in self.place_of.items():
            rows[place] = self.first(each, epoch)
        return rows

    def in_use(self, values: Tensor) -> list[Tensor]:
        """Of each shard the rows that a checkpoint has."""
        shards = values.split(self.shape.rows_per_shard)
        return [rows[: 1 + used] for rows, used in zip(shards, self.used, strict=True)]

    def ids(self) -> list[Tensor]:
        """Of each shard, in the order of its rows."""
        found: list[list[int]] = [[] for _ in self.used]
        for each in sorted(self.place_of, key=self.place_of.__getitem__):
            found[self.shard(each)].append(each)
        return [torch.tensor(ids, dtype=torch.int64) for ids in found]


def ids_in(samples: list[Sample], table: str) -> set[int]:
    """All that a step looks up in a table."""
    found = {
        "user": [{s.user} for s in samples],
        "item": [{*s.behavior_item, s.ad_item} for s in samples],
        "image": [{*s.behavior_image, s.ad_image} for s in samples],
    }
    return set().union(*found[table])
