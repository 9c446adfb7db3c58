"""Memory: the worst batch that a run can meet, what a step keeps, and how many images fit at once."""

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from lucidetr.config import TrainConfig
from lucidetr.criterion.denoising import draw_hints
from lucidetr.criterion.set_loss import normalisers
from lucidetr.data.annotations import Annotations
from lucidetr.data.preprocessing import resized_size
from lucidetr.structures import Batch
from lucidetr.training.engine import FAST
from lucidetr.training.randomness import random_state_kept
from lucidetr.training.recompute import standing

Precision = Callable[[], AbstractContextManager]
CONTAINER = Path("/sys/fs/cgroup")  # where a container's limits stand, if there is one
USABLE = 0.8  # of the free memory
# a step needs that many times what its forward pass keeps: gradients of features, the kernels' own room; where features
# are computed again, besides all that the largest stage keeps
BACKWARD, RECOMPUTED = 1.3, 2.6


def largest_size(config: TrainConfig, sizes: Int[np.ndarray, "image 2"]) -> tuple[int, int]:
    """Return the largest (height, width) of a padded batch that images of these (height, width) can come to.

    A batch of several is as high as its highest image and as wide as its widest.
    """
    images, change = config.images, config.augmentation
    changed = not config.overfit
    short = max(images.size, *change.scales) if changed and change.scales else images.size
    shapes = {resized_size(height, width, images, short) for height, width in np.unique(sizes, axis=0).tolist()}
    if changed and change.crop and images.resize == "shortest":
        low, high = min(change.crop_sides), max(change.crop_sides)
        shapes |= {resized_size(low, high, images, short), resized_size(high, low, images, short)}
    if changed and change.turn:
        shapes |= {(width, height) for height, width in shapes}
    if config.micro_batch == 1:
        return max(shapes, key=lambda shape: shape[0] * shape[1])
    return max(height for height, _ in shapes), max(width for _, width in shapes)


def largest_batch(config: TrainConfig, annotations: Annotations, number: int) -> Batch:
    """Return a batch of noise of the largest size there can be, each image with as many objects as the fullest."""
    height, width = largest_size(config, annotations.sizes)
    scenes = 4 if config.augmentation.mosaic and not config.overfit else 1
    count = max(scenes * int(annotations.objects_per_image().max(initial=0)), 1)
    centres, sides = 0.25 + torch.rand(number, count, 2) / 2, 0.1 + torch.rand(number, count, 2) / 4
    return Batch(
        images=torch.randn(number, 3, height, width),
        padding=torch.zeros(number, height, width, dtype=torch.bool),
        boxes_cxcywh=torch.cat([centres, sides], dim=-1),
        labels=torch.randint(config.model.num_classes, (number, count)),
        counts=torch.full((number,), count),
        image_ids=(0,) * number,
        sizes=((height, width),) * number,
    )


def loss_of(config: TrainConfig, model: nn.Module, part: Batch, precision: Precision, counts: list[int]) -> Tensor:
    """Return the loss of a part of a batch with those counts of objects."""
    some, shape = next(model.parameters()), config.model
    batch = part.to(some.device, some.dtype)
    norm = normalisers(counts, shape.num_queries, config.loss, shape.query_groups)
    hints = draw_hints(batch, shape, config.seed, step=0)
    with precision():
        predictions = FAST.forward(model, batch, hints)  # type: ignore[arg-type]
    return FAST.loss(predictions, batch, norm, config.loss).total


def add_gradients(
    config: TrainConfig, model: nn.Module, part: Batch, precision: Precision, counts: list[int]
) -> Tensor:
    """Return the loss of a part of a batch with those counts of objects, its gradients added to the parameters'."""
    total = loss_of(config, model, part, precision, counts)
    total.backward()
    return total.detach()


def fitting_micro_batch(
    config: TrainConfig, model: nn.Module, annotations: Annotations, precision: Precision, most: int
) -> int:
    """Return how many images to pass at once: of a share of `most` images as many as fit, in parts of equal number.

    Counted from what the worst image there can be needs; the run itself is left as it was. Where not even one fits the
    answer is one, and `preflight` says so.
    """
    device = next(model.parameters()).device
    try:
        with random_state_kept(device), standing(model):
            kept = kept_for_backward(config, model, largest_batch(config, annotations, 1), precision)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return 1
    learning = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    room = free_memory(device) * USABLE - 4 * learning  # gradients, AdamW's two moments, the moving average
    needed = kept * (RECOMPUTED if config.recompute else BACKWARD)
    fits = min(max(int(room / needed), 1), most)
    return -(-most // -(-most // fits))


def kept_for_backward(config: TrainConfig, model: nn.Module, batch: Batch, precision: Precision) -> int:
    """Return how many bytes a forward pass keeps for the backward pass, parameters aside."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        _loss = loss_of(config, model, batch, precision, batch.counts.tolist())  # held: what it keeps stays apart
    return sum(size for place, size in kept.items() if place not in own)


def free_memory(device: torch.device) -> int:
    """Return how many bytes are free for this process: the device's, or its share of what a system and container leave.

    Where the system does not say, nothing is known to be free.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = []
    information = Path("/proc/meminfo")
    if information.is_file():
        lines = dict(line.split(":", 1) for line in information.read_text().splitlines())
        limits.append(1024 * int(lines["MemAvailable"].split()[0]))
    elif hasattr(os, "sysconf"):  # macOS; half of what is installed
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    most, used = CONTAINER / "memory.max", CONTAINER / "memory.current"
    if most.is_file() and (text := most.read_text().strip()).isdigit():
        # pages of files that were read lately count as used, and are given back when they are asked for
        statistics = dict(line.split() for line in (CONTAINER / "memory.stat").read_text().splitlines())
        limits.append(max(int(text) - int(used.read_text()) + int(statistics.get("inactive_file", 0)), 0))
    return min(limits, default=0) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's ranks on this machine


def peak_memory(device: torch.device) -> float | None:
    """Return the most memory used so far, in gigabytes: the device's, or the whole process's on a processor.

    None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ModuleNotFoundError:  # there is none on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def too_large(config: TrainConfig, batch: Batch, device: torch.device) -> str:
    """Return the words for a batch that does not fit, and what to change."""
    height, width = batch.images.shape[2:]
    return (
        f"a batch of {len(batch)} images of {width} × {height} pixels with up to {int(batch.counts.max())} objects "
        f"does not fit into the memory of {device}: lower --micro-batch (now {config.micro_batch}; --batch can stay as "
        f"it is){'' if config.recompute else ', add --recompute'}, or choose a smaller --images.size (now "
        f"{config.images.size}) or smaller --augmentation.scales"
    )


def is_out_of_memory(error: Exception) -> bool:
    """Say whether an error means that memory is used up; torch says so of the host in words only."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
