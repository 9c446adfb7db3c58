"""EfficientNet-Lite0 as a backbone: small, with ImageNet weights from a pip package (Tan & Le 2019).

The Lite variants use ReLU6 instead of swish and no squeeze-and-excitation, so that they run fast everywhere.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lucidetr.config import BackboneConfig
from lucidetr.errors import InputError
from lucidetr.layers.norms import NORMS

Norm = Callable[[int], nn.Module]


class Stage(NamedTuple):
    """Describe blocks of one width; the first of them changes width and stride."""

    kernel: int
    stride: int
    expansion: int
    channels: int
    depth: int


STEM_CHANNELS = 32
LITE0 = (
    Stage(kernel=3, stride=1, expansion=1, channels=16, depth=1),
    Stage(kernel=3, stride=2, expansion=6, channels=24, depth=2),
    Stage(kernel=5, stride=2, expansion=6, channels=40, depth=2),
    Stage(kernel=3, stride=2, expansion=6, channels=80, depth=3),
    Stage(kernel=5, stride=1, expansion=6, channels=112, depth=3),
    Stage(kernel=5, stride=2, expansion=6, channels=192, depth=4),
    Stage(kernel=3, stride=1, expansion=6, channels=320, depth=1),
)


LAST_OF_STRIDE = (1, 2, 4, 6)  # the stages after which the grid is halved again, and the last one


class SameConv(nn.Conv2d):
    """Convolve as TensorFlow's "same" padding does: where the padding is uneven, the larger half is at the end.

    With stride 2 and an even side, that shifts the grid by a pixel against symmetric padding, and the published
    weights were trained on that grid.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, input: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch outputs h2 w2"]:
        """Return ⌈side / stride⌉ cells along each side."""
        height, width = (self.padding_of(side) for side in input.shape[-2:])
        padded = F.pad(input, (width // 2, width - width // 2, height // 2, height - height // 2))
        if self.training and self.groups > 1 and input.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):  # whose backward takes three to five times as long in bfloat16
                return super().forward(padded.float()).to(torch.get_autocast_dtype("cpu"))
        return super().forward(padded)

    def padding_of(self, side: int) -> int:
        """Return how many pixels to add along a side, both ends together; no kernel is shorter than its stride."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        cells = (side + stride - 1) // stride
        return (cells - 1) * stride + kernel - side


class ConvNorm(nn.Module):
    """Convolve, then norm."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int, norm: Norm):
        super().__init__()
        self.conv = SameConv(inputs, outputs, kernel, stride, groups)
        self.norm = norm(outputs)

    def forward(self, x: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch outputs h2 w2"]:
        """Return norm(conv(x))."""
        return self.norm(self.conv(x))


class ConvNormReLU(ConvNorm):
    """Convolve, norm, cut to 0…6."""

    def forward(self, x: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch outputs h2 w2"]:
        """Return relu6(norm(conv(x)))."""
        return F.relu6(super().forward(x), inplace=True)


class InvertedBottleneck(nn.Module):
    """Widen each pixel, convolve each channel by itself, narrow again (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, norm: Norm):
        super().__init__()
        wide = inputs * expansion
        self.expand = ConvNormReLU(inputs, wide, 1, 1, 1, norm) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNormReLU(wide, wide, kernel, stride, wide, norm)
        self.project = ConvNorm(wide, outputs, 1, 1, 1, norm)
        self.keeps_shape = stride == 1 and inputs == outputs

    def forward(self, x: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch outputs h2 w2"]:
        """Return project(depthwise(expand(x))), added to x where both have the same shape."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.keeps_shape else y


class EfficientNetLite(nn.Module):
    """Turn images into one map for each stride, 4, 8, 16 and 32, of 24, 40, 112 and 320 channels.

    There is one width; another setting is an InputError.
    """

    def __init__(self, config: BackboneConfig):
        super().__init__()
        if config.width != BackboneConfig.width:
            raise InputError(
                f"backbone.width = {config.width}: EfficientNet-Lite0 has one width; leave it at {BackboneConfig.width}"
            )
        norm = NORMS[config.norm]
        self.stem = ConvNormReLU(3, STEM_CHANNELS, 3, 2, 1, norm)
        stages, channels = [], STEM_CHANNELS
        for kernel, stride, expansion, outputs, depth in LITE0:
            blocks = [InvertedBottleneck(channels, outputs, kernel, stride, expansion, norm)]
            blocks += [InvertedBottleneck(outputs, outputs, kernel, 1, expansion, norm) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            channels = outputs
        self.stages = nn.Sequential(*stages)
        self.channels = tuple(LITE0[stage].channels for stage in LAST_OF_STRIDE)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> tuple[Float[Tensor, "batch _ _ _"], ...]:
        """Return the maps, fine to coarse."""
        x, maps = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return tuple(maps[stage] for stage in LAST_OF_STRIDE)
