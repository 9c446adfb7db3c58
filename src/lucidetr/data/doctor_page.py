"""The doctor's report as one HTML file that needs nothing else: numbers, faults, pictures, classes and box shapes."""

import base64
import io
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from lucidetr.data.decoding import read_image
from lucidetr.data.doctor import Report
from lucidetr.data.preprocessing import resize
from lucidetr.data.raw import Finding, Raw
from lucidetr.drawing import draw_boxes
from lucidetr.errors import InputError

TEMPLATE = "doctor_page.html.jinja"
MOST_PICTURES = 24
MOST_BOXES = 200  # drawn on a picture
MOST_ROWS = 100  # of a kind of finding, and of categories
THUMBNAIL = 360  # pixels of the longer side
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)  # limits between bars: √(area of box / area of picture)
RATIOS = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)  # width / height
SIDES = (32, 96)  # √ of COCO's limits of area
ENDS = (": ", " (", " is the same")  # what follows the place with which a finding begins
LIKE = " looks like "  # and between the places of two pictures


@dataclass(frozen=True)
class Bar:
    """Hold a number with its name, and its share of the largest beside it."""

    name: str
    number: int
    share: float


@dataclass(frozen=True)
class Shown:
    """Hold a picture as a data: URI, None where it cannot be read, with all that was found in it.

    Where a finding says that it looks like another, this is its `twin`.
    """

    path: Path
    uri: str | None
    findings: list[Finding]
    twin: "Shown | None" = None


def write_page(report: Report, path: Path) -> None:
    """Write a report as one HTML file; names from the data set are escaped, and it asks for nothing from outside."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((Path(__file__).parent / TEMPLATE).read_text(encoding="utf-8"))
    findings = sorted(report.findings, key=lambda each: each.severity != "error")
    kinds: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        kinds[finding.kind].append(finding)
    counts = Counter(finding.severity for finding in findings)
    text = template.render(
        report=report,
        faults=counts["error"],
        oddities=counts["warning"],
        kinds=kinds,
        most=MOST_ROWS,
        balance=class_balance(report),
        shapes=box_shapes(report.raws),
        pictures=worst_pictures(report.raws, findings),
    )
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # names may hold bytes that are no text


def bars(counts: dict[str, int]) -> list[Bar]:
    """Return numbers as bars.

    >>> bars({"cat": 1, "dog": 4})
    [Bar(name='cat', number=1, share=0.25), Bar(name='dog', number=4, share=1.0)]
    """
    largest = max(counts.values(), default=0) or 1
    return [Bar(name, number, number / largest) for name, number in counts.items()]


def class_balance(report: Report) -> list[tuple[str, list[Bar]]]:
    """Return how many objects of each category a split holds, the most frequent first."""
    balance = []
    for split in report.splits:
        ordered = sorted(split.per_category.items(), key=lambda pair: -pair[1])
        balance.append((split.split, bars(dict(ordered))))
    return balance


def box_shapes(raws: list[Raw]) -> list[tuple[str, list[Bar]]]:
    """Return how the boxes of all splits spread over shares of the picture's side, sides in pixels, and proportions."""
    shares, sides, ratios = [], [], []
    for raw in raws:
        for box in raw.boxes:
            width, height = box.box_xywh[2:]
            if not (0 < width < math.inf and 0 < height < math.inf):
                continue
            picture, side = raw.pictures[box.picture], math.sqrt(width) * math.sqrt(height)
            sides.append(side)
            ratios.append(width / height)
            if picture.width and picture.height:
                shares.append(side / math.sqrt(picture.width * picture.height))
    return [
        ("Side of a box, as a share of its picture's", spread(shares, SHARES, "{:.0%}")),
        ("Side of a box in pixels: COCO's small, medium and large", spread(sides, SIDES, "{:g}")),
        ("Width : height", spread(ratios, RATIOS, "{:g}")),
    ]


def spread(values: list[float], limits: tuple[float, ...], form: str) -> list[Bar]:
    """Return how many values lie between limits, each limit belonging to the values above it.

    >>> [(bar.name, bar.number) for bar in spread([1, 2, 3, 7], (2, 4), "{:g}")]
    [('below 2', 1), ('2 to 4', 2), ('4 and more', 1)]
    """
    words = [form.format(limit) for limit in limits]
    names = [
        f"below {words[0]}",
        *(f"{a} to {b}" for a, b in pairwise(words)),
        f"{words[-1]} and more",
    ]
    counts = Counter(sum(value >= limit for limit in limits) for value in values)
    return bars({name: counts[i] for i, name in enumerate(names)})


def worst_pictures(raws: list[Raw], findings: list[Finding]) -> list[Shown]:
    """Return the pictures that findings begin with, faults first, each with its boxes; at most 24."""
    places = {}
    for raw in raws:
        for number, picture in enumerate(raw.pictures):
            places[str(picture.path)] = places[picture.place] = (raw, number)
        places |= {box.place: (raw, box.picture) for box in raw.boxes}
    found: dict[tuple[int, int], tuple[Raw, int, list[Finding]]] = {}
    for finding in findings:
        if (owner := _owner(finding.text, places)) is not None:
            key = id(owner[0]), owner[1]
            if key in found or len(found) < MOST_PICTURES:
                found.setdefault(key, (*owner, []))[2].append(finding)
    return [
        Shown(raw.pictures[number].path, thumbnail(raw, number, theirs), theirs, _twin(theirs, places))
        for raw, number, theirs in found.values()
    ]


def _twin(findings: list[Finding], places: dict[str, tuple[Raw, int]]) -> Shown | None:
    """Return the picture that another looks like, if a finding says so and it can be read."""
    for finding in findings:
        if (other := _owner(finding.text.partition(LIKE)[2], places)) is not None:
            raw, number = other
            uri = thumbnail(raw, number, [])
            return Shown(raw.pictures[number].path, uri, []) if uri else None
    return None


def _owner(text: str, places: dict[str, tuple[Raw, int]]) -> tuple[Raw, int] | None:
    """Return the picture whose place, or whose box's place, a finding begins with: the longest that is known."""
    ends = sorted((at for end in ENDS for at in range(len(text)) if text.startswith(end, at)), reverse=True)
    return next((places[text[:at]] for at in ends if text[:at] in places), None)


def thumbnail(raw: Raw, number: int, findings: list[Finding]) -> str | None:
    """Return a small picture with its boxes as a data: URI; those that a finding speaks of have their number."""
    try:
        image = read_image(raw.pictures[number].path)
    except InputError:
        return None
    height, width = image.shape[1:]
    scale = min(1.0, THUMBNAIL / max(height, width))
    image = resize(image, (max(1, round(height * scale)), max(1, round(width * scale))))
    boxes, names, labels = [], [], []
    for box in [each for each in raw.boxes if each.picture == number][:MOST_BOXES]:
        left, top, wide, high = box.box_xywh
        corners = [scale * value for value in (left, top, left + wide, top + high)]
        if all(map(math.isfinite, corners)):
            boxes.append(corners)
            faulty = any(finding.text.startswith(f"{box.place}:") for finding in findings)
            names.append(re.split(", |: ", box.place)[-1] if faulty else "")  # annotation 7, line 3, object 2
            labels.append(raw.names.index(box.name) if box.name in raw.names else 0)
    drawn = draw_boxes(image, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), names, labels)
    file = io.BytesIO()
    drawn.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
