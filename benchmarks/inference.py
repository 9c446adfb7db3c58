"""DETR-R50 against transformers: from pixels in memory to boxes, the same weights on both sides.

    python -m benchmarks inference --contenders all --sides 640x640 800x1066 --batches 1 8

Resizing and normalising are timed, decoding files is not. What is found is compared with our own float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Common, alternate, read_options, report, seconds_of
from benchmarks.pair import as_transformers, card_of, tiny, untrained
from lucidetr.boxes import iou
from lucidetr.config import ImageConfig, ModelCard
from lucidetr.deployment.detector import Detector, load
from lucidetr.deployment.export import SUFFIXES, export
from lucidetr.errors import InputError, did_you_mean
from lucidetr.models.detr import DETR
from lucidetr.recipes import recipe
from lucidetr.structures import Detections
from lucidetr.training.precision import choose_device, choose_precision

PICTURE = (480, 640)  # height, width of what is resized: COCO's most frequent
KEPT = 0.5  # boxes are compared whose score is at least this, or half of the best where none is


@dataclass(frozen=True)
class Way:
    """Say how a contender computes: precision, by autocast or in the weights; compiled, or from an exported file."""

    precision: str = "fp32"
    autocast: bool = False
    compiled: bool = False
    frozen: bool = False
    exported: str = ""


MINE = "lucidetr fp32"
OURS = {
    MINE: Way(),
    "lucidetr bf16": Way("bf16"),
    "lucidetr compiled fp32": Way(compiled=True),
    "lucidetr compiled bf16": Way("bf16", compiled=True),
    "lucidetr onnx fp32": Way(exported="onnx"),
    "lucidetr openvino fp32": Way(exported="openvino"),
    "lucidetr openvino bf16": Way("bf16", exported="openvino"),
}
THEIRS = {
    "transformers fp32": Way(),
    "transformers bf16 autocast": Way("bf16", autocast=True),
    "transformers bf16": Way("bf16"),
    "transformers compiled fp32": Way(compiled=True),
    "transformers compiled bf16": Way("bf16", compiled=True),
    "transformers frozen fp32": Way(compiled=True, frozen=True),
    "transformers frozen bf16": Way("bf16", compiled=True, frozen=True),
}
EAGER = ",".join(name for name, way in (OURS | THEIRS).items() if not way.compiled and not way.exported)


@dataclass(frozen=True)
class Options(Common):
    """Time both from uint8 arrays to boxes."""

    contenders: str = EAGER
    """By name, with commas between; all: the compiled and exported ones too, which take minutes to make.
    A contender in bf16 is left out where the hardware has none, unless it is named alone."""
    sides: tuple[str, ...] = ("640x640",)
    """Height x width that the model sees."""
    batches: tuple[int, ...] = (1,)
    weights: str = ""
    """A trained detector to take the weights of; empty: random ones."""
    quick: bool = False
    """A model of a few thousand parameters, only to see that this works."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Time every size and batch, print, and append a line for each to results.jsonl."""
    options = read_options(Options, arguments, "inference")
    device = choose_device(options.device)
    for batch in options.batches:
        if batch < 1:
            raise InputError(f"--batches {batch}: choose numbers above 0")
    sides = {side: images_of(side) for side in options.sides}
    chosen = choose(options.contenders, device)
    config = tiny(recipe("detr-r50")) if options.quick else recipe("detr-r50")
    model, card = untrained(config, sharp=True).eval(), card_of(config, config.images)
    if options.weights:
        given = load(options.weights, "cpu", "fp32")
        model, card = given.model, given.card
    for side, images in sides.items():
        card = replace(card, images=images)
        for batch in options.batches:
            contenders = build(chosen, model, card, device)
            pictures = random_pictures(batch)
            first, differences = look(contenders, pictures, device)
            work = {name: partial(find, pictures) for name, find in contenders.items()}
            seconds = alternate(work, options.runs, device=device)
            settings = {"recipe": card.recipe, "side": side, "batch": batch, "weights": options.weights or "random"}
            report("inference", seconds, MINE, settings, device, {"first": first, "differences": differences})
            for name, (overlap, score) in differences.items():
                print(
                    f"  {name:28} first {first[name]:.1f} s; boxes differ by 1 - IoU {overlap:.1e}, scores {score:.1e}"
                )


def choose(names: str, device: torch.device) -> list[str]:
    """Return the contenders to run, our float32 always among them; say which are left out, and why."""
    known = [*OURS, *THEIRS]
    asked = known if names == "all" else [name.strip() for name in names.split(",")]
    for name in asked:
        if name not in known:
            raise InputError(f"unknown contender {name}: {did_you_mean(name, known)}")
    away = [name for name in asked if device.type != "cpu" and (OURS | THEIRS)[name].exported]
    if away:
        print(f"left out, because exported files are run on the CPU, not on {device}: {', '.join(away)}")
    fast = choose_precision("auto", device) == "bf16" or names not in ("all", EAGER)
    slow = [name for name in asked if not fast and (OURS | THEIRS)[name].precision == "bf16"]
    if slow:
        print(f"left out, because {device} here does not multiply bf16: {', '.join(slow)}")
    return [MINE, *(name for name in asked if name not in (MINE, *away, *slow))]


def images_of(side: str) -> ImageConfig:
    """Return how pictures become that size: squares as squares, 800x1066 by the paper's rule."""
    height, x, width = side.partition("x")
    if not (x and height.isdecimal() and width.isdecimal()):
        raise InputError(f"--sides {side}: give height x width, for example 640x640 or 800x1066")
    height, width = int(height), int(width)
    if height == width:
        return ImageConfig(resize="square", size=height)
    return ImageConfig(size=min(height, width), max_size=max(height, width))


def random_pictures(number: int) -> list[np.ndarray]:
    """Return pictures of coloured noise, coarse enough to hold structure."""
    coarse = np.random.default_rng(0).integers(
        256, size=(number, PICTURE[0] // 16, PICTURE[1] // 16, 3), dtype=np.uint8
    )
    return list(coarse.repeat(16, axis=1).repeat(16, axis=2))


Find = Callable[[list[np.ndarray]], list[Detections]]


def build(names: Sequence[str], model: DETR, card: ModelCard, device: torch.device) -> dict[str, Find]:
    """Return every contender as a function from pictures to what is in them."""
    torch._dynamo.reset()  # each size is compiled by itself, as if it were the only one
    return {
        name: ours(OURS[name], model, card, device) if name in OURS else theirs(THEIRS[name], model, card, device)
        for name in names
    }


def ours(way: Way, model: DETR, card: ModelCard, device: torch.device) -> Find:
    """Return our detector."""
    if way.exported:
        detector = through_a_file(way, model, card)
    else:
        detector = Detector(model, card, str(device), way.precision, "compile" if way.compiled else "torch")
    return lambda pictures: detector.detect([detector.prepare(picture) for picture in pictures])


def through_a_file(way: Way, model: DETR, card: ModelCard) -> Detector:
    """Return the detector that an exported file makes, which runs on the CPU."""
    pictures = [torch.from_numpy(picture).permute(2, 0, 1).contiguous() for picture in random_pictures(1)]
    with TemporaryDirectory() as folder:
        file = Path(folder) / f"model{SUFFIXES[way.exported]}"
        export(model.cpu(), card, way.exported, file, pictures, "noise")
        return load(file, precision=way.precision)


def theirs(way: Way, model: DETR, card: ModelCard, device: torch.device) -> Find:
    """Return transformers' image processor, model and post-processing."""
    peer, processor = as_transformers(model, card)
    peer = peer.to(device).eval()
    dtype = torch.bfloat16 if way.precision == "bf16" and not way.autocast else torch.float32
    peer = peer.to(dtype=dtype, memory_format=torch.channels_last)  # as ours lies
    images = card.images
    square = {"height": images.size, "width": images.size}
    shortest = {"shortest_edge": images.size, "longest_edge": images.max_size}
    size = square if images.resize == "square" else shortest
    # options of its own: the compiler would take what it has made for the same network without them
    compute: Any = torch.compile(peer, options={"freezing": way.frozen}) if way.compiled else peer

    @torch.no_grad()
    def find(pictures: list[np.ndarray]) -> list[Detections]:
        given = processor(images=pictures, size=size, return_tensors="pt").to(device)
        pixels = given["pixel_values"].to(dtype).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=way.autocast):
            outputs = compute(pixel_values=pixels, pixel_mask=given["pixel_mask"])
        outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
        sizes = [picture.shape[:2] for picture in pictures]
        rows = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        return [Detections(r["boxes"].cpu(), r["scores"].cpu(), r["labels"].cpu(), card.categories) for r in rows]

    return find


def look(
    contenders: dict[str, Find], pictures: list[np.ndarray], device: torch.device
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Return the seconds of every contender's first call, compiling included, and how what it finds differs."""
    first, found = {}, {}
    for name, find in contenders.items():
        first[name] = seconds_of(lambda name=name, find=find: found.update({name: find(pictures)}), device)
    differences = {}
    for name, others in found.items():
        pairs = [difference(one, other) for one, other in zip(found[MINE], others, strict=True)]
        differences[name] = (max(overlap for overlap, _ in pairs), max(score for _, score in pairs))
    return first, differences


def difference(mine: Detections, other: Detections) -> tuple[float, float]:
    """Return the largest 1 - IoU and the largest difference of scores between boxes of ours and their likes.

    The like of a box is the other side's box of the same label with the largest IoU; a box without one differs by 1.
    """
    kept = mine.above(min(KEPT, float(mine.scores[0]) / 2))
    overlaps = iou(kept.boxes_xyxy[:, None], other.boxes_xyxy[None])
    overlaps = overlaps.where(kept.labels[:, None] == other.labels[None], 0.0)
    best, which = overlaps.max(1)
    scores = (kept.scores - other.scores[which]).abs().where(best > 0, 1.0)
    return float((1 - best).max()), float(scores.max())
