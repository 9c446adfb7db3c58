"""The heads: class and box of each query (DETR, section 3.2, prediction feed-forward networks)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lucidetr.config import ModelConfig

PRIOR_BIAS = -math.log(99)  # a sigmoid starts near 0.01: nearly all queries find nothing (Lin et al. 2017)
LARGEST_LOG = 3.0  # a layer changes a side by at most e³, so that no early prediction overflows


def move(reference_cxcywh: Float[Tensor, "*any 4"], delta: Float[Tensor, "*any 4"]) -> Float[Tensor, "*any 4"]:
    """Return a box moved in units of its own size, so that small boxes are adjusted as easily as large ones.

    >>> move(torch.tensor([0.5, 0.5, 0.25, 0.5]), torch.tensor([0.5, 0.0, 0.0, 0.0])).tolist()
    [0.625, 0.5, 0.25, 0.5]
    """
    centre, size = reference_cxcywh[..., :2], reference_cxcywh[..., 2:]
    grown = size * delta[..., 2:].clamp(-LARGEST_LOG, LARGEST_LOG).exp()
    return torch.cat([centre + delta[..., :2] * size, grown], dim=-1)


class BoxHead(nn.Module):
    """Turn a query's content into four numbers by three linear layers."""

    def __init__(self, d_model: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)])
        self.output = nn.Linear(d_model, 4)

    def forward(self, hidden: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any 4"]:
        """Return the logits of a box, or by how much to move one."""
        for layer in self.layers:
            hidden = F.relu(layer(hidden))
        return self.output(hidden)


class Heads(nn.Module):
    """Read class logits and a box off a query's content.

    Always in float32: bfloat16 resolves a box only to 1/256 of the picture.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        sigmoid, absolute = config.classification == "sigmoid", config.boxes == "absolute"
        self.category = nn.Linear(config.d_model, config.num_classes + (not sigmoid))  # softmax: the last is no object
        self.box = BoxHead(config.d_model)
        if sigmoid:
            nn.init.constant_(self.category.bias, PRIOR_BIAS)
        if not absolute:  # the first prediction is the box that the query starts from
            nn.init.zeros_(self.box.output.weight)
            nn.init.zeros_(self.box.output.bias)

    def forward(
        self, hidden: Float[Tensor, "*any d_model"]
    ) -> tuple[Float[Tensor, "*any category"], Float[Tensor, "*any 4"]]:
        """Return logits and the box head's four numbers."""
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(self.category.weight.dtype)
            return self.category(hidden), self.box(hidden)


class HeadsOfLayers(nn.ModuleList):
    """Hold one pair of heads for each decoder layer."""

    def __init__(self, config: ModelConfig):
        super().__init__(Heads(config) for _ in range(config.decoder_layers))

    def of(self, layer: int) -> nn.Module:
        """Return the heads of a decoder layer."""
        return self[layer]


class SharedHeads(Heads):
    """Read every decoder layer with the same weights (the paper)."""

    def of(self, layer: int) -> nn.Module:
        """Return the heads of a decoder layer: these."""
        return self


def build_heads(config: ModelConfig) -> SharedHeads | HeadsOfLayers:
    """Return the heads that the config names."""
    return SharedHeads(config) if config.shared_heads else HeadsOfLayers(config)
