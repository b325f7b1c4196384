"""DCN-v2, the Deep & Cross Network: products of inputs of a bounded degree, and an MLP beside or on top of them."""

from torch import Tensor, nn

from trainer.config.options import ModelConfig
from trainer.models.ctr import CtrModel, Dense, Fields
from trainer.models.layers import Mlp
from trainer.schema import Schema


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
    """Cross layers over all inputs of DICM and its MLP, `parallel` or `stacked` (figure 1 of the DCN-v2 paper).

    stacked: logit = MLP(cross(x)). parallel: logit = w . cross(x) + MLP(x), which is the paper's final layer over
    the two outputs side by side, written as a sum.
    """

    def __init__(self, schema: Schema, config: ModelConfig) -> None:
        super().__init__(schema, config)
        self.cross = CrossNetwork(self.input_width, config.cross_layers)
        self.mlp = Mlp([self.input_width, *config.mlp, 1], self.hidden)
        self.of_cross = nn.Linear(self.input_width, 1, bias=False) if config.cross_structure == "parallel" else None

    def forward(self, fields: Fields, dense: Dense, group_of_sample_B: Tensor) -> Tensor:
        input_BW = self.inputs(fields, dense, group_of_sample_B)
        crossed_BW = self.cross(input_BW)
        if self.of_cross is None:
            logit_B1: Tensor = self.mlp(crossed_BW)
        else:
            logit_B1 = self.of_cross(crossed_BW) + self.mlp(input_BW)
        return logit_B1.squeeze(1)
