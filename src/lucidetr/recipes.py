"""Named configs: the models of the DETR paper and the same design small enough for a laptop."""

from dataclasses import replace

from lucidetr.config import (
    AugmentationConfig,
    BackboneConfig,
    ImageConfig,
    ModelConfig,
    OptimiserConfig,
    TrainConfig,
)
from lucidetr.errors import InputError, did_you_mean

PRETRAINED_FREEZE = ("backbone.stem", "backbone.stages.0")  # the paper, A.4; its backbone comes from ImageNet

DETR_R50 = TrainConfig(recipe="detr-r50", freeze=PRETRAINED_FREEZE)


def _paper(name: str, backbone: BackboneConfig) -> TrainConfig:
    return replace(DETR_R50, recipe=name, model=replace(DETR_R50.model, backbone=backbone))


# The paper's design at a twentieth of its size. Nothing is pretrained at this size, so the whole network learns
# at one rate, and group norm replaces the frozen statistics; small steps on small images need a larger rate.
DETR_XS = replace(
    DETR_R50,
    recipe="detr-xs",
    model=ModelConfig(
        backbone=BackboneConfig(name="resnet18", width=32, norm="group", dilation=True),
        d_model=128,
        num_heads=4,
        head_dim=32,
        feed_forward=512,
        encoder_layers=3,
        decoder_layers=3,
        num_queries=25,
    ),
    images=ImageConfig(size=128, max_size=213),
    augmentation=AugmentationConfig(flip=0.0, scales=(), crop=0.0, zoom=0.3, shift=0.1, colour=0.2),
    optimiser=OptimiserConfig(lr=5e-4, backbone_lr=5e-4, warmup=0.03),
    batch=16,
    micro_batch=16,
    freeze=(),
)

RECIPES: dict[str, TrainConfig] = {
    config.recipe: config
    for config in (
        DETR_R50,
        _paper("detr-r50-dc5", BackboneConfig(name="resnet50", dilation=True)),
        _paper("detr-r101", BackboneConfig(name="resnet101")),
        _paper("detr-r101-dc5", BackboneConfig(name="resnet101", dilation=True)),
        DETR_XS,
    )
}


def recipe(name: str) -> TrainConfig:
    """Return the recipe of that name; an unknown name is an InputError with a suggestion."""
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name}: {did_you_mean(name, RECIPES)}")
    return RECIPES[name]


def from_scratch(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Return the config fit for random weights, and a sentence for each thing that had to change.

    Frozen batch norm and a frozen stem only make sense with pretrained weights: a frozen random layer never
    learns, and statistics that were never measured normalise nothing.
    """
    backbone, optimiser, notes = config.model.backbone, config.optimiser, []
    if backbone.norm == "frozen_batch":
        backbone = replace(backbone, norm="group")
        notes.append("group norm instead of frozen batch norm")
    if any(name.startswith("backbone") for name in config.freeze):
        config = replace(config, freeze=tuple(n for n in config.freeze if not n.startswith("backbone")))
        notes.append("no part of the backbone frozen")
    if optimiser.backbone_lr != optimiser.lr:
        notes.append(f"backbone learns at {optimiser.lr:g} instead of {optimiser.backbone_lr:g}")
        optimiser = replace(optimiser, backbone_lr=optimiser.lr)
    model = replace(config.model, backbone=backbone)
    return replace(config, model=model, optimiser=optimiser), notes
