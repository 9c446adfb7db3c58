"""ResNet-18/34/50/101 of torchvision: a backbone to start from (He et al. 2015)."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lucidetr.config import ImageConfig
from lucidetr.conversion.describe import backbone_card, resnet_config
from lucidetr.conversion.names import COUNTER, Converted, Rows, account, in_float32, prefixed, rename, without
from lucidetr.models.backbones import ResNet

# also the names inside facebookresearch's files and of the timm backbone in Hugging Face's
RESNET: Rows = (
    ("conv1.weight", "stem.conv.weight"),
    ("bn1.{leaf}", "stem.norm.{leaf}"),
    *(
        row
        for stage in range(4)
        for row in (
            (f"layer{stage + 1}.{{block}}.conv{{n}}.weight", f"stages.{stage}.{{block}}.conv{{n}}.weight"),
            (f"layer{stage + 1}.{{block}}.bn{{n}}.{{leaf}}", f"stages.{stage}.{{block}}.norm{{n}}.{{leaf}}"),
            (f"layer{stage + 1}.{{block}}.downsample.0.weight", f"stages.{stage}.{{block}}.shortcut.conv.weight"),
            (f"layer{stage + 1}.{{block}}.downsample.1.{{leaf}}", f"stages.{stage}.{{block}}.shortcut.norm.{{leaf}}"),
        )
    ),
)
CLASSIFIER = "fc."  # the 1000 ImageNet classes


def matches(names: Collection[str]) -> bool:
    """Return whether these are the names of a torchvision ResNet."""
    return "conv1.weight" in names and "layer4.0.conv1.weight" in names


def convert_torchvision(state: Mapping[str, Tensor], source: str) -> Converted:
    """Return the backbone; its ImageNet classifier is left out."""
    kept = without(state, prefixes=(CLASSIFIER,), suffixes=(COUNTER,))
    ours = in_float32(rename(kept, prefixed(RESNET, "", "backbone."), source))
    backbone = resnet_config(ours, dilation=False, source=source)
    with torch.device("meta"):
        empty = ResNet(backbone)
    account({name.removeprefix("backbone."): tensor for name, tensor in ours.items()}, empty, source)
    return Converted(ours, backbone_card(backbone, ImageConfig()), ("the ImageNet classifier (fc) is left out",))
