"""lucidetr predict: pictures and videos in; drawn ones, files of detections and cut-out objects out."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lucidetr.errors import InputError, did_you_mean
from lucidetr.fields import HUGE, check_ranges

DEFAULT = ("drawn", "coco")


@dataclass(frozen=True)
class Options:
    """Find objects in pictures and videos; write drawn ones, and detections as files."""

    model: Annotated[str, tyro.conf.Positional]
    """A run's folder, or a model file."""
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Pictures, videos, folders, patterns ("scenes/**/*.png"); - reads such names from standard input, one a line."""
    out: str = "drawn"
    """Folder of all that is written."""
    write: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """What: drawn, coco (detections.json), jsonl, csv, crops; with commas, or one by one. Left out: drawn,coco."""
    classes: str = ""
    """Only these categories, NAME,NAME (in double quotes where a name holds a comma); left out: all."""
    threshold: str = "0.5"
    """Least score that counts: a number, NAME=NUMBER,… (others: 0.5), or best: the best F1 on the validation set, which
    `lucidetr eval` finds."""
    tile: int = 0
    """Cut large pictures into tiles of so many pixels; 0: look at each as a whole only."""
    overlap: float = 0.2
    """Share of a tile that its neighbour has too."""
    whole: bool = True
    """Look at the whole picture as well as at its tiles."""
    every: int = 1
    """Look at each so many-th frame of a video."""
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    engine: Literal["torch", "compile"] = "torch"
    """compile: slow to start, then faster."""


def run(arguments: list[str]) -> None:
    """Predict, write, say what was found and where it lies."""
    options = tyro.cli(Options, args=arguments, prog="lucidetr predict")
    check_ranges(options, "--", {"tile": (0, HUGE), "overlap": (0, 0.9), "every": (1, HUGE)})
    if 0 < options.tile < 32:
        raise InputError(f"--tile {options.tile}: choose at least 32 pixels, or 0 for no tiles")
    if not options.tile and (not options.whole or options.overlap != Options.overlap):
        given = "--no-whole" if not options.whole else f"--overlap {options.overlap:g}"
        raise InputError(f"{given} is about tiles: give --tile their side in pixels too")

    from lucidetr.deployment.detector import load
    from lucidetr.deployment.inputs import find_sources
    from lucidetr.deployment.outputs import places
    from lucidetr.deployment.predict import Done, predict_files
    from lucidetr.deployment.tiles import Tiling
    from lucidetr.evaluation.thresholds import least_scores, split_names
    from lucidetr.training.progress import ProgressLine, duration

    kinds = kinds_of(options.write)
    detector = load(options.model, options.device, options.precision, options.engine)
    wanted = split_names(options.classes)
    least = least_scores(options.threshold, detector.card.categories, Path(options.model), wanted)
    out = Path(options.out)
    sources = find_sources(options.inputs, out)
    tiling = Tiling(options.tile, options.overlap, options.whole) if options.tile else None
    line, start = ProgressLine(), time.monotonic()

    def progress(done: Done) -> None:
        rate = (done.pictures + done.frames) / max(time.monotonic() - start, 1e-9)
        line.show(done.share, f"{seen(done)}, {rate:.1f} a second, {done.boxes} objects")

    try:
        done = predict_files(
            detector, sources, out, kinds, least, tiling=tiling, every=options.every, progress=progress
        )
    finally:
        line.close()
    seconds = time.monotonic() - start
    rate = (done.pictures + done.frames) / seconds
    print(f"{done.boxes} objects in {seen(done)}, {duration(seconds)}, {rate:.1f} a second")
    for kind, place in places(kinds, out).items():
        print(f"{kind}: {place}")
    if done.refused:
        what = "pictures or videos" if any(source.is_video for source in sources) else "pictures"
        raise InputError(f"{len(done.refused)} {what} could not be used: {'; '.join(done.refused)}")


def kinds_of(words: tuple[str, ...]) -> tuple[str, ...]:
    """Return the kinds of outputs that were asked for, each once; an unknown one is an InputError.

    >>> kinds_of(("csv,crops", "csv")), kinds_of(())
    (('csv', 'crops'), ('drawn', 'coco'))
    """
    from lucidetr.deployment.outputs import WRITERS

    kinds = [kind.strip() for word in words for kind in word.split(",")]
    for kind in kinds:
        if kind not in WRITERS:
            raise InputError(f"--write {kind}: {did_you_mean(kind, WRITERS)}")
    return tuple(dict.fromkeys(kinds)) or DEFAULT


def seen(done) -> str:
    """Return what was looked at, in words."""
    words = [f"{done.pictures} pictures"] if done.pictures or not done.frames else []
    return " and ".join(words + ([f"{done.frames} frames"] if done.frames else []))
