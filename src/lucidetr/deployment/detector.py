"""The user's object: pictures in, `Detections` out."""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lucidetr.config import ModelCard
from lucidetr.data.decoding import as_image
from lucidetr.data.preprocessing import Sample, make_batch, prepare
from lucidetr.deployment.exported import OPENERS, open_exported
from lucidetr.deployment.inference import build_engine, quicken
from lucidetr.errors import InputError
from lucidetr.models.detr import DETR
from lucidetr.models.postprocess import postprocess
from lucidetr.structures import Detections
from lucidetr.training.checkpoint import load_model
from lucidetr.training.precision import autocast, choose_device, choose_precision

AHEAD = 4  # pictures decoded before their turn


class Detector:
    """Find objects in pictures with a trained model; `.card` says what it is, `.model` is a copy of the network.

    `.model(images, padding)` returns `Predictions`: of every layer, or of the last alone where the model is an
    exported file. `.quick`, called alike but inside `with detector.autocast():`, predicts the same, faster: it is
    what this object and `lucidetr eval` run. It was made of `.model` once: to change that later changes no prediction.
    """

    def __init__(
        self,
        model: nn.Module,
        card: ModelCard,
        device: str | torch.device = "auto",
        precision: str = "auto",
        engine: str = "torch",
        copied: bool = True,
    ):
        if copied:  # what follows would change the caller's
            model = copy.deepcopy(model)
        self.device = choose_device(device)
        self.precision = choose_precision(precision, self.device)
        self.autocast = autocast(self.precision, self.device)
        model = model.double() if self.precision == "fp64" else model.float()  # whatever it was trained in
        self.model = model.to(self.device).to(memory_format=torch.channels_last).eval()
        hasten = build_engine(engine)
        self.quick = hasten(quicken(model, self.precision)) if isinstance(model, DETR) else model
        self.card = card

    @property
    def names(self) -> tuple[str, ...]:
        """Return the category names it can find."""
        return self.card.categories.names

    def predict(self, picture: Any, threshold: float = 0.0) -> Detections:
        """Return what is in one picture, boxes in its own pixels, best score first.

        `picture` is a path, a Pillow image, a uint8 array (height, width, 3) or a uint8 tensor (3, height, width).
        """
        return self.detect([self.prepare(picture)])[0].above(threshold)

    def predict_many(self, pictures: Iterable[Any], threshold: float = 0.0) -> Iterator[Detections]:
        """Return the detections of each picture in turn, as asked for; each is seen alone, without its neighbours.

        The next pictures are decoded and resized while one is looked at; arrays and tensors may be filled anew
        meanwhile. It ends at a picture that cannot be used, in its turn, with an InputError.
        """
        if isinstance(pictures, (str, Path)):
            raise InputError(f"predict_many takes several pictures, and {pictures} is one path: give a list of paths")
        prepared = ahead(self.prepare, map(own, pictures))
        return (self.detect([sample.result()])[0].above(threshold) for _, sample in prepared)

    def prepare(self, picture: Any) -> Sample:
        """Return a picture as the model will see it: decoded and resized."""
        return prepare(as_image(picture), self.card.images)

    @torch.no_grad()
    def detect(self, samples: Sequence[Sample]) -> list[Detections]:
        """Return what is in each of some prepared pictures, which are seen side by side in one batch."""
        if not samples:
            return []
        batch = make_batch(samples, self.card.images).to(self.device, next(self.model.parameters()).dtype)
        with self.autocast():
            predictions = self.quick(batch.images, batch.padding)
        return postprocess(predictions, batch.sizes, self.card.categories)


def own(picture: Any) -> Any:
    """Return a picture whose pixels nobody else changes: an array or a tensor is copied, as it may be a buffer."""
    if isinstance(picture, np.ndarray):
        return picture.copy()
    return picture.clone() if isinstance(picture, Tensor) else picture


def ahead(work: Callable[[Any], Any], items: Iterable[Any], most: int = AHEAD) -> Iterator[tuple[Any, Future[Any]]]:
    """Yield each item in turn with the work on it, done by another thread for up to `most` items that follow.

    What the work on an item raises, the `result()` of that item does.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode") as pool:
        waiting: deque[tuple[Any, Future[Any]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > most:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for _, future in waiting:
                future.cancel()


def load(
    path: str | Path, device: str | torch.device = "auto", precision: str = "auto", engine: str = "torch"
) -> Detector:
    """Load a detector from a run's folder, a model file, or an exported .onnx, .xml (OpenVINO) or .pt2 file.

    `engine` "compile" lets torch.compile make the network faster still, after tens of seconds. Exported files run on
    the CPU. A .pt2 file is a program: load only files whose origin you trust.
    """
    path = Path(path)
    if path.suffix in OPENERS:
        if str(device) not in ("auto", "cpu"):
            raise InputError(
                f"--device {device}: {path} is an exported model and runs on the cpu; load the run instead"
            )
        if engine != "torch":
            raise InputError(f"--engine {engine}: {path} is an exported model, which brings its own; leave it out")
        exported, card, precision = open_exported(path, precision)
        return Detector(exported, card, "cpu", precision, copied=False)
    tensors, card = load_model(path)
    if not card.categories:
        raise InputError(f"{path}: these are the weights of a backbone alone; train a detector from them by --weights")
    with torch.device("meta"):
        model = DETR(card.model)
    model.load_state_dict(tensors, assign=True)
    return Detector(model, card, device, precision, engine, copied=False)
