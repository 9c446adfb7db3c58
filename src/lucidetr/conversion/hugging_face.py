"""Hugging Face `DetrForObjectDetection` folders: their names to ours and back.

Two layouts are in use: that of the published models, which the library still writes, and that of its modules since
version 5. The backbone is timm's ResNet (torchvision's names) or the library's own.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lucidetr.categories import Categories
from lucidetr.config import BackboneConfig, ImageConfig, ModelCard
from lucidetr.conversion.coco_names import slots
from lucidetr.conversion.describe import (
    beyond_tensors,
    empty_model,
    is_bottleneck,
    model_config,
    recipe_name,
    resnet_config,
)
from lucidetr.conversion.hugging_face_config import images_config, model_json, preprocessor_json, read_model_json
from lucidetr.conversion.names import COUNTER, Converted, Rows, account, in_float32, prefixed, rename, swapped, without
from lucidetr.conversion.read import usable
from lucidetr.conversion.torchvision import RESNET
from lucidetr.errors import InputError

OWN_RESNET: Rows = (
    ("embedder.embedder.convolution.weight", "stem.conv.weight"),
    ("embedder.embedder.normalization.{leaf}", "stem.norm.{leaf}"),
    *(
        row
        for i in range(3)
        for row in (
            (
                f"encoder.stages.{{stage}}.layers.{{block}}.layer.{i}.convolution.weight",
                f"stages.{{stage}}.{{block}}.conv{i + 1}.weight",
            ),
            (
                f"encoder.stages.{{stage}}.layers.{{block}}.layer.{i}.normalization.{{leaf}}",
                f"stages.{{stage}}.{{block}}.norm{i + 1}.{{leaf}}",
            ),
        )
    ),
    (
        "encoder.stages.{stage}.layers.{block}.shortcut.convolution.weight",
        "stages.{stage}.{block}.shortcut.conv.weight",
    ),
    (
        "encoder.stages.{stage}.layers.{block}.shortcut.normalization.{leaf}",
        "stages.{stage}.{block}.shortcut.norm.{leaf}",
    ),
)
HEADS: Rows = (
    ("class_labels_classifier.{leaf}", "heads.category.{leaf}"),
    ("bbox_predictor.layers.2.{leaf}", "heads.box.output.{leaf}"),
    ("bbox_predictor.layers.{n}.{leaf}", "heads.box.layers.{n}.{leaf}"),
)


def _layer(attentions: dict[str, str], output: str, feed_forward: str) -> Rows:
    """Return the rows of one encoder or decoder layer."""
    return (
        *(
            row
            for theirs, ours in attentions.items()
            for row in (
                (f"{theirs}.q_proj.{{leaf}}", f"{ours}.query.{{leaf}}"),
                (f"{theirs}.k_proj.{{leaf}}", f"{ours}.key.{{leaf}}"),
                (f"{theirs}.v_proj.{{leaf}}", f"{ours}.value.{{leaf}}"),
                (f"{theirs}.{output}.{{leaf}}", f"{ours}.output.{{leaf}}"),
                (f"{theirs}_layer_norm.{{leaf}}", f"{ours}_path.norm.{{leaf}}"),
            )
        ),
        (f"{feed_forward}fc1.{{leaf}}", "feed_forward.expand.{leaf}"),
        (f"{feed_forward}fc2.{{leaf}}", "feed_forward.contract.{leaf}"),
        ("final_layer_norm.{leaf}", "feed_forward_path.norm.{leaf}"),
    )


def _layout(backbone: Rows, conv_encoder: str, output: str, feed_forward: str) -> Rows:
    """Return one layout's table: it is one backbone's names, and three words that changed over time."""
    encoder = _layer({"self_attn": "attention"}, output, feed_forward)
    decoder = _layer({"self_attn": "self_attention", "encoder_attn": "cross_attention"}, output, feed_forward)
    return (
        *prefixed(backbone, f"model.backbone.{conv_encoder}model.", "backbone."),
        ("model.input_projection.{leaf}", "projection.{leaf}"),
        ("model.query_position_embeddings.weight", "queries.position"),
        *prefixed(encoder, "model.encoder.layers.{layer}.", "encoder.layers.{layer}."),
        *prefixed(decoder, "model.decoder.layers.{layer}.", "decoder.layers.{layer}."),
        ("model.decoder.layernorm.{leaf}", "decoder.norm.{leaf}"),
        *HEADS,
    )


PUBLISHED = {"conv_encoder": "conv_encoder.", "output": "out_proj", "feed_forward": ""}
CURRENT = {"conv_encoder": "", "output": "o_proj", "feed_forward": "mlp."}


def matches(names: Collection[str]) -> bool:
    """Return whether these are the names of a `DetrForObjectDetection`."""
    return "class_labels_classifier.weight" in names and "model.query_position_embeddings.weight" in names


def convert_hugging_face(
    state: Mapping[str, Tensor], config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None, folder: Path
) -> Converted:
    """Return the detector of a folder's tensors, `config.json` and, when there, `preprocessor_config.json`."""
    with usable(f"{folder}/config.json"):
        described = read_model_json(config, f"{folder}/config.json")
    own = any(".embedder.embedder." in name for name in state)
    if own != (described.backbone == "resnet"):
        raise InputError(
            f"{folder}: config.json describes the backbone {described.backbone}, "
            f"but the tensors are those of {'the own ResNet' if own else 'timm'}: they do not belong together"
        )
    layout = CURRENT if any(".mlp.fc1." in name or ".o_proj." in name for name in state) else PUBLISHED
    rows = _layout(OWN_RESNET if own else RESNET, **layout)
    ours = in_float32(rename(without(state, suffixes=(COUNTER,)), rows, str(folder)))
    backbone = resnet_config(ours, described.dilation, str(folder))
    if backbone.dilation and not is_bottleneck(backbone.name):
        raise InputError(f"{folder}: a dilated {backbone.name} is not converted: timm dilates one convolution more")
    model = model_config(ours, backbone, described.num_heads, described.dropout, str(folder))
    account(ours, empty_model(model), str(folder))
    with usable(f"{folder}/config.json"):
        categories = _categories(config, model.num_classes, folder)
    images, notes = ImageConfig(), []
    if preprocessor is None:
        notes.append("no preprocessor_config.json: the paper's sizes and normalisation are assumed")
    else:
        with usable(f"{folder}/preprocessor_config.json"):
            images = images_config(preprocessor, f"{folder}/preprocessor_config.json")
    card = ModelCard(model=model, images=images, categories=categories, recipe=recipe_name(model))
    return Converted(ours, card, tuple(notes))


def export_hugging_face(
    state: Mapping[str, Tensor], card: ModelCard
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return tensors in the published layout, `config.json` and `preprocessor_config.json`.

    The backbone is the library's own ResNet, or timm's where it is dilated, which the library has from timm only.
    A model that the library cannot build is an InputError.
    """
    model, backbone = card.model, card.model.backbone
    timm = backbone.dilation
    for fits, reason in (
        (backbone.norm != "group", "backbone.norm is group, its batch norms are frozen"),
        (backbone.name.startswith("resnet"), f"backbone.name is {backbone.name}, only ResNets are exported"),
        (not timm or _timm_has(backbone), "a dilated backbone comes from timm, and only ResNets of width 64 agree"),
        (model.num_heads * model.head_dim == model.d_model, "num_heads × head_dim is not d_model"),
        (model.encoder_block == model.decoder_block == "post_norm", "its blocks are post_norm"),
        (model.position != "learned", "position is learned, which is not written in its names"),
        (not (other := beyond_tensors(model)), other),
    ):
        if not fits:
            raise InputError(f"DetrForObjectDetection cannot build this model: {reason}")
    rows = _layout(RESNET if timm else OWN_RESNET, **PUBLISHED)
    theirs = rename(without(state, suffixes=(COUNTER,)), swapped(rows), "the checkpoint")
    return in_float32(theirs), model_json(card), preprocessor_json(card.images)


def _timm_has(backbone: BackboneConfig) -> bool:
    return backbone.width == 64 and is_bottleneck(backbone.name)


def _categories(config: Mapping[str, Any], num_classes: int, folder: Path) -> Categories:
    """Return the categories under `id2label`; ids of their own stand in `category_ids` where we wrote the file."""
    named = config.get("id2label") or {str(label): f"LABEL_{label}" for label in range(num_classes)}
    try:
        names = {int(label): str(name) for label, name in named.items()}
    except (AttributeError, ValueError):
        raise InputError(f"{folder}/config.json: id2label is not an object with numbers for keys") from None
    if sorted(names) != list(range(num_classes)):
        raise InputError(
            f"{folder}/config.json: names {len(names)} in id2label, but there are {num_classes} classes in the tensors "
            "(and one for no object): they do not belong together"
        )
    categories = slots([names[label] for label in range(num_classes)])
    ids = config.get("category_ids")
    if isinstance(ids, list) and len(ids) == num_classes:
        return Categories(ids=tuple(map(int, ids)), names=categories.names)
    return categories
