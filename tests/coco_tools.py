"""Pycocotools, the witness of COCO's numbers, without what it prints."""

import contextlib
import io

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lucidetr.evaluation.coco import NUMBERS


def by_pycocotools(content: dict, rows: list[dict]) -> COCOeval:
    """Return the evaluation of rows of results on the content of a COCO file."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(rows), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def twelve(run) -> dict[str, float | None]:
    """Return the twelve numbers of an independent package's evaluation, None where it says −1."""
    return {name: None if value == -1 else value for name, value in zip(NUMBERS, run.stats.tolist()[:12], strict=True)}
