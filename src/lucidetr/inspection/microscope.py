"""One picture through the reference, with a model's own weights: who looked where, and what every layer said.

(DETR, section 4.2 and figures 3 and 6: attention weights are read off as they are.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from lucidetr.categories import Categories
from lucidetr.config import LossConfig, ModelCard
from lucidetr.criterion.matcher import match, matching_cost
from lucidetr.data.batching import fixed_sample
from lucidetr.data.dataset import Dataset
from lucidetr.data.preprocessing import Sample, make_batch
from lucidetr.models.detr import DETR
from lucidetr.models.postprocess import class_scores
from lucidetr.reference.network import forward_from_maps
from lucidetr.reference.trace import Trace
from lucidetr.structures import Batch, Predictions

NOBODY = -1  # has the object: there are more objects than queries
PARTS = ("class", "L1", "GIoU")  # of the matching cost


@dataclass(frozen=True, eq=False)
class View:
    """Hold what can be seen of a model while it looks at one picture.

    The layer axis has the rows of `Predictions`: the proposals first, where there are any, then the decoder layers.
    Tokens are the encoder's, keys the cells of the memory; both lie row by row. Boxes are fractions of the picture.
    The cost is that of the matching in training, its PARTS weighted as there.
    """

    image: UInt8[np.ndarray, "height width 3"]  # as the model saw it, resized
    image_id: int
    size: tuple[int, int]  # height, width of the original picture
    categories: Categories
    has_proposals: bool
    logits: Float[np.ndarray, "layer query category"]
    boxes_cxcywh: Float[np.ndarray, "layer query 4"]
    scores: Float[np.ndarray, "layer query"]  # of the best real class
    labels: Int[np.ndarray, "layer query"]  # which that is
    encoder_attention: Float[np.ndarray, "encoder_layer head token token"]
    encoder_grid: tuple[int, int]  # rows and columns of tokens
    cross_attention: Float[np.ndarray, "decoder_layer head query key"]
    memory_grid: tuple[int, int]
    self_attention: Float[np.ndarray, "decoder_layer head query query"]
    reference_cxcywh: Float[np.ndarray, "decoder_layer query 4"] | None  # the box that a layer starts from
    objects_cxcywh: Float[np.ndarray, "object 4"]
    object_labels: Int[np.ndarray, " object"]
    cost_parts: Float[np.ndarray, "layer query object part"]
    assignment: Int[np.ndarray, "layer object"]  # the query that has the object, or NOBODY
    silent: dict[str, Bool[np.ndarray, " _"]]  # by layer, which hidden units of its feed-forward stayed 0 everywhere

    @property
    def cost(self) -> Float[np.ndarray, "layer query object"]:
        """Return the whole cost of every pair."""
        return self.cost_parts.sum(-1)

    @property
    def row_names(self) -> list[str]:
        """Return what to call each row of the layer axis."""
        proposals = ["proposals"] if self.has_proposals else []
        return proposals + [f"layer {i + 1}" for i in range(len(self.logits) - len(proposals))]


def look(model: DETR, card: ModelCard, dataset: Dataset, index: int, loss: LossConfig) -> View:
    """Return what the model does with image `index` of a split, prepared as in evaluation."""
    return look_at(model, card, fixed_sample(dataset, card.images, index), loss)


@torch.no_grad()
def look_at(model: DETR, card: ModelCard, sample: Sample, loss: LossConfig) -> View:
    """Return what the model does with one resized picture; it may have objects or none.

    Everything behind the backbone is computed by the reference, which can keep what the fast model throws away. The
    maps come from the model's own backbone: it is quick on large pictures, and not every backbone has a reference.
    A model in training mode is an AssertionError: its norms and queries would be others.
    """
    assert not model.training, "look at a model in evaluation mode"
    batch = make_batch([sample], card.images)
    some = next(model.parameters())
    moved = batch.to(some.device, some.dtype)
    maps = model.backbone(moved.images)
    predictions, trace = forward_from_maps(model.state_dict(), model.config, maps, moved.padding, keep=worth_keeping)
    logits, boxes_cxcywh = (x.float().cpu() for x in (predictions.logits, predictions.boxes_cxcywh))
    predictions = Predictions(logits=logits, boxes_cxcywh=boxes_cxcywh)
    scores, labels = best_class(logits[:, 0], len(card.categories))
    parts, assignment = pairing(predictions, batch, loss)
    return View(
        image=sample.image.permute(1, 2, 0).numpy(),
        image_id=sample.image_id,
        size=sample.size,
        categories=card.categories,
        has_proposals=model.config.selects,
        logits=logits[:, 0].numpy(),
        boxes_cxcywh=boxes_cxcywh[:, 0].numpy(),
        scores=scores.numpy(),
        labels=labels.numpy(),
        objects_cxcywh=batch.boxes_cxcywh[0].numpy(),
        object_labels=batch.labels[0].numpy(),
        cost_parts=parts,
        assignment=assignment,
        **inner(trace),
    )


def worth_keeping(name: str) -> bool:
    """Say whether a value of the reference's trace goes into a `View`."""
    return name.endswith((".weights", ".reference_cxcywh", ".feed_forward.hidden", "padding"))


def inner(trace: Trace) -> dict:
    """Return the fields of a `View` that lie inside the network; the trace is emptied, for some of it is large."""
    grid = tuple(trace["padding"].shape[1:])
    memory_grid = tuple(trace.get("fusion.padding", trace["padding"]).shape[1:])
    hidden = [name for name in trace if name.endswith(".feed_forward.hidden")]
    silent = {layer_name(name): (trace[name] <= 0).flatten(0, -2).all(0).cpu().numpy() for name in hidden}
    cross = taken(trace, "decoder", "cross_attention.weights")
    heads, tokens = cross.shape[1], grid[0] * grid[1]
    encoder = taken(trace, "encoder", "attention.weights")
    reference = taken(trace, "decoder", "reference_cxcywh")
    return {
        "encoder_attention": encoder if len(encoder) else np.zeros((0, heads, tokens, tokens), np.float32),
        "encoder_grid": grid,
        "cross_attention": cross,
        "memory_grid": memory_grid,
        "self_attention": taken(trace, "decoder", "self_attention.weights"),
        "reference_cxcywh": reference if len(reference) else None,
        "silent": silent,
    }


def layer_name(name: str) -> str:
    """Return which layer a value of the trace belongs to, counted from 1.

    >>> layer_name("encoder.layers.0.feed_forward.hidden")
    'encoder layer 1'
    """
    part, _, index, *_ = name.split(".")
    return f"{part} layer {int(index) + 1}"


def taken(trace: Trace, part: str, what: str) -> np.ndarray:
    """Take one kind of value of all layers out of the trace, for its one picture, and return them in one array."""
    names = [name for name in trace if name.startswith(f"{part}.layers.") and name.split(".", 3)[3] == what]
    if not names:
        return np.zeros(0, np.float32)
    together = np.empty((len(names), *trace[names[0]].shape[1:]), np.float32)
    for layer, name in enumerate(names):
        together[layer] = trace.pop(name)[0].cpu().numpy()
    return together


def best_class(
    logits: Float[Tensor, "*any query category"], num_classes: int
) -> tuple[Float[Tensor, "*any query"], Int[Tensor, "*any query"]]:
    """Return the score of every query's best real class, and which it is."""
    scores, labels = class_scores(logits, num_classes).max(-1)
    return scores, labels


def pairing(
    predictions: Predictions, batch: Batch, loss: LossConfig
) -> tuple[Float[np.ndarray, "layer query object part"], Int[np.ndarray, "layer object"]]:
    """Return the parts of the matching cost of every pair of a batch of one picture, and which query has each object.

    A part is the cost with the other two weights at 0.
    """
    alone = (
        replace(loss, cost_l1=0.0, cost_giou=0.0),
        replace(loss, cost_class=0.0, cost_giou=0.0),
        replace(loss, cost_class=0.0, cost_l1=0.0),
    )
    parts = torch.stack([matching_cost(predictions, batch, each)[:, 0] for each in alone], dim=-1)
    pairs = match(predictions, batch, loss)
    assignment = np.full((len(parts), parts.shape[2]), NOBODY)
    assignment[pairs.layer.numpy(), pairs.object.numpy()] = pairs.query.numpy()
    return parts.numpy(), assignment


def kept(view: View, threshold: float = 0.5, most: int | None = 6) -> list[int]:
    """Return the queries worth drawing, best score of the last layer first: those that found something, or three."""
    order: Sequence[int] = np.argsort(-view.scores[-1], kind="stable").tolist()
    found = [query for query in order if view.scores[-1, query] >= threshold]
    return found[:most] or list(order[:3])
