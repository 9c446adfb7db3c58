"""The boxes of a whole split as flat arrays: small, quick to index, and shared by worker processes for free."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from lucidetr.categories import Categories
from lucidetr.structures import Target


@dataclass(frozen=True, eq=False)
class Annotations:
    """Hold images and objects of one split; the objects of image i are rows starts[i] … starts[i+1] − 1.

    Boxes keep the file's own numbers (left, top, width, height in pixels, float64), so that evaluation compares
    with exactly what the user wrote. Crowd boxes are regions to ignore, not objects to find.
    """

    categories: Categories
    folder: Path
    image_ids: np.ndarray  # int64 [image]
    file_names: np.ndarray  # str [image], relative to folder
    sizes: np.ndarray  # int64 [image, 2] height, width
    starts: np.ndarray  # int64 [image + 1]
    annotation_ids: np.ndarray  # int64 [object]
    boxes_xywh: np.ndarray  # float64 [object, 4]
    labels: np.ndarray  # int64 [object] 0…K−1
    areas: np.ndarray  # float64 [object] decides small, medium or large in evaluation
    crowd: np.ndarray  # bool [object]
    mended: str = ""  # what was left out or changed on reading, in words

    def __len__(self) -> int:
        return len(self.image_ids)

    def rows(self, index: int) -> slice:
        """Return where the objects of image `index` stand."""
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def target(self, index: int) -> Target:
        """Return what is to be found in image `index`: its boxes cut to the picture, crowds left out."""
        corners, labels = self.objects(index)
        return Target(boxes_xyxy=torch.from_numpy(corners.astype(np.float32)), labels=torch.from_numpy(labels))

    def objects(self, index: int) -> tuple[Float[np.ndarray, "object 4"], Int[np.ndarray, " object"]]:
        """Return the same as arrays: boxes_xyxy in the picture's pixels, and labels."""
        rows = self.rows(index)
        keep = ~self.crowd[rows]
        low = self.boxes_xywh[rows][keep, :2]
        high = low + self.boxes_xywh[rows][keep, 2:]
        width_height = self.sizes[index, ::-1]
        corners = np.concatenate([low.clip(0, width_height), high.clip(0, width_height)], axis=1)
        return corners, self.labels[rows][keep]

    def objects_per_image(self) -> np.ndarray:
        """Return how many objects each image has, crowds left out."""
        ends = np.concatenate([[0], np.cumsum(~self.crowd)])
        return ends[self.starts[1:]] - ends[self.starts[:-1]]

    def subset(self, indices: np.ndarray) -> "Annotations":
        """Return the annotations of some images, in the given order."""
        rows = [np.arange(self.starts[i], self.starts[i + 1]) for i in indices]
        flat = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
        return replace(
            self,
            image_ids=self.image_ids[indices],
            file_names=self.file_names[indices],
            sizes=self.sizes[indices],
            starts=np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64),
            annotation_ids=self.annotation_ids[flat],
            boxes_xywh=self.boxes_xywh[flat],
            labels=self.labels[flat],
            areas=self.areas[flat],
            crowd=self.crowd[flat],
            mended="",
        )

    def to_coco(self) -> dict:
        """Return the content of a COCO file, with the user's own image, annotation and category ids."""
        image_of_row = np.repeat(self.image_ids, np.diff(self.starts)).tolist()
        category_ids = np.array(self.categories.ids, dtype=np.int64)[self.labels].tolist()
        return {
            "images": [
                {"id": i, "file_name": str(name), "height": height, "width": width}
                for i, name, (height, width) in zip(
                    self.image_ids.tolist(), self.file_names, self.sizes.tolist(), strict=True
                )
            ],
            "annotations": [
                {"id": a, "image_id": i, "category_id": c, "bbox": box, "area": area, "iscrowd": int(crowd)}
                for a, i, c, box, area, crowd in zip(
                    self.annotation_ids.tolist(),
                    image_of_row,
                    category_ids,
                    self.boxes_xywh.tolist(),
                    self.areas.tolist(),
                    self.crowd.tolist(),
                    strict=True,
                )
            ],
            "categories": [
                {"id": i, "name": name} for i, name in zip(self.categories.ids, self.categories.names, strict=True)
            ],
        }


class Pictures(NamedTuple):
    """Hold the images of a split as a reader found them."""

    ids: np.ndarray
    names: np.ndarray
    sizes: np.ndarray  # height, width


class Objects(NamedTuple):
    """Hold the objects of a split as a reader found them, in any order; `image` is a row of the pictures."""

    image: np.ndarray
    ids: np.ndarray
    boxes_xywh: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray

    @classmethod
    def numbered(cls, image: np.ndarray, boxes_xywh: np.ndarray, labels: list[int]) -> "Objects":
        """Return objects of a form that knows nothing else of them: ids from 1, areas of the boxes, no crowds."""
        areas = boxes_xywh[:, 2] * boxes_xywh[:, 3]
        ids, crowd = np.arange(1, len(image) + 1), np.zeros(len(image), dtype=bool)
        return cls(image, ids, boxes_xywh, np.array(labels, dtype=np.int64), areas, crowd)


def gather(
    categories: Categories,
    folder: Path,
    pictures: Pictures,
    objects: Objects,
    keep: np.ndarray,
    cut: np.ndarray | None = None,
) -> Annotations:
    """Return the annotations with the objects that are kept, those of each image side by side."""
    left_out, shortened = int((~keep).sum()), 0 if cut is None else int(cut.sum())
    order = np.flatnonzero(keep)[np.argsort(objects.image[keep], kind="stable")]
    counts = np.bincount(objects.image[order], minlength=len(pictures.ids))
    return Annotations(
        categories=categories,
        folder=folder,
        image_ids=pictures.ids,
        file_names=pictures.names,
        sizes=pictures.sizes,
        starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        annotation_ids=objects.ids[order],
        boxes_xywh=objects.boxes_xywh[order],
        labels=objects.labels[order],
        areas=objects.areas[order],
        crowd=objects.crowd[order],
        mended=f"of {len(keep):,} boxes, {left_out:,} left out and {shortened:,} cut at the picture's edge"
        if left_out or shortened
        else "",
    )
