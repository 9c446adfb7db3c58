"""The config of a model, read off its tensors under our names."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lucidetr.categories import Categories
from lucidetr.config import BackboneConfig, ImageConfig, ModelCard, ModelConfig
from lucidetr.conversion.names import listed
from lucidetr.errors import InputError
from lucidetr.models.backbones import DEPTHS, Bottleneck
from lucidetr.models.detr import DETR
from lucidetr.recipes import RECIPES

STAGE_BLOCK = re.compile(r"backbone\.stages\.(\d+)\.(\d+)\.")
LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.")


def resnet_config(state: Mapping[str, Tensor], dilation: bool, source: str) -> BackboneConfig:
    """Return which ResNet these tensors are, by the number of blocks in each stage and the kind of block."""
    blocks = {(int(m[1]), int(m[2])) for name in state if (m := STAGE_BLOCK.match(name))}
    depths = tuple(sum(1 for stage, _ in blocks if stage == wanted) for wanted in range(4))
    bottleneck = "backbone.stages.0.0.conv3.weight" in state
    if "backbone.stem.conv.weight" not in state:
        raise InputError(f"{source}: the first convolution of the backbone (conv1) is missing")
    for name, (_, known_depths) in DEPTHS.items():
        if is_bottleneck(name) == bottleneck and known_depths == depths:
            width = len(state["backbone.stem.conv.weight"])
            return BackboneConfig(name=cast(Any, name), width=width, norm="frozen_batch", dilation=dilation)
    kind = "bottleneck" if bottleneck else "basic"
    raise InputError(
        f"{source}: a backbone with {depths} {kind} blocks in its four stages is none of {', '.join(DEPTHS)}"
    )


def is_bottleneck(name: str) -> bool:
    """Return whether this ResNet has bottleneck blocks: only those are dilated in the same way by everyone."""
    return DEPTHS[name][0] is Bottleneck


def model_config(
    state: Mapping[str, Tensor], backbone: BackboneConfig, num_heads: int, dropout: float, source: str
) -> ModelConfig:
    """Return the config whose model has these tensors; the number of heads cannot be seen in them."""
    needed = ("projection.weight", "queries.position", "heads.category.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise InputError(f"{source}: a detector needs {listed(missing)} (our names): the file lacks them")
    d_model = len(state["projection.weight"])
    if num_heads < 1 or d_model % num_heads:
        raise InputError(f"{source}: {num_heads} heads do not divide d_model {d_model}: give the right number of heads")
    layers = {"encoder": 0, "decoder": 0}
    for name in state:
        if match := LAYER.match(name):
            layers[match[1]] = max(layers[match[1]], int(match[2]) + 1)
    hidden = [len(tensor) for name, tensor in state.items() if name.endswith("feed_forward.expand.weight")]
    pre_norm = "encoder.norm.weight" in state
    learned = "position.row" in state
    return ModelConfig(
        backbone=backbone,
        num_classes=len(state["heads.category.weight"]) - 1,
        d_model=d_model,
        num_heads=num_heads,
        head_dim=d_model // num_heads,
        feed_forward=hidden[0] if hidden else ModelConfig.feed_forward,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_block="pre_norm" if pre_norm else "post_norm",
        decoder_block="pre_norm" if pre_norm else "post_norm",
        num_queries=len(state["queries.position"]),
        dropout=dropout,
        position="learned" if learned else "sine",
        position_table=len(state["position.row"]) if learned else ModelConfig.position_table,
    )


def beyond_tensors(model: ModelConfig) -> str:
    """Return the settings that `model_config` would not read off the model's tensors, empty where it reads them all.

    Those that say how a model starts or learns are not asked for.

    >>> beyond_tensors(ModelConfig(num_queries=7)), beyond_tensors(ModelConfig(position_at="input"))
    ('', 'position_at is input')
    """
    known = {"position": ("sine", "learned"), "encoder_block": ("post_norm", "pre_norm")}
    known["decoder_block"] = known["encoder_block"]
    fixed = ("classification", "fused", "position_at", "queries", "boxes", "box_bias", "shared_heads")
    told = [f"{name} is {getattr(model, name)}" for name in known if getattr(model, name) not in known[name]]
    told += [f"{name} is {value}" for name in fixed if (value := getattr(model, name)) != getattr(ModelConfig, name)]
    return ", ".join(told + ([] if model.feed_forward else ["feed_forward is 0"]))


def empty_model(model: ModelConfig) -> nn.Module:
    """Return a detector whose tensors have names and shapes but no memory, to compare with."""
    with torch.device("meta"):
        return DETR(model)


def recipe_name(model: ModelConfig) -> str:
    """Return the recipe that builds this model but for its number of classes, or `converted`.

    >>> recipe_name(ModelConfig(num_classes=7)), recipe_name(ModelConfig(num_queries=7))
    ('detr-r50', 'converted')
    """
    names = [name for name, r in RECIPES.items() if replace(r.model, num_classes=model.num_classes) == model]
    return names[0] if names else "converted"


def backbone_card(backbone: BackboneConfig, images: ImageConfig) -> ModelCard:
    """Return the card of a backbone alone: no categories, and of the transformer only what nobody chose."""
    return ModelCard(
        model=ModelConfig(backbone=backbone),
        images=images,
        categories=Categories(ids=(), names=()),
        recipe=backbone.name,
    )
