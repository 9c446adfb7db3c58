"""What a doctor looks at in a data set: its boxes, its names, its picture files, and what its splits share."""

import hashlib
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from lucidetr.data.agreement import Agreement, agreement
from lucidetr.data.decoding import DAMAGED, EXIF_ORIENTATION, MAX_PIXELS, TURNED, refuse_by_header, upright_sides
from lucidetr.data.faults import EDGE_TOLERANCE, listing
from lucidetr.data.places import View, find_pairs, paths, rank, shared_places, small_copy
from lucidetr.data.raw import Finding, Picture, Raw
from lucidetr.errors import InputError, unreadable

SMALLEST_BOX = 2.0  # pixels: less is a slip of the mouse
SMALLEST_SIDE = 32
LONGEST_ASPECT = 10
NEAR = 3  # of 64 bits in which the fingerprints of near duplicates may differ
FEW_IMAGES = 20
IMBALANCE = 50  # times as many objects in the largest category as in the smallest


class Look(NamedTuple):
    """Hold what a picture is known by: its file's SHA-256, a fingerprint, and a small copy if that was asked for."""

    digest: str
    bits: int
    size: tuple[int, int]  # width and height, upright
    small: UInt8[np.ndarray, "height width"] | None = None


class Twins(NamedTuple):
    """Hold two pictures of two splits that look nearly the same."""

    split: str
    path: Path
    other_split: str
    other: Path


class Examined(NamedTuple):
    """Hold what is wrong or odd, and how far labels agree where a place was labelled twice."""

    findings: list[Finding]
    twice: Agreement | None


def examine(raws: Sequence[Raw], num_queries: int = 0, places: bool = True) -> Examined:
    """Find everything that is wrong or odd: in reading, in boxes, names, files, and between splits.

    With `places` every two pictures are compared, to find those that show one place.
    """
    looks: dict[str, dict[Path, Look]] = {}
    views: dict[Path, View] = {}
    for raw in raws:
        _names(raw)
        looks[raw.split] = {}
        for number, picture in enumerate(raw.pictures):
            if look := look_at(raw, picture, places):
                looks[raw.split][picture.path] = look
                if look.small is not None:
                    views[picture.path] = View(raw, number, look.size, look.small)
        _boxes(raw)
        _counts(raw, num_queries)
    pairs = find_pairs(sorted(views.values(), key=lambda view: rank(view.raw.split)))
    twins = near_twins(looks)
    digest = {path: look.digest for split in looks.values() for path, look in split.items()}
    told = {frozenset((each.path, each.other)) for each in twins}  # and the same file twice is told of in any case
    new = [pair for pair in pairs if len({digest[path] for path in paths(pair)}) == 2 and paths(pair) not in told]
    findings = [finding for raw in raws for finding in raw.findings]
    return Examined(findings + between(raws, looks, twins) + shared_places(new), agreement(pairs))


def _names(raw: Raw) -> None:
    """Find category names that are, or nearly are, the same."""
    kinds = defaultdict(list)
    for name in raw.names:
        kinds[" ".join(name.lower().split())].append(name)
    for alike in kinds.values():
        if len(set(alike)) < len(alike):
            raw.error(
                "category-name-twice", f"{raw.split}: two categories are called {alike[0]!r}; join or rename them"
            )
        elif len(alike) > 1:
            raw.warn(
                "category-names-alike",
                f"{raw.split}: the categories {', '.join(map(repr, alike))} differ in case or spaces alone; join them",
            )


def look_at(raw: Raw, picture: Picture, small: bool = False) -> Look | None:
    """Decode one picture wholly; return what it is known by, None if it is damaged."""
    path = picture.path
    if not path.is_file():
        raw.error("image-missing", f"{picture.place}: {path} does not exist; put it there, or take the entry out")
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raw.error("image-unreadable", unreadable(path, error))
        return None
    if not content:
        raw.error("image-empty", f"{path}: a file of 0 bytes; replace it")
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                refuse_by_header(image, len(content), str(path))
                _header(raw, picture, image)
                size = upright_sides(image)
                image.filename = ""  # see decoding.py
                image.load()
                _depth(raw, path, image)
                digest, copy = hashlib.sha256(content).hexdigest(), small_copy(image) if small else None
                return Look(digest, fingerprint(image), size, copy)
    except InputError as error:
        raw.error("image-huge", str(error))
    except Image.DecompressionBombError as error:
        raw.error("image-huge", f"{path}: more than {MAX_PIXELS:,} pixels ({error}); make it smaller")
    except UnidentifiedImageError:
        raw.error("image-format", f"{path}: not an image that can be read; replace it, or take its entry out")
    except DAMAGED as error:
        raw.error("image-damaged", f"{path}: damaged or truncated, {len(content):,} bytes ({error}); replace the file")
    return None


def _header(raw: Raw, picture: Picture, image: Image.Image) -> None:
    """Compare what the file says of itself with what the data set says, and note odd modes and shapes."""
    path, (width, height) = picture.path, image.size
    turned, upright = image.getexif().get(EXIF_ORIENTATION) in TURNED, upright_sides(image)
    stated = (picture.width, picture.height)
    if picture.width is None:
        picture.width, picture.height = upright
    elif stated != upright:
        words = f"{picture.place}: stated as {stated[0]} × {stated[1]}"
        if stated == upright[::-1] and turned:
            text = f"{words}, its pixels before the EXIF note turns it; upright it is {upright[0]} × {upright[1]}"
            raw.error("size-turned", f"{text}: save the picture upright and label that")
        else:
            text = f"{words} but {path} is {upright[0]} × {upright[1]}"
            raw.error("size-differs", f"{text}: correct width and height, or replace the picture")
    if image.mode in ("I", "F"):
        raw.error("mode-32-bit", f"{path}: 32-bit pixels ({image.mode}) have no agreed brightness; save 8 or 16 bits")
    elif image.mode == "CMYK":
        raw.warn("mode-cmyk", f"{path}: CMYK, read as RGB without a colour profile; better save it as RGB")
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        raw.warn("mode-alpha", f"{path}: transparent pixels are laid upon white")
    if (number := _frames(image)) > 1:
        raw.warn("frames", f"{path}: has {number} frames; only the first is read")
    if min(width, height) < SMALLEST_SIDE:
        raw.warn("image-tiny", f"{path}: {width} × {height} pixels; there is little to see")
    elif max(width, height) > LONGEST_ASPECT * min(width, height):
        raw.warn("image-long", f"{path}: {width} × {height} pixels; cut such strips into pieces")


def _depth(raw: Raw, path: Path, image: Image.Image) -> None:
    """Say how 16-bit grey is read, and where a camera's 12 bits or fewer lie in it: such a picture is nearly black."""
    if not image.mode.startswith("I;16"):
        return
    raw.warn("mode-16-bit", f"{path}: 16-bit grey, read as brightness / 257")
    brightest = int(np.asarray(image).max())
    if brightest < 2**12:
        text = f"{path}: 16-bit grey whose brightest pixel is {brightest}, read as {round(brightest / 257)} of 255"
        raw.warn("mode-16-bit-dark", f"{text}: nearly black; spread the brightness over all 16 bits")


def _frames(image: Image.Image) -> int:
    """Return how many frames a file has, 1 where its list of further ones is damaged: the first may be sound."""
    try:
        return getattr(image, "n_frames", 1)
    except DAMAGED:
        return 1


def fingerprint(image: Image.Image) -> int:
    """Return 64 bits, one for each step to the right in a 9 × 8 grey miniature: is it brighter?"""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR), dtype=np.int16)
    bits = (grey[:, 1:] > grey[:, :-1]).flatten()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def _boxes(raw: Raw) -> None:
    """Find boxes that are none, lie outside, or are there twice."""
    corners_fit = reach_out = 0
    seen: dict[tuple, str] = {}
    shares = [max(box.box_xywh) <= 1.0 for box in raw.boxes if all(map(math.isfinite, box.box_xywh))]
    if len(shares) > 1 and all(shares):
        raw.error("boxes-are-shares", f"{raw.split}: all boxes are below 1: shares of the picture? Give pixels")
        return
    for box in raw.boxes:
        picture = raw.pictures[box.picture]
        left, top, width, height = values = box.box_xywh
        shown = "[" + ", ".join(f"{value:g}" for value in values) + "]"
        if not all(map(math.isfinite, values)):
            raw.error("box-not-finite", f"{box.place}: box {shown} is not finite; correct it")
            continue
        if width < 0 or height < 0:
            raw.error("box-negative", f"{box.place}: box {shown} has a negative side; corners exchanged?")
            continue
        if width == 0 or height == 0:
            raw.error("box-no-area", f"{box.place}: box {shown} has no area; delete it, or --bad-boxes drop")
            continue
        key = (box.picture, box.name, *values)
        if key in seen:
            raw.warn("box-twice", f"{box.place}: the same box {shown} of {box.name} as {seen[key]}; delete one")
        seen[key] = box.place
        if min(width, height) < SMALLEST_BOX:
            raw.warn("box-tiny", f"{box.place}: box {shown} is less than {SMALLEST_BOX:g} pixels; a slip of the mouse?")
        if picture.width is None or picture.height is None:
            continue
        frame = f"its {picture.width} × {picture.height} picture"
        fits = width <= picture.width + EDGE_TOLERANCE and height <= picture.height + EDGE_TOLERANCE
        corners_fit += left < width and top < height and fits
        over = max(-left, -top, left + width - picture.width, top + height - picture.height)
        reach_out += over > EDGE_TOLERANCE
        if left >= picture.width or top >= picture.height or left + width <= 0 or top + height <= 0:
            raw.error("box-outside", f"{box.place}: box {shown} lies outside {frame}; delete or correct it")
        elif over > EDGE_TOLERANCE:
            text = f"{box.place}: box {shown} reaches {over:g} pixels over {frame}"
            raw.error("box-over-edge", f"{text}; cut it, or --bad-boxes drop")
        elif width * height >= 0.98 * picture.width * picture.height:
            raw.warn("box-whole-picture", f"{box.place}: box {shown} of {box.name} is the whole picture")
    if corners_fit == len(raw.boxes) and reach_out > 0.3 * len(raw.boxes):
        raw.error(
            "boxes-are-corners",
            f"{raw.split}: all boxes make sense as [left, top, right, bottom]; give [left, top, width, height]",
        )


def _counts(raw: Raw, num_queries: int) -> None:
    """Find what is odd in the numbers of one split."""
    per_picture = Counter(box.picture for box in raw.boxes if not box.crowd)
    empty = len(raw.pictures) - len(per_picture)
    if raw.pictures and empty > len(raw.pictures) / 2:
        raw.warn("many-empty", f"{raw.split}: {empty} of {len(raw.pictures)} pictures hold no object; is that so?")
    most = max(per_picture.values(), default=0)
    if num_queries and most > num_queries:
        raw.error(
            "more-objects-than-queries",
            f"{raw.split}: up to {most} objects in a picture, but {num_queries} queries: raise --model.num-queries",
        )
    counts = Counter(box.name for box in raw.boxes if not box.crowd)
    if unused := [name for name in raw.names if not counts[name]]:
        raw.warn("category-unused", f"{raw.split}: no object of {listing(unused)}; nothing can be learned or measured")
    if counts and raw.split == "train":
        (largest, many), (smallest, few) = counts.most_common()[0], counts.most_common()[-1]
        if many > IMBALANCE * few:
            raw.warn("imbalance", f"train: {many} objects of {largest} but {few} of {smallest}")
        if len(raw.pictures) < FEW_IMAGES:
            raw.warn("few-images", f"train: {len(raw.pictures)} pictures; expect little without --weights")


def between(raws: Sequence[Raw], looks: dict[str, dict[Path, Look]], twins: Sequence[Twins]) -> list[Finding]:
    """Find pictures that are there more than once, and splits that do not fit together."""
    splits = [raw.split for raw in raws]
    found = list(_copies(looks))
    for split, path, other_split, other in twins:
        text = f"{path} ({split}) looks like {other} ({other_split}): frames of one film, or a copy?"
        found.append(Finding("splits-look-alike", "warning", text))
    if "train" in splits and "val" not in splits:
        text = "no validation split: a fifth of the training pictures will be set aside at random (lucidetr data split)"
        found.append(Finding("no-validation", "warning", text))
    if "train" not in splits and "all" not in splits:
        found.append(Finding("no-training", "error", f"no training split, only {', '.join(splits)}; name one train"))
    train = next((raw for raw in raws if raw.split == "train"), None)
    for raw in raws:
        if train and raw is not train and categories_of(raw) != categories_of(train):
            apart = listing(sorted(set(categories_of(raw)) ^ set(categories_of(train))))
            text = f"{raw.split} and train have other categories: {apart} in one alone; give both the same list"
            found.append(Finding("categories-differ", "error", text))
        elif train and raw is not train:
            missing = sorted({box.name for box in raw.boxes} - {box.name for box in train.boxes})
            if missing:
                text = f"{raw.split} has objects of {listing(missing)}, train has none: they cannot be learned"
                found.append(Finding("category-only-outside-train", "warning", text))
    return found


def categories_of(raw: Raw) -> list[str]:
    """Return the categories of a split as "id name", or by name where the form knows no ids.

    >>> categories_of(Raw("val", names=["cat", "dog"], ids=[3, 1]))
    ['1 dog', '3 cat']
    """
    named = zip(raw.ids, raw.names, strict=True) if raw.ids else ((None, name) for name in raw.names)
    return sorted(name if number is None else f"{number} {name}" for number, name in named)


def _copies(looks: dict[str, dict[Path, Look]]) -> Iterator[Finding]:
    """Yield pictures that are there twice, byte for byte."""
    owner: dict[str, tuple[str, Path]] = {}
    for split, pictures in looks.items():
        for path, look in pictures.items():
            other, first = owner.setdefault(look.digest, (split, path))
            if (other, first) == (split, path):
                continue
            if other == split:
                yield Finding("image-twice", "warning", f"{path} is the same picture as {first}; keep one")
            else:
                text = f"{path} ({split}) is the same picture as {first} ({other}): results on {split} mean little"
                yield Finding("splits-share-image", "error", f"{text}; delete it from one of them")


def near_twins(looks: dict[str, dict[Path, Look]]) -> list[Twins]:
    """Return for each picture that of each later split with the nearest fingerprint, if they are not the same file."""
    return [
        Twins(split, path, other_split, other)
        for (split, mine), (other_split, theirs) in combinations(looks.items(), 2)
        for path, other in _look_alikes(mine, theirs)
    ]


def _look_alikes(mine: dict[Path, Look], theirs: dict[Path, Look]) -> Iterator[tuple[Path, Path]]:
    """Yield pairs of pictures of two splits that look the same but are not the same file."""
    if not mine or not theirs:
        return
    there = np.array([look.bits for look in theirs.values()], dtype=np.uint64)
    paths, digests = list(theirs), [look.digest for look in theirs.values()]
    for path, (digest, bits, *_) in mine.items():
        apart = np.unpackbits((there ^ np.uint64(bits)).view(np.uint8).reshape(-1, 8), axis=1).sum(1)
        nearest = int(apart.argmin())
        plain = bits.bit_count() in (0, 64)  # one colour all over: every such picture looks the same
        if apart[nearest] <= NEAR and digests[nearest] != digest and not plain:
            yield path, paths[nearest]
