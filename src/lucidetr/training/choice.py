"""Which member of the family fits a data set, when nobody has said: chosen from its pictures, and explained."""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from lucidetr.config import TrainConfig
from lucidetr.data.annotations import Annotations
from lucidetr.recipes import recipe

SMALL_OBJECT = 20  # pixels that an object which is small for its data set should have in the model's input


class Member(NamedTuple):
    """Say what a member of the family is good for."""

    name: str
    low: int
    high: int
    """Its smallest and largest side."""
    crowd: float
    """Objects in one picture above which it has too few tokens."""
    needs_gpu: bool
    """It does not learn in reasonable time without one."""


MEMBERS = (
    Member("lucid-xs", low=96, high=192, crowd=40, needs_gpu=False),
    Member("lucid-s", low=224, high=416, crowd=math.inf, needs_gpu=False),
    Member("lucid-m", low=512, high=640, crowd=math.inf, needs_gpu=True),
)
MANY_IMAGES = 20_000
SLOW_SIDE = 224  # as far as lucid-xs goes where a processor computes float32 alone
HANDED = {"left", "right"}


def choose(annotations: Annotations, gpu: bool, slow: bool = False) -> tuple[TrainConfig, list[str]]:
    """Return the recipe and its settings for a data set, and the reasons in sentences.

    The side follows from how small the small objects are (the 10th percentile of all, or the middle one of the smallest
    category), never beyond the pictures' own pixels; the member from the side, the crowd and the machine; the queries
    from the fullest picture. `slow` is a processor that computes in float32 alone: there the smallest member sees twice
    as many pictures as the next in the same time (docs/bccd.md).
    """
    shares, labels = object_shares(annotations), annotations.labels[~annotations.crowd]
    own = int(np.median(annotations.sizes.max(1)))
    counts = annotations.objects_per_image()
    most = int(counts.max()) if len(counts) else 0
    small = min([1.0, *(np.median(shares[labels == label]) for label in np.unique(labels))])
    small = min(small, float(np.percentile(shares, 10))) if len(shares) else small
    wanted = min(SMALL_OBJECT / small, own)

    usable = [member for member in MEMBERS if gpu or not member.needs_gpu]
    member = next((m for m in usable if wanted <= m.high and most <= m.crowd), usable[-1])
    if slow and not gpu and most <= MEMBERS[0].crowd:
        member = MEMBERS[0]._replace(high=SLOW_SIDE)
    name = member.name
    reasons = [
        f"{len(annotations)} images of about {own} pixels; small objects take {small:.1%} of a side: "
        f"to show them with {SMALL_OBJECT} pixels, a side of {round(SMALL_OBJECT / small)} is needed"
    ]
    if wanted == own:
        reasons.append(f"the pictures have no more than {own} themselves")
    if name == "lucid-m" and len(annotations) >= MANY_IMAGES:
        name, reasons = "lucid-l", [*reasons, f"{len(annotations)} images are enough for the largest member"]
    if not gpu and wanted > member.high:
        why = "with neither a GPU nor bfloat16" if slow else "without a GPU"
        reasons.append(f"{why} {name} at {member.high} is the largest that learns in reasonable time")
    config = recipe(name)
    side = int(np.clip(np.ceil(wanted / 32) * 32, member.low, member.high))
    queries = max(config.model.num_queries, int(np.ceil(1.25 * most / 10) * 10))
    reasons.append(f"chosen: {name} at {side} × {side} with {queries} queries (up to {most} objects in a picture)")
    model, images = replace(config.model, num_queries=queries), replace(config.images, size=side)
    mirrored = not has_hands(annotations.categories.names)
    reasons.append(
        "pictures are mirrored at random (--augmentation.flip 0 turns it off)"
        if mirrored
        else "pictures are not mirrored: the category names speak of left and right, or of signs"
    )
    augmentation = replace(config.augmentation, flip=0.5 if mirrored else 0.0)
    return replace(config, model=model, images=images, augmentation=augmentation), reasons


def has_hands(names: tuple[str, ...]) -> bool:
    """Return whether a mirror would change what a picture shows, as far as the category names tell.

    >>> has_hands(("left hand", "cup")), has_hands(("7", "b")), has_hands(("cat", "dog"))
    (True, True, False)
    """
    words = {word for name in names for word in name.lower().replace("_", " ").replace("-", " ").split()}
    signs = sum(len(name) == 1 for name in names)
    return bool(words & HANDED) or signs > len(names) / 2


def object_shares(annotations: Annotations) -> np.ndarray:
    """Return the side of every object as a share of its picture's: √(share of the area), crowds left out."""
    image_of_row = np.repeat(np.arange(len(annotations)), np.diff(annotations.starts))
    shares = annotations.boxes_xywh[:, 2:] / annotations.sizes[image_of_row][:, ::-1]
    return np.sqrt(shares.prod(1))[~annotations.crowd]
