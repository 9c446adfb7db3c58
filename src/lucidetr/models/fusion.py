"""One fused map: the encoder's output, on a coarse grid, added to a finer map of the backbone.

As in a feature pyramid (Lin et al. 2017), but only one map comes out, so the decoder's attention stays dense.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lucidetr.config import ModelConfig
from lucidetr.layers.norms import NORMS
from lucidetr.models.backbones import convolution


class Fusion(nn.Module):
    """Enlarge the coarse map to the finer grid, add it to the finer map, and smooth the sum."""

    def __init__(self, channels: int, d_model: int, norm: str):
        super().__init__()
        self.lateral = nn.Conv2d(channels, d_model, kernel_size=1)
        self.smooth = convolution(d_model, d_model, 3)
        self.norm = NORMS["group" if norm == "frozen_batch" else norm](d_model)  # nothing here was pretrained

    def forward(
        self, coarse: Float[Tensor, "batch d_model h w"], fine: Float[Tensor, "batch channel h2 w2"]
    ) -> Float[Tensor, "batch d_model h2 w2"]:
        """Return a map of the finer grid."""
        spread = F.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
        return F.relu(self.norm(self.smooth(self.lateral(fine) + spread)))


class Fusions(nn.ModuleList):
    """Fuse the encoder's map into each finer map that the config names, coarse to fine; with none, return it."""

    def __init__(self, config: ModelConfig, channels: tuple[int, ...]):
        self.levels = [config.backbone.strides.index(stride) for stride in config.fused]
        super().__init__(Fusion(channels[level], config.d_model, config.backbone.norm) for level in self.levels)

    def forward(
        self, coarse: Float[Tensor, "batch d_model h w"], maps: tuple[Tensor, ...]
    ) -> Float[Tensor, "batch d_model grid_h grid_w"]:
        """Return the map that the decoder reads."""
        for fusion, level in zip(self, self.levels, strict=True):
            coarse = fusion(coarse, maps[level])
        return coarse
