"""Every recipe as an exported file at its own size: how far it is from torch, and how large."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import Threads, note, read_options
from benchmarks.pair import card_of, tiny, untrained
from lucidetr.config import ModelCard
from lucidetr.data.dataset import open_dataset
from lucidetr.deployment.export import (
    SUFFIXES,
    compare,
    differences,
    metadata,
    onnx_to_openvino,
    trace,
    write_onnx,
    write_torch,
)
from lucidetr.deployment.exported import open_exported, sides
from lucidetr.models.detr import DETR
from lucidetr.recipes import RECIPES, recipe

SCENES = "generated:digits?size=320&val=8"


@dataclass(frozen=True)
class Options(Threads):
    """Write, open and compare; each recipe has 10 classes and random weights."""

    recipes: str = ",".join(RECIPES)
    pictures: int = 2
    """Generated scenes that are compared, square and upright, each alone, then up to three in one padded batch."""
    shapes: int = 0
    """Batches of noise that are compared too: one to four padded pictures of any sides up to the recipe's."""
    quick: bool = False
    """Models of a few thousand parameters for pictures of 64 pixels, only to see that this works."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare each recipe's files with its model, print, and append a line for each recipe to results.jsonl."""
    options = read_options(Options, arguments, "exports")
    for name in options.recipes.split(","):
        files, side = measured(name, options)
        for form, row in files.items():
            print(f"{name}, {form}: " + ", ".join(f"{key} {value:.3g}" for key, value in row.items()), flush=True)
        settings = {"recipe": name, "pictures": options.pictures, "shapes": options.shapes}
        note("exports", settings, {"side": side, "files": files})


@torch.no_grad()
def measured(name: str, options: Options) -> tuple[dict[str, dict[str, float]], int]:
    """Return for each kind of file its bytes and its largest differences from the model, and the pictures' side."""
    config = tiny(recipe(name)) if options.quick else recipe(name)
    images = replace(config.images, size=64, max_size=107) if options.quick else config.images
    config = replace(config, model=replace(config.model, num_classes=10))
    card, model = card_of(config, images), varied(untrained(config, sharp=True)).eval()
    scenes = open_dataset(SCENES, "val")
    pictures = [scenes.image(index)[:, :, : 320 - 80 * (index % 2)] for index in range(options.pictures)]
    truths = [(batch, model(*batch)) for batch in noise(card, options.shapes)]
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for form, file in written(model, card, Path(folder)).items():
            exported, _, _ = open_exported(file, "fp32")
            agreements = compare(exported, model, card, pictures)
            row = {kind: max(getattr(each, kind) for each in agreements) for kind in ("logits", "boxes", "scores")}
            row["bytes"] = sum(each.stat().st_size for each in Path(folder).glob(f"{form}.*"))
            apart = [differences(exported(*batch), truth) for batch, truth in truths]
            if apart:
                row |= {"shapes_logits": max(pair[0] for pair in apart), "shapes_boxes": max(pair[1] for pair in apart)}
            found[form] = row
    return found, images.size


def varied(model: DETR) -> DETR:
    """Vary what starts all alike, such as box heads and branches at zero, so that every part has something to say."""
    for parameter in model.parameters():
        if parameter.numel() > 1 and parameter.std(correction=0) == 0:
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def written(model: DETR, card: ModelCard, folder: Path) -> dict[str, Path]:
    """Write a model as each kind of file, all from one graph."""
    files = {form: folder / f"{form}{suffix}" for form, suffix in SUFFIXES.items()}
    program, about = trace(model), metadata(card)
    write_onnx(program, about, files["onnx"])
    onnx_to_openvino(files["onnx"], about, files["openvino"])
    write_torch(program, about, files["torch"])
    return files


def noise(card: ModelCard, number: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of noise and their padding, each of another number, height and width."""
    generator = torch.Generator().manual_seed(0)
    least, most = sides(card.model)[0], card.images.size
    for _ in range(number):
        size = int(torch.randint(1, 5, (1,), generator=generator))
        height, width = torch.randint(least, most + 1, (2,), generator=generator).tolist()
        images = torch.randn(size, 3, height, width, generator=generator)
        padding = torch.zeros(size, height, width, dtype=torch.bool)
        for index in range(1, size):  # the first fills the batch; none is so small that padding would become queries
            padding[index, max(least, int(height * (0.6 + 0.1 * index))) :] = True
            padding[index, :, max(least, width - 5 * index) :] = True
        yield images.masked_fill(padding[:, None], 0.0), padding
