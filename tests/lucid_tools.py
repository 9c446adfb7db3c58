"""What the tests of the lucid options, and of what looks into a model, share."""

import torch

from lucidetr.config import BackboneConfig, ModelConfig
from lucidetr.models.detr import DETR

TINY = ModelConfig(
    backbone=BackboneConfig(name="convnet", width=4, norm="group"),
    num_classes=3,
    classification="sigmoid",
    d_model=16,
    num_heads=2,
    head_dim=8,
    feed_forward=32,
    encoder_layers=1,
    decoder_layers=3,
    encoder_block="pre_norm",
    decoder_block="pre_norm",
    fused=(8,),
    position="octaves",
    num_queries=5,
    queries="anchors",
    boxes="refined",
    box_bias="gaussian",
    shared_heads=False,
    dropout=0.0,
)
PAPER = ModelConfig(
    backbone=BackboneConfig(name="resnet18", width=8, norm="group", dilation=True),
    num_classes=3,
    d_model=32,
    num_heads=2,
    head_dim=16,
    feed_forward=64,
    encoder_layers=2,
    decoder_layers=3,
    num_queries=7,
    dropout=0.0,
)


def off_start(config: ModelConfig) -> DETR:
    """Return a model whose parameters are all off their start, in evaluation mode."""
    torch.manual_seed(5)
    model = DETR(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model
