"""The door: a weight file or folder of any known kind becomes our weights and card, and back again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lucidetr.config import ModelCard
from lucidetr.conversion import efficientnet, facebook, hugging_face, torchvision
from lucidetr.conversion.describe import empty_model
from lucidetr.conversion.names import COUNTER, Converted, account, without
from lucidetr.conversion.read import read_json, read_pth, read_safetensors
from lucidetr.errors import InputError

KNOWN = (
    "a facebookresearch/detr .pth, a folder of Hugging Face's DetrForObjectDetection (config.json and "
    "model.safetensors), a torchvision ResNet .pth, an EfficientNet-Lite0 .pth"
)


def convert(source: Path, dilation: bool | None = None, num_heads: int | None = None) -> Converted:
    """Return the weights in a file or folder under our names, with their card; the kind is seen by the names inside.

    `dilation` and `num_heads` are needed for a facebookresearch file that keeps no options, and only there.
    Any name without a place, on either side, is an InputError that lists it.
    """
    file = source / "model.safetensors" if source.is_dir() else source
    payload = read_safetensors(file) if file.suffix == ".safetensors" else read_pth(file)
    if not isinstance(payload, Mapping):
        raise InputError(f"{source}: holds a {type(payload).__name__}, not weights by name. Known: {KNOWN}")
    state = _tensors(payload, source)
    if facebook.matches(state):
        return facebook.convert_facebook({**payload, "model": state}, source, dilation, num_heads)
    converted = _hugging_face(state, file.parent) if hugging_face.matches(state) else _backbone(state, source)
    for name, value in (("dilation", dilation), ("num_heads", num_heads)):
        if value is not None:
            raise InputError(f"{source}: {name} is only asked of a facebookresearch file: leave it out")
    return converted


def _hugging_face(state: dict[str, Tensor], folder: Path) -> Converted:
    config = read_json(folder / "config.json")
    preprocessor = folder / "preprocessor_config.json"
    return hugging_face.convert_hugging_face(
        state, config, read_json(preprocessor) if preprocessor.is_file() else None, folder
    )


def _backbone(state: dict[str, Tensor], source: Path) -> Converted:
    if torchvision.matches(state):
        return torchvision.convert_torchvision(state, str(source))
    if efficientnet.matches(state):
        return efficientnet.convert_efficientnet(state, str(source))
    raise InputError(f"{source}: weights of an unknown kind, with {_sample(state)}. Known: {KNOWN}")


def _tensors(payload: Mapping[str, Any], source: Path) -> dict[str, Tensor]:
    """Return the tensors by name: the payload itself, or what a training script put under `model`."""
    state = payload.get("model", payload)
    if not isinstance(state, Mapping):
        raise InputError(f"{source}: `model` holds a {type(state).__name__}, not weights by name")
    odd = [str(name) for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if odd:
        raise InputError(f"{source}: not weights by name, {_sample(odd)} is no tensor. Known: {KNOWN}")
    return dict(state)


def _sample(names: Any) -> str:
    return ", ".join(list(names)[:3]) + (", …" if len(names) > 3 else "") if names else "nothing inside"


def _need_detector(card: ModelCard) -> None:
    if not card.categories:
        raise InputError("a backbone alone cannot be written as a detector: train one from it by --weights first")


def export_hugging_face(state: Mapping[str, Tensor], card: ModelCard, folder: Path) -> None:
    """Write a folder that `DetrForObjectDetection.from_pretrained` loads; an unknown kind of model is an InputError."""
    _need_detector(card)
    account(without(state, suffixes=(COUNTER,)), empty_model(card.model), "the model")
    tensors, config, preprocessor = hugging_face.export_hugging_face(state, card)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, values in (("config.json", config), ("preprocessor_config.json", preprocessor)):
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def export_facebook(state: Mapping[str, Tensor], card: ModelCard, path: Path) -> None:
    """Write a `.pth` with the names of facebookresearch/detr; an unknown kind of model is an InputError."""
    _need_detector(card)
    account(without(state, suffixes=(COUNTER,)), empty_model(card.model), "the model")
    payload = facebook.export_facebook(state, card)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(payload, path)
