"""What the page shows of a model's inside, as plain values for JSON (DETR, figures 3 and 6)."""

import base64
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor, from_numpy

from lucidetr.boxes import cxcywh_to_xyxy
from lucidetr.config import LossConfig
from lucidetr.data.preprocessing import prepare
from lucidetr.deployment.detector import Detector
from lucidetr.errors import InputError
from lucidetr.inspection.attention import attention_of_point, attention_of_query, course_of_scores
from lucidetr.inspection.microscope import View, kept, look_at
from lucidetr.models.detr import DETR
from lucidetr.models.postprocess import class_scores

SCORE = 0.05  # from which on a query is worth looking into
MOST = 30  # queries of one picture


def look_json(detector: Detector, image: UInt8[Tensor, "3 height width"]) -> dict[str, Any]:
    """Return how the best queries found what they found: their box, score and attention, layer by layer.

    `rows` names what boxes and scores are of: what the queries start from, if that is a box, then the decoder layers.
    A learned start has no score, and nothing is looked at before the first layer. Boxes are in the picture's own
    pixels, scores are those of the class that the query says in the end, and what it says of every class, by id, is
    `scores_by_category`; attention is one map for each decoder layer and head. `ranked` queries are the encoder's best
    tokens, best first; the others are learned. Best query first.
    """
    view = view_of(detector, image)
    height, width = view.size
    queries = kept(view, SCORE, MOST)
    boxes, rows, scores = view.boxes_cxcywh, view.row_names, course_of_scores(view, queries).T.tolist()
    if view.reference_cxcywh is not None and not view.has_proposals:
        boxes, rows = np.concatenate([view.reference_cxcywh[:1], boxes]), ["start", *rows]
        scores = [[None, *course] for course in scores]
    boxes_xyxy = in_pixels(boxes, width, height)
    of_all = class_scores(from_numpy(view.logits[-1]).double(), len(view.categories)).tolist()
    layers, heads = view.cross_attention.shape[:2]
    return {
        "image": {"width": width, "height": height},
        "rows": rows,
        "num_queries": view.logits.shape[1],
        "ranked": view.has_proposals,
        "grid": grid_json(view.memory_grid),
        "queries": [
            {
                "query": query,
                "name": view.categories.names[label := view.labels[-1, query]],
                "category_id": view.categories.ids[label],
                "score": course[-1],
                "scores": course,
                "scores_by_category": dict(zip(map(str, view.categories.ids), of_all[query], strict=True)),
                "boxes_xyxy": boxes_xyxy[:, query].tolist(),
                "attention": [
                    [map_json(attention_of_query(view, layer, query, head)) for head in range(heads)]
                    for layer in range(layers)
                ],
            }
            for query, course in zip(queries, scores, strict=True)
        ],
    }


def point_json(detector: Detector, image: UInt8[Tensor, "3 height width"], x: float, y: float) -> dict[str, Any]:
    """Return what the encoder relates a point to: a map for each layer, the mean of its heads.

    x and y are fractions of the picture; outside of 0…1 they are an InputError, as is a model without encoder layers.
    """
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise InputError(f"x = {x}, y = {y}: give fractions of the picture, 0…1")
    view = view_of(detector, image)
    if not len(view.encoder_attention):
        raise InputError("this model has no encoder layers to ask; its decoder reads the backbone's map as it is")
    height, width = view.size
    return {
        "image": {"width": width, "height": height},
        "point": {"x": x, "y": y},
        "grid": grid_json(view.encoder_grid),
        "layers": [map_json(attention_of_point(view, i, x, y)) for i in range(len(view.encoder_attention))],
    }


def view_of(detector: Detector, image: UInt8[Tensor, "3 height width"]) -> View:
    """Return what the microscope sees of one picture; an exported model is an InputError."""
    card = detector.card
    return look_at(inside(detector), card, prepare(image, card.images), LossConfig())


def inside(detector: Detector) -> DETR:
    """Return the network that can be looked into; an exported model, which has no such, is an InputError."""
    if not isinstance(detector.model, DETR):
        raise InputError("an exported model has no inside to look into; serve the run that it was made of")
    return detector.model


def in_pixels(boxes_cxcywh: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return corners in pixels of boxes in fractions of a picture.

    >>> in_pixels(np.array([0.5, 0.5, 0.5, 1.0]), width=40, height=20).tolist()
    [10.0, 0.0, 30.0, 20.0]
    """
    return cxcywh_to_xyxy(from_numpy(boxes_cxcywh)).numpy() * np.array([width, height, width, height])


def map_json(weights: Float[np.ndarray, "grid_h grid_w"]) -> dict[str, Any]:
    """Return a map of attention as bytes in base64, row by row, 255 for its largest weight, and that weight.

    >>> map_json(np.array([[0.0, 0.25], [0.5, 0.25]]))
    {'cells': 'AID/gA==', 'largest': 0.5}
    """
    largest = float(weights.max())
    cells = np.round(weights * (255 / largest if largest > 0 else 0.0)).astype(np.uint8)
    return {"cells": base64.b64encode(cells.tobytes()).decode(), "largest": largest}


def grid_json(grid: tuple[int, int]) -> dict[str, int]:
    """Return rows and columns by name."""
    return {"height": grid[0], "width": grid[1]}
