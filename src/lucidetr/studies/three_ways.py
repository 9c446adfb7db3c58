"""Three ways: the reference written out in plain arithmetic, the fast engine, and going on from trained weights.

On the same data with the same budget, once counted in images and once in minutes, or by `--steps` in steps alone.
Reference and fast engine train lucid-xs and compute the same function, so for equal images they should reach the same
and differ in time alone. What trained weights are worth is seen on lucid-s-lite0 at 128 pixels: its backbone from
ImageNet (extra `pretrained`), against the same network from random weights. `--weights FILE` adds a detector that goes
on from that file, and its network from random weights.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lucidetr.config import TrainConfig
from lucidetr.conversion.names import backbone_only
from lucidetr.errors import InputError
from lucidetr.recipes import DETR_R50, LUCID_S_LITE0, LUCID_XS, RECIPES
from lucidetr.studies.experiment import (
    FEW_DATA,
    Contender,
    Plan,
    Result,
    aps,
    gains,
    in_words,
    numbers,
    run_grid,
    run_one,
    spread,
)
from lucidetr.studies.page import Page, draw_bars, markdown_table, save, write_page
from lucidetr.training.start import load_start

USUAL = Plan(minutes=2.0, seeds=3, images=3200)
QUICK = Plan(minutes=0.1, seeds=1, images=160, data=FEW_DATA, quick=True)
REFERENCE, FAST = "reference engine", "fast engine"
TUNED, RANDOM = "lite0 from ImageNet", "lite0 from random weights"

LITE0 = replace(
    LUCID_S_LITE0,
    model=replace(LUCID_S_LITE0.model, num_queries=LUCID_XS.model.num_queries),
    images=LUCID_XS.images,
    augmentation=LUCID_XS.augmentation,
    batch=LUCID_XS.batch,
    micro_batch=LUCID_XS.micro_batch,
)


def study(folder: Path, plan: Plan) -> Path:
    """Train, draw and write the page."""
    trained = run_grid(folder / "three-ways.jsonl", contenders(plan), plan, run_one)
    names = list(ways(plan))
    figures, tables = [], []
    for kind, budget in budgets(plan).items():
        says = f"AP after {budget}"
        values = {name: aps(trained[kind, name]) for name in names}
        bars = save(
            folder / f"three-ways-{kind}.png", (7, 2.5), lambda f, v=values, s=says: draw_bars(f.subplots(), v, s)
        )
        figures.append((bars, f"{says}; dots are seeds."))
        tables.append(table(says, {name: trained[kind, name] for name in names}))
    answer = [sentence for kind in budgets(plan) for sentence in sentences(kind, trained, plan)]
    page = Page("Three ways to train", __doc__ or "", tuple(figures), tuple(tables), tuple(answer))
    return write_page(folder, "three-ways", page, plan, [r for runs in trained.values() for r in runs])


def ways(plan: Plan) -> dict[str, TrainConfig]:
    """Return the config of each way to train."""
    found = {
        # the reference computes in float32, so the fast engine does, too: they differ in time alone
        REFERENCE: replace(LUCID_XS, engine="reference", precision="fp32"),
        FAST: replace(LUCID_XS, precision="fp32"),
        TUNED: LITE0,
        RANDOM: replace(LITE0, weights=""),
    }
    return found | (from_checkpoint(plan.weights) if plan.weights else {})


def budgets(plan: Plan) -> dict[str, str]:
    """Return what each kind of run is given.

    >>> budgets(Plan(minutes=2, seeds=3, images=3200)), budgets(Plan(minutes=2, seeds=3, steps=400))
    ({'images': '3200 images', 'minutes': '2 minutes'}, {'steps': '400 steps'})
    """
    if plan.steps:
        return {"steps": f"{plan.steps} steps"}
    return {"images": f"{plan.images} images", "minutes": f"{plan.minutes:g} minutes"}


def contenders(plan: Plan) -> Iterator[Contender]:
    """Yield each way with each budget."""
    for kind in budgets(plan):
        for name, config in ways(plan).items():
            steps = max(plan.images // config.batch, 1) if kind == "images" else 0
            yield kind, name, replace(config, steps=steps)


def from_checkpoint(file: str) -> dict[str, TrainConfig]:
    """Return the config that goes on from a detector's weights, and that of its network from random ones."""
    start = load_start(TrainConfig(weights=file))
    if start is None or backbone_only(start.state):
        raise InputError(f"--weights {file}: a whole detector is needed here, this is a backbone only")
    card = start.card
    kin = LUCID_XS if card.model.classification == "sigmoid" else DETR_R50
    base = replace(RECIPES.get(card.recipe, kin), weights="")
    optimiser = replace(base.optimiser, matrices="adamw")  # as a whole detector goes on; both ways alike
    fitting = {"model": card.model, "images": card.images, "optimiser": optimiser}
    stem = str(Path(file))  # every run's file has the same name
    return {
        f"{stem} tuned": replace(base, weights=file, **fitting),
        f"{stem}, random weights": replace(base, **fitting),
    }


def table(says: str, trained: dict[str, list[Result]]) -> str:
    """Return each way with its images, its time and what it reached."""
    rows = []
    for name, runs in trained.items():
        images = [r.images_per_second * r.numbers["seconds"] for r in runs]
        rows.append(
            [
                name,
                ", ".join(sorted({r.precision for r in runs})) or "–",
                spread(images, 0),
                spread(numbers(runs, "seconds"), 0),
                spread([r.images_per_second for r in runs], 1),
                spread(aps(runs)),
                spread([r.ap50 for r in runs]),
            ]
        )
    return markdown_table([says, "precision", "images", "seconds", "images/s", "AP", "AP50"], rows)


def sentences(kind: str, trained: dict[tuple[str, str], list[Result]], plan: Plan) -> Iterator[str]:
    """Yield what the numbers of one budget say."""
    slow, fast = trained[kind, REFERENCE], trained[kind, FAST]
    if slow and fast:
        ratio = mean_speed(fast) / mean_speed(slow)
        yield (
            f"Equal {kind}: the fast engine sees {ratio:.1f} times as many images a second as the reference; "
            f"fast against reference: {in_words(gains(fast, slow))}."
        )
    compared = [("from ImageNet", TUNED, RANDOM)]
    if plan.weights:
        tuned, random = list(ways(plan))[-2:]
        compared.append((tuned, tuned, random))
    for says, one, other in compared:
        gain = in_words(gains(trained[kind, one], trained[kind, other]))
        yield f"Equal {kind}: {says} against random weights: {gain}."


def mean_speed(runs: list[Result]) -> float:
    """Return the mean number of images a second."""
    return sum(r.images_per_second for r in runs) / len(runs)
