"""lucidetr data: jobs on data sets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lucidetr.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Write:
    """Write a generated data set as a COCO folder, for any other program to train on."""

    source: Annotated[str, tyro.conf.Positional]
    """For example generated:digits, or 'generated:digits?size=256&objects=5-60'."""
    folder: Annotated[str, tyro.conf.Positional]
    """A new folder."""


def write(arguments: list[str]) -> None:
    """Write annotations/SPLIT.json and SPLIT/*.png."""
    options = tyro.cli(Write, args=arguments, prog="lucidetr data write")

    from lucidetr.data.export import write_generated

    folder = Path(options.folder)
    for split, count in write_generated(options.source, folder).items():
        print(f"{split}: {count} images in {folder / split}, boxes in {folder / 'annotations' / split}.json")


JOBS = {"write": write}


def run(arguments: list[str]) -> None:
    """Run the job named by the first argument."""
    job = arguments[0] if arguments else ""
    if job in ("-h", "--help"):
        print("lucidetr data write SOURCE FOLDER   write a generated data set as a COCO folder")
    elif job in JOBS:
        JOBS[job](arguments[1:])
    else:
        raise InputError(f"lucidetr data {job}: {did_you_mean(job, JOBS)}")
