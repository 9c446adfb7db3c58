"""A data set's state of health: what it holds, and everything that is wrong or odd about it."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lucidetr.data.examine import examine
from lucidetr.data.raw import Finding, Raw, read_raw
from lucidetr.data.sums import compare


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

    def to_dict(self) -> dict[str, Any]:
        """Return what is written to a file."""
        findings = [finding._asdict() for finding in self.findings]
        return {"data": self.data, "format": self.format, "splits": [asdict(s) for s in self.splits]} | {
            "findings": findings
        }


def diagnose(source: Path, num_queries: int = 0) -> Report:
    """Read a data set as far as it can be read, decode every picture, and say all that is wrong. It only reads.

    Where `lucidetr data lock` has written down the sums of its files, they are compared.
    """
    form, raws = read_raw(source)
    findings = examine(raws, num_queries) + list(compare(source if source.is_dir() else source.parent))
    return Report(str(source), form, [summarise(raw) for raw in raws if raw.pictures], findings, raws)


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
    return "\n".join(lines)
