"""A short convnet for small pictures: each stage halves the grid, then adds a few residual blocks.

No max pool and no 7×7 convolution: a digit of 14 pixels would be two cells wide before anything was learned.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lucidetr.config import BackboneConfig
from lucidetr.layers.norms import NORMS, normed
from lucidetr.models.backbones import BasicBlock, Norm, convolution

GROWTH = (2, 4, 4, 8)  # channels of the stages, in units of the stem's


class Halving(nn.Module):
    """Halve height and width: a 3×3 convolution of stride 2."""

    def __init__(self, inputs: int, outputs: int, norm: Norm):
        super().__init__()
        self.conv = convolution(inputs, outputs, 3, stride=2)
        self.norm = norm(outputs)

    def forward(self, x: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch outputs h2 w2"]:
        """Return relu(norm(conv(x)))."""
        return F.relu(normed(self.conv, self.norm, x), inplace=True)


class ConvStage(nn.Module):
    """Halve the grid, then add residual blocks of one width."""

    def __init__(self, inputs: int, outputs: int, depth: int, norm: Norm):
        super().__init__()
        self.down = Halving(inputs, outputs, norm)
        self.blocks = nn.Sequential(*(BasicBlock(outputs, outputs, 1, 1, norm) for _ in range(depth)))

    def forward(self, x: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch outputs h2 w2"]:
        """Return the stage's map."""
        return self.blocks(self.down(x))


class ConvNet(nn.Module):
    """Turn images into maps at strides 4, 8, 16 (and 32), one for each stage."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        norm = NORMS[config.norm]
        self.stem = Halving(3, config.width, norm)
        widths = [config.width, *(config.width * growth for growth in GROWTH)]
        self.stages = nn.ModuleList(
            ConvStage(widths[i], widths[i + 1], depth, norm) for i, depth in enumerate(config.depths)
        )
        self.channels = tuple(widths[1 : len(config.depths) + 1])

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> tuple[Float[Tensor, "batch _ _ _"], ...]:
        """Return the map of every stage, fine to coarse."""
        x, maps = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return tuple(maps)
