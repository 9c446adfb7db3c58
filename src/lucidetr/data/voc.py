"""Pascal VOC annotations: one XML file for each picture, and lists that say which picture belongs to which split."""

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np

from lucidetr.categories import Categories
from lucidetr.data.annotations import Annotations, Objects, Pictures, gather
from lucidetr.data.decoding import SUFFIXES, upright_size
from lucidetr.data.faults import BadBoxes, check_boxes, hidden, inside, is_file, listing, refuse_outside, refuse_twice
from lucidetr.data.splits import split_of
from lucidetr.data.yolo import read_lines
from lucidetr.errors import InputError, unreadable

IMAGE_FOLDERS = ("JPEGImages", "images", "Images", ".")
SIDES = ("xmin", "ymin", "xmax", "ymax")
LONGEST = 1_000_000  # pixels: no picture's side is longer


def find_voc(folder: Path) -> dict[str, list[Path]]:
    """Find the XML files of each split below `folder`, none where this is no VOC data set.

    Known layouts: Annotations/*.xml, however that is spelt, with lists in ImageSets/Main/SPLIT.txt; SPLIT/*.xml beside
    the pictures, as Roboflow exports them, or in SPLIT/annotations; and files without lists, which are all training
    pictures. Where there is no train.txt,
    trainval.txt lists the training pictures, those of val.txt left out. An empty list of val or test is none.
    """
    for place in annotation_folders(folder):
        if not any(place.glob("*.xml")) and (divided := _split_folders(place)):
            return divided
    files = xml_files(folder)
    if not files:
        return _split_folders(folder)
    known = {path.stem: path for path in files}
    found: dict[str, list[Path]] = {}
    lists = {words.stem: words for words in sorted(folder.glob("ImageSets/Main/*.txt"))}  # some of one category
    for split in ("train", "val", "test"):
        if split in lists and (paths := _listed(lists[split], known)):
            found[split] = paths
    if found and len(known) < len(files):
        twice = next(path for path in files if known[path.stem] != path)
        raise InputError(f"{twice} and {known[twice.stem]} have one name, which lists cannot tell apart; rename one")
    if "train" not in lists and "trainval" in lists:
        held_out = set(found.get("val", []))
        found["train"] = [path for path in _listed(lists["trainval"], known) if path not in held_out]
        if not found["train"]:
            raise InputError(f"{lists['trainval']}: lists no picture that val.txt does not list as well")
    return found or {"train": files}


def xml_files(folder: Path) -> list[Path]:
    """Return the XML files of a folder: those below its annotations, or, where it has none, its own."""
    below = [path for place in annotation_folders(folder) for path in place.rglob("*.xml") if not hidden(path, place)]
    return sorted(below) or sorted(folder.glob("*.xml"))


def annotation_folders(folder: Path) -> list[Path]:
    """Return the folders of annotations in a folder; one that may not be looked into has none."""
    try:
        return [each for each in sorted(folder.iterdir()) if each.is_dir() and each.name.lower() == "annotations"]
    except OSError:
        return []


def _listed(words: Path, known: dict[str, Path]) -> list[Path]:
    """Return the XML files that a list names; an empty list of training pictures is an InputError."""
    lines = [line.strip() for line in read_lines(words) if line.strip()]
    if not lines and words.stem in ("train", "trainval"):
        raise InputError(f"{words}: no name in it; list the training pictures, or take the file away")
    # a name may have spaces, and a list of one category has a number behind each name
    names = [line if line in known else line.split()[0] for line in lines]
    if missing := [name for name in names if name not in known]:
        folder = next(iter(known.values())).parent
        raise InputError(f"{words}: {len(missing)} of {len(names)} names have no file in {folder}: {listing(missing)}")
    return [known[name] for name in names]


def _split_folders(folder: Path) -> dict[str, list[Path]]:
    """Return the XML files of folders named after splits; two of one split are an InputError."""
    named = [(split, each) for each in sorted(folder.iterdir()) if each.is_dir() and (split := split_of(each.name))]
    found: dict[str, list[Path]] = {}
    for split, each in named:
        if not (files := xml_files(each)):
            continue  # masks, or pictures alone
        if split in found:
            other = found[split][0].relative_to(folder).parts[0]
            raise InputError(f"{folder}: both {other} and {each.name} look like {split}; keep one")
        found[split] = files
    return found


def read_voc(folder: Path, files: list[Path], every: list[Path], bad_boxes: BadBoxes = "refuse") -> Annotations:
    """Read one split of a VOC data set; `every` file of all splits decides which categories there are.

    Categories are the names in alphabetical order, with ids 1…K; image and annotation ids count from 1. Corners are
    edges of boxes: left = xmin, width = xmax − xmin. Objects marked difficult are objects like others.
    """
    trees = {path: parse(path) for path in every}
    names = sorted({_text(path, each, "name") for path, tree in trees.items() for each in tree.iter("object")})
    if not names:
        raise InputError(f"{folder}: no object in any of {len(every)} XML files")
    categories = Categories(ids=tuple(range(1, len(names) + 1)), names=tuple(names))
    label_of = {name: label for label, name in enumerate(names)}
    pictures, rows, boxes, labels = [], [], [], []
    for row, path in enumerate(files):
        tree = trees[path]
        picture = picture_of(folder, path, tree)
        pictures.append((picture, *(stated_size(path, tree) or upright_size(folder / picture))))
        for each in tree.iter("object"):
            rows.append(row)
            name, (xmin, ymin, xmax, ymax) = read_object(path, each)
            labels.append(label_of[name])
            boxes.append([xmin, ymin, xmax - xmin, ymax - ymin])
    refuse_twice(
        folder,
        [name.as_posix() for name, *_ in pictures],
        [path.name for path in files],
        "correct <filename> in one of them, or take one away",
    )
    image = np.array(rows, dtype=np.int64)
    sizes = np.array([size for _, *size in pictures], dtype=np.int64)
    given = np.array(boxes, dtype=np.float64).reshape(-1, 4)

    def place(row: int) -> str:
        number = row - int(np.searchsorted(image, image[row]))
        return f"{files[image[row]].name}, object {number + 1} ({names[labels[row]]}): [left, top, width, height]"

    kept, keep, cut = check_boxes(folder, given, sizes[image], place, bad_boxes)
    return gather(
        categories,
        folder,
        Pictures(np.arange(1, len(files) + 1), np.array([name.as_posix() for name, *_ in pictures]), sizes),
        Objects.numbered(image, kept, labels),
        keep,
        cut,
    )


def parse(path: Path) -> ET.Element:
    """Return the root of an XML file; a document type is refused, for it can make a small file huge."""
    refuse_outside(path, "the file itself", [path], [path.parent])
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(unreadable(path, error)) from None
    if b"\0" in content:
        raise InputError(f"{path}: UTF-16, or no text at all; save it as UTF-8")
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise InputError(f"{path}: it defines a document type, which annotation files do not need; take it out")
    try:
        root = ET.fromstring(content)  # noqa: S314 see above
    except (ET.ParseError, LookupError, ValueError) as error:  # the last two: encodings that it does not know
        raise InputError(f"{path}: not XML ({error})") from None
    if root.tag == "annotations":
        raise InputError(f"{path}: CVAT's own XML, of many pictures at once; export the task as COCO or as Pascal VOC")
    return root


def read_object(path: Path, element: ET.Element) -> tuple[str, tuple[float, ...]]:
    """Return name and corners (left, top, right, bottom in pixels) of one object."""
    return _text(path, element, "name"), tuple(_number(path, element, f"bndbox/{side}") for side in SIDES)


def _text(path: Path, element: ET.Element, name: str) -> str:
    text = (element.findtext(name) or "").strip()
    if not text:
        raise InputError(f"{path}: <{element.tag}> has no <{name}>; every object needs one")
    return text


def _number(path: Path, element: ET.Element, name: str) -> float:
    text = _text(path, element, name)
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{path}: <{name}> is {text!r}; expected a number of pixels") from None


def stated_size(path: Path, tree: ET.Element) -> tuple[int, int] | None:
    """Return height and width as the file states them, None where it says none, or 0 × 0 as some programs write."""
    size = tree.find("size")
    if size is None or {(size.findtext(side) or "0").strip() for side in ("height", "width")} == {"0"}:
        return None
    height, width = (_number(path, size, side) for side in ("height", "width"))
    if not (1 <= height <= LONGEST and 1 <= width <= LONGEST):
        raise InputError(f"{path}: <size> says {width:g} × {height:g} pixels; write the picture's own size there")
    return int(height), int(width)


def picture_of(folder: Path, path: Path, tree: ET.Element) -> Path:
    """Find a file's picture, below the data set's folder: by its <filename>, or by the XML file's own name."""
    stated = (tree.findtext("filename") or "").strip()
    if stated:
        inside(path, "<filename>", stated, folder)
    names = [stated] if Path(stated).suffix.lower() in SUFFIXES else []
    names += [path.stem + suffix for lower in SUFFIXES for suffix in (lower, lower.upper())]
    above = [each for each in path.parents if each != folder and each.is_relative_to(folder)]  # SPLIT, for one
    places = [path.parent, *(each / name for each in (*above, folder) for name in IMAGE_FOLDERS)]
    for name in names:
        for place in places:
            if is_file(place / name):
                refuse_outside(path, "its picture", [place / name], [folder])
                return (place / name).relative_to(folder)
    tried = ", ".join(str(place) for place in dict.fromkeys(places))
    raise InputError(f"{path}: its picture {stated or path.stem} is in none of {tried}; put it there")
