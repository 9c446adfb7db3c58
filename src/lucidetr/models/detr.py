"""DETR: images in, a set of boxes and classes out, at once (DETR, section 3.2 and figure 2)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lucidetr.config import ModelConfig
from lucidetr.layers.positions import LearnedPosition, SinePosition
from lucidetr.models.backbones import ResNet
from lucidetr.models.decoder import Decoder
from lucidetr.models.efficientnet import EfficientNetLite
from lucidetr.models.encoder import Encoder
from lucidetr.models.heads import Heads
from lucidetr.models.queries import LearnedQueries
from lucidetr.structures import Predictions


class DETR(nn.Module):
    """Detect objects as a set: backbone, encoder, decoder over object queries, heads.

    One forward serves training, prediction and export. Images are normalised and zero where padded.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.backbone = (EfficientNetLite if config.backbone.name == "efficientnet_lite0" else ResNet)(config.backbone)
        self.projection = nn.Conv2d(self.backbone.channels, config.d_model, kernel_size=1)
        self.position = (
            SinePosition(config.d_model)
            if config.position == "sine"
            else LearnedPosition(config.d_model, config.position_table)
        )
        self.encoder = Encoder(config)
        self.queries = LearnedQueries(config)
        self.decoder = Decoder(config)
        self.heads = Heads(config)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], padding: Bool[Tensor, "batch height width"]
    ) -> Predictions:
        """Return logits and boxes after every decoder layer."""
        features = self.projection(self.backbone(images))
        grid_padding = shrink_padding(padding, features.shape[-2], features.shape[-1])
        position = self.position(grid_padding, torch.promote_types(features.dtype, torch.float32))
        tokens, position = flatten(features), flatten(position)
        memory = self.encoder(tokens, position, grid_padding.flatten(1))
        content, query_position = self.queries(len(images))
        hidden = self.decoder(content, query_position, memory, position, grid_padding.flatten(1))
        return self.heads(hidden)


def flatten(grid: Float[Tensor, "batch d_model grid_h grid_w"]) -> Float[Tensor, "batch token d_model"]:
    """Return the cells of a grid as a sequence, row by row."""
    return grid.flatten(2).transpose(1, 2)


def shrink_padding(
    padding: Bool[Tensor, "batch height width"], grid_h: int, grid_w: int
) -> Bool[Tensor, "batch grid_h grid_w"]:
    """Return which cells of the feature grid are padding: those whose first pixel is."""
    height, width = padding.shape[-2:]
    rows = [i * height // grid_h for i in range(grid_h)]
    columns = [i * width // grid_w for i in range(grid_w)]
    return padding[:, rows][:, :, columns]
