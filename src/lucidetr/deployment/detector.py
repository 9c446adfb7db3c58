"""The user's object: pictures in, `Detections` out."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lucidetr.config import ModelCard
from lucidetr.data.decoding import as_image
from lucidetr.data.preprocessing import make_batch, prepare
from lucidetr.deployment.engines import OPENERS, open_exported
from lucidetr.errors import InputError
from lucidetr.models.detr import DETR
from lucidetr.models.postprocess import postprocess
from lucidetr.structures import Detections
from lucidetr.training.checkpoint import load_model
from lucidetr.training.precision import autocast, choose_device, choose_precision


class Detector:
    """Find objects in pictures with a trained model; `.card` says what it is, `.model` is the network itself.

    `.model(images, padding)` returns `Predictions`: of every layer, or of the last alone where the model is an
    exported file.
    """

    def __init__(self, model: nn.Module, card: ModelCard, device: str = "auto", precision: str = "auto"):
        self.device = choose_device(device)
        self.precision = choose_precision(precision, self.device)
        self.autocast = autocast(self.precision, self.device)
        self.model = model.to(self.device).to(memory_format=torch.channels_last).eval()
        self.card = card

    @property
    def names(self) -> tuple[str, ...]:
        """Return the category names it can find."""
        return self.card.categories.names

    def predict(self, picture: Any, threshold: float = 0.0) -> Detections:
        """Return what is in one picture, boxes in its own pixels, best score first.

        `picture` is a path, a Pillow image, a uint8 array (height, width, 3) or a uint8 tensor (3, height, width).
        """
        return next(self.predict_many([picture], threshold))

    @torch.no_grad()
    def predict_many(self, pictures: Iterable[Any], threshold: float = 0.0) -> Iterator[Detections]:
        """Yield the detections of each picture in turn; each is seen alone, so none depends on its neighbours."""
        for picture in pictures:
            batch = make_batch([prepare(as_image(picture), self.card.images)], self.card.images)
            batch = batch.to(self.device, next(self.model.parameters()).dtype)
            with self.autocast():
                predictions = self.model(batch.images, batch.padding)
            yield postprocess(predictions, batch.sizes, self.card.categories)[0].above(threshold)


def load(path: str | Path, device: str = "auto", precision: str = "auto") -> Detector:
    """Load a detector from a run's folder, a model file, or an exported .onnx, .xml (OpenVINO) or .pt2 file.

    Exported files run on the CPU. A .pt2 file is a program: load only files whose origin you trust.
    """
    path = Path(path)
    if path.suffix in OPENERS:
        if device not in ("auto", "cpu"):
            raise InputError(
                f"--device {device}: {path} is an exported model and runs on the cpu; load the run instead"
            )
        exported, card, precision = open_exported(path, precision)
        return Detector(exported, card, "cpu", precision)
    tensors, card = load_model(path)
    if not card.categories:
        raise InputError(f"{path}: these are the weights of a backbone alone; train a detector from them by --weights")
    with torch.device("meta"):
        model = DETR(card.model)
    model.load_state_dict(tensors, assign=True)
    return Detector(model, card, device, precision)
