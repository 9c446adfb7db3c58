"""Predictions on pictures and videos: read, looked at, written, one frame after the other."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from lucidetr.deployment.detector import AHEAD, Detector, ahead
from lucidetr.deployment.inputs import Frame, Source, frames
from lucidetr.deployment.outputs import WRITERS, check_places
from lucidetr.deployment.tiles import Tiling, predict_in_tiles
from lucidetr.errors import InputError
from lucidetr.structures import Detections


@dataclass
class Done:
    """Count what was predicted so far, and name each picture or video that could not be used, or not to its end."""

    pictures: int = 0
    frames: int = 0
    boxes: int = 0
    share: float = 0.0  # of the sources
    refused: list[str] = field(default_factory=list)


def predict_files(
    detector: Detector,
    sources: Sequence[Source],
    out: Path,
    kinds: Sequence[str],
    least: Float[Tensor, " category"],
    *,
    tiling: Tiling | None = None,
    every: int = 1,
    progress: Callable[[Done], None] = lambda done: None,
) -> Done:
    """Write what is found in all sources to `out`, in each of the `kinds` of outputs (`WRITERS`).

    `least` is the least score that counts, for each label. Of videos each `every`-th frame is looked at. What cannot
    be read, or is of a size that the model does not take, is named in the result and does not stop the others.
    """
    check_places(kinds, out, sources)
    done = Done()
    order = {source: i for i, source in enumerate(sources)}
    with ExitStack() as stack:
        writers = [stack.enter_context(WRITERS[kind](out, detector.card.categories)) for kind in kinds]
        for frame, found in find(detector, frames(sources, every, done.refused), least, done.refused, tiling):
            for writer in writers:
                writer.add(frame, found)
            done.pictures += frame.number is None
            done.frames += frame.number is not None
            done.boxes += len(found)
            done.share = (order[frame.source] + frame.share) / len(sources)
            progress(done)
    return done


def find(
    detector: Detector,
    some: Iterable[Frame],
    least: Float[Tensor, " category"],
    refused: list[str],
    tiling: Tiling | None = None,
) -> Iterator[tuple[Frame, Detections]]:
    """Yield each frame with what was found in it, few in memory at a time; `refused` gets those that cannot be taken.

    Pictures that are cut into tiles are large, and none is read ahead.
    """
    work = (lambda frame: None) if tiling else (lambda frame: detector.prepare(frame.image))
    named = set()  # of a video every frame is refused, and it is named once
    for frame, prepared in ahead(work, some, 0 if tiling else AHEAD):
        try:
            if tiling:
                found = predict_in_tiles(detector, frame.image, tiling, least)
            else:
                found = detector.detect([prepared.result()])[0].above(least)
        except InputError as error:
            if frame.source not in named:
                refused.append(f"{frame.source.file}: {error}")
            named.add(frame.source)
            continue
        yield frame, found
