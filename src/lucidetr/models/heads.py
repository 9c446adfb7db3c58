"""What a query says: its class and its box (DETR, section 3.2, prediction feed-forward networks)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lucidetr.config import ModelConfig
from lucidetr.structures import Predictions


class BoxHead(nn.Module):
    """Turn a query's content into a box by three linear layers and a sigmoid."""

    def __init__(self, d_model: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)])
        self.output = nn.Linear(d_model, 4)

    def forward(self, hidden: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any 4"]:
        """Return centre and size as fractions of the picture."""
        for layer in self.layers:
            hidden = F.relu(layer(hidden))
        return self.output(hidden).sigmoid()


class Heads(nn.Module):
    """Read class logits and boxes off every decoder layer with the same weights.

    Always in float32: a box in bfloat16 is known only to 1/256 of the picture.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.category = nn.Linear(config.d_model, config.num_classes + 1)  # the last slot: no object
        self.box = BoxHead(config.d_model)

    def forward(self, hidden: Float[Tensor, "layer batch query d_model"]) -> Predictions:
        """Return logits and boxes of every layer."""
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(self.category.weight.dtype)
            return Predictions(logits=self.category(hidden), boxes_cxcywh=self.box(hidden))
