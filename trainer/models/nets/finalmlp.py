"""FinalMLP: two MLPs side by side, each with gates of its own before it, and products of what they make."""

import torch
from torch import Tensor, nn

from trainer.config.options import ModelConfig
from trainer.exchange.sums import take_rows
from trainer.models.ctr import CtrModel, Dense, Fields
from trainer.models.layers import Mlp
from trainer.schema import Schema


class FeatureGates(nn.Module):
    """2 sigmoid(W2 relu(W1 c + b1) + b2), a number for each input of one stream; c: what the stream goes by.

    Mao et al., AAAI 2023, section 3.2: about 1 at first, between 0 and 2.
    """

    def __init__(self, context_width: int, hidden: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(context_width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, context_MC: Tensor) -> Tensor:
        """Return the number of each input, (M, width)."""
        return 2 * torch.sigmoid(self.net(context_MC))


class BilinearFusion(nn.Module):
    """b + w . [x, y] + sum over heads h of x_h' W_h y_h, where x_h and y_h are slices of x and y (section 3.3).

    The heads are slices of equal length; with one head W is a whole matrix.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, 1)
        each = width // heads
        self.weight = nn.Parameter(torch.empty(heads, each, each).normal_(std=(2 / (heads * each * each + 1)) ** 0.5))

    def forward(self, x_BW: Tensor, y_BW: Tensor) -> Tensor:
        """Return the logits, (B,)."""
        x_BHE, y_BHE = (each.view(each.shape[0], *self.weight.shape[:2]) for each in (x_BW, y_BW))
        logit_B: Tensor = self.linear(torch.cat([x_BW, y_BW], dim=1)).squeeze(1)
        return logit_B + (torch.einsum("bhi,hij->bhj", x_BHE, self.weight) * y_BHE).sum((1, 2))


class FinalMlp(CtrModel):
    """All inputs of DICM go into two MLPs of the hidden layers `mlp`, and bilinear fusion makes the logit of both.

    With `feature_gates` one stream sees the inputs through gates that the user's IDs and dense values set, the other
    through gates that the ad's set, so that they do not learn the same; a side without such fields leaves its stream
    ungated.
    """

    def __init__(self, schema: Schema, config: ModelConfig) -> None:
        super().__init__(schema, config)
        self.user_gates, self.ad_gates = (
            FeatureGates(width, config.gate_hidden, self.input_width) if width and config.feature_gates else None
            for width in (self.side_width("user", config), self.side_width("ad", config))
        )
        widths = [self.input_width, *config.mlp]
        self.user_mlp, self.ad_mlp = (Mlp(widths, self.hidden, activated=True) for _ in range(2))
        self.fusion = BilinearFusion(config.mlp[-1], config.fusion_heads)

    def forward(self, fields: Fields, dense: Dense, group_of_sample_B: Tensor) -> Tensor:
        user, ad = self.of_side("user", fields, dense), self.of_side("ad", fields, dense)
        input_BW = of_user_BW = of_ad_BW = self.put_together(user, ad, fields, dense, group_of_sample_B)
        if self.user_gates is not None:
            of_user_BW = input_BW * take_rows(self.user_gates(torch.cat(user, dim=1)), group_of_sample_B)
        if self.ad_gates is not None:
            of_ad_BW = input_BW * self.ad_gates(torch.cat(ad, dim=1))
        logit_B: Tensor = self.fusion(self.user_mlp(of_user_BW), self.ad_mlp(of_ad_BW))
        return logit_B
