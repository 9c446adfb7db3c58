"""A network made fast for prediction alone: norms folded, weights in the format that they are multiplied in."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lucidetr.errors import InputError
from lucidetr.layers.attention import MultiHeadAttention
from lucidetr.layers.feed_forward import FeedForward
from lucidetr.layers.norms import FrozenBatchNorm2d, fold
from lucidetr.models.detr import DETR
from lucidetr.structures import Predictions

ENGINES = ("torch", "compile")
MULTIPLIED = (nn.Conv2d, MultiHeadAttention, FeedForward)  # all else computes in float32: norms, heads, boxes


def quicken(model: DETR, precision: str) -> DETR:
    """Return a copy of a network that predicts the same, faster; the network itself stays as it is.

    Batch norms become part of the convolutions before them, and features lie channels last. For bf16 under autocast
    the weights of convolutions, attentions and feed-forwards are rounded once instead of at every picture.
    """
    quick = copy.deepcopy(model).eval().requires_grad_(False)
    for block in list(quick.modules()):
        for name, norm in list(block.named_children()):
            if isinstance(norm, (nn.BatchNorm2d, FrozenBatchNorm2d)):
                fold(convolution_before(block, name), norm)
                setattr(block, name, nn.Identity())
    if precision == "bf16":
        for part in quick.modules():
            if isinstance(part, MULTIPLIED):
                part.to(torch.bfloat16)
    return quick.to(memory_format=torch.channels_last)


def convolution_before(block: nn.Module, norm: str) -> nn.Conv2d:
    """Return the convolution whose output a block's norm reads: conv1 for norm1, conv or smooth for norm."""
    names = (norm.replace("norm", "conv"), "smooth")
    return next(part for name in names if isinstance(part := getattr(block, name, None), nn.Conv2d))


class Compiled(nn.Module):
    """Predict by a network that torch.compile has turned into machine code, with its weights as constants.

    The first picture waits for the compiler, tens of seconds. The second shape makes it compile once more, for any
    height and width.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.compute = torch.compile(lambda images, padding: model(images, padding).tensors())

    @torch.no_grad()
    def forward(self, images: Tensor, padding: Tensor) -> Predictions:
        """Return logits and boxes of every layer."""
        from torch._inductor import config

        # constants are laid out for the processor's matrix units once; a GPU has no use for it
        with config.patch(freezing=images.device.type == "cpu"):
            return Predictions.of(self.compute(images, padding))


def build_engine(name: str) -> Callable[[nn.Module], nn.Module]:
    """Return what makes a quick network quicker still; an unknown name is an InputError."""
    if name not in ENGINES:
        raise InputError(f"--engine {name}: choose one of {', '.join(ENGINES)}")
    return Compiled if name == "compile" else lambda model: model
