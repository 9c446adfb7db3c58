"""Weights and training state on disk: safetensors with a JSON card inside, written whole or not at all.

RUN/best.safetensors and RUN/last.safetensors are models to use: weights, and the card that says how to build them.
RUN/checkpoints/step-N.safetensors hold everything needed to go on with step N + 1, and nothing else needs them.
"""

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lucidetr.config import CARD_SCHEMA, ModelCard
from lucidetr.errors import InputError
from lucidetr.fields import from_dict, to_dict

MODEL_FILES = ("best.safetensors", "last.safetensors")  # in the order of preference
KEPT = 2  # training checkpoints


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file beside its place, then move it there: a reader finds the old one or the new one, never half."""
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    write_atomically(path, content)


def write_atomically(path: Path, content: bytes) -> None:
    """Write bytes to a temporary file, flush them to the disk, and rename; a full disk is said in plain words."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):  # where the folder itself is none, there is nothing to tidy
            temporary.unlink()
        raise InputError(
            f"{path}: cannot be written ({error.strerror}): {len(content):,} bytes are needed; "
            "free some space or choose another folder. What was saved before is unharmed"
        ) from None


def save_model(path: Path, state: dict[str, Tensor], card: ModelCard) -> None:
    """Write a model: its weights, its card inside, and a copy of the card beside it to be read by people."""
    text = json.dumps(to_dict(card), indent=2)
    save_tensors(path, state, {"card": text})
    write_atomically(path.with_suffix(".json"), text.encode())


def has_card(path: Path) -> bool:
    """Say whether this is a model of ours: a run's folder, or a safetensors file with a card inside."""
    if path.is_dir():
        return any((path / name).is_file() for name in MODEL_FILES)
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return "card" in (file.metadata() or {})
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None


def load_model(path: Path) -> tuple[dict[str, Tensor], ModelCard]:
    """Read a model's weights and card; `path` is the file, or a run's folder whose best (else last) model counts."""
    if path.is_dir():
        found = [path / name for name in MODEL_FILES if (path / name).is_file()]
        if not found:
            raise InputError(f"{path}: no best.safetensors or last.safetensors in it; has this run been trained?")
        path = found[0]
    tensors, metadata = load_tensors(path)
    if "card" not in metadata:
        raise InputError(
            f"{path}: these weights carry no lucidetr card; turn other weights into a model by lucidetr convert"
        )
    values = json.loads(metadata["card"])
    if values.get("schema", 0) > CARD_SCHEMA:
        raise InputError(f"{path}: written by a newer lucidetr (schema {values['schema']}); upgrade to read it")
    return tensors, from_dict(ModelCard, values)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors and the metadata of a safetensors file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None


def save_training(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a training checkpoint and remove all but the newest few."""
    save_tensors(folder / f"step-{step:08d}.safetensors", tensors, {"state": json.dumps(state)})
    for _, old in sorted(training_checkpoints(folder))[:-KEPT]:
        old.unlink()


def training_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, file) of the training checkpoints in a folder."""
    files = folder.glob("step-*.safetensors")
    found = ((re.fullmatch(r"step-(\d+)", file.stem), file) for file in files)
    return [(int(match[1]), file) for match, file in found if match]


def load_newest_training(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Read the training checkpoint of the highest step number that can be read, and name those passed over."""
    notes: list[str] = []
    for _, path in sorted(training_checkpoints(folder), reverse=True):
        try:
            tensors, metadata = load_tensors(path)
            return tensors, json.loads(metadata["state"]), notes
        except (InputError, KeyError, ValueError) as error:
            notes.append(f"passed over a damaged checkpoint: {error}")
    raise InputError(f"{folder}: no checkpoint in it can be read: {'; '.join(notes)}")


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's moments under names such as optimiser.3.exp_avg."""
    states = optimiser.state_dict()["state"]
    return {f"optimiser.{i}.{name}": value for i, state in states.items() for name, value in state.items()}


def load_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimiser its moments back, each laid out in memory as its parameter is.

    The fused step walks through memory without looking at strides: moments in another order than their
    channels-last parameter would silently be those of other weights.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".")
            parameter = parameters[int(index)]
            same_shape = value.shape == parameter.shape
            moments = torch.empty_like(parameter).copy_(value) if same_shape else value
            state.setdefault(int(index), {})[key] = moments
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
