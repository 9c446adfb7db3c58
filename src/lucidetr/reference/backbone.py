"""ResNet or a short convnet: pixels into maps of features (He et al. 2015, figures 3 and 5; DETR, 3.2 and A.4)."""

from jaxtyping import Float
from torch import Tensor

from lucidetr.reference.convolution import convolution, max_pool
from lucidetr.reference.elementary import relu
from lucidetr.reference.norms import group_norm, known_batch_norm, measured_batch_norm
from lucidetr.reference.scope import Scope

BLOCKS = {  # how many blocks each of the four stages has (He et al. 2015, table 1)
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
}
BOTTLENECKS = ("resnet50", "resnet101")


def norm(here: Scope, x: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch channel h w"]:
    """Return the features normed in the way the config names."""
    return norm_of_kind(here, x, here.config.backbone.norm)


def norm_of_kind(here: Scope, x: Float[Tensor, "batch channel h w"], kind: str) -> Float[Tensor, "batch channel h w"]:
    """Return the features normed with the weights that lie here: kind is frozen_batch, batch or group."""
    if kind == "group":
        return group_norm(x, here["weight"], here["bias"])
    if kind == "batch" and here.training:
        here["num_batches_tracked"].add_(1)
        return measured_batch_norm(x, here["weight"], here["bias"], here["running_mean"], here["running_var"])
    return known_batch_norm(x, here["weight"], here["bias"], here["running_mean"], here["running_var"])


def backbone(
    here: Scope, images: Float[Tensor, "batch 3 height width"]
) -> tuple[Float[Tensor, "batch channel h w"], ...]:
    """Return the maps of all stages, fine to coarse; a backbone that is not written here is a ValueError."""
    name = here.config.backbone.name
    if name == "convnet":
        return convnet(here, images)
    if name in BLOCKS:
        return resnet(here, images)
    raise ValueError(f"model.backbone.name = {name}: the reference knows only {', '.join(BLOCKS)}, convnet")


def stem(here: Scope, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channel h w"]:
    """Quarter the picture: a 7 × 7 convolution and a max pool, each of stride 2."""
    x = here.record("conv", convolution(images, here["conv.weight"], stride=2))
    x = relu(norm(here.inside("norm"), x))
    return here.record("output", max_pool(x))


def shortcut(here: Scope, x: Float[Tensor, "batch channel h w"], stride: int) -> Float[Tensor, "batch outputs h2 w2"]:
    """Return the input itself, or where the block changes its shape, its 1 × 1 convolution and norm."""
    if "shortcut.conv.weight" not in here:
        return x
    return norm(here.inside("shortcut").inside("norm"), convolution(x, here["shortcut.conv.weight"], stride))


def basic_block(
    here: Scope, x: Float[Tensor, "batch channel h w"], stride: int, dilation: int
) -> Float[Tensor, "batch outputs h2 w2"]:
    """Return relu(shortcut(x) + two 3 × 3 convolutions of x)."""
    y = relu(norm(here.inside("norm1"), convolution(x, here["conv1.weight"], stride, dilation)))
    y = norm(here.inside("norm2"), convolution(y, here["conv2.weight"], 1, dilation))
    return relu(y + shortcut(here, x, stride))


def bottleneck_block(
    here: Scope, x: Float[Tensor, "batch channel h w"], stride: int, dilation: int
) -> Float[Tensor, "batch outputs h2 w2"]:
    """Return relu(shortcut(x) + 1 × 1 to fewer channels, 3 × 3, 1 × 1 to more): the 3 × 3 strides."""
    y = relu(norm(here.inside("norm1"), convolution(x, here["conv1.weight"])))
    y = relu(norm(here.inside("norm2"), convolution(y, here["conv2.weight"], stride, dilation)))
    y = norm(here.inside("norm3"), convolution(y, here["conv3.weight"]))
    return relu(y + shortcut(here, x, stride))


def stride_and_dilation(stage: int, block: int, dilated: bool) -> tuple[int, int]:
    """Return by how much a block strides and spreads its 3 × 3 kernels.

    The first block of stages 1, 2 and 3 halves the grid. DC5 takes the stride out of stage 3 and, to see as far
    as before, doubles the spacing of its kernels from the second block on (the first still sees the finer grid
    as its own stride of 1 would).

    >>> [stride_and_dilation(3, block, dilated=False) for block in range(3)]
    [(2, 1), (1, 1), (1, 1)]
    >>> [stride_and_dilation(3, block, dilated=True) for block in range(3)]
    [(1, 1), (1, 2), (1, 2)]
    """
    first, last_stage = block == 0, stage == 3
    if dilated and last_stage:
        return 1, 1 if first else 2
    return 2 if first and stage > 0 else 1, 1


def resnet(
    here: Scope, images: Float[Tensor, "batch 3 height width"]
) -> tuple[Float[Tensor, "batch channel h w"], ...]:
    """Return the features of the four stages, at strides 4, 8, 16 and 32.

    With dilation the last two both have stride 16, and the later one, which has seen more, stands for both.
    """
    config = here.config.backbone
    block = bottleneck_block if config.name in BOTTLENECKS else basic_block
    x, maps = stem(here.inside("stem"), images), []
    for stage, depth in enumerate(BLOCKS[config.name]):
        for index in range(depth):
            place = here.inside("stages").inside(stage).inside(index)
            x = place.record("output", block(place, x, *stride_and_dilation(stage, index, config.dilation)))
        maps.append(x)
    return (*maps[:2], maps[3]) if config.dilation else tuple(maps)


def halve(here: Scope, x: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch outputs h2 w2"]:
    """Return the map at half its height and width: a 3 × 3 convolution of stride 2, normed and cut at 0."""
    return here.record("output", relu(norm(here.inside("norm"), convolution(x, here["conv.weight"], stride=2))))


def convnet(
    here: Scope, images: Float[Tensor, "batch 3 height width"]
) -> tuple[Float[Tensor, "batch channel h w"], ...]:
    """Return the features of up to four stages, at strides 4, 8, 16 and 32.

    Every stage halves the grid and then looks twice more in each of its blocks, which change nothing of the shape.
    Small pictures have no cells to give away, so there is no 7 × 7 kernel and no pool.
    """
    x, maps = halve(here.inside("stem"), images), []
    for stage, depth in enumerate(here.config.backbone.depths):
        place = here.inside("stages").inside(stage)
        x = halve(place.inside("down"), x)
        for index in range(depth):
            block = place.inside("blocks").inside(index)
            x = block.record("output", basic_block(block, x, stride=1, dilation=1))
        maps.append(x)
    return tuple(maps)
