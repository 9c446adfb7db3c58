"""Recompute features in the backward pass instead of keeping them (Chen et al. 2016, sublinear memory cost)."""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # BatchNorm2d and SyncBatchNorm
from torch.utils.checkpoint import checkpoint

from lucidetr.models.detr import DETR


def recompute(model: DETR, compiled: bool = False) -> None:
    """Let every backbone stage, encoder layer and decoder layer keep its input alone, and compute the rest again.

    The same numbers come out, to the last bit, for about a third more time.
    """
    for part in (*model.backbone.stages, *model.encoder.layers, *model.decoder.layers):
        # compiled code moves the norms' statistics in the first pass alone, and takes no contexts
        inside = {} if compiled else {"context_fn": functools.partial(contexts, part)}
        part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False, **inside)


def contexts(part: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return what to open around the first pass, and around the second."""
    return nullcontext(), standing(part)


@contextmanager
def standing(model: nn.Module) -> Iterator[None]:
    """Let batch norms measure their batch without remembering it: it was, or will be, counted by another pass."""
    norms = [part for part in model.modules() if isinstance(part, _BatchNorm)]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, momentum, counted in before:
            norm.momentum, norm.num_batches_tracked = momentum, counted
