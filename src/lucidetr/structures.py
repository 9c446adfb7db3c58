"""The values that travel between the parts, as frozen dataclasses with their shapes.

Axis names mean the same everywhere and are listed in docs/shapes.md.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lucidetr.boxes import xyxy_to_xywh
from lucidetr.categories import Categories
from lucidetr.errors import InputError, did_you_mean, imported


@dataclass(frozen=True, eq=False)
class Target:
    """Hold the ground truth of one image: boxes in its own pixels and their labels 0…K−1."""

    boxes_xyxy: Float[Tensor, "object 4"]
    labels: Int[Tensor, " object"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Hold images of unequal size padded to one size, and their objects padded to one number.

    `boxes_cxcywh` are fractions of each image before padding; entries past `counts` are zeros. `counts` stays on
    the host, where the matching is solved; `sizes` are the original pictures' (height, width) in pixels.
    """

    images: Float[Tensor, "batch 3 height width"]
    padding: Bool[Tensor, "batch height width"]  # True = padded
    boxes_cxcywh: Float[Tensor, "batch object 4"]
    labels: Int[Tensor, "batch object"]
    counts: Int[Tensor, " batch"]
    image_ids: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "Batch":
        """Return the same batch with images and objects on `device`, images and boxes as `dtype`.

        A GPU fetches what lies in pinned memory by itself, while this process goes on.
        """
        dtypes = {"images": dtype, "boxes_cxcywh": dtype, "padding": torch.bool, "labels": self.labels.dtype}
        how = {"device": device, "non_blocking": device.type == "cuda"}
        moved = {name: getattr(self, name).to(dtype=kind, **how) for name, kind in dtypes.items()}
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        """Return the same batch in memory that the system does not move; torch's loader calls this by its name."""
        names = ("images", "padding", "boxes_cxcywh", "labels")
        return replace(self, **{name: getattr(self, name).pin_memory() for name in names})


@dataclass(frozen=True, eq=False)
class Hints:
    """Hold noised truths of each image, as many as there are queries, for one more group to start from in training."""

    boxes_cxcywh: Float[Tensor, "batch query 4"]
    labels: Int[Tensor, "batch query"]


@dataclass(frozen=True, eq=False)
class Predictions:
    """Hold what the heads say after every decoder layer; the last layer is the answer, the others are supervised.

    Proposals that the queries started from are a layer of their own, the first. `logits` of a softmax end with the
    slot for no object; those of sigmoids have none. `boxes_cxcywh` are fractions of the unpadded image. `tokens` is
    what every token of the memory says beside them in training, if it is asked, as one layer for each group of queries.
    """

    logits: Float[Tensor, "layer batch query category"]
    boxes_cxcywh: Float[Tensor, "layer batch query 4"]
    tokens: "Predictions | None" = None

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Predictions":
        """Return the predictions whose tensors these are."""
        logits, boxes_cxcywh, *rest = tensors
        return cls(logits=logits, boxes_cxcywh=boxes_cxcywh, tokens=cls.of(rest) if rest else None)

    @classmethod
    def stacked(cls, parts: "Sequence[Predictions]") -> "Predictions":
        """Return the layers of all parts, one after the other; of what tokens say, too."""
        tokens = [part.tokens for part in parts if part.tokens]
        return cls(
            logits=torch.cat([part.logits for part in parts]),
            boxes_cxcywh=torch.cat([part.boxes_cxcywh for part in parts]),
            tokens=cls.stacked(tokens) if tokens else None,
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """Return logits and boxes, and those of the tokens: all that a compiled or recorded graph may hand out."""
        return (self.logits, self.boxes_cxcywh, *(self.tokens.tensors() if self.tokens else ()))

    def in_full_precision(self) -> "Predictions":
        """Return the same values in float32, or in float64 where they are that already."""
        dtype = torch.promote_types(self.logits.dtype, torch.float32)
        return Predictions.of([each.to(dtype) for each in self.tensors()])

    def groups_as_layers(self, groups: int) -> "Predictions":
        """Return groups of queries, one after the other on the query axis, as layers of their own.

        Row l · groups + g is group g after layer l: each is matched and supervised as any layer is.
        """
        if groups == 1:
            return self
        values = (self.logits, self.boxes_cxcywh)
        logits, boxes = (x.unflatten(2, (groups, -1)).movedim(2, 1).flatten(0, 1) for x in values)
        return Predictions(logits=logits, boxes_cxcywh=boxes, tokens=self.tokens)


@dataclass(frozen=True, eq=False)
class Assignment:
    """List every matched pair of all layers and images: `query[i]` of `image[i]` in `layer[i]` has `object[i]`."""

    layer: Int[Tensor, " match"]
    image: Int[Tensor, " match"]
    query: Int[Tensor, " match"]
    object: Int[Tensor, " match"]


@dataclass(frozen=True, eq=False)
class Detections:
    """Hold the boxes found in one picture, in its own pixels, best score first."""

    boxes_xyxy: Float[Tensor, "detection 4"]
    scores: Float[Tensor, " detection"]
    labels: Int[Tensor, " detection"]
    categories: Categories

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        """Return the user's category name of each detection."""
        return [self.categories.names[label] for label in self.labels.tolist()]

    @property
    def category_ids(self) -> list[int]:
        """Return the user's category id of each detection."""
        return [self.categories.ids[label] for label in self.labels.tolist()]

    def above(self, threshold: float | Float[Tensor, " category"]) -> "Detections":
        """Return only the detections whose score is at least `threshold`: one number 0…1, or one for each label."""
        if isinstance(threshold, Tensor) and threshold.shape == (len(self.categories),):
            return self.only(self.scores >= threshold[self.labels])
        if isinstance(threshold, Real) and 0 <= threshold <= 1:
            return self.only(self.scores >= threshold)
        said = f"tensor of shape {tuple(threshold.shape)}" if isinstance(threshold, Tensor) else repr(threshold)
        raise InputError(
            f"threshold {said}: give a number from 0 to 1, or a tensor with one for each of the "
            f"{len(self.categories)} categories"
        )

    def of_classes(self, names: Iterable[str]) -> "Detections":
        """Return only the detections of some categories; a name that is not among them is an InputError."""
        wanted = torch.tensor(labels_of(names, self.categories), dtype=torch.long)
        return self.only(torch.isin(self.labels, wanted))

    def only(self, which: Bool[Tensor, " detection"] | Int[Tensor, " _"]) -> "Detections":
        """Return the detections where `which` is True, or those that it numbers, in its order."""
        return replace(self, boxes_xyxy=self.boxes_xyxy[which], scores=self.scores[which], labels=self.labels[which])

    def to_coco(self, image_id: int) -> list[dict]:
        """Return the detections as entries of a COCO results file, with the user's own category ids."""
        rows = zip(xyxy_to_xywh(self.boxes_xyxy).tolist(), self.scores.tolist(), self.category_ids, strict=True)
        return [
            {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
            for box, score, category_id in rows
        ]

    def to_supervision(self) -> Any:
        """Return the same as `supervision.Detections`: class_id is the label 0…K−1, data["class_name"] the name."""
        return imported("supervision").Detections(
            xyxy=self.boxes_xyxy.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def to_dataframe(self) -> Any:
        """Return a pandas table, a row for each detection: name, category_id, score, x0, y0, x1, y1."""
        pandas = imported("pandas")
        columns: dict[str, Any] = {
            "name": pandas.Series(self.names, dtype=str),  # with their types said, nothing found is no other table
            "category_id": np.array(self.category_ids, dtype=np.int64),
            "score": self.scores.numpy(),
        }
        corners = zip(("x0", "y0", "x1", "y1"), self.boxes_xyxy.numpy().T, strict=True)
        return pandas.DataFrame(columns | dict(corners))


def labels_of(names: Iterable[str], categories: Categories) -> list[int]:
    """Return the labels of category names, or of a single one; an unknown name is an InputError with the nearest."""
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in categories.names:
            raise InputError(f"unknown category {name!r}: {did_you_mean(name, categories.names)}")
    return [categories.names.index(name) for name in names]
