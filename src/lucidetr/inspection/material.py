"""What every section of a report is made from: the run's files, its model, the validation split and what was found."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lucidetr.config import ModelCard, TrainConfig
from lucidetr.data.annotations import Annotations
from lucidetr.data.dataset import Dataset, evenly, open_training_data
from lucidetr.errors import InputError
from lucidetr.evaluation.coco import Metrics, evaluate
from lucidetr.evaluation.detect import detect
from lucidetr.models.detr import DETR
from lucidetr.structures import Detections
from lucidetr.training.checkpoint import load_model
from lucidetr.training.run_log import read_metrics, trained_as
from lucidetr.training.statistics import read_statistics


@dataclass(frozen=True, eq=False)
class Material:
    """Hold a run as it lies in its folder, with the model in memory; what is costly is computed once, on demand."""

    run: Path
    config: TrainConfig  # as trained
    model: DETR  # in evaluation mode, float32, on the CPU
    card: ModelCard
    training: Annotations  # of the split that it was trained on
    dataset: Dataset  # the validation split
    pictures: tuple[int, ...]  # indices of the images to be looked at one by one
    metrics: list[dict[str, Any]]  # lines of metrics.jsonl
    statistics: list[dict[str, Any]]  # lines of statistics.jsonl

    @property
    def split(self) -> str:
        """Return what the pictures are to the model, in words."""
        return "training images learned by heart" if self.config.overfit else "validation split"

    @cached_property
    def detections(self) -> list[Detections]:
        """Return what the model finds in every image of the split."""
        return detect(self.model, self.dataset, self.card.images, self.card.categories)

    @cached_property
    def evaluation(self) -> Metrics:
        """Return COCO's numbers of these detections."""
        return evaluate(self.dataset.annotations, self.detections)


def open_run(run: Path, images: Iterable[int] = (), pictures: int = 4, most: int = 200) -> Material:
    """Read a run's folder; `images` are COCO ids of pictures to look at, else some spread over the split are taken.

    Of a large split only `most` images, evenly spread, are kept.
    """
    if not (run / "run.json").is_file():
        raise InputError(f"{run} is not a run's folder: there is no run.json in it; give the --out of lucidetr train")
    config = trained_as(run)
    training, dataset, _ = open_training_data(config)
    ids = dataset.annotations.image_ids.tolist()
    wanted = list(images)
    if unknown := [image for image in wanted if image not in ids]:
        raise InputError(f"{dataset.name} has no image {unknown[0]}; its ids are {ids[0]} … {ids[-1]}")
    if len(dataset) > most:
        keep = sorted({*evenly(len(dataset), most), *(ids.index(image) for image in wanted)})
        dataset = dataset.subset(torch.tensor(keep).numpy(), f"{dataset.name}, {len(keep)} of {len(dataset)} images")
        ids = dataset.annotations.image_ids.tolist()
    chosen = tuple(ids.index(image) for image in wanted) or tuple(evenly(len(dataset), pictures))
    tensors, card = load_model(run)
    if card.categories != dataset.annotations.categories:
        raise InputError(
            f"{run} knows {card.categories}, but {dataset.name} has {dataset.annotations.categories} now; "
            "inspect needs the data that the run was trained on"
        )
    model = DETR(card.model)
    model.load_state_dict(tensors)
    return Material(
        run=run,
        config=config,
        model=model.eval(),
        card=card,
        training=training.annotations,
        dataset=dataset,
        pictures=chosen,
        metrics=read_metrics(run),
        statistics=read_statistics(run),
    )
