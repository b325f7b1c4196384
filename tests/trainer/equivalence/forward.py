"""The forward pass of every base net and aggregator as its description reads: one sample, one behaviour at a time.

Plain functions of the tensors that a `Reference` holds; nothing here is shared with trainer/models.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from worlds import Sample, pair_of

if TYPE_CHECKING:
    from reference import Reference


def logit(r: "Reference", s: Sample, new_ad: bool) -> Tensor:
    """One sample's logit; with `new_ad` as if its ad had no IDs of its own."""
    nets = {"lr": _lr, "mlp": _mlp_net, "din": _din, "dcn": _dcn, "finalmlp": _finalmlp, "two_tower": _two_towers}
    return nets[r.config.base](r, s, new_ad)


def _lr(r: "Reference", s: Sample, new_ad: bool) -> Tensor:
    """b + the weights of all ids + w . (dense values, visual vectors)."""
    total = r.dense["model.bias"] + r.id_vector("user", s.user)[0]
    for table, values in {"item": s.behavior_item, "image": s.behavior_image}.items():
        total = total + r.pooled(table, values)[0]
    for vector in _ad_ids(r, s, new_ad):
        total = total + vector[0]
    others = torch.cat([_age(r, s), _price(r, s), *_images(r, s, new_ad)])
    for weight, value in zip(r.dense["model.weight"], others, strict=True):
        total = total + weight * value
    return total


def _mlp_net(r: "Reference", s: Sample, new_ad: bool) -> Tensor:
    return _mlp(r, _inputs(r, s, new_ad))


def _din(r: "Reference", s: Sample, new_ad: bool) -> Tensor:
    """Behaviour k is [its item, its image id]; its weight is the unit's score, and the weights do not sum to one."""
    query = torch.cat(_ad_ids(r, s, new_ad)[:2])
    unit = "model.attention.unit"
    matched = r.dense[f"{unit}.match.weight"] @ query if r.variant.numbers else query
    total = torch.zeros(len(matched), dtype=r.dtype)
    behaviors = zip(s.behavior_item, s.behavior_image, s.item_weight, s.behavior_age, strict=True)
    for item, image, weight, age in behaviors:
        times = weight if r.variant.weighted else 1
        key = [times * r.id_vector("item", item), r.id_vector("image", image)]
        key += [r.id_vector("behavior_age", r.age_bucket(age))] if r.variant.numbers else []
        total = total + _score(r, unit, torch.cat(key), query, matched) * torch.cat(key)
    return _mlp(r, torch.cat([_inputs(r, s, new_ad, summed=False), total]))


def _dcn(r: "Reference", s: Sample, new_ad: bool) -> Tensor:
    """x_(l+1) = x_0 * (W x_l + b) + x_l."""
    start = _inputs(r, s, new_ad)
    crossed = start
    for layer in range(r.config.cross_layers):
        name = f"model.cross.layers.{layer}"
        crossed = start * (r.dense[f"{name}.weight"] @ crossed + r.dense[f"{name}.bias"]) + crossed
    return _mlp(r, start) + (r.dense["model.of_cross.weight"] @ crossed)[0]


def _finalmlp(r: "Reference", s: Sample, new_ad: bool) -> Tensor:
    """b + w . [x, y] + x' W y; x and y are MLPs of the gated inputs."""
    start, streams = _inputs(r, s, new_ad), []
    contexts = {"user": _user(r, s, True), "ad": [*_ad_ids(r, s, new_ad), _price(r, s)]}
    for number, (name, context) in enumerate(contexts.items()):
        net = f"model.{name}_gates.net"
        hidden = torch.relu(r.dense[f"{net}.0.weight"] @ torch.cat(context) + r.dense[f"{net}.0.bias"])
        gated = start * 2 * torch.sigmoid(r.dense[f"{net}.2.weight"] @ hidden + r.dense[f"{net}.2.bias"])
        streams.append(_layers(r, f"model.{name}_mlp", gated, first_dropout=2 * number + 1, ends_linear=False))
    total = r.dense["model.fusion.linear.weight"][0] @ torch.cat(streams) + r.dense["model.fusion.linear.bias"][0]
    return total + streams[0] @ r.dense["model.fusion.weight"] @ streams[1]


def _two_towers(r: "Reference", s: Sample, new_ad: bool) -> Tensor:
    """<user vector, ad vector> + b + w . price: the price is a matter of the impression."""
    user = [r.id_vector("user", s.user), _age(r, s)]
    user += [r.items(s), r.pooled("image", s.behavior_image)]
    ad = _ad_ids(r, s, new_ad)
    if r.config.images == "both":
        nothing = torch.zeros(r.config.visual_width, dtype=r.dtype)
        user.append(sum((r.visual(key, "behavior_image", "images") for key in s.behavior_image), start=nothing))
        ad.append(_of_ad(r, s, "image"))
    product = _layers(r, "model.user_tower", torch.cat(user)) @ _layers(r, "model.ad_tower", torch.cat(ad))
    return product + r.dense["model.bias"][0] + r.dense["model.context.weight"][0] @ _price(r, s)


def _inputs(r: "Reference", s: Sample, new_ad: bool, summed: bool = True) -> Tensor:
    """User: ids, dense; ad: ids, dense; images."""
    ad = [*_ad_ids(r, s, new_ad), _price(r, s)]
    return torch.cat([*_user(r, s, summed), *ad, *_images(r, s, new_ad)])


def _user(r: "Reference", s: Sample, summed: bool) -> list[Tensor]:
    behaviors = [r.items(s), r.pooled("image", s.behavior_image)] if summed else []
    if summed and r.variant.numbers:
        behaviors.append(r.pooled("behavior_age", tuple(r.age_bucket(age) for age in s.behavior_age)))
    return [r.id_vector("user", s.user), *behaviors, _age(r, s)]


def _age(r: "Reference", s: Sample) -> Tensor:
    if not r.variant.numbers:
        return _number(r, s.age)
    mean, std = r.learned["income"]
    income = 0.0 if math.isnan(s.income) else (math.log1p(np.float32(s.income)) - mean) / std
    return _number(r, (float(np.float32(s.age)) - 0.4) / 0.3, income)


def _price(r: "Reference", s: Sample) -> Tensor:
    values = [float(np.float32(each)) for each in s.ad_price]
    if not r.variant.numbers:
        return _number(r, *values)
    mean, std = r.learned["ad_rate"]
    rate = (filled(s.ad_rate) - mean) / std
    return _number(r, *(math.copysign(math.log1p(abs(x)), x) for x in values), rate)


def filled(rate: float) -> float:
    """An ad's rate; one half if it is missing."""
    return 0.5 if math.isnan(rate) else float(np.float32(rate))


def _ad_ids(r: "Reference", s: Sample, new_ad: bool) -> list[Tensor]:
    known = 0 if new_ad else 1
    times = s.ad_weight if r.variant.weighted else 1
    ids = [known * times * r.id_vector("item", s.ad_item), known * r.id_vector("image", s.ad_image)]
    if r.variant.words:
        ids.append(known * r.id_vector("item", pair_of(s)))
    if r.config.id_proxy:
        for place, name in enumerate(["ad_item", "ad_image_id", "ad_pair"][: 3 if r.variant.words else 2]):
            ids[place] = _proxy(r, s, name) + ids[place]
    if r.variant.numbers:
        ids.append(r.id_vector("ad_price_bucket", sum(s.ad_price[0] >= start for start in (-0.5, 0.0, 0.5))))
    return ids


def _proxy(r: "Reference", s: Sample, field: str) -> Tensor:
    """What the ad's visual vectors say about one of its own IDs."""
    contents = ["image", *(["text"] if r.variant.texts else [])]
    net, visual = f"model.id_proxy.nets.{field}", torch.cat([_of_ad(r, s, each) for each in contents])
    hidden = torch.relu(r.dense[f"{net}.0.weight"] @ visual + r.dense[f"{net}.0.bias"])
    return r.dense[f"{net}.2.weight"] @ hidden + r.dense[f"{net}.2.bias"]


def _number(r: "Reference", *values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).to(r.dtype)


def _images(r: "Reference", s: Sample, new_ad: bool) -> list[Tensor]:
    """The ad's visual vectors, then the behaviours' of each content, aggregated."""
    contents = ["image", "text"] if r.variant.texts else ["image"]
    of_ad = [_of_ad(r, s, c) for c in contents] if r.config.images in ("ad", "both") else []
    if r.config.images not in ("behavior", "both"):
        return of_ad
    of_ids = torch.cat([*_ad_ids(r, s, new_ad), _price(r, s)])
    queries = {"attentive": [torch.cat(of_ad) if of_ad else of_ids]}
    if r.config.pooling == "multi_query":
        queries["multi_query"] = [torch.cat(of_ad), of_ids]
    result = list(of_ad)
    for content in contents:
        vectors = [r.visual(key, f"behavior_{content}", f"{content}s") for key in s.behavior_image]
        result.append(_aggregate(r, f"behavior_{content}", vectors, queries.get(r.config.pooling, [])))
    if r.config.image_products and r.config.base != "lr":
        ad = torch.cat([*of_ad, of_ids])
        for content in contents:
            vectors = [r.visual(key, f"behavior_{content}", f"{content}s") for key in s.behavior_image]
            nothing = torch.zeros(r.width_of_content(f"behavior_{content}"), dtype=r.dtype)
            mean = sum(vectors, start=nothing) / max(len(vectors), 1)
            result.append(mean * (r.dense[f"model.products.behavior_{content}.weight"] @ ad))
    return result


def _of_ad(r: "Reference", s: Sample, content: str) -> Tensor:
    """The visual vector of the ad, zero where it is dropped."""
    vector = r.visual(s.ad_image, f"ad_{content}", f"{content}s")
    return torch.zeros_like(vector) if r.dropped_pictures_B[r.place] else vector


def _aggregate(r: "Reference", field: str, vectors: list[Tensor], queries: list[Tensor]) -> Tensor:
    width = r.width_of_content(field)
    nothing = torch.zeros(width, dtype=r.dtype)
    match r.config.pooling:
        case "concat":
            length = r.config.pooling_length
            return torch.cat([vectors[k] if k < len(vectors) else nothing for k in range(length)])
        case "sum":
            return sum(vectors, start=nothing)
        case "mean":
            return sum(vectors, start=nothing) / max(len(vectors), 1)
        case "max":
            return torch.stack([max(v[i] for v in vectors) for i in range(width)]) if vectors else nothing
    sums = []
    for channel, query in enumerate(queries):
        unit = f"model.aggregators.{field}.channels.{channel}"
        matched = r.dense[f"{unit}.match.weight"] @ query
        scores = [_score(r, unit, vector, query, matched) for vector in vectors]
        shares = torch.softmax(torch.stack(scores), 0) if scores else []
        sums.append(sum((share * v for share, v in zip(shares, vectors, strict=True)), start=nothing))
    return torch.cat(sums)


def _score(r: "Reference", unit: str, key: Tensor, query: Tensor, matched: Tensor) -> Tensor:
    """v . f(K k + Q q + C (k * m) + b)."""
    hidden = r.dense[f"{unit}.of_key.weight"] @ key
    hidden = hidden + r.dense[f"{unit}.of_query.weight"] @ query + r.dense[f"{unit}.of_query.bias"]
    hidden = hidden + r.dense[f"{unit}.of_product.weight"] @ (key * matched)
    score = (r.dense[f"{unit}.score.weight"] @ r.activation(hidden, f"{unit}.activation"))[0]
    bias = f"{unit}.score.bias"
    return score + r.dense[bias][0] if bias in r.dense else score


def _mlp(r: "Reference", x: Tensor) -> Tensor:
    return _layers(r, "model.mlp", x)[0]


def _layers(r: "Reference", name: str, x: Tensor, first_dropout: int = 1, ends_linear: bool = True) -> Tensor:
    """Two hidden layers, and a linear one."""
    for layer in range(3 if ends_linear else 2):
        x = r.dense[f"{name}.{2 * layer}.weight"] @ x + r.dense[f"{name}.{2 * layer}.bias"]
        if layer < 2:
            x = r.activation(x, f"{name}.{2 * layer + 1}")
            x = r.dropout(x, first_dropout + layer)
    return x
