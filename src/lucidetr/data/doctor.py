"""A data set's state of health: what it holds, and everything that is wrong or odd about it."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lucidetr.data.agreement import Agreement
from lucidetr.data.examine import examine
from lucidetr.data.places import compares
from lucidetr.data.raw import Finding, Raw, read_raw
from lucidetr.data.sums import compare

FEWEST_LABELS = 20  # that tell how far labels made twice agree


@dataclass(frozen=True)
class SplitSummary:
    """Hold the numbers of one split."""

    split: str
    images: int
    objects: int
    objects_per_image: tuple[int, float, int]
    """Fewest, mean, most."""
    without_objects: int
    sides: tuple[int, int]
    """Smallest and largest side of a picture, in pixels."""
    box_share: tuple[float, float, float]
    """√(area of box / area of picture): 10th, 50th and 90th percentile."""
    per_category: dict[str, int]


@dataclass(frozen=True)
class Report:
    """Hold what a doctor says."""

    data: str
    format: str
    splits: list[SplitSummary]
    findings: list[Finding]
    raws: list[Raw] = field(default_factory=list, repr=False)
    """What was read, for pictures of it."""
    twice: Agreement | None = None
    """How far labels agree where two pictures show one place; None where fewer than 20 lie in such places."""
    places: bool = True
    """Whether every two pictures were compared, to find such places."""

    def to_dict(self) -> dict[str, Any]:
        """Return what is written to a file."""
        return {
            "data": self.data,
            "format": self.format,
            "splits": [asdict(split) for split in self.splits],
            "places_compared": self.places,
            "labelled_twice": asdict(self.twice) if self.twice else None,
            "findings": [finding._asdict() for finding in self.findings],
        }


def diagnose(source: Path, num_queries: int = 0, places: Literal["auto", "all", "off"] = "auto") -> Report:
    """Read a data set as far as it can be read, decode every picture, and say all that is wrong. It only reads.

    Every two pictures are compared to find those that show one place; with `auto` only up to 1,000 pictures.
    Where `lucidetr data lock` has written down the sums of its files, they are compared.
    """
    form, raws = read_raw(source)
    compared = compares(sum(len(raw.pictures) for raw in raws), places)
    findings, twice = examine(raws, num_queries, compared)
    twice = twice if twice and twice.together.labels >= FEWEST_LABELS else None
    findings += compare(source if source.is_dir() else source.parent)
    splits = [summarise(raw) for raw in raws if raw.pictures]
    return Report(str(source), form, splits, findings, raws, twice, compared)


def summarise(raw: Raw) -> SplitSummary:
    """Return the numbers of one split."""
    per_image = np.bincount([box.picture for box in raw.boxes if not box.crowd], minlength=len(raw.pictures))
    sides = [side for picture in raw.pictures for side in (picture.width, picture.height) if side]
    shares = []
    for box in raw.boxes:
        picture, (_, _, width, height) = raw.pictures[box.picture], box.box_xywh
        if picture.width and picture.height and width > 0 and height > 0:
            shares.append((width * height / (picture.width * picture.height)) ** 0.5)
    low, middle, high = np.percentile(shares, [10, 50, 90]).round(4).tolist() if shares else (0.0, 0.0, 0.0)
    counts = Counter(box.name for box in raw.boxes if not box.crowd)
    return SplitSummary(
        split=raw.split,
        images=len(raw.pictures),
        objects=int(per_image.sum()),
        objects_per_image=(int(per_image.min()), round(float(per_image.mean()), 2), int(per_image.max())),
        without_objects=int((per_image == 0).sum()),
        sides=(min(sides, default=0), max(sides, default=0)),
        box_share=(low, middle, high),
        per_category={name: counts[name] for name in dict.fromkeys([*raw.names, *counts])},
    )


def summary_table(report: Report) -> str:
    """Return the numbers of all splits as lines of text."""
    lines = [f"{report.data}: {report.format}"]
    for each in report.splits:
        fewest, mean, most = each.objects_per_image
        small, middle, large = each.box_share
        lines.append(
            f"{each.split}: {each.images} pictures of {each.sides[0]} to {each.sides[1]} pixels, "
            f"{each.objects} objects "
            f"({fewest} to {most} in one, {mean:g} on average; {each.without_objects} pictures without any); "
            f"sides of boxes {small:.1%} / {middle:.1%} / {large:.1%} of the picture's (10th, 50th, 90th percentile)"
        )
        lines.append("  " + ", ".join(f"{name} {count}" for name, count in each.per_category.items()))
    if report.twice:
        lines += _labelled_twice(report.twice)
    if not report.places:
        lines.append(
            "pictures of one place: not looked for (--places all compares every two of one size, which takes long)"
        )
    return "\n".join(lines)


def _labelled_twice(twice: Agreement) -> Iterator[str]:
    """Yield what the labels of places that were labelled twice say of each other."""
    yield (
        f"{twice.pairs} pair{'s' * (twice.pairs != 1)} of pictures show one place. Objects that both show whole have "
        f"{twice.together.labels} labels; {twice.together.paired:.0%} have a partner of their category in the other "
        "picture (IoU at least 0.5)"
    )
    for name, each in twice.categories.items():
        text = f"  {name}: {each.labels} labels, {each.paired:.0%} with a partner"
        if each.iou is not None:
            text += (
                f"; mean IoU of partners {each.iou:.2f}, share within COCO's ten IoUs {each.within:.2f}, "
                f"of boxes without error {each.ideal:.2f}"
            )
        yield text
