"""The user's object: pictures in, `Detections` out."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
    """Find objects in pictures with a trained model; `.card` says what it is, `.model` is the network itself.

    `.model(images, padding)` returns `Predictions`: of every layer, or of the last alone where the model is an
    exported file. `.quick`, called alike but inside `with detector.autocast():`, predicts the same, faster: it is
    what this object and `lucidetr eval` run.
    """

    def __init__(
        self, model: nn.Module, card: ModelCard, device: str = "auto", precision: str = "auto", engine: str = "torch"
    ):
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
        """Yield the detections of each picture in turn; each is seen alone, so none depends on its neighbours.

        The next pictures are decoded and resized while one is looked at.
        """
        for sample in ahead(self.prepare, pictures):
            yield self.detect([sample])[0].above(threshold)

    def prepare(self, picture: Any) -> Sample:
        """Return a picture as the model will see it: decoded and resized."""
        return prepare(as_image(picture), self.card.images)

    @torch.no_grad()
    def detect(self, samples: Sequence[Sample]) -> list[Detections]:
        """Return what is in each of some prepared pictures, which are seen side by side in one batch."""
        batch = make_batch(samples, self.card.images).to(self.device, next(self.model.parameters()).dtype)
        with self.autocast():
            predictions = self.quick(batch.images, batch.padding)
        return postprocess(predictions, batch.sizes, self.card.categories)


def ahead(work: Callable[[Any], Sample], items: Iterable[Any], most: int = AHEAD) -> Iterator[Sample]:
    """Yield the work on each item in turn, done by another thread for up to `most` items that follow.

    An item whose work raises does so in its turn.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode") as pool:
        waiting: deque[Future[Sample]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > most:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def load(path: str | Path, device: str = "auto", precision: str = "auto", engine: str = "torch") -> Detector:
    """Load a detector from a run's folder, a model file, or an exported .onnx, .xml (OpenVINO) or .pt2 file.

    `engine` "compile" lets torch.compile make the network faster still, after tens of seconds. Exported files run on
    the CPU. A .pt2 file is a program: load only files whose origin you trust.
    """
    path = Path(path)
    if path.suffix in OPENERS:
        if device not in ("auto", "cpu"):
            raise InputError(
                f"--device {device}: {path} is an exported model and runs on the cpu; load the run instead"
            )
        if engine != "torch":
            raise InputError(f"--engine {engine}: {path} is an exported model, which brings its own; leave it out")
        exported, card, precision = open_exported(path, precision)
        return Detector(exported, card, "cpu", precision)
    tensors, card = load_model(path)
    if not card.categories:
        raise InputError(f"{path}: these are the weights of a backbone alone; train a detector from them by --weights")
    with torch.device("meta"):
        model = DETR(card.model)
    model.load_state_dict(tensors, assign=True)
    return Detector(model, card, device, precision, engine)
