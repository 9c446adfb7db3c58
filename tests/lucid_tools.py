"""What the unit tests of the lucid options share."""

from lucidetr.config import BackboneConfig, ModelConfig

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
