"""The process that holds the model: it decodes pictures, finds what is in them, and may die without harm to others."""

import io
import logging
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lucidetr.data.dataset import Dataset, evenly, has_split, open_dataset, open_training_data
from lucidetr.data.decoding import from_pillow, refuse_by_header
from lucidetr.data.preprocessing import Sample as Resized
from lucidetr.deployment.detector import Detector, load
from lucidetr.deployment.page.look import look_json, point_json
from lucidetr.deployment.page.usual import usual_json
from lucidetr.deployment.service.messages import Answer, Job, Sample, Settings, in_json
from lucidetr.drawing import draw_detections
from lucidetr.errors import InputError
from lucidetr.fields import to_dict
from lucidetr.models.detr import DETR
from lucidetr.structures import Detections
from lucidetr.training.run_log import asked_of

# no reader of Pillow's that starts a program (EPS), decodes in Python (some PPM, 13 s for 20 MB) or is rarely met
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")
SAMPLES = 24  # pictures that are gathered to show where queries usually look
USUAL_SECONDS = 3.0  # after which no further picture is begun for that
log = logging.getLogger("lucidetr.service")
T = TypeVar("T")


def work(connection: Connection, settings: Settings) -> None:
    """Load the model and say what it is, then answer jobs until the connection closes.

    First comes (True, the card) or (False, why there is none), then (index, answer) for each of a list of jobs.
    """
    for each in (signal.SIGINT, signal.SIGTERM):  # meant for the service, which finishes what it has admitted
        signal.signal(each, signal.SIG_IGN)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the service has ended
        try:
            detector = load(settings.run, settings.device, settings.precision)
        except InputError as error:
            connection.send((False, str(error)))
            return
        connection.send((True, describe(detector, settings)))
        while True:
            for answer in answers(detector, connection.recv(), settings):
                connection.send(answer)


def describe(detector: Detector, settings: Settings) -> dict[str, Any]:
    """Return what a model is, as plain values for JSON."""
    card = detector.card
    categories = zip(card.categories.ids, card.categories.names, strict=True)
    metrics = {name: value if math.isfinite(value) else None for name, value in card.metrics.items()}
    inside = isinstance(detector.model, DETR)
    return {
        "name": Path(settings.run).resolve().name,
        "recipe": card.recipe,
        "step": card.step,
        "AP": metrics.get("AP"),
        "metrics": metrics,
        "categories": [{"id": number, "name": name} for number, name in categories],
        "images": to_dict(card.images),
        "parameters": sum(each.numel() for each in detector.model.parameters()) if inside else None,
        "precision": detector.precision,
        "device": str(detector.device),
        "threshold": settings.threshold,
        "can_look_inside": inside,
    }


def attempt(work: Callable[..., T], *arguments: Any) -> T | Answer:
    """Return what comes out, or the refusal of a picture that cannot be used; a picture never ends the process."""
    try:
        return work(*arguments)
    except InputError as error:
        return in_json({"error": str(error)}, 400)
    except Exception as error:  # noqa: BLE001  readers of pictures raise nearly anything on hostile bytes
        log.warning("a picture could not be used: %s: %s", type(error).__name__, str(error).partition("\n")[0])
        return in_json({"error": f"the picture cannot be used: {type(error).__name__}; try another"}, 400)


def decode(body: bytes, max_pixels: int) -> UInt8[Tensor, "3 height width"]:
    """Return the pixels of a picture's bytes; unreadable bytes, or a header that says too many, are an InputError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large or damaged pictures: our own cap and words follow
            with Image.open(io.BytesIO(body), formats=FORMATS) as picture:
                refuse_by_header(picture, len(body), "the picture", max_pixels)
                return from_pillow(picture)
    except Image.DecompressionBombError:  # Pillow raises it, too, far above any cap of ours
        raise InputError(f"the picture says that it has more than {max_pixels:,} pixels; make it smaller") from None
    except UnidentifiedImageError:
        kinds = ", ".join(FORMATS)
        raise InputError(f"not a picture that can be read ({len(body):,} bytes); send one of {kinds}") from None
    except (OSError, SyntaxError) as error:  # Pillow raises both on damaged files
        raise InputError(f"damaged or truncated picture of {len(body):,} bytes ({error}); replace the file") from None


@dataclass(frozen=True, eq=False)
class Picture:
    """Hold a decoded picture of a job; its own pixels only where something is to be drawn on them."""

    index: int
    threshold: float
    resized: Resized
    pixels: UInt8[Tensor, "3 height width"] | None


def answers(detector: Detector, jobs: Sequence[Job], settings: Settings) -> Iterator[tuple[int, Answer]]:
    """Yield (index, answer) of each job, in the order in which they are done.

    Pictures of the same size after the resize are seen in one batch, without padding: no answer depends on a neighbour.
    """
    started = time.monotonic()
    groups: dict[tuple[int, ...], list[Picture]] = {}
    for index, job in enumerate(jobs):
        done = attempt(open_picture if job.task == "predict" else look, detector, index, job, settings)
        if isinstance(done, Picture):
            groups.setdefault(tuple(done.resized.image.shape), []).append(done)
        else:
            yield index, done
    for pictures in groups.values():
        found = detect_each(detector, [picture.resized for picture in pictures])
        for picture, each in zip(pictures, found, strict=True):
            seconds = time.monotonic() - started
            yield picture.index, each if isinstance(each, Answer) else written(each, picture, seconds)


def open_picture(detector: Detector, index: int, job: Job, settings: Settings) -> Picture:
    """Return the picture of a job, decoded and resized."""
    pixels = decode(job.pictures[0], settings.max_pixels)
    drawn = pixels if job.options.get("drawn") else None
    return Picture(index, job.options["threshold"], detector.prepare(pixels), drawn)


def detect_each(detector: Detector, resized: Sequence[Resized]) -> list[Detections | Answer]:
    """Return what is in each picture of one batch; where that fails they are tried one by one, so only one can fail."""
    found = attempt(detector.detect, resized)
    if not isinstance(found, Answer):
        return list(found)
    return [found] if len(resized) == 1 else [each for one in resized for each in detect_each(detector, [one])]


def written(found: Detections, picture: Picture, seconds: float) -> Answer:
    """Return the detections of a picture as JSON, or drawn on it as PNG."""
    kept = found.above(picture.threshold)
    if picture.pixels is not None:
        file = io.BytesIO()
        draw_detections(picture.pixels, kept).save(file, "PNG", compress_level=1)
        return Answer(file.getvalue(), media_type="image/png")
    height, width = picture.resized.size
    rows = zip(kept.boxes_xyxy.tolist(), kept.scores.tolist(), kept.category_ids, kept.names, strict=True)
    detections = [
        {"box_xyxy": box, "score": score, "category_id": category_id, "name": name}
        for box, score, category_id, name in rows
    ]
    return in_json({"image": {"width": width, "height": height}, "detections": detections, "seconds": seconds})


def look(detector: Detector, index: int, job: Job, settings: Settings) -> Answer:
    """Return what the page shows of a model's inside; a model that cannot show it is a conflict, status 409."""
    image = None if job.task == "usual" else decode(job.pictures[0], settings.max_pixels)
    try:
        if image is None:
            until = time.monotonic() + USUAL_SECONDS
            bodies = takewhile(lambda _: time.monotonic() < until, job.pictures)
            return in_json(usual_json(detector, (decode(body, settings.max_pixels) for body in bodies)))
        if job.task == "point":
            return in_json(point_json(detector, image, **job.options))
        return in_json(look_json(detector, image))
    except InputError as error:
        return in_json({"error": str(error)}, 409)


def gather(connection: Connection, settings: Settings) -> None:
    """Send some pictures of the run's validation split, or of other data, and a note where there are none."""
    try:
        dataset = open_samples(settings)
    except InputError as error:
        connection.send(([], f"no sample pictures: {error}"))
        return
    samples, note = [], ""
    for index in evenly(len(dataset), SAMPLES):
        try:
            sample = as_sample(dataset, index)
            if len(sample.body) <= settings.max_bytes:
                decode(sample.body, settings.max_pixels)  # what would be refused when it is sent back is no sample
                samples.append(sample)
        except ValueError as error:  # an InputError, or Pillow's on a damaged file
            note = f"the sample picture {dataset.annotations.file_names[index]} was left out: {error}"
    connection.send((samples, note))


def open_samples(settings: Settings) -> Dataset:
    """Return the validation split of the data named in the settings, else of those that the run was trained on."""
    if settings.data:
        return open_dataset(settings.data, "val")
    path = Path(settings.run)
    folder = path if path.is_dir() else path.parent
    began = asked_of(folder)
    if began is None:
        raise InputError(
            f"{folder / 'config.json'} is not there to say what the model was trained on; name data by --data"
        )
    if began.data and not began.val_json and has_split(began.data, "val"):
        return open_dataset(began.data, "val", began.bad_boxes)  # without opening the training split
    return open_training_data(began)[1]


def as_sample(dataset: Dataset, index: int) -> Sample:
    """Return one picture of a split: its file, if a browser shows such, else its pixels as PNG."""
    name = Path(str(dataset.annotations.file_names[index]))
    said = os.fsencode(name.name).decode(errors="replace")  # a name may hold bytes that are no letters
    kind = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png"}.get(name.suffix.lower())
    if kind and (file := dataset.file(index)):
        return Sample(said, kind, file.read_bytes())
    content = io.BytesIO()
    Image.fromarray(dataset.image(index).permute(1, 2, 0).numpy()).save(content, "PNG")
    return Sample(said, "image/png", content.getvalue())
