"""Record a GPU's forward and backward pass once, and replay it in every step (CUDA graphs).

A GPU computes most operations of a detector faster than Python asks for them, one after the other. A recording holds
them all, and is asked for at once. It is of one shape, so every batch must be alike.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lucidetr.config import TrainConfig
from lucidetr.data.annotations import Annotations
from lucidetr.models.detr import DETR
from lucidetr.structures import Hints, Predictions
from lucidetr.training.distributed import Ranks
from lucidetr.training.memory import is_out_of_memory, largest_batch
from lucidetr.training.randomness import random_state_kept


def repeats(config: TrainConfig, device: torch.device, ranks: Ranks) -> bool:
    """Say whether each step of a run computes the same on batches of one shape, in one part, on one GPU."""
    change = config.augmentation
    alike = config.images.resize == "square" and change.start_size == 1.0 and not change.scales
    whole = config.micro_batch == config.batch and ranks.size == 1
    otherwise = config.compile or config.recompute or config.model.denoising or config.engine != "fast"
    return config.replay and device.type == "cuda" and alike and whole and not otherwise


def advice(config: TrainConfig, device: torch.device, ranks: Ranks) -> str:
    """Return what a run should hear whose steps could be replayed but are not, else nothing."""
    asked = replace(config, replay=True, micro_batch=config.batch)
    if config.replay or not repeats(asked, device, ranks):
        return ""
    whole = "" if config.micro_batch == config.batch else f" --micro-batch {config.batch}"
    return f"a GPU waits through much of a step; these can be replayed from a recording: --replay{whole}"


class Replayed(nn.Module):
    """Compute a model's predictions, and in backward its gradients, by a recording.

    Both are replaced by the next step's. Gradients are the recording's own tensors: only one part can be summed.
    """

    def __init__(self, model: DETR, config: TrainConfig, annotations: Annotations, precision: str):
        super().__init__()
        some = next(model.parameters())
        batch = largest_batch(config, annotations, config.micro_batch).to(some.device, some.dtype)
        given = (batch.images, batch.padding)
        flat = Flat(model, rounds=precision == "bf16")
        if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):  # in newer versions of torch
            # a recording is made on a stream of its own, and autograd waits for it: so for all steps to come
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        self.computes: Any = torch.cuda.make_graphed_callables(flat, given, allow_unused_input=True)

    def forward(self, images: Tensor, padding: Tensor, hints: Hints | None = None) -> Predictions:
        """Return logits and boxes of every layer; a recording takes no hints."""
        assert hints is None
        return Predictions.of(self.computes(images, padding))


class Flat(nn.Module):
    """Predict tensors, which is all that a recording can hand out.

    It opens autocast by itself, so that backward is recorded outside of it, as it runs elsewhere. Weights that were
    rounded for one pass are not kept: they would be gone in the next.
    """

    def __init__(self, model: DETR, rounds: bool):
        super().__init__()
        self.model, self.rounds = model, rounds

    def forward(self, images: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
        """Return logits and boxes of every layer, and those of the tokens."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.rounds, cache_enabled=False):
            return self.model(images, padding).tensors()


def record(model: DETR, config: TrainConfig, annotations: Annotations, precision: str) -> Replayed | None:
    """Return the model as a recording, made on a batch of noise; None where the memory does not hold one.

    Batch norms' statistics and the random state are left as they were.
    """
    device = next(model.parameters()).device
    try:
        with random_state_kept(device), buffers_kept(model):
            return Replayed(model, config, annotations, precision)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    torch.cuda.empty_cache()  # out of the handler, whose error still holds what was allocated
    return None


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put back what passes inside leave in a model's buffers, such as batch norms' statistics."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)
