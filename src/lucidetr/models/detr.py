"""DETR: images in, a set of boxes and classes out, at once (DETR, section 3.2 and figure 2)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lucidetr.config import ModelConfig
from lucidetr.layers.box_bias import Grid
from lucidetr.layers.positions import (
    AtAttention,
    AtInput,
    LearnedPosition,
    NoPosition,
    OctavePosition,
    SinePosition,
    cell_centres,
)
from lucidetr.models.backbones import DEPTHS, ResNet
from lucidetr.models.convnet import ConvNet
from lucidetr.models.decoder import DECODERS
from lucidetr.models.efficientnet import EfficientNetLite
from lucidetr.models.encoder import Encoder
from lucidetr.models.fusion import Fusions
from lucidetr.models.heads import build_heads
from lucidetr.models.initialisation import initialise
from lucidetr.models.memory import Memory, flatten, shrink_padding
from lucidetr.models.queries import HintQueries, build_queries, side_by_side
from lucidetr.structures import Hints, Predictions

BACKBONES = {**dict.fromkeys(DEPTHS, ResNet), "convnet": ConvNet, "efficientnet_lite0": EfficientNetLite}
POSITIONS = {"sine": SinePosition, "learned": LearnedPosition, "octaves": OctavePosition, "none": NoPosition}
POSITIONS_AT = {"attention": AtAttention, "input": AtInput}


class DETR(nn.Module):
    """Detect objects as a set: backbone, encoder, decoder over object queries, heads.

    One forward serves training, prediction and export. Images are normalised and zero where padded.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.backbone = BACKBONES[config.backbone.name](config.backbone)
        self.projection = nn.Conv2d(self.backbone.channels[-1], config.d_model, kernel_size=1)
        self.position = POSITIONS[config.position](config)
        self.add_position = POSITIONS_AT[config.position_at]()
        self.encoder = Encoder(config)
        self.fusion = Fusions(config, self.backbone.channels)
        self.queries = build_queries(config)
        self.hints = HintQueries(config) if config.denoising else None
        self.decoder = DECODERS[config.boxes](config)
        self.heads = build_heads(config)
        initialise(self, config)

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        padding: Bool[Tensor, "batch height width"],
        hints: Hints | None = None,
    ) -> Predictions:
        """Return logits and boxes after every decoder layer, preceded by those of the proposals, if any.

        In training, groups of queries become layers of their own, and hints are one more group, the first; `tokens` is
        what all tokens say, where they are taught.
        """
        memory = self.encode(self.backbone(images), padding)
        start = self.queries(memory)
        groups = self.config.query_groups if self.training else 1
        if hints is not None and self.hints is not None:
            queries = start.content.shape[1] // groups  # fewer than the config says where a picture has few tokens
            start, groups = side_by_side([self.hints(hints, queries), start]), groups + 1
        predictions = self.decoder(start, memory, self.heads, groups).groups_as_layers(groups)
        return Predictions.stacked([start.proposals, predictions]) if start.proposals else predictions

    def encode(self, maps: tuple[Tensor, ...], padding: Bool[Tensor, "batch height width"]) -> Memory:
        """Return what the decoder reads: the encoder's output, fused with finer maps where the config names some."""
        features = self.projection(maps[-1])
        grid_padding, position, _ = self.locate(features, padding)
        tokens, position = self.add_position.enter(flatten(features), flatten(position))
        tokens = self.encoder(tokens, position, grid_padding.flatten(1))
        coarse = tokens.transpose(1, 2).unflatten(2, features.shape[-2:])
        fused = self.fusion(coarse, maps)
        grid_padding, position, grid = self.locate(fused, padding)
        tokens = flatten(fused)
        return Memory(tokens, self.add_position.keys(tokens, flatten(position)), grid_padding.flatten(1), grid)

    def locate(
        self, features: Float[Tensor, "batch d_model h w"], padding: Bool[Tensor, "batch height width"]
    ) -> tuple[Bool[Tensor, "batch h w"], Float[Tensor, "batch d_model h w"], Grid]:
        """Return which cells of a map are padding, their position encodings, and the grid of their centres."""
        grid_padding = shrink_padding(padding, features.shape[-2], features.shape[-1])
        dtype = torch.promote_types(features.dtype, torch.float32)
        return grid_padding, self.position(grid_padding, dtype), Grid(*cell_centres(grid_padding, dtype))
