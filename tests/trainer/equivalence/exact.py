"""Tables and their optimisers in plain torch: one id, one row at a time. Part of the reference."""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor
from worlds import Sample

from featurestore.keys import shard_of, splitmix64
from tests.variants import SEED
from trainer.config import OptimConfig
from trainer.ids.exact import ExactShape, first_vectors
from trainer.optim import BETA1, BETA2


class PlainRows:
    """One table, (rows, width), and what its optimiser keeps, by the names that the engine's checkpoints use."""

    def __init__(self, weight: Tensor, optim: OptimConfig) -> None:
        self.weight, self.optim = weight, optim
        like = weight.detach()
        each, one = torch.zeros_like(like), torch.zeros(len(like), dtype=like.dtype)
        none = torch.zeros(len(like), dtype=torch.int32)
        fresh = {
            "adam": {"momentum": each, "variance": each, "last_step": none, "last_weight": like},
            "rowwise_adagrad": {"sum": one},
        }
        self.state = {name: part.clone() for name, part in fresh[optim.ids].items()}
        self.adam = torch.optim.Adam([weight], betas=(BETA1, BETA2), eps=optim.eps)  # torch's own, of the whole table

    def move(self, row: int, to: int) -> None:
        """Puts a row's weights and state at another place."""
        for values in self.everything():
            values[to] = values[row]

    def clear(self, row: int) -> None:
        """The row's weights and state are zero, as those of a row that nothing has touched."""
        for values in self.everything():
            values[row] = 0

    def everything(self) -> list[Tensor]:
        """Weights, what is kept beside them, and the moments of torch's Adam, all by row."""
        of_adam = [value for value in self.adam.state[self.weight].values() if value.shape == self.weight.shape]
        return [self.weight.detach(), *self.state.values(), *of_adam]

    def step(self, touched: list[int], lr: float) -> Tensor:
        """Moves the rows by the gradient in `weight.grad`, and returns that."""
        gradient = self.weight.grad.clone()
        with torch.no_grad():
            if self.optim.ids == "adam":
                self.adam.param_groups[0]["lr"] = lr
                self.adam.step()
            moments = self.adam.state[self.weight]
            for row in touched:
                if self.optim.ids == "adam":
                    self.state["momentum"][row] = moments["exp_avg"][row]
                    self.state["variance"][row] = moments["exp_avg_sq"][row]
                    self.state["last_step"][row] = int(moments["step"])
                    self.state["last_weight"][row] = self.weight[row]
                else:
                    self.state["sum"][row] += (gradient[row] ** 2).mean()
                    self.weight[row] -= lr * gradient[row] / (self.state["sum"][row].sqrt() + self.optim.eps)
        return gradient

    def parts(self) -> dict[str, Tensor]:
        """Weights and state, as a checkpoint has them."""
        return {"weight": self.weight.detach(), **self.state}


class PlainIds:
    """Rows of ids by their place in the whole table, shard by shard; the first row of a shard is the cold one."""

    def __init__(self, shape: ExactShape, std: float) -> None:
        self.shape, self.std = shape, std
        self.place_of: dict[int, int] = {}
        self.times = Counter[int]()
        self.used = [0] * shape.num_shards
        self.last_step: dict[int, int] = {}
        self.last_day: dict[int, int] = {}
        self.num_steps = self.day = self.day_of_halving = self.evicted = self.expired = 0

    def place(self, each: int) -> int:
        """Its own, or that of its shard's cold row."""
        return self.place_of.get(each, self.shard(each) * self.shape.rows_per_shard)

    def shard(self, each: int) -> int:
        """By the hash."""
        return int(shard_of([each], self.shape.num_shards)[0])

    def admit(self, ids: Iterable[int], rows: PlainRows) -> None:
        """A step with these ids: who has come often enough gets the next row, and its first value, as long as its shard
        has room; before, rows longest unused make room in the shards that lack some."""
        ids = sorted(set(ids))
        self.num_steps += 1
        self.times.update(e for e in ids if e not in self.place_of)
        self.last_step |= dict.fromkeys(ids, self.num_steps)
        self.last_day |= dict.fromkeys(ids, self.day)
        new = [e for e in ids if e not in self.place_of and self.times[e] >= self.shape.rules.admit_after]
        if self.shape.rules.when_full == "evict":
            for shard, count in Counter(map(self.shard, new)).items():
                self.make_room(shard, count, rows)
        for each in new:
            shard = self.shard(each)
            if self.used[shard] == self.shape.rows_per_shard - 1:
                continue
            self.used[shard] += 1
            self.place_of[each] = shard * self.shape.rows_per_shard + self.used[shard]
            rows.weight.detach()[self.place_of[each]] = self.first(each).to(rows.weight.dtype)

    def expire_rows(self, day: int, rows: PlainRows) -> None:
        """Rows last used more than `expire_days` before go; as often, counts of ids without a row are halved."""
        self.day, days = day, self.shape.rules.expire_days
        if days is None:
            return
        for shard in range(self.shape.num_shards):
            gone = [each for each in self.place_of if self.shard(each) == shard and self.last_day[each] < day - days]
            self.expired += len(gone)
            self.let_go(shard, gone, rows)
        if day - self.day_of_halving >= days:
            self.day_of_halving, self.times = day, Counter({each: n // 2 for each, n in self.times.items()})

    def make_room(self, shard: int, count: int, rows: PlainRows) -> None:
        """For so many: at least a sixteenth of the rows goes at once, none that this step uses."""
        room = self.shape.rows_per_shard - 1
        lacking = self.used[shard] + count - room
        if lacking <= 0:
            return
        mine = [each for each in self.place_of if self.shard(each) == shard]
        unused = sorted((self.last_step[each], each) for each in mine if self.last_step[each] < self.num_steps)
        gone = [each for _, each in unused[: max(lacking, -(-room // 16))]]
        self.evicted += len(gone)
        self.let_go(shard, gone, rows)

    def let_go(self, shard: int, gone: list[int], rows: PlainRows) -> None:
        """These ids of a shard have no row any more; the last rows take the places of those that go."""
        holes = sorted(self.place_of.pop(each) for each in gone)
        self.used[shard] -= len(gone)
        end = shard * self.shape.rows_per_shard + self.used[shard]
        moving = sorted((place, each) for each, place in self.place_of.items() if self.shard(each) == shard)
        for hole, (place, each) in zip(holes, [(p, e) for p, e in moving if p > end], strict=False):
            rows.move(place, hole)
            self.place_of[each] = hole
        for place in range(end + 1, (shard + 1) * self.shape.rows_per_shard):
            rows.clear(place)

    def first(self, each: int) -> Tensor:
        """The values that its row begins with."""
        return torch.from_numpy(first_vectors(self.shape, splitmix64([each]), SEED, self.std)[0])

    def first_rows(self) -> Tensor:
        """Of the whole table; rows of no id, and cold ones, are zeros."""
        rows = torch.zeros(self.shape.size, self.shape.width, dtype=torch.float64)
        for each, place in self.place_of.items():
            rows[place] = self.first(each)
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
