"""What the queries are for: where each looks for objects, how often it is used, which are alike (DETR, figure 7)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from lucidetr.boxes import cxcywh_to_xyxy, iou
from lucidetr.config import ImageConfig, LossConfig
from lucidetr.criterion.matcher import match
from lucidetr.data.batching import evaluation_batches
from lucidetr.data.dataset import Dataset, evenly
from lucidetr.inspection import churn
from lucidetr.inspection.material import Material
from lucidetr.inspection.microscope import best_class
from lucidetr.inspection.page import Figure, Section, chart
from lucidetr.models.detr import DETR
from lucidetr.models.queries import Start
from lucidetr.structures import Predictions

FOUND = 0.5  # a score from which on a query counts as having found something
ALIKE = 0.99  # cosine of what two queries start from
SAME_BOX = 0.8  # IoU of two boxes of one class: one object said twice
TOLERATED = 0.05  # such pairs for each object
ENOUGH = 2  # matches for each query, before it is said that a query is never used
DRAWN = 20  # queries whose boxes are drawn
SMALL, HORIZONTAL, VERTICAL = 0, 1, 2
COLOURS = ("#2ca02c", "#e0413f", "#4a90d9")  # the paper's, to be seen on white and on black


@dataclass(frozen=True, eq=False)
class QueryStatistics:
    """Hold what the queries said of many pictures, after the last layer.

    Where a picture has fewer tokens than there are queries, the rest of its boxes are nan and their scores 0.
    """

    image_ids: tuple[int, ...]
    boxes_cxcywh: Float[np.ndarray, "batch query 4"]
    scores: Float[np.ndarray, "batch query"]  # of the best real class
    labels: Int[np.ndarray, "batch query"]
    matched: Bool[np.ndarray, "batch query"]  # with an object, as in training
    similarity: Float[np.ndarray, "query query"]  # of what they start from, −1…1; nan: never side by side
    ranked: bool  # selected queries: number i is the token of rank i, another one in every picture

    @property
    def used(self) -> Bool[np.ndarray, " query"]:
        """Return which queries ever had an object or found something."""
        return np.any(self.matched | (self.scores >= FOUND), axis=0)


@torch.no_grad()
def query_statistics(
    model: DETR, dataset: Dataset, images: ImageConfig, loss: LossConfig, most: int = 200
) -> QueryStatistics:
    """Return what a model's queries say of a split, of at most so many pictures evenly spread over it.

    The model is in evaluation mode. Two queries are as similar as what they start from: the mean of the cosines of
    their contents and of their positions, as far as they have them. Selected queries start from other tokens in every
    picture; for them it is the mean over the pictures, of rank i with rank j.
    """
    if len(dataset) > most:
        dataset = dataset.subset(np.array(evenly(len(dataset), most)), dataset.name)
    queries, some = model.config.num_queries, next(model.parameters())
    boxes = np.full((len(dataset), queries, 4), np.nan, np.float32)
    scores, labels = np.zeros(boxes.shape[:2], np.float32), np.zeros(boxes.shape[:2], np.int64)
    matched = np.zeros(boxes.shape[:2], bool)
    alike, pictures = np.zeros((queries, queries), np.float32), np.zeros((queries, queries), np.int64)
    ids: list[int] = []
    for part in evaluation_batches(dataset, images, batch=8):
        moved = part.to(some.device, some.dtype)
        start, said = ask(model, moved.images, moved.padding)
        here, there = slice(len(ids), len(ids) + len(part)), slice(0, said.logits.shape[2])
        best, category = best_class(said.logits[0].float(), model.config.num_classes)
        boxes[here, there] = said.boxes_cxcywh[0].float().cpu().numpy()
        scores[here, there], labels[here, there] = best.cpu().numpy(), category.cpu().numpy()
        pairs = match(said, moved, loss)
        matched[len(ids) + pairs.image.cpu().numpy(), pairs.query.cpu().numpy()] = True
        alike[there, there] += similarity(vectors(model, start)).sum(0).cpu().numpy()
        pictures[there, there] += len(part)
        ids += part.image_ids
    ranked = model.config.selects
    likeness = np.where(pictures > 0, alike / pictures.clip(1), np.nan)  # some ranks are nowhere, or never side by side
    return QueryStatistics(tuple(ids), boxes, scores, labels, matched, likeness, ranked)


def ask(model: DETR, images: Tensor, padding: Tensor) -> tuple[Start, Predictions]:
    """Return what the queries start from and what they say in the end: the model's forward, cut in two."""
    memory = model.encode(model.backbone(images), padding)
    start = model.queries(memory)
    said = model.decoder(start, memory, model.heads, 1)
    return start, Predictions(logits=said.logits[-1:], boxes_cxcywh=said.boxes_cxcywh[-1:])


def vectors(model: DETR, start: Start) -> list[Float[Tensor, "batch query d_model"]]:
    """Return what tells queries from each other when they start: content and position, those that are not empty."""
    position = start.position
    if start.boxes_cxcywh is not None:
        of_boxes: Callable[[Tensor], Tensor] = model.decoder.position  # type: ignore[assignment]
        position = of_boxes(start.boxes_cxcywh)
    content = None if model.config.queries == "scored" else start.content  # scored: points of one line
    return [part for part in (content, position) if part is not None and bool(part.any())]


def similarity(parts: list[Float[Tensor, "batch query d_model"]]) -> Float[Tensor, "batch query query"]:
    """Return the cosine of every two queries, the mean of the parts' that they are described by.

    >>> content, position = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> similarity([content, position])[0].tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    directions = [F.normalize(part, dim=-1) for part in parts]
    return torch.stack([each @ each.transpose(-2, -1) for each in directions]).mean(0)


def kinds(boxes_cxcywh: Float[np.ndarray, "*any 4"]) -> Int[np.ndarray, "*any"]:
    """Return SMALL for the smaller half of all boxes, HORIZONTAL or VERTICAL for the larger ones.

    >>> sizes = np.array([[0.1, 0.1], [0.1, 0.2], [0.9, 0.5], [0.5, 0.9]])
    >>> kinds(np.concatenate([np.full((4, 2), 0.5), sizes], axis=1)).tolist()
    [0, 0, 1, 2]
    """
    width, height = boxes_cxcywh[..., 2], boxes_cxcywh[..., 3]
    small = width * height < np.nanmedian(width * height)
    return np.where(small, SMALL, np.where(width >= height, HORIZONTAL, VERTICAL))


def near_duplicates(similarity: Float[np.ndarray, "query query"], above: float = ALIKE) -> list[tuple[int, int]]:
    """Return the pairs of queries that start from nearly the same.

    >>> near_duplicates(np.array([[1.0, 0.2, 0.999], [0.2, 1.0, 0.1], [0.999, 0.1, 1.0]]))
    [(0, 2)]
    """
    return [(int(i), int(j)) for i, j in np.argwhere(np.triu(similarity > above, k=1))]


def said_twice(statistics: QueryStatistics) -> list[tuple[int, int, int]]:
    """Return (picture, query, query) where a second query said an object again: one class, IoU above SAME_BOX.

    One of the two has the object. Two that each have one of their own are both right, however close these lie.
    """
    found = []
    for picture, scores in enumerate(statistics.scores):
        sure = np.flatnonzero(scores >= FOUND)
        corners = cxcywh_to_xyxy(torch.from_numpy(statistics.boxes_cxcywh[picture, sure]))
        labels = statistics.labels[picture, sure]
        one = np.logical_xor.outer(statistics.matched[picture, sure], statistics.matched[picture, sure])
        overlap = iou(corners[:, None], corners[None]).numpy()
        same = np.triu((overlap > SAME_BOX) & (labels[:, None] == labels[None]) & one, k=1)
        found += [(picture, int(sure[i]), int(sure[j])) for i, j in np.argwhere(same)]
    return found


def draw_places(drawn: Any, statistics: QueryStatistics) -> None:
    """Draw the middles of all boxes that each of the most used queries said, as the paper's figure 7 does."""
    shown = np.argsort(-statistics.matched.sum(0), kind="stable")[:DRAWN]
    colours = np.array(COLOURS)[kinds(statistics.boxes_cxcywh)]
    panels = drawn.subplots(-(-len(shown) // 10), min(len(shown), 10), squeeze=False).ravel()
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    for axes, query in zip(panels, sorted(shown.tolist()), strict=False):
        x, y = statistics.boxes_cxcywh[:, query, :2].T
        axes.scatter(x, y, s=7, c=colours[:, query], linewidths=0, rasterized=True)
        axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[], aspect="equal")
        axes.set_title(str(query), fontsize=8)


def draw_usage(axes: Any, statistics: QueryStatistics) -> None:
    """Draw in what share of the pictures each query has an object, and finds something."""
    matched, found = statistics.matched.mean(0), (statistics.scores >= FOUND).mean(0)
    order = np.arange(len(matched)) if statistics.ranked else np.argsort(-matched, kind="stable")
    axes.stairs(matched[order], fill=True, color="tab:blue", alpha=0.5, label="has an object")
    axes.stairs(found[order], color="tab:orange", linewidth=1.5, label=f"score of at least {FOUND}")
    named = "queries, best token first" if statistics.ranked else "queries, most used first"
    axes.set(xlabel=named, ylabel="share of pictures", ylim=(0, None))
    axes.legend()


def draw_similarity(axes: Any, statistics: QueryStatistics) -> None:
    """Draw how alike the queries start."""
    drawn = axes.imshow(statistics.similarity, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="none")
    axes.set(xlabel="query", ylabel="query")
    axes.grid(visible=False)
    axes.figure.colorbar(drawn, ax=axes, label="cosine")


def warn_of_use(statistics: QueryStatistics) -> list[str]:
    """Return a sentence where most queries are never used, and one where objects are found twice.

    Queries that are ranks of tokens are not blamed: how many are used is how many objects there are.
    """
    sentences, idle = [], int((~statistics.used).sum())
    queries, enough = len(statistics.used), ENOUGH * len(statistics.used)
    if not statistics.ranked and idle > queries / 2 and statistics.matched.sum() >= enough:
        sentences.append(
            f"{idle} of {queries} queries never have an object: fewer would do, or they have not learned to share."
        )
    twice = said_twice(statistics)
    pictures = {picture for picture, _, _ in twice}
    objects = int(statistics.matched.sum())
    if len(twice) > TOLERATED * objects:
        picture, one, other = twice[0]
        sentences.append(
            f"{len(twice)} of {objects} objects are found by a second query, too, in {len(pictures)} of "
            f"{len(statistics.image_ids)} pictures (image {statistics.image_ids[picture]}: {one} and {other}): "
            "self-attention does not tell them apart yet."
        )
    return sentences


def warn_of_likeness(statistics: QueryStatistics) -> list[str]:
    """Return a sentence where queries start from nearly the same and so can hardly say different things."""
    pairs = near_duplicates(statistics.similarity)
    if not pairs:
        return []
    some = ", ".join(f"{i} and {j}" for i, j in pairs[:5]) + (" …" if len(pairs) > 5 else "")
    return [f"{len(pairs)} pairs of queries start from nearly the same (cosine above {ALIKE}): {some}."]


def section(material: Material) -> Section:
    """Return what the queries are for, over the validation split."""
    loss = material.config.loss
    statistics = query_statistics(material.model, material.dataset, material.card.images, loss)
    if statistics.ranked:
        says = (
            "Queries of this model are the tokens that look most like objects, best first: query 3 is the fourth best "
            "token of a picture, in each picture another place. They are ranks, not slots; late ranks are spare."
        )
        places = "Early ranks lie where the objects of the data lie; no rank has a place of its own."
        likeness = "Early ranks are used, late ones hardly: there are as many as the fullest picture needs."
    else:
        says = (
            "Queries of this model are learned once, for all pictures: each becomes a slot that looks for objects of "
            "some sizes in some places."
        )
        places = "Each query prefers a region and a few sizes, and all have some large boxes (the paper's figure 7)."
        likeness = "Most queries are used now and then, and no two start from the same."

    def draw(drawn: Any) -> None:
        usage, matrix = drawn.subplots(1, 2)
        draw_usage(usage, statistics)
        draw_similarity(matrix, statistics)

    over_the_run = churn.figure(material)
    drawn_ones = min(len(statistics.used), DRAWN)
    all_of_them = len(statistics.used)
    which = "queries" if drawn_ones == all_of_them else f"the {DRAWN} most used of {all_of_them} queries"
    rows = -(-drawn_ones // 10)
    seen = "1 picture" if len(statistics.image_ids) == 1 else f"{len(statistics.image_ids)} pictures"
    return Section(
        title="Queries",
        says=f"{says} Over {seen} of the {material.split}, after the last layer.",
        figures=(
            Figure(
                name="queries-places",
                title=f"Where {which} put their boxes, found or not: the middles",
                chart=chart(10, 1.25 * rows, lambda drawn: draw_places(drawn, statistics)),
                healthy=f"{places} Green: the smaller half of all boxes; red: large and wide; blue: large and tall.",
            ),
            Figure(
                name="queries-use",
                title="How often queries are used, and how alike they start",
                chart=chart(10, 3.6, draw),
                healthy=f"{likeness} Alike is a cosine, of positions or contents, or the mean of both.",
                warnings=(*warn_of_use(statistics), *warn_of_likeness(statistics)),
            ),
            *([over_the_run] if over_the_run else []),
        ),
    )
