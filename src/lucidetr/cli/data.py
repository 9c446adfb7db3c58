"""lucidetr data: jobs on data sets."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from lucidetr.cli.train import read_config
from lucidetr.errors import InputError, did_you_mean
from lucidetr.fields import HUGE, check_ranges, to_dict

if TYPE_CHECKING:
    from lucidetr.data.dataset import Dataset

SEEDS = (0, 2**31 - 1)
AUGMENTED, VERSIONS = 4, 5  # pictures of a sheet, and how often each

HELP = """\
lucidetr data convert SOURCE FOLDER --to coco|yolo|voc   any data set, generated ones too, as a new folder
lucidetr data split SOURCE FOLDER --val 0.2 --test 0.1   a set without splits, divided at random; see its --help
lucidetr data sample SOURCE SHEET.png                    a sheet of pictures with their boxes
lucidetr data augment [RECIPE] --data SOURCE --out SHEET.png
                                                         pictures as a run's first epochs see them; any setting of train
lucidetr data lock FOLDER                                note the SHA-256 of every file in it, for the doctor to compare
"""


@dataclass(frozen=True)
class Convert:
    """Write a data set as a new folder, for any other program to train on."""

    source: Annotated[str, tyro.conf.Positional]
    """A COCO, YOLO or VOC folder, or for example 'generated:digits?size=256&objects=5-60'."""
    folder: Annotated[str, tyro.conf.Positional]
    """A new folder."""
    to: Literal["coco", "yolo", "voc"] = "coco"
    bad_boxes: Literal["refuse", "drop"] = "refuse"


@dataclass(frozen=True)
class Split:
    """Divide the training split of a data set at random, and write the parts as a new folder."""

    source: Annotated[str, tyro.conf.Positional]
    folder: Annotated[str, tyro.conf.Positional]
    val: float = 0.2
    """Share of the images for validation."""
    test: float = 0.0
    """Share of the images for the test."""
    seed: int = 0
    places: Literal["auto", "all", "off"] = "auto"
    """Keep pictures that show one place in one part; every two of one size are compared; auto: up to 1,000 pictures.

    off: for pictures of many like things in one setting, as before a camera that stands still.
    """
    to: Literal["coco", "yolo", "voc"] = "coco"
    bad_boxes: Literal["refuse", "drop"] = "refuse"


@dataclass(frozen=True)
class Sample:
    """Draw a sheet of pictures with their boxes."""

    source: Annotated[str, tyro.conf.Positional]
    sheet: Annotated[str, tyro.conf.Positional]
    """A picture file: .png or .jpg."""
    split: str = "train"
    images: int = 12
    seed: int = 0
    bad_boxes: Literal["refuse", "drop"] = "refuse"


@dataclass(frozen=True)
class Lock:
    """Note the SHA-256 of every file of a data set in its lock.sha256, which the doctor and sha256sum compare."""

    folder: Annotated[str, tyro.conf.Positional]
    renew: bool = False
    """Write the sums anew where files have changed."""


def convert(arguments: list[str]) -> None:
    """Write every split in another form."""
    options = tyro.cli(Convert, args=arguments, prog="lucidetr data convert")

    from lucidetr.data.export import write_splits

    folder = Path(options.folder)
    tell(write_splits(opened(options), folder, options.to), folder)


def split(arguments: list[str]) -> None:
    """Divide a training split."""
    options = tyro.cli(Split, args=arguments, prog="lucidetr data split")
    check_ranges(options, "--", {"seed": SEEDS})

    from lucidetr.data.export import divide, places_of, write_splits
    from lucidetr.data.places import compares

    splits = opened(options)
    if list(splits) != ["train"]:
        raise InputError(
            f"{options.source} has the splits {', '.join(splits)} already; lucidetr data convert keeps them"
        )
    whole = splits["train"]
    folder = Path(options.folder)
    places = places_of(whole) if compares(len(whole), options.places) else None
    parts = divide(whole, options.val, options.test, options.seed, places)
    tell(write_splits(parts, folder, options.to), folder)
    if places is None:
        print("pictures of one place may lie in different parts (--places all compares every two pictures)")
    elif together := len(whole) - len(set(places.tolist())):
        print(f"{together} pictures stayed with others that show the same place")


def sample(arguments: list[str]) -> None:
    """Draw some pictures."""
    options = tyro.cli(Sample, args=arguments, prog="lucidetr data sample")
    check_ranges(options, "--", {"images": (1, HUGE), "seed": SEEDS})

    from lucidetr.data.dataset import mended, open_dataset
    from lucidetr.data.sheet import draw_sheet

    path = sheet_path(options.sheet)
    refuse_inside(options.source, "", options.sheet)
    dataset = open_dataset(options.source, options.split, options.bad_boxes)
    refuse_inside(options.source, "", options.sheet, pictures_of(dataset))
    for note in mended(dataset):
        print(note)
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(dataset, options.images, options.seed).save(path)
    print(f"{min(options.images, len(dataset))} of {len(dataset)} images of {dataset.name}: {path}")


def augment(arguments: list[str]) -> None:
    """Draw some pictures as training changes them, and say which changes are on."""
    config = read_config(arguments, "lucidetr data augment")

    from lucidetr.data.dataset import open_training_data
    from lucidetr.data.sheet import draw_augmented

    path = sheet_path(config.out)
    for source in (config.data, config.train_images):
        refuse_inside(source, "--out ", config.out)
    dataset, val_set, notes = open_training_data(config)
    for each in (dataset, val_set):
        refuse_inside(config.train_json or config.data, "--out ", config.out, pictures_of(each))
    for note in notes:
        print(note)
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_augmented(dataset, config, AUGMENTED, VERSIONS).save(path)
    print(f"{config.recipe}: {', '.join(f'{k} {v}' for k, v in to_dict(config.augmentation).items())}")
    print(f"left as they are, then as {VERSIONS} epochs see them: {path}")


def lock(arguments: list[str]) -> None:
    """Write down the sums of all files."""
    options = tyro.cli(Lock, args=arguments, prog="lucidetr data lock")

    from lucidetr.data import sums
    from lucidetr.data.splits import find_splits
    from lucidetr.training.checkpoint import write_atomically

    folder = Path(options.folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no folder; give that of a data set")
    find_splits(folder)  # anything else is refused
    if not options.renew:
        sums.refuse_changes(folder)
    lines = sums.sums_of(folder)
    write_atomically(folder / sums.SUMS, "".join(lines).encode("utf-8", "surrogateescape"))
    print(f"{len(lines)} files: {folder / sums.SUMS}")


def sheet_path(text: str) -> Path:
    """Return the path of a sheet; a name that is not a picture's is an InputError."""
    from lucidetr.data.sheet import SHEET_SUFFIXES

    path = Path(text)
    if path.suffix.lower() not in SHEET_SUFFIXES:
        raise InputError(f"{path}: give the sheet a name that ends in one of {', '.join(SHEET_SUFFIXES)}")
    return path


def refuse_inside(data: str, option: str, given: str, pictures: Iterable[Path] = ()) -> None:
    """Refuse to write a file into a data set's folder, or in the place of its description or of one of its pictures."""
    source, target = Path(data).resolve(), Path(given).resolve()
    if not (data and given and source.exists()):
        return
    own = target.is_relative_to(source) if source.is_dir() else target == source
    if own or any(path.name == target.name and path.resolve() == target for path in pictures):
        where = source if source.is_dir() else source.parent
        raise InputError(f"{option}{given} lies in the data set {where}, which stays as it is; write elsewhere")


def pictures_of(dataset: "Dataset") -> Iterator[Path]:
    """Yield the files of a data set's pictures."""
    if dataset.stored:
        yield from (dataset.annotations.folder / str(name) for name in dataset.annotations.file_names)


def opened(options: Convert | Split) -> dict[str, "Dataset"]:
    """Open every split, and say what was done to its boxes."""
    from lucidetr.data.dataset import mended
    from lucidetr.data.export import open_splits

    splits = open_splits(options.source, options.bad_boxes)
    for note in [note for dataset in splits.values() for note in mended(dataset)]:
        print(note)
    return splits


def tell(counts: dict[str, int], folder: Path) -> None:
    """Say what was written."""
    for name, count in counts.items():
        print(f"{name}: {count} images in {folder}")


JOBS = {"convert": convert, "split": split, "sample": sample, "augment": augment, "lock": lock}


def run(arguments: list[str]) -> None:
    """Run the job named by the first argument."""
    job = arguments[0] if arguments else ""
    if job in ("-h", "--help"):
        print(HELP, end="")
    elif job in JOBS:
        JOBS[job](arguments[1:])
    else:
        raise InputError(f"lucidetr data {job}: {did_you_mean(job, JOBS)}")
