"""One fused map: what the encoder understood on a coarse grid, laid over the detail of a finer one.

(Lin et al. 2017, feature pyramids, but only one map comes out: the decoder's attention stays dense and visible.)
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lucidetr.config import ModelConfig
from lucidetr.layers.norms import NORMS
from lucidetr.models.backbones import convolution


class Fusion(nn.Module):
    """Add the coarse map, spread over the finer grid, to the finer map, and smooth the sum."""

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
    """Climb from the encoder's map to the finest that the config names; with none named, stay where it is."""

    def __init__(self, config: ModelConfig, channels: tuple[int, ...]):
        self.rungs = [config.backbone.strides.index(stride) for stride in config.fused]
        super().__init__(Fusion(channels[rung], config.d_model, config.backbone.norm) for rung in self.rungs)

    def forward(
        self, coarse: Float[Tensor, "batch d_model h w"], maps: tuple[Tensor, ...]
    ) -> Float[Tensor, "batch d_model grid_h grid_w"]:
        """Return the map that the decoder reads."""
        for fusion, rung in zip(self, self.rungs, strict=True):
            coarse = fusion(coarse, maps[rung])
        return coarse
