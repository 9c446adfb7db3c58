"""ResNets that turn pixels into features (He et al. 2015; DETR, section 3.2 and A.4).

A bottleneck strides in its 3×3 convolution, as torchvision's pretrained weights expect. What a norm returns is needed
once, so it is rectified and summed in place: a tenth of a prediction's time on a CPU was spent on moving copies of it.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lucidetr.config import BackboneConfig
from lucidetr.layers.norms import NORMS, normed

Norm = Callable[[int], nn.Module]


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """Return a convolution without bias, padded so that only the stride shrinks the map, with He's fan-out weights."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


class Shortcut(nn.Module):
    """Bring a block's input to its output's width and stride: a 1×1 convolution and a norm."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm):
        super().__init__()
        self.conv = convolution(inputs, outputs, 1, stride)
        self.norm = norm(outputs)

    def forward(self, x: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch outputs h2 w2"]:
        """Return the input in the shape of the block's output."""
        return normed(self.conv, self.norm, x)


def shortcut(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Module:
    """Return a `Shortcut` where a block changes width or stride, else the identity."""
    changes = stride != 1 or inputs != outputs
    return Shortcut(inputs, outputs, stride, norm) if changes else nn.Identity()


class BasicBlock(nn.Module):
    """Add two 3×3 convolutions to their input (ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, dilation: int, norm: Norm):
        super().__init__()
        self.conv1 = convolution(inputs, width, 3, stride, dilation)
        self.norm1 = norm(width)
        self.conv2 = convolution(width, width, 3, 1, dilation)
        self.norm2 = norm(width)
        self.shortcut = shortcut(inputs, width, stride, norm)

    def forward(self, x: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch outputs h2 w2"]:
        """Return relu(shortcut(x) + two convolutions of x)."""
        y = F.relu(normed(self.conv1, self.norm1, x), inplace=True)
        y = normed(self.conv2, self.norm2, y)
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


class Bottleneck(nn.Module):
    """Add a narrow 3×3 convolution between two 1×1 to their input (ResNet-50 and -101)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, dilation: int, norm: Norm):
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = convolution(inputs, width, 1)
        self.norm1 = norm(width)
        self.conv2 = convolution(width, width, 3, stride, dilation)
        self.norm2 = norm(width)
        self.conv3 = convolution(width, outputs, 1)
        self.norm3 = norm(outputs)
        self.shortcut = shortcut(inputs, outputs, stride, norm)

    def forward(self, x: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch outputs h2 w2"]:
        """Return relu(shortcut(x) + three convolutions of x)."""
        y = F.relu(normed(self.conv1, self.norm1, x), inplace=True)
        y = F.relu(normed(self.conv2, self.norm2, y), inplace=True)
        y = normed(self.conv3, self.norm3, y)
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


class Stem(nn.Module):
    """Quarter the picture: a 7×7 convolution and a max pool, each of stride 2."""

    def __init__(self, width: int, norm: Norm):
        super().__init__()
        self.conv = convolution(3, width, 7, stride=2)
        self.norm = norm(width)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channel h w"]:
        """Return features at stride 4."""
        x = F.relu(normed(self.conv, self.norm, images), inplace=True)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


DEPTHS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(nn.Module):
    """Turn images into one map for each stride: 4, 8, 16, 32, or 4, 8, 16 with dilation (DC5).

    With dilation the last stage has no stride; its first block is not dilated, the later ones are, by 2, so that the
    receptive field stays.
    """

    def __init__(self, config: BackboneConfig):
        super().__init__()
        block, depths = DEPTHS[config.name]
        norm = NORMS[config.norm]
        strides = (1, 2, 2, 1 if config.dilation else 2)
        dilations = (1, 1, 1, 2 if config.dilation else 1)
        self.stem = Stem(config.width, norm)
        stages, channels = [], config.width
        for stage, (depth, stride, dilation) in enumerate(zip(depths, strides, dilations, strict=True)):
            width = config.width * 2**stage
            blocks = [block(channels, width, stride, 1, norm)]
            channels = width * block.expansion
            blocks += [block(channels, width, 1, dilation, norm) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        outputs = [config.width * 2**stage * block.expansion for stage in range(4)]
        self.kept = (0, 1, 3) if config.dilation else (0, 1, 2, 3)  # of two maps at stride 16, the later
        self.channels = tuple(outputs[stage] for stage in self.kept)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> tuple[Float[Tensor, "batch _ _ _"], ...]:
        """Return the maps, fine to coarse; the paper's model reads the last alone."""
        x, maps = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return tuple(maps[stage] for stage in self.kept)
