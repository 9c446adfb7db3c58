"""lucidetr study: experiments that make a table or figure of the pages anew."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lucidetr.errors import InputError


@dataclass(frozen=True)
class Options:
    """Run a study; what is done already is not done again."""

    name: Annotated[Literal["ladder"], tyro.conf.Positional]
    """ladder: from detr-xs to lucid-xs, one named change at a time, and lucid-xs with each change taken away."""
    out: str
    """Folder of its results."""
    minutes: float = 2.0
    """Of training for each run."""
    seeds: int = 3
    threads: int = 0
    """Of the processor; 0: as many as it has."""
    clock: Literal["wall", "processor"] = "wall"
    """What minutes count; processor: one thread's own time, which other jobs cannot take away (--threads 1)."""
    part: str = "1/1"
    """2/3: this process takes the second of three shares of the runs."""
    data: str = "generated:digits"


def run(arguments: list[str]) -> None:
    """Run the study and write its table."""
    options = tyro.cli(Options, args=arguments, prog="lucidetr study")
    number, _, parts = options.part.partition("/")
    if not (number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts)):
        raise InputError(f"--part {options.part}: expected for example 1/2")
    if options.minutes <= 0 or options.seeds < 1 or options.threads < 0:
        raise InputError(f"--minutes {options.minutes:g} --seeds {options.seeds} --threads {options.threads}: too few")

    import torch

    from lucidetr.studies.ladder import ladder_page, run_study

    if options.threads:
        torch.set_num_threads(options.threads)
    file = Path(options.out) / "ladder.jsonl"
    run_study(file, options.minutes, options.seeds, (int(number), int(parts)), options.data, options.clock)
    page = file.with_suffix(".md")
    page.write_text(ladder_page(file) + "\n", encoding="utf-8")
    print(f"table: {page}")
