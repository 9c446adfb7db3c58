"""lucidetr recipes: what each named model is, and how large."""

import torch

from lucidetr.config import TrainConfig
from lucidetr.errors import InputError
from lucidetr.models.detr import DETR
from lucidetr.recipes import RECIPES


def run(arguments: list[str]) -> None:
    """Print the table."""
    if arguments in (["--help"], ["-h"]):
        print("lucidetr recipes   print the named models and their sizes as a table; no options")
        return
    if arguments:
        raise InputError(f"lucidetr recipes takes no options (given: {' '.join(arguments)})")
    print(recipe_table())


def count_parameters(config: TrainConfig) -> tuple[int, int]:
    """Return (all parameters, those that learn) of a recipe, without the memory for them."""
    with torch.device("meta"):
        model = DETR(config.model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    frozen = sum(size for name, size in sizes.items() if any(name.startswith(f"{part}.") for part in config.freeze))
    return sum(sizes.values()), sum(sizes.values()) - frozen


def recipe_table() -> str:
    """Return a Markdown table of all recipes."""
    rows = [
        "| recipe | backbone | image | encoder, decoder | width | queries | parameters | of these learn |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, config in RECIPES.items():
        model, images, backbone = config.model, config.images, config.model.backbone
        total, learning = count_parameters(config)
        dilated = " DC5" if backbone.dilation else ""
        narrow = f" ({backbone.width} wide)" if backbone.width != 64 else ""
        size = f"{images.size}–{images.max_size}" if images.resize == "shortest" else f"{images.size}²"
        rows.append(
            f"| {name} | {backbone.name}{dilated}{narrow} | {size} | {model.encoder_layers}, {model.decoder_layers} "
            f"| {model.d_model} | {model.num_queries} | {total:,} | {learning:,} |"
        )
    return "\n".join(rows)
