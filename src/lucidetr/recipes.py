"""Named configs: the models of the DETR paper, the lucid family, and the ladder that leads from one to the other."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from lucidetr.config import (
    AugmentationConfig,
    BackboneConfig,
    ImageConfig,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    TrainConfig,
)
from lucidetr.errors import InputError, did_you_mean
from lucidetr.fields import with_fields

PRETRAINED_FREEZE = ("backbone.stem", "backbone.stages.0")  # as the published code has it, for a backbone from ImageNet

DETR_R50 = TrainConfig(recipe="detr-r50", freeze=PRETRAINED_FREEZE)


def _paper(name: str, backbone: BackboneConfig) -> TrainConfig:
    """Return DETR_R50 with another backbone; the published DC5 models learned one picture at a time, unpadded."""
    config = replace(DETR_R50, recipe=name, model=replace(DETR_R50.model, backbone=backbone))
    return replace(config, micro_batch=1) if backbone.dilation else config


# Five times the paper's parameters, four fifths of them in the backbone, and another choice in most parts of the
# transformer (docs/detr-222m.md counts them). Nothing is pretrained at this size: group norm, one rate.
DETR_222M = replace(
    DETR_R50,
    recipe="detr-222m",
    model=ModelConfig(
        backbone=BackboneConfig(name="resnet18", width=256, norm="group"),
        num_heads=11,
        head_dim=144,
        encoder_block="end_norm",
        decoder_block="shared_norm",
        position_at="input",
        queries="content",
    ),
    optimiser=replace(DETR_R50.optimiser, backbone_lr=DETR_R50.optimiser.lr),
    freeze=(),
)

# The paper's design at a tenth of its size. Nothing is pretrained at this size, so the whole network learns
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

LUCID_XS = TrainConfig(
    recipe="lucid-xs",
    model=ModelConfig(
        backbone=BackboneConfig(name="convnet", width=32, norm="batch"),
        classification="sigmoid",
        d_model=128,
        num_heads=4,
        head_dim=32,
        feed_forward=512,
        encoder_layers=1,
        decoder_layers=2,
        encoder_block="pre_norm",
        decoder_block="pre_norm",
        fused=(8,),
        num_queries=25,
        queries="scored",  # so a query must look at its object, which a token's content would spare it
        teach_tokens=True,
        boxes="relative",
        box_bias="rpb",
        dropout=0.0,
        initialisation="xavier",
        residual_start="zero",
    ),
    loss=LossConfig(classification="mal", cost_class=2.0, weight_class=0.5, weight_l1=10.0),
    images=ImageConfig(resize="square", size=128),
    augmentation=AugmentationConfig(flip=0.0, scales=(), crop=0.0, zoom=0.3, shift=0.1, colour=0.2, until=0.9),
    optimiser=OptimiserConfig(
        lr=1.5e-3,
        backbone_lr=1.5e-3,
        matrices="muon",
        schedule="cosine",
        warmup=0.03,
        ema=0.03,
    ),
    batch=16,
    micro_batch=16,
)


def _larger(name: str, model: ModelConfig, **changes: Any) -> TrainConfig:
    """Return a larger member of the family: another model, and what its size asks for."""
    augmentation = replace(LUCID_XS.augmentation, flip=0.5)  # xs is for digits and the like, which have hands
    return replace(LUCID_XS, recipe=name, model=model, augmentation=augmentation, **changes)


LUCID_S = _larger(
    "lucid-s",
    replace(
        LUCID_XS.model,
        backbone=replace(LUCID_XS.model.backbone, depths=(1, 2, 2, 1)),
        decoder_layers=3,
        fused=(16, 8),
        num_queries=100,
    ),
    images=ImageConfig(resize="square", size=320),
    batch=8,
    micro_batch=8,
)

LUCID_S_LITE0 = replace(
    LUCID_S,
    recipe="lucid-s-lite0",
    model=replace(LUCID_S.model, backbone=BackboneConfig(name="efficientnet_lite0", norm="batch")),
    weights="efficientnet-lite0",
)

LUCID_M = _larger(
    "lucid-m",
    replace(
        LUCID_XS.model,
        backbone=BackboneConfig(name="resnet18", norm="batch"),
        d_model=256,
        num_heads=8,
        feed_forward=2048,
        decoder_layers=4,
        fused=(16,),
        num_queries=300,
    ),
    images=ImageConfig(resize="square", size=640),
    optimiser=replace(LUCID_XS.optimiser, lr=5e-4, backbone_lr=5e-4),
    micro_batch=4,
)

LUCID_L = replace(
    LUCID_M,
    recipe="lucid-l",
    model=replace(
        LUCID_M.model,
        backbone=BackboneConfig(name="resnet50", norm="batch"),
        encoder_layers=4,
        decoder_layers=6,
    ),
)

RECIPES: dict[str, TrainConfig] = {
    config.recipe: config
    for config in (
        DETR_R50,
        _paper("detr-r50-dc5", BackboneConfig(name="resnet50", dilation=True)),
        _paper("detr-r101", BackboneConfig(name="resnet101")),
        _paper("detr-r101-dc5", BackboneConfig(name="resnet101", dilation=True)),
        DETR_222M,
        DETR_XS,
        LUCID_XS,
        LUCID_S,
        LUCID_S_LITE0,
        LUCID_M,
        LUCID_L,
    )
}


@dataclass(frozen=True)
class Rung:
    """Hold one named change, on the way from detr-xs to lucid-xs or beyond."""

    name: str
    says: str
    changes: dict[str, Any]
    """Fields by their dotted names: one, or such as make no sense without each other."""
    carries: tuple[str, ...] = ()
    """Later rungs that cannot stand without this one."""


LADDER = (
    Rung("detr-xs", "the paper's design at a tenth of its size", {}),
    Rung("rate", "three times the learning rate", {"optimiser.lr": 1.5e-3, "optimiser.backbone_lr": 1.5e-3}),
    Rung("square", "square pictures, changed a batch at a time", {"images.resize": "square", "images.max_size": 1333}),
    Rung(
        "convnet",
        "a short convnet without max pool instead of ResNet-18 DC5",
        {"model.backbone.name": "convnet", "model.backbone.dilation": False},
    ),
    Rung("fused", "the encoder's map is laid over the finer one of stride 8", {"model.fused": [8]}),
    Rung(
        "sigmoid",
        "a sigmoid for each class and focal loss, no slot for no object",
        {"model.classification": "sigmoid", "loss.classification": "focal", "loss.cost_class": 2.0},
        carries=("selected", "mal", "taught", "scored"),
    ),
    Rung(
        "anchors",
        "queries start from learned boxes, which the layers move",
        {"model.queries": "anchors", "model.boxes": "relative"},
        carries=("selected", "taught", "sides", "scored"),
    ),
    Rung(
        "selected",
        "queries start from the tokens that look most like objects",
        {"model.queries": "selected"},
        carries=("taught", "scored"),
    ),
    Rung("mal", "the score of a match shall follow its overlap", {"loss.classification": "mal"}),
    Rung("no-dropout", "nothing is dropped", {"model.dropout": 0.0}),
    Rung(
        "pre-norm",
        "norms stand inside the residual branches",
        {"model.encoder_block": "pre_norm", "model.decoder_block": "pre_norm"},
    ),
    Rung("batch-norm", "batch norm instead of group norm", {"model.backbone.norm": "batch"}),
    Rung("one-encoder-layer", "one encoder layer instead of three", {"model.encoder_layers": 1}),
    Rung("cosine", "the rate falls along a cosine instead of a step", {"optimiser.schedule": "cosine"}),
    Rung("average", "a moving average of the weights is what counts", {"optimiser.ema": 0.03}),
    Rung("tail", "the last tenth of the run sees pictures as they are", {"augmentation.until": 0.9}),
    Rung("boxes-first", "classes weigh half of what they weigh in the paper", {"loss.weight_class": 0.5}),
    Rung("xavier", "every matrix and kernel starts by Xavier's rule", {"model.initialisation": "xavier"}),
    Rung("quiet", "residual branches of the transformer start at zero", {"model.residual_start": "zero"}),
    Rung("muon", "matrices and kernels step along orthogonal matrices", {"optimiser.matrices": "muon"}),
    Rung("taught", "every token learns, too: each object teaches four of them", {"model.teach_tokens": True}),
    Rung("distances", "L1 distances weigh twice what they weigh in the paper", {"loss.weight_l1": 10.0}),
    Rung("two-decoder-layers", "two decoder layers instead of three", {"model.decoder_layers": 2}),
    Rung("sides", "cross-attention learns from the distances to the box's sides", {"model.box_bias": "rpb"}),
    Rung("scored", "of its token a query hears box and score alone, and must look", {"model.queries": "scored"}),
)

# What else the literature offers, off in every recipe: each is measured on top of lucid-xs
BESIDES = (
    Rung("varifocal", "the overlap as a match's score, by varifocal loss", {"loss.classification": "varifocal"}),
    Rung("ia-bce", "a mean of score and overlap is asked of a match", {"loss.classification": "ia_bce"}),
    Rung("refined", "each layer moves the box of the layer before", {"model.boxes": "refined"}),
    Rung(
        "twice",
        "each layer moves the box of the layer before and learns from the next one's, too",
        {"model.boxes": "refined_twice"},
    ),
    Rung(
        "bell",
        "cross-attention gets a bell for each head instead of a bias by the sides",
        {"model.box_bias": "gaussian"},
    ),
    Rung("own-heads", "a class and box head for each layer", {"model.shared_heads": False}),
    Rung("groups", "a second set of queries learns beside the first", {"model.query_groups": 2}),
    Rung("hints", "one more set of queries starts from noised truths", {"model.denoising": 0.4}),
    Rung("octaves", "position encodings of 1 to 32 waves over the picture", {"model.position": "octaves"}),
    Rung("identity-blocks", "the backbone's blocks start as identities", {"model.backbone.zero_residual": True}),
    Rung("mosaic", "half of the pictures are four at half size, till half of the run", {"augmentation.mosaic": 0.5}),
    Rung("growing", "pictures grow from two thirds, till half of the run", {"augmentation.start_size": 0.67}),
    Rung("decay", "each step also shrinks all weights, by the rate's share of them", {"optimiser.weight_decay": 1.0}),
)


def climb() -> Iterator[tuple[Rung, TrainConfig]]:
    """Yield every rung with its config, from detr-xs up."""
    config = DETR_XS
    for rung in LADDER:
        config = with_fields(config, rung.changes)
        yield rung, config


def beyond(rung: Rung) -> TrainConfig:
    """Return lucid-xs with one of those changes that are off in it."""
    return replace(with_fields(LUCID_XS, rung.changes), recipe=f"{LUCID_XS.recipe} with {rung.name}")


def without(rung: Rung) -> TrainConfig:
    """Return lucid-xs with one rung's change taken back, and those that cannot stand without it."""
    taken = {rung.name, *rung.carries}
    config = DETR_XS
    for each in LADDER:
        if each.name not in taken:
            config = with_fields(config, each.changes)
    return replace(config, recipe=f"{LUCID_XS.recipe} without {rung.name}")


def recipe(name: str) -> TrainConfig:
    """Return the recipe of that name; an unknown name is an InputError with a suggestion."""
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name}: {did_you_mean(name, RECIPES)}")
    return RECIPES[name]


def fine_tuned(config: TrainConfig, backbone_alone: bool) -> TrainConfig:
    """Return the config with the rates and steps that fit trained weights, where they are still the recipe's own.

    A whole detector goes on five times slower, its backbone slower still, and always by AdamW, with which these rates
    were found. A trained backbone alone learns at the rate of all that is new beside it: slower it learned less
    (docs/LOG.md, 2026-11-26). The paper's recipes are made for such a backbone and stay as they are.
    """
    if not config.recipe.startswith("lucid"):
        return config
    own, optimiser = _own(config).optimiser, config.optimiser
    if not backbone_alone:
        optimiser = replace(
            optimiser, matrices="adamw", lr=optimiser.lr / 5 if optimiser.lr == own.lr else optimiser.lr
        )
    if optimiser.backbone_lr == own.backbone_lr:
        optimiser = replace(optimiser, backbone_lr=optimiser.lr / (1 if backbone_alone else 5))
    return replace(config, optimiser=optimiser)


def from_scratch(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Return the config fit for random weights, and a sentence for each thing that had to change.

    Frozen batch norm and a frozen stem only make sense with pretrained weights: a frozen random layer never
    learns, and statistics that were never measured normalise nothing. Settings that
    are no longer the recipe's own were asked for, and stay.
    """
    own, backbone, optimiser, notes = _own(config), config.model.backbone, config.optimiser, []
    if backbone.norm == own.model.backbone.norm == "frozen_batch":
        backbone = replace(backbone, norm="group")
        notes.append("group norm instead of frozen batch norm")
    if config.freeze == own.freeze and any(name.startswith("backbone") for name in config.freeze):
        config = replace(config, freeze=tuple(n for n in config.freeze if not n.startswith("backbone")))
        notes.append("no part of the backbone frozen")
    if optimiser.backbone_lr == own.optimiser.backbone_lr != optimiser.lr:
        notes.append(f"backbone learns at {optimiser.lr:g} instead of {optimiser.backbone_lr:g}")
        optimiser = replace(optimiser, backbone_lr=optimiser.lr)
    model = replace(config.model, backbone=backbone)
    return replace(config, model=model, optimiser=optimiser), notes


def _own(config: TrainConfig) -> TrainConfig:
    """Return the recipe that a config was made from; one without a name is its own."""
    return RECIPES.get(config.recipe, config)
