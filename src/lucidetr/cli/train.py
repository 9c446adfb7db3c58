"""lucidetr train: a recipe, or what fits the data, changed by options, on a data set."""

from pathlib import Path

import tyro

from lucidetr.config import TrainConfig
from lucidetr.errors import InputError
from lucidetr.recipes import RECIPES, recipe


def run(arguments: list[str]) -> None:
    """Train and draw the curves; of several ranks the first draws and speaks."""
    config = read_config(arguments, "lucidetr train")

    from lucidetr.inspection.curves import draw_curves
    from lucidetr.studies.engines import choose_engine
    from lucidetr.training.distributed import launched
    from lucidetr.training.loop import train

    folder = train(*choose_engine(config))
    if launched().first:
        print(f"curves: {draw_curves(folder, folder / 'curves.png')}")


def read_config(arguments: list[str], program: str) -> TrainConfig:
    """Return the config of a command line: a recipe, or what fits the data, changed by options."""
    named = bool(arguments) and not arguments[0].startswith("-")
    if not arguments:
        raise InputError(f"what on? {program} [RECIPE] --data DATA …; RECIPE is one of {', '.join(RECIPES)}")
    name, options = (arguments[0], arguments[1:]) if named else ("lucid-xs", arguments)
    program = f"{program} {name if named else '[RECIPE]'}"
    base = recipe(name)
    config = tyro.cli(TrainConfig, default=base, args=options, prog=program)
    if named:
        return config

    from lucidetr.training.run_log import asked_of

    # a run that goes on keeps the settings that it began with: another machine might choose others
    base = (asked_of(Path(config.out)) if config.resume else None) or choose_for(config)
    return tyro.cli(TrainConfig, default=base, args=options, prog=program)


def choose_for(config: TrainConfig) -> TrainConfig:
    """Return the recipe that fits the config's data, and say why it was chosen."""
    from lucidetr.data.dataset import open_training_data
    from lucidetr.training.choice import choose
    from lucidetr.training.distributed import launched, place
    from lucidetr.training.precision import choose_precision

    train_set, _, _ = open_training_data(config)
    device = place(config.device, launched())
    slow = device.type == "cpu" and choose_precision("auto", device) == "fp32"
    chosen, reasons = choose(train_set.annotations, gpu=device.type != "cpu", slow=slow)
    for reason in reasons if launched().first else ():
        print(reason)
    return chosen
