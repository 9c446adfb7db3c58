"""How residual branches start: as any other layer, at nothing, or quieter the deeper the stack."""

import torch
from torch import Tensor, nn

from lucidetr.config import ModelConfig
from lucidetr.layers.attention import MultiHeadAttention
from lucidetr.layers.feed_forward import FeedForward
from lucidetr.models.backbones import BasicBlock, Bottleneck
from lucidetr.models.efficientnet import InvertedBottleneck


@torch.no_grad()
def quieten(model: nn.Module, config: ModelConfig) -> None:
    """Rescale the last layer of each residual branch of a freshly made network.

    A transformer's branch ends in a linear layer, a backbone block's in a norm (Goyal et al. 2017, section 5.1).
    """
    layers = max(config.encoder_layers + config.decoder_layers, 1)
    scale = {"xavier": 1.0, "zero": 0.0, "scaled": (2 * layers) ** -0.5}[config.residual_start]
    for part in model.modules():
        if isinstance(part, (MultiHeadAttention, FeedForward)):
            last = part.output if isinstance(part, MultiHeadAttention) else part.contract
            for parameter in last.parameters():
                parameter.mul_(scale)
        elif config.backbone.zero_residual and (scale_of_norm := last_scale(part)) is not None:
            scale_of_norm.zero_()


def last_scale(block: nn.Module) -> Tensor | None:
    """Return the scale of the norm that ends a backbone block's residual branch, None for anything else."""
    if isinstance(block, BasicBlock):
        norm = block.norm2
    elif isinstance(block, Bottleneck):
        norm = block.norm3
    elif isinstance(block, InvertedBottleneck) and block.keeps_shape:
        norm = block.project.norm
    else:
        return None
    return norm.state_dict()["weight"]  # a parameter, or in frozen batch norm a buffer
