"""A split of images with boxes, wherever its pixels come from, and how a training run gets its two splits."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from torch import Tensor

from lucidetr.config import TrainConfig
from lucidetr.data import digits
from lucidetr.data.annotations import Annotations
from lucidetr.data.coco import read_coco
from lucidetr.data.decoding import read_image
from lucidetr.data.faults import BadBoxes
from lucidetr.data.preprocessing import resize
from lucidetr.data.splits import find_splits
from lucidetr.errors import InputError, did_you_mean

SPLIT_SEED = 0  # of the images set aside: runs with other seeds are judged on the same ones
Pixels = Callable[[int], UInt8[Tensor, "3 height width"]]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Hold the boxes of a split and the way to its pixels; images stay in memory once `keep` has made room."""

    name: str
    annotations: Annotations
    read: Pixels
    stored: bool = True  # as files in the annotations' folder; what is generated is not, whatever lies there
    skips: bool = False  # in training, a picture that cannot be read; the next one takes its place
    room: float = 0.0  # gigabytes
    reserved: dict[int, float] = field(default_factory=dict, repr=False)  # of it, for all images at a side
    # by index and side, 0 being the picture as decoded
    kept: dict[tuple[int, int], UInt8[Tensor, "3 height width"]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.annotations)

    def image(self, index: int) -> UInt8[Tensor, "3 height width"]:
        """Return the pixels of image `index`; a size that the annotations do not state is an InputError."""
        if (index, 0) in self.kept:
            return self.kept[index, 0]
        image = self.decoded(index)
        if self.reserve(0):
            self.kept[index, 0] = image
        return image

    def file(self, index: int) -> Path | None:
        """Return the file of image `index`, None where there is none."""
        path = self.annotations.folder / str(self.annotations.file_names[index])
        return path if self.stored and path.is_file() else None

    def square(self, index: int, side: int) -> UInt8[Tensor, "3 size size"]:
        """Return image `index` resized to side × side."""
        if (index, side) in self.kept:
            return self.kept[index, side]
        if not self.reserve(side):
            return resize(self.image(index), (side, side))
        image = self.kept[index, side] = resize(self.decoded(index), (side, side))
        return image

    def reserve(self, side: int) -> bool:
        """Say whether there is room to keep all images at that side (0: as decoded) beside what is kept already."""
        if side not in self.reserved:
            pixels = len(self) * side**2 if side else int(self.annotations.sizes.prod(1).sum())
            need = pixels * 3 / 1e9
            if sum(self.reserved.values()) + need > self.room:
                return False
            self.reserved[side] = need
        return True

    def decoded(self, index: int) -> UInt8[Tensor, "3 height width"]:
        """Return the pixels of image `index` from where they are stored."""
        image = self.read(index)
        stated = tuple(self.annotations.sizes[index].tolist())
        if tuple(image.shape[1:]) != stated:
            name, (height, width) = self.annotations.file_names[index], image.shape[1:]
            turned, fix = "", "correct width and height, or replace the picture"
            if (width, height) == stated:  # other numbers would only hide that boxes and picture do not fit
                turned, fix = ", as its EXIF note turns it", "save the picture upright, and label that"
            raise InputError(
                f"{self.annotations.folder / name}: image {self.annotations.image_ids[index]} is "
                f"{width} × {height} pixels{turned}; the annotations say {stated[1]} × {stated[0]}: {fix}"
            )
        return image

    def keep(self, gigabytes: float) -> "Dataset":
        """Return the same split, its images staying in memory, decoded or as squares, if all fit into `gigabytes`."""
        return replace(self, room=gigabytes, reserved={}, kept={})

    def subset(self, indices: np.ndarray, name: str) -> "Dataset":
        """Return some of the images, in the given order."""
        read = partial(_chosen, self, indices.tolist())
        return Dataset(name, self.annotations.subset(indices), read, self.stored, self.skips)


def open_dataset(source: str, split: str, bad_boxes: BadBoxes = "refuse") -> Dataset:
    """Open one split of a folder or of a generated set, or a single COCO file, which is every split."""
    if source.startswith("generated:"):
        return _open_digits(source, split)
    if source.endswith(".json"):
        return open_coco(Path(source), bad_boxes=bad_boxes)
    found = find_splits(Path(source))
    if split not in found.splits:
        raise InputError(f"{source} has no split {split}: {did_you_mean(split, found.splits)}")
    return _from_files(f"{source}, {split} ({found.format})", found.splits[split](bad_boxes))


def open_coco(path: Path, images: Path | None = None, bad_boxes: BadBoxes = "refuse") -> Dataset:
    """Open one COCO file, with its image folder when that cannot be found by itself."""
    return _from_files(str(path), read_coco(path, images, bad_boxes))


def _from_files(name: str, annotations: Annotations) -> Dataset:
    return Dataset(name, annotations, partial(_stored, annotations))


# functions with a name: where processes are not forked, a reading process gets its data set as a pickle


def _stored(annotations: Annotations, index: int) -> UInt8[Tensor, "3 height width"]:
    return read_image(annotations.folder / str(annotations.file_names[index]))


def _chosen(dataset: Dataset, chosen: list[int], index: int) -> UInt8[Tensor, "3 height width"]:
    return dataset.image(chosen[index])


def _open_digits(source: str, split: str) -> Dataset:
    scenes = digits.DigitScenes(digits.parse(source), split)
    return Dataset(f"{source} {split}", scenes.annotations(), scenes.picture, stored=False)


def has_split(source: str, split: str) -> bool:
    """Say whether a folder or generated set comes with that split."""
    if source.startswith("generated:"):
        return split in digits.SPLITS
    return not source.endswith(".json") and split in find_splits(Path(source)).splits


def open_training_data(config: TrainConfig) -> tuple[Dataset, Dataset, list[str]]:
    """Return the training and the validation split, and a sentence for everything worth knowing about them."""
    for split in ("train", "val"):
        if (images := getattr(config, f"{split}_images")) and not getattr(config, f"{split}_json"):
            raise InputError(f"--{split}-images {images} belongs to --{split}-json, which is not given")
    notes = []
    gigabytes = config.cache_gb / max(config.workers, 1)  # each reading process keeps its own
    if config.train_json:
        train = _open_explicit(config.train_json, config.train_images, config)
    elif config.data:
        train = open_dataset(config.data, "train", config.bad_boxes)
    else:
        raise InputError("no data: give --data FOLDER, --data generated:digits, or --train-json and --train-images")
    train = replace(train, skips=config.bad_pictures == "skip")
    notes += mended(train) + without_objects(train)
    if config.overfit:
        few = train.subset(np.arange(min(config.overfit, len(train))), f"{train.name}, first {config.overfit}")
        few = few.keep(gigabytes)
        return few, few, [*notes, f"overfitting {len(few)} images: evaluated on the same images, no augmentation"]
    if config.val_json:
        val = _open_explicit(config.val_json, config.val_images, config)
    elif config.data and has_split(config.data, "val"):
        val = open_dataset(config.data, "val", config.bad_boxes)
    else:
        train, val = set_aside(train, config.val_fraction, SPLIT_SEED)
        notes.append(
            f"no validation split: {len(val)} of {len(val) + len(train)} training images set aside at random "
            f"(--val-fraction {config.val_fraction:g}), the same whatever the --seed"
        )
    val = in_categories_of(train, val)
    notes += mended(val) + shared_files(train, val)
    return train.keep(gigabytes), val.keep(config.cache_gb), notes


def mended(dataset: Dataset) -> list[str]:
    """Return a sentence on what was left out or changed when a split was read, none where nothing was."""
    return [f"{dataset.name}: {dataset.annotations.mended}"] if dataset.annotations.mended else []


def without_objects(train: Dataset) -> list[str]:
    """Return a sentence where most training images hold no object; that none holds one is an InputError."""
    empty = int((train.annotations.objects_per_image() == 0).sum())
    why = "where that is not so, their labels were not found: lucidetr doctor says which"
    if empty == len(train):
        raise InputError(
            f"{train.name}: none of {len(train)} images holds an object, so there is nothing to learn; {why}"
        )
    return [f"warning: {empty} of {len(train)} training images hold no object; {why}"] if empty > len(train) / 2 else []


def shared_files(train: Dataset, val: Dataset) -> list[str]:
    """Return a sentence where both splits have images in common, which makes validation look better than it is."""
    if not (train.stored and val.stored):
        return []
    # texts, for a hundred thousand paths would take a second
    seen, others = (
        [f"{each.folder.resolve()}/{name}" for name in each.file_names.tolist()]
        for each in (train.annotations, val.annotations)
    )
    both = len(set(others).intersection(seen))
    said = f"warning: {both} of {len(val)} validation images are training images, too: what they show means little"
    return [said] if both else []


def in_categories_of(train: Dataset, val: Dataset) -> Dataset:
    """Return a split in the categories of the training split, of which it may name fewer; others are an InputError."""
    mine, theirs = train.annotations.categories, val.annotations.categories
    place = {pair: label for label, pair in enumerate(zip(mine.ids, mine.names, strict=True))}
    labels = [place.get(pair, -1) for pair in zip(theirs.ids, theirs.names, strict=True)]
    if mine == theirs or -1 in labels:
        refuse_other_categories(train, val)
        return val
    told = np.array(labels, dtype=np.int64)[val.annotations.labels]
    return replace(val, annotations=replace(val.annotations, categories=mine, labels=told))


def refuse_other_categories(one: Dataset, other: Dataset) -> None:
    """Refuse two splits that number other categories, or in another order: one's labels would not be the other's."""
    mine, theirs = one.annotations.categories, other.annotations.categories
    if mine != theirs:
        raise InputError(
            f"{one.name} and {other.name} have different categories: {mine} against {theirs}; give both the same list"
        )


def evenly(total: int, number: int) -> list[int]:
    """Return `number` indices evenly spread over 0 … total − 1, all of them where there are fewer.

    >>> evenly(10, 3), evenly(2, 5)
    ([1, 5, 8], [0, 1])
    """
    number = min(number, total)
    return [int((i + 0.5) * total / number) for i in range(number)]


def _open_explicit(path: str, images: str, config: TrainConfig) -> Dataset:
    return open_coco(Path(path), Path(images) if images else None, config.bad_boxes)


def set_aside(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split at random into training and validation images; the same seed gives the same split."""
    if not 0 < fraction < 1:
        raise InputError(f"--val-fraction {fraction}: choose a share between 0 and 1")
    if len(dataset) < 2:
        raise InputError(
            f"{dataset.name}: {len(dataset)} image cannot be split; give a validation set, more images, or --overfit 1"
        )
    chosen = held_out(len(dataset), fraction, seed)
    rest = np.setdiff1d(np.arange(len(dataset)), chosen)
    return dataset.subset(rest, f"{dataset.name}, rest"), dataset.subset(chosen, f"{dataset.name}, set aside")


def held_out(
    number: int, fraction: float, seed: int, places: Int[np.ndarray, " image"] | None = None
) -> Int[np.ndarray, " chosen"]:
    """Choose a share of two or more pictures at random, at least one; those of one place go together.

    Never all of them are chosen, unless all show one place.

    >>> held_out(6, 0.4, seed=1, places=np.array([0, 0, 0, 1, 1, 2])).tolist()
    [3, 4]
    """
    order = np.random.default_rng(seed).permutation(number)
    count = min(max(round(fraction * number), 1), number - 1)
    if places is None:
        return np.sort(order[:count])
    groups = [np.flatnonzero(places == place) for place in dict.fromkeys(places[order].tolist())]
    chosen: list[int] = []
    for group in groups:
        if len(chosen) + len(group) <= count:
            chosen += group.tolist()
    return np.sort(np.array(chosen or min(groups, key=len)))
