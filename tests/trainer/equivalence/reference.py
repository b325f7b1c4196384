"""One process without exchange, shards or unique keys: every occurrence by itself, sample by sample, in plain torch.

    python reference.py INITIAL OUT

writes for each scenario the losses, the first step's gradients and what is trained after the last step, by the names
that the engine uses. It shares nothing with the engine but what worker.py run alone wrote to INITIAL (initial values,
and what the codes of an int8 store stand for), the place of an id's row, and which samples ID dropout takes.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scenarios import OPTIM, SCENARIOS, SCHEMA, SEED, Sample, Scenario, features, steps
from torch import Tensor
from torch.nn import functional

from trainer.dropout import dropped
from trainer.step import table_shapes
from trainer.tables import initial_rows

BETA1, BETA2, EPS = 0.9, 0.999, 1e-6


class Reference:
    """Tensors by name, and a forward that reads like the description of the model."""

    def __init__(self, scenario: Scenario, dtype: str, known: dict[str, Any]) -> None:
        initial, (mean, std) = known["initial"], known["mean_and_std"]
        self.scenario, self.config = scenario, scenario.config(dtype)
        self.dtype = getattr(torch, dtype)
        self.shared = self.config.shared_image_model
        self.shapes = {s.name: s for s in table_shapes(SCHEMA.fields, self.config)}
        self.dense = {name: value.clone().requires_grad_() for name, value in initial.items()}
        self.adam = torch.optim.Adam(self.dense.values(), lr=OPTIM.lr, betas=(BETA1, BETA2), eps=EPS)
        self.tables = {}
        for name, shape in self.shapes.items():
            shards = [initial_rows(shape, shard, SEED, 0.05) for shard in range(shape.num_shards)]
            self.tables[name] = torch.from_numpy(np.concatenate(shards)).to(self.dtype).requires_grad_()
        self.row_state = {
            name: {
                "momentum": torch.zeros_like(table),
                "variance": torch.zeros(len(table), dtype=self.dtype),
                "steps": torch.zeros(len(table), dtype=torch.int32),
            }
            for name, table in self.tables.items()
        }
        self.mean, self.std = mean.to(self.dtype), std.to(self.dtype)
        feature_of = known["decoded"] or {key: torch.from_numpy(value) for key, value in features().items()}
        self.feature_of = {key: value.to(self.dtype) for key, value in feature_of.items()}
        self.touched: dict[str, set[int]] = {}

    def id_vector(self, table: str, value: int) -> Tensor:
        """The row of one id."""
        shard, row = self.shapes[table].place_of(np.array([value]))
        place = int(shard[0]) * self.shapes[table].rows_per_shard + int(row[0])
        self.touched.setdefault(table, set()).add(place)
        return self.tables[table][place]

    def pooled(self, table: str, values: tuple[int, ...]) -> Tensor:
        """Sum of the rows of a list of ids."""
        total = torch.zeros(self.config.id_width, dtype=self.dtype)
        for value in values:
            total = total + self.id_vector(table, value)
        return total

    def visual(self, key: int, field: str) -> Tensor:
        """E on the feature of one image."""
        store = "stores.images"
        name = "shared" if self.shared else field
        if key not in self.feature_of:
            if self.scenario.missing == "learned":
                return self.dense[f"{store}.no_image.{name}"]
            return torch.zeros(self.config.visual_width, dtype=self.dtype)
        hidden = self.feature_of[key]
        if self.scenario.standardized:
            hidden = (hidden - self.mean) / self.std
        for layer in range(3):
            at = f"{store}.models.{name}"
            weight, bias = self.dense[f"{at}.layers.{layer}.weight"], self.dense[f"{at}.layers.{layer}.bias"]
            hidden = weight @ hidden + bias
            if layer < 2:
                hidden = self.prelu(hidden, f"{at}.activations.{layer}.weight")
        return hidden

    def prelu(self, x: Tensor, name: str) -> Tensor:
        """x where positive, slope x elsewhere."""
        return torch.where(x > 0, x, self.dense[name] * x)

    def attend(self, vectors: list[Tensor], query: Tensor) -> Tensor:
        """Softmax over the scores of a sample's behaviours, weighted sum."""
        weight = {n.rpartition("behavior_image.")[2]: v for n, v in self.dense.items() if "aggregators" in n}
        scores = []
        for vector in vectors:
            hidden = weight["of_key.weight"] @ vector + weight["of_key.bias"] + weight["of_query.weight"] @ query
            hidden = hidden + weight["of_product.weight"] @ (vector * (weight["match.weight"] @ query))
            hidden = self.prelu(hidden, "model.aggregators.behavior_image.activation.weight")
            scores.append((weight["score.weight"] @ hidden)[0])
        shares = torch.softmax(torch.stack(scores), 0)
        return sum(share * vector for share, vector in zip(shares, vectors, strict=True))

    def mlp(self, name: str, parts: list[Tensor]) -> Tensor:
        """Two hidden layers with PReLU and a linear one."""
        x = torch.cat(parts)
        for layer in range(3):
            x = self.dense[f"{name}.{2 * layer}.weight"] @ x + self.dense[f"{name}.{2 * layer}.bias"]
            if layer < 2:
                x = self.prelu(x, f"{name}.{2 * layer + 1}.weight")
        return x

    def two_towers(self, s: Sample) -> Tensor:
        """One sample's logit by two towers: price is a matter of the impression."""
        user = [self.id_vector("user", s.user), torch.tensor([s.age], dtype=torch.float32).to(self.dtype)]
        user += [self.pooled("item", s.behavior_item), self.pooled("image", s.behavior_image)]
        ad = [self.id_vector("item", s.ad_item), self.id_vector("image", s.ad_image)]
        if self.config.images == "both":
            nothing = torch.zeros(self.config.visual_width, dtype=self.dtype)
            user.append(sum([self.visual(key, "behavior_image") for key in s.behavior_image], nothing))
            ad.append(self.visual(s.ad_image, "ad_image"))
        product = self.mlp("model.user_tower", user) @ self.mlp("model.ad_tower", ad)
        price = torch.tensor(s.ad_price, dtype=torch.float32).to(self.dtype)
        return product + self.dense["model.bias"][0] + self.dense["model.context.weight"][0] @ price

    def logit(self, s: Sample, new_ad: bool) -> Tensor:
        """One sample's logit; with `new_ad` as if its ad had no IDs of its own."""
        if self.config.base == "two_tower":
            return self.two_towers(s)
        parts = [
            self.id_vector("user", s.user),
            torch.tensor([s.age], dtype=torch.float32).to(self.dtype),
            self.pooled("item", s.behavior_item),
            self.pooled("image", s.behavior_image),
        ]
        known = 0 if new_ad else 1
        ad = [
            known * self.id_vector("item", s.ad_item),
            known * self.id_vector("image", s.ad_image),
            torch.tensor(s.ad_price, dtype=torch.float32).to(self.dtype),
        ]
        parts += ad
        query = torch.cat(ad)
        if self.config.images in ("ad", "both"):
            query = self.visual(s.ad_image, "ad_image")
            parts.append(query)
        if self.config.images in ("behavior", "both"):
            vectors = [self.visual(key, "behavior_image") for key in s.behavior_image]
            if not vectors:
                parts.append(torch.zeros(self.config.visual_width, dtype=self.dtype))
            elif self.config.pooling == "sum":
                parts.append(sum(vectors))
            else:
                parts.append(self.attend(vectors, query))
        return self.mlp("model.mlp", parts)[0]

    def step(self, samples: list[Sample], number: int) -> tuple[float, dict[str, Tensor]]:
        """Mean loss, and the gradients; moves every parameter."""
        self.touched = {}
        for value in [*self.dense.values(), *self.tables.values()]:
            value.grad = torch.zeros_like(value)
        label = torch.tensor([s.label for s in samples], dtype=self.dtype)
        new_ad_B = dropped(SEED, number, 0, len(samples), self.config.id_dropout)
        logits = [self.logit(s, new_ad) for s, new_ad in zip(samples, new_ad_B, strict=True)]
        loss = functional.binary_cross_entropy_with_logits(torch.stack(logits), label)
        loss.backward()
        for table, rows in self.touched.items():
            for row in rows:
                frequency = int(self.row_state[table]["steps"][row]) + 1
                self.tables[table].grad[row] += self.scenario.id_l2 / frequency * self.tables[table].detach()[row]
        gradients = {n: v.grad.clone() for n, v in [*self.dense.items(), *self.tables.items()]}
        lr = OPTIM.lr * OPTIM.lr_gamma ** (number // OPTIM.lr_every)
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        with torch.no_grad():
            for table, rows in self.touched.items():
                for row in rows:
                    self.move_row(table, row, lr)
        return float(loss.detach()), gradients

    def move_row(self, table: str, row: int, lr: float) -> None:
        """Adam on one row, with one second moment for all of it."""
        gradient, state = self.tables[table].grad[row], self.row_state[table]
        state["steps"][row] += 1
        state["momentum"][row] = BETA1 * state["momentum"][row] + (1 - BETA1) * gradient
        state["variance"][row] = BETA2 * state["variance"][row] + (1 - BETA2) * (gradient**2).mean()
        t = int(state["steps"][row])
        momentum, variance = state["momentum"][row] / (1 - BETA1**t), state["variance"][row] / (1 - BETA2**t)
        self.tables[table][row] -= lr * momentum / (variance.sqrt() + EPS)

    def trained(self) -> dict[str, Tensor]:
        """Everything that 20 steps moved, by the engine's names."""
        state = {name: value.detach() for name, value in self.dense.items()}
        for name, value in self.dense.items():
            state |= {f"adam/{name}/{part}": moment for part, moment in self.adam.state[value].items()}
        for name, shape in self.shapes.items():
            for part, values in {"weight": self.tables[name].detach(), **self.row_state[name]}.items():
                for shard, rows in enumerate(values.split(shape.rows_per_shard)):
                    state[f"{name}/{shard:04d}/{part}"] = rows
        return state


def main(initial: Path, out: Path) -> None:
    """All scenarios."""
    start = torch.load(initial)
    results = {}
    for name, scenario in SCENARIOS.items():
        for dtype in scenario.dtypes:
            model = Reference(scenario, dtype, start[f"{name}/{dtype}"])
            outcomes = [model.step(samples, number) for number, samples in enumerate(steps(scenario))]
            results[f"{name}/{dtype}"] = {
                "losses": [loss for loss, _ in outcomes],
                "gradients": outcomes[0][1],
                "trained": model.trained(),
            }
    torch.save(results, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
