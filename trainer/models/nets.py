"""The networks beside DICM: DCN, DIN, FinalMLP, LR and two towers; and how one is built.

Letters of shapes as in trainer/models/ctr.py; of two towers, W is the width of both.
"""

import importlib
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from trainer.config import BaseNet, ModelConfig
from trainer.errors import ConfigError, DataError
from trainer.exchange.vectors import FieldVectors, take_rows
from trainer.models.ctr import CtrModel, Dense, Dicm, Fields
from trainer.models.layers import Mlp, used_fields, value_rows, width_of
from trainer.models.pooling import BehaviorAttention, sum_pool
from trainer.problems import Problem
from trainer.samples.reader import Batch
from trainer.schema.fields import Field, Schema


class CrossNetwork(nn.Module):
    """x_(l+1) = x_0 * (W_l x_l + b_l) + x_l, `*` element by element, W_l square (Wang et al., WWW 2021, equation 1).

    L layers hold products of up to L + 1 inputs.
    """

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))

    def forward(self, input_BW: Tensor) -> Tensor:
        """Return the products of the inputs, (B, W)."""
        crossed_BW = input_BW
        for layer in self.layers:
            crossed_BW = input_BW * layer(crossed_BW) + crossed_BW
        return crossed_BW


class Dcn(CtrModel):
    """Cross layers over all inputs of DICM next to its MLP, in parallel (figure 1 of the DCN-v2 paper).

    logit = w . cross(x) + MLP(x), which is the paper's final layer over the two outputs side by side, written as a sum.
    """

    def __init__(self, schema: Schema, config: ModelConfig) -> None:
        super().__init__(schema, config)
        self.cross = CrossNetwork(self.input_width, config.cross_layers)
        self.mlp = Mlp([self.input_width, *config.mlp, 1], self.hidden)
        self.of_cross = nn.Linear(self.input_width, 1, bias=False)

    def forward(self, fields: Fields, dense: Dense, group_of_sample_B: Tensor) -> Tensor:
        input_BW = self.inputs(fields, dense, group_of_sample_B)
        logit_B1: Tensor = self.of_cross(self.cross(input_BW)) + self.mlp(input_BW)
        return logit_B1.squeeze(1)


class Din(CtrModel):
    """Attention over behaviour IDs by the ad's IDs (Zhou et al., KDD 2018), beside the aggregated images of DICM.

    The behaviours are the multi_id fields of side user that share their table with an id field of side ad, as
    behavior_item and ad_item do: value k of all of them describes behaviour k. Fields `beside` one of them, as the
    behaviours' ages, are part of the behaviour too. Other fields are pooled as in DICM.
    """

    def __init__(self, schema: Schema, config: ModelConfig) -> None:
        """Raises ConfigError where there is no such field."""
        pairs = paired_fields(used_fields(schema, config))
        if not pairs:
            raise ConfigError(Problem.NO_PAIRED_FIELDS)
        self.behaviors = behaviors_of(used_fields(schema, config))
        self._ads = [ad.name for _, ad in pairs]
        super().__init__(schema, config, elsewhere=self.behaviors)
        query_width = sum(width_of(ad, config) for _, ad in pairs)
        beside = [field for field in self.fields if field.name in self.behaviors[len(pairs) :]]
        width = query_width + sum(width_of(field, config) for field in beside)
        self.attention = BehaviorAttention(width, query_width, config.attention_hidden, self.hidden)
        self.mlp = Mlp([self.input_width + self.attention.width, *config.mlp, 1], self.hidden)

    def forward(self, fields: Fields, dense: Dense, group_of_sample_B: Tensor) -> Tensor:
        query_BW = torch.cat([value_rows(fields[name]) for name in self._ads], dim=1)
        interest_BW = self.attention([fields[name] for name in self.behaviors], group_of_sample_B, query_BW)
        logit_B1: Tensor = self.mlp(torch.cat([self.inputs(fields, dense, group_of_sample_B), interest_BW], dim=1))
        return logit_B1.squeeze(1)

    def check(self, batch: Batch) -> None:
        check_equal_lists(batch, self.behaviors)


def behaviors_of(fields: Collection[Field]) -> list[str]:
    """Name the fields of side user that describe behaviours value by value: the paired ones, then those beside them."""
    paired = [behavior.name for behavior, _ in paired_fields(fields)]
    return [*paired, *(field.name for field in fields if field.beside in paired and field.name not in paired)]


def check_equal_lists(batch: Batch, behaviors: Sequence[str]) -> None:
    """Raise DataError where a user's lists of these fields are not equally long."""
    first, *others = behaviors
    for name in others:
        one_G, other_G = batch.fields[first].lengths_M, batch.fields[name].lengths_M
        differing = np.flatnonzero(one_G != other_G)
        if len(differing):
            at = differing[0]
            raise DataError(Problem.UNPAIRED_BEHAVIORS, first, name, one_G[at], other_G[at])


def paired_fields(fields: Collection[Field]) -> list[tuple[Field, Field]]:
    """Pair each multi_id field of side user with the first id field of side ad that has its table."""
    ads: dict[str, Field] = {}
    for field in fields:
        if field.side == "ad" and field.kind == "id":
            ads.setdefault(field.table_name, field)
    return [
        (field, ads[field.table_name])
        for field in fields
        if field.side == "user" and field.kind == "multi_id" and field.table_name in ads
    ]


class FeatureGates(nn.Module):
    """2 sigmoid(W2 relu(W1 c + b1) + b2), a number for each input of one stream; c: the stream's condition.

    Mao et al., AAAI 2023, section 3.2: about 1 at first, between 0 and 2.
    """

    HIDDEN = 64

    def __init__(self, context_width: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(context_width, self.HIDDEN), nn.ReLU(), nn.Linear(self.HIDDEN, width))

    def forward(self, context_MC: Tensor) -> Tensor:
        """Return the number of each input, (M, width)."""
        return 2 * torch.sigmoid(self.net(context_MC))


class BilinearFusion(nn.Module):
    """b + w . [x, y] + x' W y (Mao et al., section 3.3, with one head)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, 1)
        self.weight = nn.Parameter(torch.empty(width, width).normal_(std=(2 / (width * width + 1)) ** 0.5))

    def forward(self, x_BW: Tensor, y_BW: Tensor) -> Tensor:
        """Return the logits, (B,)."""
        logit_B: Tensor = self.linear(torch.cat([x_BW, y_BW], dim=1)).squeeze(1)
        return logit_B + (x_BW @ self.weight * y_BW).sum(1)


class FinalMlp(CtrModel):
    """All inputs of DICM go into two MLPs of the hidden layers `mlp`, and bilinear fusion makes the logit of both.

    One stream sees the inputs through gates that the user's IDs and dense values set, the other through gates that the
    ad's set, so that they do not learn the same; a side without such fields leaves its stream ungated.
    """

    def __init__(self, schema: Schema, config: ModelConfig) -> None:
        super().__init__(schema, config)
        self.user_gates, self.ad_gates = (
            FeatureGates(width, self.input_width) if width else None
            for width in (_width(self._of(side, "id", "multi_id", "dense"), config) for side in ("user", "ad"))
        )
        widths = [self.input_width, *config.mlp]
        self.user_mlp, self.ad_mlp = (Mlp(widths, self.hidden, activated=True) for _ in range(2))
        self.fusion = BilinearFusion(config.mlp[-1])

    def forward(self, fields: Fields, dense: Dense, group_of_sample_B: Tensor) -> Tensor:
        user, ad = self.side_inputs("user", fields, dense), self.side_inputs("ad", fields, dense)
        input_BW = of_user_BW = of_ad_BW = self.concat_inputs(user, ad, fields, group_of_sample_B)
        if self.user_gates is not None:
            of_user_BW = input_BW * take_rows(self.user_gates(torch.cat(user, dim=1)), group_of_sample_B)
        if self.ad_gates is not None:
            of_ad_BW = input_BW * self.ad_gates(torch.cat(ad, dim=1))
        logit_B: Tensor = self.fusion(self.user_mlp(of_user_BW), self.ad_mlp(of_ad_BW))
        return logit_B


class Lr(CtrModel):
    """logit = b + sum of the weights of all ids of the sample + w . (dense values, visual vectors).

    The weight of an id is a row of its table, which is one number wide here, whatever width the schema or the model
    names: a linear layer over 12-wide ID vectors would spend twelve parameters and twelve Adam moments on an id for
    the same one number, and would learn a product of two factors in its place. Visual vectors keep their width, so
    with images a step has a second collective of vectors, of one number an id. Images are E's and the aggregator's, as
    in the other base nets. The weights of a multi_id are pooled as `multi_hot` says. w and b start at zero, the ids'
    weights as all tables do.

    The only network is the attention to images, which learns late from Xavier's large weights: GAUC .628 instead of
    .700 after two epochs of the drawn clothes (docs/RESULTS.md). So it starts as torch's layers do.
    """

    starts_by_xavier = False

    def __init__(self, schema: Schema, config: ModelConfig) -> None:
        super().__init__(schema, config.model_copy(update={"image_products": False}))
        num_ids = sum(field.is_id for field in self.fields)
        self.weight = nn.Parameter(torch.zeros(self.input_width - num_ids))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, fields: Fields, dense: Dense, group_of_sample_B: Tensor) -> Tensor:
        ids_of_ad, dense_of_ad = self.id_vectors("ad", fields), self.dense_values("ad", dense)
        ids = [*self.of_group(self.id_vectors("user", fields), group_of_sample_B), *ids_of_ad]
        others = [
            *self.of_group(self.dense_values("user", dense), group_of_sample_B),
            *dense_of_ad,
            *self.images(fields, group_of_sample_B, [*ids_of_ad, *dense_of_ad]),
        ]
        logit_B = self.bias.expand(group_of_sample_B.shape[0])
        if ids:
            logit_B = logit_B + torch.cat(ids, dim=1).sum(dim=1)
        if others:
            logit_B = logit_B + torch.cat(others, dim=1) @ self.weight
        return logit_B


class TwoTower(CtrModel):
    """Logit = <user vector, ad vector> + bias + a term of the impression's context.

    The pre-rank variant of "Image Matters" (arXiv 1711.06505): the user's side gets the user's ID vectors, dense fields
    and the summed visual vectors of the behaviours, the ad's side those of the ad; each goes through an MLP of its own,
    with hidden layers as `mlp` says and `tower_width` outputs. `pooling` is not used: what looks at the ad cannot be
    part of the user's vector. So the vectors of all ads can be made ahead and searched (crossmedia index build).

    There is no temperature and no normalisation: both towers end in a linear layer, which carries the scale. So the
    inner product itself, as faiss takes it, orders ads by their logits. Fields of the schema with `context: true`
    (the scene, say) belong to the impression and not to the ad; a linear layer on them adds the same number to every
    ad that competes for one impression, so the order does not depend on them.
    """

    def __init__(self, schema: Schema, config: ModelConfig) -> None:
        if config.dropout:
            raise ConfigError(Problem.DROPOUT_IN_TOWER)
        super().__init__(schema, config.model_copy(update={"pooling": "sum", "image_products": False}))
        self.width = config.tower_width
        self.user_fields = tuple(field for field in self.fields if field.side == "user")
        self.ad_fields = tuple(field for field in self.fields if field.side == "ad" and not field.context)
        self.context_fields = tuple(field for field in self.fields if field.context)
        for side, fields in (("user", self.user_fields), ("ad", self.ad_fields)):
            if not fields:
                raise ConfigError(Problem.TOWER_WITHOUT_FIELD, side)
        self.user_tower = Mlp([_width(self.user_fields, config), *config.mlp, self.width], self.hidden)
        self.ad_tower = Mlp([_width(self.ad_fields, config), *config.mlp, self.width], self.hidden)
        self.bias = nn.Parameter(torch.zeros(1))
        self.context = nn.Linear(_width(self.context_fields, config), 1, bias=False) if self.context_fields else None

    def forward(self, fields: Fields, dense: Dense, group_of_sample_B: Tensor) -> Tensor:
        user_GW = self.user_vectors(fields, dense)
        ad_BW = self.ad_vectors(fields, dense)
        logit_B = (take_rows(user_GW, group_of_sample_B) * ad_BW).sum(dim=1) + self.bias
        if self.context is not None:
            logit_B = logit_B + self.context(self._inputs(self.context_fields, fields, dense)).squeeze(1)
        return logit_B

    def user_vectors(self, fields: Fields, dense: Dense) -> Tensor:
        """Return one vector a group, (G, W), for all samples of the group."""
        user_GW: Tensor = self.user_tower(self._inputs(self.user_fields, fields, dense))
        return user_GW

    def ad_vectors(self, fields: Fields, dense: Dense) -> Tensor:
        """Return one vector a sample, (B, W), of the ad's fields alone: any rows of ads will do."""
        ad_BW: Tensor = self.ad_tower(self._inputs(self.ad_fields, fields, dense))
        return ad_BW

    def _inputs(self, fields: Sequence[Field], vectors: Fields, dense: Dense) -> Tensor:
        """Put vectors and dense values of these fields side by side, (M, width), several vectors of a row as one."""
        parts = [dense[f.name] if f.kind == "dense" else self._of_rows(f, vectors[f.name]) for f in fields]
        return torch.cat(parts, dim=1)

    def _of_rows(self, field: Field, values: FieldVectors) -> Tensor:
        if field.kind == "multi_id":
            return self.pool(values)
        return sum_pool(values) if field.kind == "content" and field.side == "user" else value_rows(values)


def _width(fields: Sequence[Field], config: ModelConfig) -> int:
    """Count the numbers of a row of these fields, side by side."""
    return sum(width_of(field, config) for field in fields)


_BASE_NETS: dict[BaseNet | str, type[CtrModel]] = {
    "lr": Lr,
    "mlp": Dicm,
    "din": Din,
    "dcn": Dcn,
    "finalmlp": FinalMlp,
    "two_tower": TwoTower,
}


def build_model(schema: Schema, config: ModelConfig) -> CtrModel:
    """Build the model of `config.base` over the fields of the schema. Raises ConfigError where they do not fit."""
    model = net_class(config.base)(schema, config)
    fixed = next((name for name, value in model.named_parameters() if not value.requires_grad), None)
    if fixed is not None:
        raise ConfigError(Problem.FIXED_PARAMETER, config.base, fixed)
    return model.apply(_start_by_xavier) if model.starts_by_xavier else model


def net_class(base: str) -> type[CtrModel]:
    """Return the class of a base net: one of ours, or the one at a dotted path, whose module is imported.

    Of that module nothing is called but a class that extends CtrModel, as a path may come from another user's run.
    Raises ConfigError.
    """
    if base in _BASE_NETS:
        return _BASE_NETS[base]
    module_name, _, name = base.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except Exception as failure:  # a module may raise any error while it is imported
        reason = f"{type(failure).__name__}: {' '.join(str(failure).split())}"
        raise ConfigError(Problem.NET_NOT_IMPORTED, base, module_name, reason) from failure
    if not (isinstance(found, type) and issubclass(found, CtrModel)):
        raise ConfigError(Problem.NO_SUCH_NET, base, module_name, name)
    return found


def _start_by_xavier(module: nn.Module) -> None:
    """Draw Glorot and Bengio's normal weights, of deviation (2 / (inputs + outputs)) ** 0.5; biases are zero."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
