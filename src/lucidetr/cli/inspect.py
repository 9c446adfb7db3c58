"""lucidetr inspect: what happened inside a run, as one page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lucidetr.errors import InputError
from lucidetr.fields import HUGE, check_ranges


@dataclass(frozen=True)
class Options:
    """Look inside a run: one HTML page with its course, weights, gradients, pictures, queries and errors."""

    run: Annotated[str, tyro.conf.Positional]
    """A run's folder."""
    images: str = ""
    """Validation images to look at one by one, by their COCO ids: 3,17. Left out: four, spread over the split."""
    out: str = ""
    """The page; left out: RUN/report.html."""
    save_figures: str = ""
    """A folder for every figure as PNG and SVG."""
    most: int = 200
    """Of a larger validation split only so many images, evenly spread, are looked at."""


def run(arguments: list[str]) -> None:
    """Write the page; print the warnings in it and where it lies."""
    options = tyro.cli(Options, args=arguments, prog="lucidetr inspect")
    check_ranges(options, "--", {"most": (1, HUGE)})
    wanted = image_ids(options.images)
    folder = Path(options.run)
    out = Path(options.out) if options.out else folder / "report.html"
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out {out}: give the page a name that ends in .html")

    from lucidetr.inspection.material import open_run
    from lucidetr.inspection.report import SECTIONS, write_report
    from lucidetr.training.progress import ProgressLine

    material = open_run(folder, wanted, most=options.most)
    saved = Path(options.save_figures) if options.save_figures else None
    line = ProgressLine()
    try:
        page, warnings = write_report(
            material, out, saved, lambda name: line.show(SECTIONS.index(name) / len(SECTIONS), f"looking at {name}")
        )
    finally:
        line.close()
    for warning in warnings:
        print(f"warning: {warning}")
    if saved:
        print(f"figures: {saved}")
    print(f"report: {page}")


def image_ids(text: str) -> list[int]:
    """Return the ids in a list such as 3,17.

    >>> image_ids("3, 17"), image_ids("")
    ([3, 17], [])
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if wrong := [word for word in words if not word.removeprefix("-").isdecimal()]:
        raise InputError(f"--images {text}: {wrong[0]} is no image id; give whole numbers, for example 3,17")
    return [int(word) for word in words]
