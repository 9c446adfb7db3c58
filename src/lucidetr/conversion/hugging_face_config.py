"""`config.json` and `preprocessor_config.json` of a Hugging Face DETR folder, read and written."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lucidetr.config import BackboneConfig, ImageConfig, ModelCard
from lucidetr.conversion.describe import is_bottleneck
from lucidetr.errors import InputError
from lucidetr.models.backbones import DEPTHS

BILINEAR = 2  # Pillow's number for it
OWN_RESNET_EXPANSION = 4  # of a bottleneck

# settings that change what the network computes and that we build in one way only
FIXED: dict[str, Any] = {
    "model_type": "detr",
    "activation_function": "relu",
    "num_channels": 3,
    "position_embedding_type": "sine",
    "auxiliary_loss": False,  # there it norms the queries between the decoder layers too: another network
}
FIXED_RESNET: dict[str, Any] = {
    "num_channels": 3,
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}
LAST_STAGE = ("stage4", "layer4", 4, -1)
FIXED_TIMM: dict[str, Any] = {"num_channels": 3}
FIXED_PREPROCESSOR: dict[str, Any] = {"do_resize": True, "do_rescale": True, "resample": BILINEAR}


@dataclass(frozen=True)
class Described:
    """Hold what `config.json` says and the tensors do not show."""

    backbone: str  # resnet: the library's own; else a name of timm's
    dilation: bool
    num_heads: int
    dropout: float


def read_model_json(config: Mapping[str, Any], place: str) -> Described:
    """Return what cannot be seen in the tensors; a setting that we do not build is an InputError."""
    _check(config, FIXED, place)
    heads = {config.get(f"{part}_attention_heads", 8) for part in ("encoder", "decoder")}
    hidden = {config.get(f"{part}_ffn_dim", 2048) for part in ("encoder", "decoder")}
    for what, values in (("attention_heads", heads), ("ffn_dim", hidden)):
        if len(values) > 1:
            raise InputError(f"{place}: encoder_{what} and decoder_{what} differ ({sorted(values)}): ours are equal")
    backbone, dilation = _backbone(config, place)
    dropout = config.get("dropout", 0.1)
    if not isinstance(dropout, float | int):
        raise InputError(f"{place}: dropout is {dropout!r}, expected a number")
    return Described(backbone, dilation, int(heads.pop()), float(dropout))


def _backbone(config: Mapping[str, Any], place: str) -> tuple[str, bool]:
    """Return the backbone's name and whether its last stage is dilated.

    Files up to version 4 say `backbone`, `dilation` and `backbone_kwargs` at the top, later ones `backbone_config`.
    The own ResNet ignores `dilation`, so we do.
    """
    nested = config.get("backbone_config")
    if nested is None and config.get("use_timm_backbone", True):
        options = config.get("backbone_kwargs") or {}
        nested = {"model_type": "timm_backbone", "backbone": config.get("backbone") or "resnet50"}
        nested |= {"output_stride": 16 if config.get("dilation") else None}
        nested |= {key: options[key] for key in ("output_stride", "out_indices", "num_channels") if key in options}
    nested = nested or {"model_type": "resnet"}
    kind = nested.get("model_type")
    place = f"{place}: backbone"
    if kind == "resnet":
        _check(nested, FIXED_RESNET, place)
        _last(nested.get("out_features") or nested.get("out_indices"), place)
        return "resnet", False
    if kind != "timm_backbone":
        raise InputError(f"{place} model_type {kind!r} is not known: resnet and timm_backbone are")
    _check(nested, FIXED_TIMM, place)
    _last(nested.get("out_features") or nested.get("out_indices"), place)
    name = str(nested.get("backbone"))
    if name.partition(".")[0] not in DEPTHS:  # a dot separates timm's architecture from its training
        raise InputError(f"{place} {name} is not known: {', '.join(DEPTHS)} are")
    stride = nested.get("output_stride")
    if stride not in (None, 32, 16):
        raise InputError(f"{place} has output_stride {stride}: 32 and 16 (DC5) are known")
    return name, stride == 16


def _last(outputs: Any, place: str) -> None:
    """Check that the last of the backbone's outputs, the one that the detector reads, is that of its last stage."""
    if outputs and outputs[-1] not in LAST_STAGE:
        raise InputError(f"{place} ends with output {outputs[-1]!r}: only the last stage is read here")


def _check(values: Mapping[str, Any], fixed: Mapping[str, Any], place: str) -> None:
    for name, expected in fixed.items():
        if values.get(name, expected) != expected:
            raise InputError(f"{place}: {name} is {values[name]!r}, and only {expected!r} is converted")


def model_json(card: ModelCard) -> dict[str, Any]:
    """Return the `config.json` of a model that `DetrForObjectDetection` can build."""
    model = card.model
    names = card.categories.names
    return {
        "architectures": ["DetrForObjectDetection"],
        "model_type": "detr",
        "activation_function": "relu",
        "auxiliary_loss": False,
        "position_embedding_type": "sine",
        "num_channels": 3,
        "num_queries": model.num_queries,
        "d_model": model.d_model,
        "encoder_layers": model.encoder_layers,
        "decoder_layers": model.decoder_layers,
        "encoder_attention_heads": model.num_heads,
        "decoder_attention_heads": model.num_heads,
        "encoder_ffn_dim": model.feed_forward,
        "decoder_ffn_dim": model.feed_forward,
        "dropout": model.dropout,
        "attention_dropout": model.dropout,
        "activation_dropout": model.dropout,
        "dilation": model.backbone.dilation,
        "use_timm_backbone": model.backbone.dilation,
        "use_pretrained_backbone": False,
        # a dilated backbone is timm's, said as in the published files, which every version of the library reads
        "backbone": model.backbone.name if model.backbone.dilation else None,
        "backbone_config": None if model.backbone.dilation else _resnet_json(model.backbone),
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
        "category_ids": list(card.categories.ids),  # ours: the library has labels 0…K−1 only
        "dtype": "float32",
    }


def _resnet_json(backbone: BackboneConfig) -> dict[str, Any]:
    bottleneck = is_bottleneck(backbone.name)
    expansion = OWN_RESNET_EXPANSION if bottleneck else 1
    return {
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": backbone.width,
        "hidden_sizes": [backbone.width * expansion * 2**stage for stage in range(4)],
        "depths": list(DEPTHS[backbone.name][1]),
        "layer_type": "bottleneck" if bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "out_features": ["stage4"],
    }


def images_config(preprocessor: Mapping[str, Any], place: str) -> ImageConfig:
    """Return sizes and normalisation of a `preprocessor_config.json`.

    >>> images_config({"size": 640, "max_size": 1000, "do_normalize": False}, "preprocessor_config.json")
    ImageConfig(resize='shortest', size=640, max_size=1000, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    """
    _check(preprocessor, FIXED_PREPROCESSOR, place)
    factor = preprocessor.get("rescale_factor", 1 / 255)
    if abs(factor * 255 - 1) > 1e-6:
        raise InputError(f"{place}: rescale_factor is {factor}, and only 1/255 is converted")
    normalised = preprocessor.get("do_normalize", True)
    return ImageConfig(
        **_size(preprocessor, place),
        mean=_three(preprocessor.get("image_mean", ImageConfig.mean), place) if normalised else (0.0, 0.0, 0.0),
        std=_three(preprocessor.get("image_std", ImageConfig.std), place) if normalised else (1.0, 1.0, 1.0),
    )


def _size(preprocessor: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the fields of `ImageConfig` for a size: a number and max_size in old files, an object in later ones."""
    size = preprocessor.get("size") or {"shortest_edge": ImageConfig.size, "longest_edge": ImageConfig.max_size}
    if isinstance(size, int):
        size = {"shortest_edge": size, "longest_edge": preprocessor.get("max_size", ImageConfig.max_size)}
    if isinstance(size, dict):
        shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
        if isinstance(shortest, int) and isinstance(longest, int):
            return {"resize": "shortest", "size": shortest, "max_size": longest}
        if isinstance(size.get("height"), int) and size["height"] == size.get("width"):
            return {"resize": "square", "size": size["height"]}
    raise InputError(f"{place}: size {size!r} is not converted: shortest_edge and longest_edge, or a square, are")


def _three(values: Any, place: str) -> tuple[float, float, float]:
    try:
        red, green, blue = map(float, values)
    except (TypeError, ValueError):
        raise InputError(f"{place}: {values!r} is not one number for each of red, green and blue") from None
    return red, green, blue


def preprocessor_json(images: ImageConfig) -> dict[str, Any]:
    """Return the `preprocessor_config.json` that prepares pictures as we do."""
    square = {"height": images.size, "width": images.size}
    shortest = {"shortest_edge": images.size, "longest_edge": images.max_size}
    return {
        "image_processor_type": "DetrImageProcessor",
        "format": "coco_detection",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_pad": True,
        "resample": BILINEAR,
        "rescale_factor": 1 / 255,
        "size": square if images.resize == "square" else shortest,
        "image_mean": list(images.mean),
        "image_std": list(images.std),
    }
