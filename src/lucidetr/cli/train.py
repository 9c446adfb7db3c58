"""lucidetr train: a recipe, changed by options, on a data set."""

import tyro

from lucidetr.config import TrainConfig
from lucidetr.errors import InputError
from lucidetr.recipes import RECIPES, recipe


def run(arguments: list[str]) -> None:
    """Train and draw the curves."""
    if arguments and arguments[0] in ("-h", "--help"):
        arguments = ["detr-r50", "--help"]
    if not arguments or arguments[0].startswith("-"):
        raise InputError(f"which recipe? lucidetr train RECIPE --data DATA …; RECIPE is one of {', '.join(RECIPES)}")
    name, *options = arguments
    config = tyro.cli(TrainConfig, default=recipe(name), args=options, prog=f"lucidetr train {name}")

    from lucidetr.cli.engines import choose_engine
    from lucidetr.inspection.curves import draw_curves
    from lucidetr.training.loop import train

    folder = train(*choose_engine(config))
    print(f"curves: {draw_curves(folder, folder / 'curves.png')}")
