"""What a run starts from: random weights, or a file of ours, of other projects, or behind an https address."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from lucidetr.config import TrainConfig
from lucidetr.conversion.convert import convert
from lucidetr.conversion.download import fetch
from lucidetr.conversion.efficientnet import efficientnet_lite0
from lucidetr.conversion.names import Converted, backbone_only
from lucidetr.data.dataset import Dataset
from lucidetr.data.sums import sum_of
from lucidetr.errors import InputError
from lucidetr.recipes import fine_tuned, from_scratch
from lucidetr.training.checkpoint import has_card, load_model

PACKAGED = "efficientnet-lite0"


def load_start(config: TrainConfig) -> Converted | None:
    """Return the weights and card that --weights names, None when there are none."""
    if config.weights_sha256 and config.weights in ("", PACKAGED):
        raise InputError(f"--weights-sha256 is that of a file, and --weights is {config.weights or 'not given'}")
    if not config.weights:
        return None
    if config.weights == PACKAGED:
        return efficientnet_lite0()
    path = Path(config.weights)
    if "://" in config.weights:
        if not config.weights_sha256:
            raise InputError(f"--weights {config.weights}: give the file's SHA-256 too, by --weights-sha256")
        path = fetch(config.weights, config.weights_sha256)
    if not path.exists():
        raise InputError(f"--weights {path}: no such file or folder")
    if config.weights_sha256 and "://" not in config.weights:
        check_hash(path, config.weights_sha256)
    return Converted(*load_model(path)) if has_card(path) else convert(path)


def check_hash(path: Path, expected: str) -> None:
    """Refuse a file whose content is not the one that was meant."""
    if path.is_dir():
        raise InputError(f"--weights {path} is a folder, --weights-sha256 that of a file: name the file in it")
    if (found := sum_of(path)) != expected.strip().lower():
        raise InputError(f"--weights {path}: its SHA-256 is {found}, --weights-sha256 says {expected}")


def settle(config: TrainConfig, start: Converted | None, dataset: Dataset) -> tuple[TrainConfig, list[str]]:
    """Return the config as it will be trained, fit to the weights and to the data, and what had to change."""
    config, fitted = fit_to_weights(config, start)
    config, adapted = fit_to_data(config, dataset)
    return config, [*(start.notes if start else ()), *fitted, *adapted]


def fit_to_weights(config: TrainConfig, start: Converted | None) -> tuple[TrainConfig, list[str]]:
    """Return the config fit for random weights, or with the rates and normalisation of trained ones; say what changed.

    Only here is it known whether the weights are a whole detector's or a backbone's.
    """
    if start is None:
        config, changes = from_scratch(config)
        return config, [f"from random weights: {', '.join(changes)}"] if changes else []
    known = replace(config.images, mean=start.card.images.mean, std=start.card.images.std)
    notes = ["pixels are normalised as the weights know them"] if known != config.images else []
    tuned = fine_tuned(config, backbone_only(start.state))
    if (now := tuned.optimiser) != config.optimiser:
        rates = f"--optimiser.lr {now.lr:g} --optimiser.backbone-lr {now.backbone_lr:g}"
        by = "" if now.matrices == config.optimiser.matrices else ", by AdamW for all of them"
        notes.append(f"rates that fit the trained weights: {rates}{by}")
    return replace(tuned, images=known), notes


def fit_to_data(config: TrainConfig, dataset: Dataset) -> tuple[TrainConfig, list[str]]:
    """Return the config with the data's number of classes and a batch that the data can fill, and what changed."""
    notes = []
    classes = len(dataset.annotations.categories)
    config = replace(config, model=replace(config.model, num_classes=classes))
    if config.batch > len(dataset):
        notes.append(f"batch {config.batch} is more than the {len(dataset)} images there are: batch {len(dataset)}")
        config = replace(config, batch=len(dataset))
    config = replace(config, micro_batch=min(config.micro_batch, config.batch))
    objects = dataset.annotations.objects_per_image()
    queries = config.model.num_queries
    if (objects > queries).any():
        crowded = int((objects > queries).sum())
        notes.append(
            f"warning: {crowded} of {len(objects)} images have more objects (up to {objects.max()}) than the model has "
            f"queries ({queries}); the rest can never be found: set --model.num-queries to {objects.max()} or more"
        )
    most = int(np.sort(objects)[-4:].sum())
    if config.augmentation.mosaic and not config.overfit and objects.max(initial=0) <= queries < most:
        notes.append(
            f"mosaics join four pictures, with up to {most} objects for {queries} queries: what is too much is not "
            f"learned there; --model.num-queries {most} would hold all, --augmentation.mosaic 0 leaves mosaics out"
        )
    return config, notes
