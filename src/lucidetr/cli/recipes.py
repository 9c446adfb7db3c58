"""lucidetr recipes: what each named model is and how large, and the ladder that leads from one family to the other."""

from dataclasses import dataclass

import tyro

from lucidetr.errors import InputError
from lucidetr.models.size import measure
from lucidetr.recipes import RECIPES


@dataclass(frozen=True)
class Options:
    """Print the named models and their sizes as a table."""

    ladder: bool = False
    """Print the ladder instead: from detr-xs to lucid-xs, one named change at a time, with what each was worth."""
    neighbours: bool = False
    """Print published models of like size and their AP on COCO instead."""


def run(arguments: list[str]) -> None:
    """Print a table."""
    options = tyro.cli(Options, args=arguments, prog="lucidetr recipes")
    if options.ladder and options.neighbours:
        raise InputError("--ladder and --neighbours are two tables: ask for one of them")
    if options.ladder:
        from lucidetr.studies.ladder import ladder_page

        print(ladder_page())
    elif options.neighbours:
        print(neighbour_table())
    else:
        print(recipe_table())


def recipe_table() -> str:
    """Return a Markdown table of all recipes."""
    rows = [
        "| recipe | backbone | image | encoder, decoder | width | queries | parameters | of these learn | GFLOPs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, config in RECIPES.items():
        model, images, backbone = config.model, config.images, config.model.backbone
        size = measure(config)
        dilated = " DC5" if backbone.dilation else ""
        narrow = f" ({backbone.width} wide)" if backbone.width != 64 else ""
        side = f"{images.size}–{images.max_size}" if images.resize == "shortest" else f"{images.size}²"
        rows.append(
            f"| {name} | {backbone.name}{dilated}{narrow} | {side} | {model.encoder_layers}, {model.decoder_layers} "
            f"| {model.d_model} | {model.num_queries} | {size.parameters:,} | {size.learning:,} | {size.gflops:.1f} |"
        )
    return "\n".join(rows)


@dataclass(frozen=True)
class Neighbour:
    """Hold what a paper or its repository says of a model."""

    beside: str
    name: str
    side: str
    millions: float
    gflops: float
    ap: float
    start: str


NEIGHBOURS = (
    Neighbour("lucid-xs", "DEIMv2-Femto", "416²", 1.0, 1.7, 31.0, "ImageNet"),
    Neighbour("lucid-xs", "DEIMv2-Pico", "640²", 1.5, 5.2, 38.5, "ImageNet"),
    Neighbour("lucid-s", "DEIMv2-N", "640²", 3.6, 6.8, 43.0, "ImageNet"),
    Neighbour("lucid-s", "D-FINE-N", "640²", 4, 7, 42.8, "ImageNet"),
    Neighbour("lucid-m", "RT-DETRv2-S", "640²", 20, 60, 48.1, "ImageNet"),
    Neighbour("lucid-m", "D-FINE-M", "640²", 19, 57, 52.3, "ImageNet"),
    Neighbour("lucid-l", "DETR R50", "800–1333", 41, 172, 42.0, "ImageNet"),
    Neighbour("lucid-l", "D-FINE-L", "640²", 31, 91, 54.0, "ImageNet"),
)


def neighbour_table() -> str:
    """Return a Markdown table of our family beside published models; their numbers are their authors' own.

    The DETR paper counts a multiplication and its sum as one operation (86); here it is doubled, as in the others.
    """
    rows = ["| model | image | parameters | GFLOPs | AP on COCO | starts from |", "|---|---|---|---|---|---|"]
    for name in ("lucid-xs", "lucid-s", "lucid-m", "lucid-l"):
        config, size = RECIPES[name], measure(RECIPES[name])
        rows.append(
            f"| **{name}** | {config.images.size}² | {size.parameters / 1e6:.1f} M | {size.gflops:.1f} "
            "| not trained on it | random weights |"
        )
        rows += [
            f"| {n.name} | {n.side} | {n.millions:g} M | {n.gflops:g} | {n.ap} | {n.start} |"
            for n in NEIGHBOURS
            if n.beside == name
        ]
    return "\n".join(rows)
