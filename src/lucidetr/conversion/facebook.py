"""The paper's own weight files, facebookresearch/detr `.pth`: their names to ours and back.

Its attention keeps the three input projections in one matrix, queries above keys above values.
"""

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lucidetr.categories import Categories
from lucidetr.config import ImageConfig, ModelCard, ModelConfig
from lucidetr.conversion.coco_names import COCO_SLOTS, coco_categories, slots
from lucidetr.conversion.describe import (
    beyond_tensors,
    empty_model,
    is_bottleneck,
    model_config,
    recipe_name,
    resnet_config,
)
from lucidetr.conversion.names import COUNTER, Converted, Rows, account, in_float32, prefixed, rename, swapped, without
from lucidetr.conversion.read import usable
from lucidetr.conversion.torchvision import RESNET
from lucidetr.errors import InputError
from lucidetr.fields import from_dict, to_dict


def _attention(theirs: str, ours: str) -> Rows:
    """Return the rows of one attention after its packed projection was split, and of the norm on its path."""
    return (
        *((f"{theirs}.in_proj.{part}.{{leaf}}", f"{ours}.{part}.{{leaf}}") for part in PACKED),
        (f"{theirs}.out_proj.{{leaf}}", f"{ours}.output.{{leaf}}"),
    )


def _layer(attentions: dict[str, str]) -> Rows:
    """Return the rows of one encoder or decoder layer, whose norms are numbered in the order of its parts."""
    parts = [*attentions.values(), "feed_forward"]
    return (
        *(row for theirs, ours in attentions.items() for row in _attention(theirs, ours)),
        ("linear1.{leaf}", "feed_forward.expand.{leaf}"),
        ("linear2.{leaf}", "feed_forward.contract.{leaf}"),
        *((f"norm{i}.{{leaf}}", f"{part}_path.norm.{{leaf}}") for i, part in enumerate(parts, start=1)),
    )


PACKED = ("query", "key", "value")
ENCODER_LAYER = _layer({"self_attn": "attention"})
DECODER_LAYER = _layer({"self_attn": "self_attention", "multihead_attn": "cross_attention"})
DETR_NAMES: Rows = (
    *prefixed(RESNET, "backbone.0.body.", "backbone."),
    ("backbone.1.row_embed.weight", "position.row"),
    ("backbone.1.col_embed.weight", "position.column"),
    ("input_proj.{leaf}", "projection.{leaf}"),
    ("query_embed.weight", "queries.position"),
    *prefixed(ENCODER_LAYER, "transformer.encoder.layers.{layer}.", "encoder.layers.{layer}."),
    ("transformer.encoder.norm.{leaf}", "encoder.norm.{leaf}"),
    *prefixed(DECODER_LAYER, "transformer.decoder.layers.{layer}.", "decoder.layers.{layer}."),
    ("transformer.decoder.norm.{leaf}", "decoder.norm.{leaf}"),
    ("class_embed.{leaf}", "heads.category.{leaf}"),
    ("bbox_embed.layers.2.{leaf}", "heads.box.output.{leaf}"),
    ("bbox_embed.layers.{n}.{leaf}", "heads.box.layers.{n}.{leaf}"),
)

# The published files hold tensors only, and neither dilation nor heads can be seen in a tensor.
PUBLISHED_DILATION = {
    "detr-r50-e632da11.pth": False,
    "detr-r50-dc5-f0fb7ef5.pth": True,
    "detr-r101-2c7b67e5.pth": False,
    "detr-r101-dc5-a2e86def.pth": True,
}
PUBLISHED_HEADS = 8


def matches(names: Collection[str]) -> bool:
    """Return whether these are the names of a facebookresearch DETR."""
    return "query_embed.weight" in names and "class_embed.weight" in names


def convert_facebook(
    payload: Mapping[str, Any], path: Path, dilation: bool | None = None, num_heads: int | None = None
) -> Converted:
    """Return the detector in a file's contents: tensors under `model`, and the options it was trained with, if kept.

    `dilation` and `num_heads` say what a file without options cannot; said twice, they must agree.
    """
    options, notes = _options(payload), []
    known = path.name in PUBLISHED_DILATION
    dilated: bool = _settle(path, "dilation", options.get("dilation", PUBLISHED_DILATION.get(path.name)), dilation)
    heads: int = _settle(path, "num_heads", options.get("nheads", PUBLISHED_HEADS if known else None), num_heads)
    if known and not options:
        notes.append(f"{path.name} is a published file: dilation {dilated}, {heads} heads")
    tensors = without(payload.get("model", payload), suffixes=(COUNTER,))
    ours = in_float32(rename(split_packed(tensors), DETR_NAMES, str(path)))
    backbone = resnet_config(ours, dilated, str(path))
    dropout = float(options.get("dropout", ModelConfig.dropout))
    model = model_config(ours, backbone, heads, dropout, str(path))
    account(ours, empty_model(model), str(path))
    with usable(f"{path}: category_ids"):
        categories = _categories(options, model.num_classes)
    if "category_names" not in options and model.num_classes != COCO_SLOTS:
        notes.append(f"the file names no classes: they are called {categories.names[0]} … {categories.names[-1]}")
    if "images" not in options and not known:
        notes.append("the file does not say how pictures are prepared: the paper's sizes and normalisation are assumed")
    with usable(f"{path}: images"):
        images = from_dict(ImageConfig, options.get("images", {}))
    card = ModelCard(model=model, images=images, categories=categories, recipe=recipe_name(model))
    return Converted(ours, card, tuple(notes))


def export_facebook(state: Mapping[str, Tensor], card: ModelCard) -> dict[str, Any]:
    """Return what `torch.save` should write for facebookresearch/detr: tensors under `model`, options under `args`.

    A model that this code cannot build is an InputError.
    """
    model, backbone = card.model, card.model.backbone
    for fits, reason in (
        (backbone.norm != "group", "backbone.norm is group, its batch norms are frozen"),
        (backbone.name.startswith("resnet"), f"backbone.name is {backbone.name}, its backbones are ResNets"),
        (backbone.width == 64, f"backbone.width is {backbone.width}, its ResNets start with 64 channels"),
        (not backbone.dilation or is_bottleneck(backbone.name), f"it has no dilated {backbone.name}"),
        (model.num_heads * model.head_dim == model.d_model, "num_heads × head_dim is not d_model"),
        (model.encoder_block == model.decoder_block, "encoder_block and decoder_block differ"),
        (not (other := beyond_tensors(model)), other),
    ):
        if not fits:
            raise InputError(f"facebookresearch/detr cannot build this model: {reason}")
    options = argparse.Namespace(
        backbone=backbone.name,
        dilation=backbone.dilation,
        position_embedding=model.position,
        enc_layers=model.encoder_layers,
        dec_layers=model.decoder_layers,
        dim_feedforward=model.feed_forward,
        hidden_dim=model.d_model,
        dropout=model.dropout,
        nheads=model.num_heads,
        num_queries=model.num_queries,
        pre_norm=model.encoder_block == "pre_norm",
        masks=False,
        category_names=list(card.categories.names),
        category_ids=list(card.categories.ids),
        images=to_dict(card.images),
    )
    split = rename(without(state, suffixes=(COUNTER,)), swapped(DETR_NAMES), "the checkpoint")
    return {"model": join_packed(in_float32(split)), "args": options}


def split_packed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with every packed projection cut in three.

    >>> list(split_packed({"attn.in_proj_bias": torch.zeros(6)}))
    ['attn.in_proj.query.bias', 'attn.in_proj.key.bias', 'attn.in_proj.value.bias']
    """
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        start, packed, leaf = name.rpartition("in_proj_")
        if packed:
            thirds = zip(PACKED, tensor.chunk(3), strict=True)
            split |= {f"{start}in_proj.{part}.{leaf}": third for part, third in thirds}
        else:
            split[name] = tensor
    return split


def join_packed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with the three input projections of every attention in one.

    >>> parts = {f"attn.in_proj.{part}.bias": torch.zeros(2) for part in PACKED}
    >>> {name: tensor.shape for name, tensor in join_packed(parts).items()}
    {'attn.in_proj_bias': torch.Size([6])}
    """
    joined: dict[str, Tensor] = {}
    for name, tensor in state.items():
        start, packed, leaf = name.partition("in_proj.query.")
        if packed:
            joined[f"{start}in_proj_{leaf}"] = torch.cat([state[f"{start}in_proj.{part}.{leaf}"] for part in PACKED])
        elif "in_proj." not in name:
            joined[name] = tensor
    return joined


def _options(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the saved options, only those read here and only where they have the type they should have."""
    found = vars(payload["args"]) if isinstance(payload.get("args"), argparse.Namespace) else {}
    types: dict[str, type | tuple[type, ...]] = {
        "dilation": bool,
        "nheads": int,
        "dropout": (float, int),
        "category_names": list,  # this and the next only in files that we wrote: the original has no place for them
        "category_ids": list,
        "images": dict,
    }
    return {name: found[name] for name, kind in types.items() if isinstance(found.get(name), kind)}


def _settle(path: Path, what: str, told: Any, given: Any) -> Any:
    """Return what the file tells or else what the user says; neither, or both and different, is an InputError."""
    if told is None and given is None:
        raise InputError(
            f"{path}: the file does not say its {what} and tensors do not show it: give {what} "
            "(the paper's models have 8 heads, and dilation only where their name says DC5)"
        )
    if told is not None and given is not None and told != given:
        raise InputError(f"{path}: {what} is {told} in the file, not {given}: leave {what} out")
    return given if told is None else told


def _categories(options: dict[str, Any], num_classes: int) -> Categories:
    names, ids = options.get("category_names", []), options.get("category_ids", [])
    if len(names) == len(ids) == num_classes:
        return Categories(ids=tuple(map(int, ids)), names=tuple(map(str, names)))
    return coco_categories() if num_classes == COCO_SLOTS else slots([f"class {i}" for i in range(num_classes)])
