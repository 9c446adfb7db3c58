"""Does a detector keep up where pictures are full? What it finds, by the number of objects in a picture."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from lucidetr.data.annotations import Annotations
from lucidetr.evaluation.errors import hardest
from lucidetr.structures import Detections

GROUPS = 6


@dataclass(frozen=True)
class Group:
    """Hold pictures with about as many objects, and how many of these were found at how many false alarms."""

    fewest: int
    most: int
    images: int
    objects: int
    found: int
    false: int

    @property
    def recall(self) -> float | None:
        """Return the share of the objects that were found, None where there are none."""
        return self.found / self.objects if self.objects else None

    @property
    def precision(self) -> float | None:
        """Return the share of right detections, None where there are none."""
        said = self.found + self.false
        return self.found / said if said else None


def groups_of(counts: Int[np.ndarray, " image"], groups: int) -> list[int]:
    """Return the least count of each group: a group ends as soon as it has its share of the pictures.

    >>> groups_of(np.array([1, 1, 1, 1, 1, 20]), 6), groups_of(np.arange(1, 13), 4)
    ([1, 20], [1, 4, 7, 10])
    """
    share = len(counts) / groups
    starts, size = [], share
    for value, images in zip(*np.unique(counts, return_counts=True), strict=True):
        if size >= share:
            starts.append(int(value))
            size = 0
        size += images
    return starts[:-1] if len(starts) > 1 and size < share / 2 else starts


def by_crowd(
    annotations: Annotations, detections: Sequence[Detections], score: float, groups: int = GROUPS
) -> list[Group]:
    """Return the pictures in groups by their number of objects, each of about as many pictures, emptiest first.

    Found is an object whose category a detection of at least `score` says, with an IoU of 0.5.
    """
    counts = annotations.objects_per_image()
    missed, false = np.zeros((2, len(annotations)), dtype=np.int64)
    for picture in hardest(annotations, detections, score):
        missed[picture.index], false[picture.index] = picture.missed, picture.false
    made, starts = [], groups_of(counts, groups)
    for low, after in itertools.pairwise([*starts, counts.max() + 1]):
        inside = (counts >= low) & (counts < after)
        objects = int(counts[inside].sum())
        made.append(
            Group(
                fewest=int(counts[inside].min()),
                most=int(counts[inside].max()),
                images=int(inside.sum()),
                objects=objects,
                found=objects - int(missed[inside].sum()),
                false=int(false[inside].sum()),
            )
        )
    return made
