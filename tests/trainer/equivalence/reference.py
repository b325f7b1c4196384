"""One process without exchange, shards or unique keys: every occurrence by itself, sample by sample, in plain torch.

    python reference.py INITIAL OUT

writes for each variant the losses, the first step's gradients and what is trained after the last step, by the names
that the engine uses. It shares nothing with the engine but what worker.py run alone wrote to INITIAL (initial values,
and the rows of a compact store), the place of an id's row, and the numbers that dropout draws.
"""

import functools
import math
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exact import PlainIds, PlainRows, ids_in
from forward import filled, logit
from packing import packed, unpacked
from torch import Tensor
from torch.nn import functional
from worlds import Sample, features, steps, texts

from tests.variants import SEED, TEXT_WIDTH, VARIANTS, Variant
from trainer.engine.wiring import shape_of
from trainer.ids.exact import ExactShape
from trainer.ids.shards import TableShape, initial_rows
from trainer.models.layers import random_words
from trainer.models.newads import dropped

BETA1, BETA2, EPS = 0.9, 0.999, 1e-6


class Reference:
    """Tensors by name and their optimisers; forward.py is the forward pass."""

    def __init__(self, variant: Variant, dtype: str, known: dict[str, Any]) -> None:
        self.variant, self.config = variant, variant.config(dtype)
        self.dtype = getattr(torch, dtype)
        id_width = 1 if self.config.base == "lr" else self.config.id_width
        self.shapes = {
            name: shape_of(name, id_width, table, self.config.table_shards)
            for name, table in self.config.tables.items()
        }
        if variant.numbers:
            rows = {"behavior_age": 33, "ad_price_bucket": 5}
            shards = self.config.table_shards
            self.shapes |= {name: TableShape(name, id_width, count, shards, True) for name, count in rows.items()}
        std = self.config.id_init_std
        self.exact = {name: PlainIds(s, std) for name, s in self.shapes.items() if isinstance(s, ExactShape)}
        self.dense = {name: value.clone().requires_grad_() for name, value in known["initial"].items()}
        self.adam = torch.optim.Adam(self.dense.values(), betas=(BETA1, BETA2), eps=EPS)
        self.tables = {name: self.first_rows(name).requires_grad_() for name in self.shapes}
        self.rows = {name: PlainRows(table, variant.optim) for name, table in self.tables.items()}
        self.mean_and_std = {
            store: [values.to(self.dtype) for values in both] for store, both in known["mean_and_std"].items()
        }
        images = known["decoded"] or {key: torch.from_numpy(value) for key, value in features().items()}
        all_texts = {key: torch.from_numpy(value) for key, value in texts().items()}
        self.feature_of = {
            name: {key: value.to(self.dtype) for key, value in values.items()}
            for name, values in {"images": images, "texts": all_texts}.items()
        }
        self.learned = mean_and_std(variant) if variant.numbers else {}
        self.places: dict[tuple[str, int], int] = {}
        self.touched: dict[str, dict[int, Tensor]] = {}
        self.running: dict[str, Tensor] = {}
        if self.config.image_dropout:
            self.running["model.new_ads.counts"] = torch.ones((), dtype=self.dtype)  # only evaluations decide on it
        self.number = self.place = 0

    def first_rows(self, table: str) -> Tensor:
        """The values that a table's rows begin with."""
        if table in self.exact:
            return self.exact[table].first_rows().to(self.dtype)
        shape, std = self.shapes[table], self.config.id_init_std
        shards = [initial_rows(shape, shard, SEED, std) for shard in range(shape.num_shards)]
        return torch.from_numpy(np.concatenate(shards)).to(self.dtype)

    def id_vector(self, table: str, value: int) -> Tensor:
        """The row of one id, taken out of its table once a step: each time makes a gradient of the whole table."""
        place, rows = self.place_of(table, value), self.touched.setdefault(table, {})
        if place not in rows:
            rows[place] = self.tables[table][place]
        return rows[place]

    def place_of(self, table: str, value: int) -> int:
        """The place of an id's row in the whole table."""
        if table in self.exact:
            return self.exact[table].place(value)
        if (table, value) not in self.places:
            shard, row = self.shapes[table].place_of(np.array([value]))
            self.places[table, value] = int(shard[0]) * self.shapes[table].rows_per_shard + int(row[0])
        return self.places[table, value]

    def pooled(self, table: str, values: tuple[int, ...], weights: tuple[float, ...] = ()) -> Tensor:
        """Mean or sum of the rows of a list of ids, each times its weight; a mean is over the absolute weights."""
        total = torch.zeros(self.shapes[table].width, dtype=self.dtype)
        weights = weights or (1,) * len(values)
        for value, weight in zip(values, weights, strict=True):
            total = total + weight * self.id_vector(table, value)
        return total / (sum(abs(w) for w in weights) or 1) if self.config.multi_hot == "mean" else total

    def items(self, s: Sample) -> Tensor:
        """Mean or sum of the rows of the behaviours' items."""
        return self.pooled("item", s.behavior_item, s.item_weight if self.variant.weighted else ())

    def age_bucket(self, seconds: float) -> int:
        """How often 1 can be doubled to get to the age, and one more; 0 below one second."""
        count = 0
        while seconds >= 2**count and count < 31:
            count += 1
        return count

    def visual(self, key: int, field: str, store_name: str) -> Tensor:
        """E on the feature of one image or text."""
        store = f"stores.{store_name}"
        feature_of = self.feature_of[store_name]
        if key not in feature_of:
            if self.variant.missing == "learned":
                return self.dense[f"{store}.no_image"]
            return torch.zeros(self.width_of_content(field), dtype=self.dtype)
        hidden = feature_of[key]
        if self.variant.standardized:
            mean, std = self.mean_and_std[store_name]
            if self.variant.compact:
                std = (sum(each**2 for each in std) / len(std)) ** 0.5
            hidden = (hidden - mean) / std
        for layer in range(3):
            at = f"{store}.model"
            weight, bias = self.dense[f"{at}.layers.{layer}.weight"], self.dense[f"{at}.layers.{layer}.bias"]
            hidden = weight @ hidden + bias
            if layer < 2:
                hidden = self.prelu(hidden, f"{at}.activations.{layer}.weight")
        return hidden

    def prelu(self, x: Tensor, name: str) -> Tensor:
        """x where positive, slope x elsewhere."""
        return torch.where(x > 0, x, self.dense[name] * x)

    def activation(self, x: Tensor, name: str) -> Tensor:
        """Of a hidden layer of a net on the worker."""
        match self.config.activation:
            case "relu":
                return torch.where(x > 0, x, 0 * x)
            case "prelu":
                return self.prelu(x, f"{name}.weight")

    def dropout(self, x: Tensor, layer: int) -> Tensor:
        """A quarter of a word of 64 bits a unit, lowest bits first."""
        rate, words = self.config.dropout, -(-len(x) // 4)
        if rate == 0:
            return x
        drawn = random_words(f"{SEED}/dropout/{layer}/{self.number}", self.place * words + np.arange(words))
        units = [int(drawn[unit // 4]) >> 16 * (unit % 4) & 0xFFFF for unit in range(len(x))]
        below = round(rate * 65536)
        return x * torch.tensor([1 / (1 - below / 65536) if u >= below else 0.0 for u in units], dtype=x.dtype)

    def logits(self, samples: list[Sample], number: int) -> list[Tensor]:
        """The logit of each sample of step `number`."""
        places_B = np.arange(len(samples))
        new_ad_B = dropped(SEED, number, places_B, self.config.id_dropout)
        self.dropped_pictures_B = dropped(SEED, number, places_B, self.config.image_dropout, "image_dropout")
        self.number, result = number, []
        for self.place, (sample, new_ad) in enumerate(zip(samples, new_ad_B, strict=True)):
            result.append(logit(self, sample, new_ad))
        return result

    def width_of_content(self, field: str) -> int:
        """Width of the visual vectors of a content field."""
        return TEXT_WIDTH if field.endswith("text") else self.config.visual_width

    def step(self, samples: list[Sample], number: int) -> tuple[float, dict[str, Tensor]]:
        """Mean loss, and the gradients; moves every parameter."""
        self.touched = {}
        for name, exact in self.exact.items():
            if self.variant.steps_of_day and number % self.variant.steps_of_day == 0:
                exact.expire_rows(number // self.variant.steps_of_day, self.rows[name])
            exact.admit(ids_in(samples, name), self.rows[name])
        for value in [*self.dense.values(), *self.tables.values()]:
            value.grad = torch.zeros_like(value)
        label = torch.tensor([s.label for s in samples], dtype=self.dtype)
        loss = functional.binary_cross_entropy_with_logits(torch.stack(self.logits(samples, number)), label)
        loss.backward()
        gradients = {name: value.grad.clone() for name, value in self.dense.items()}
        optim = self.variant.optim
        share = optim.lr_gamma ** (number // optim.lr_every) * min(1, (number + 1) / max(1, optim.warmup_steps))
        for table, rows in self.rows.items():
            gradients[table] = rows.step(sorted(self.touched.get(table, ())), optim.alpha * share)
            if table in self.exact:
                gradients[table] = torch.cat(self.exact[table].in_use(gradients[table]))
        for group in self.adam.param_groups:
            group["lr"] = optim.lr * share
        self.adam.step()
        return float(loss.detach()), gradients

    def trained(self) -> dict[str, Tensor]:
        """Everything that the steps moved, by the engine's names."""
        state = {name: value.detach() for name, value in self.dense.items()} | self.running
        for name, value in self.dense.items():
            state |= {f"adam/{name}/{part}": moment for part, moment in self.adam.state[value].items()}
        for name, shape in self.shapes.items():
            exact = self.exact.get(name)
            for part, values in self.rows[name].parts().items():
                for shard, rows in enumerate(exact.in_use(values) if exact else values.split(shape.rows_per_shard)):
                    state[f"{name}/{shard:04d}/{part}"] = rows
            for shard, ids in enumerate(exact.ids() if exact else []):
                state[f"{name}/{shard:04d}/ids"] = ids
        return state


def mean_and_std(variant: Variant) -> dict[str, tuple[float, float]]:
    """Of the logarithm of incomes, once a session, missing ones left out; and of rates, missing ones filled."""
    samples = [sample for batch in steps(variant) for sample in batch]
    known = {s.session: math.log1p(np.float32(s.income)) for s in samples if not math.isnan(s.income)}
    numbers = {"income": list(known.values()), "ad_rate": [filled(s.ad_rate) for s in samples]}
    return {name: (statistics.fmean(values), statistics.pstdev(values)) for name, values in numbers.items()}


@functools.cache
def known_of(initial: Path) -> dict[str, dict[str, Any]]:
    """What worker.py wrote, read once in each process."""
    return unpacked(initial.read_bytes())


def outcome_of(initial: Path, run: str) -> bytes:
    """All that the reference writes of one run, NAME/DTYPE, packed."""
    torch.set_num_threads(1)
    name, dtype = run.split("/")
    model = Reference(VARIANTS[name], dtype, known_of(initial)[run])
    outcomes = [model.step(samples, number) for number, samples in enumerate(steps(VARIANTS[name]))]
    result = {
        "losses": [loss for loss, _ in outcomes],
        "gradients": outcomes[0][1],
        "trained": model.trained(),
        "evicted": {table: exact.evicted for table, exact in model.exact.items()},
        "expired": {table: exact.expired for table, exact in model.exact.items()},
    }
    return packed(result)


def main(initial: Path, out: Path) -> None:
    """All variants, on all processors: they have nothing to do with each other."""
    runs = [f"{name}/{dtype}" for name, variant in VARIANTS.items() for dtype in variant.dtypes]
    torch.optim.Adam([torch.zeros(1)])  # imports torch's compiler: here, once for all of them
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(functools.partial(outcome_of, initial), runs)
        out.write_bytes(packed({run: unpacked(each) for run, each in zip(runs, results, strict=True)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
