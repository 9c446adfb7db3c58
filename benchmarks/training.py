"""A training step of DETR-R50 against transformers: forward, matching, loss, backward, clip and AdamW.

Both have the same weights, the same parameters that learn, and every decoder layer supervised; what they lose over the
first steps, without dropout, is written down beside the times.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Common, alternate, measurable, read_options, report
from benchmarks.pair import PeerLoss, learning, pair_to_train, random_batch, tiny
from lucidetr.config import TrainConfig
from lucidetr.criterion.set_loss import normalisers, set_loss
from lucidetr.models.detr import DETR
from lucidetr.recipes import recipe
from lucidetr.structures import Batch
from lucidetr.training.optimiser import build_optimiser
from lucidetr.training.precision import autocast, choose_device

OBJECTS = 7  # in a picture: COCO's mean


@dataclass(frozen=True)
class Options(Common):
    """Time optimiser steps of both and compare what they lose."""

    side: int = 640
    batch: int = 2
    precisions: str = "fp32,bf16"
    """bf16 by autocast; left out where the hardware has none, unless it is named alone."""
    losses: int = 20
    """Steps over which the losses of both are compared; 0: none."""
    quick: bool = False
    """A model of a few thousand parameters, only to see that this works."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Time each precision, print, and append a line for each to results.jsonl."""
    options = read_options(Options, arguments, "training")
    device = choose_device(options.device)
    config = tiny(recipe("detr-r50")) if options.quick else recipe("detr-r50")
    batch = random_batch(options.batch, options.side, OBJECTS, config.model.num_classes, device)
    for precision in measurable(options.precisions, device):
        ours, peer = pair_to_train(config, config.model.dropout)
        settings = {"recipe": config.recipe, "side": options.side, "batch": options.batch, "precision": precision}
        settings |= {"learning": learning(ours), "objects": OBJECTS, "dropout": config.model.dropout}
        contenders = {
            "lucidetr": our_step(ours, config, batch, precision),
            "transformers": their_step(peer, config, batch, precision),
        }
        seconds = alternate(contenders, options.runs, device=device)
        compared = compare_losses(config, batch, precision, options.losses) if options.losses else {}
        report("training", seconds, "lucidetr", settings, device, compared)


def compare_losses(config: TrainConfig, batch: Batch, precision: str, steps: int) -> dict[str, Any]:
    """Return the losses of both over some steps from the same weights, without dropout, at a tenth of the rate.

    At the whole rate a random start throws both about so much that rounding decides which query an object gets.
    """
    rates = {"lr": config.optimiser.lr / 10, "backbone_lr": config.optimiser.backbone_lr / 10}
    config = replace(config, optimiser=replace(config.optimiser, **rates))
    ours, peer = pair_to_train(config, dropout=0.0)
    mine, theirs = our_step(ours, config, batch, precision), their_step(peer, config, batch, precision)
    losses = [(float(mine()), float(theirs())) for _ in range(steps)]
    largest = max(abs(one - other) / abs(one) for one, other in losses)
    (first, last) = losses[0][0], losses[-1][0]
    print(
        f"losses in {precision} over {steps} steps, {first:.3f} to {last:.3f}: largest difference {largest:.1e} of it"
    )
    return {"losses": losses, "losses_in": precision, "largest_difference": largest}


Step = Callable[[], Tensor]


def our_step(model: DETR, config: TrainConfig, batch: Batch, precision: str) -> Step:
    """Return our optimiser step, which returns its loss."""
    device = batch.images.device
    model = model.to(device).to(memory_format=torch.channels_last).train()
    norm = normalisers(batch.counts.tolist(), config.model.num_queries, config.loss)
    computing = autocast(precision, device)

    def loss() -> Tensor:
        with computing():
            predictions = model(batch.images, batch.padding)
        return set_loss(predictions, batch, norm, config.loss).total

    return with_optimiser(loss, model, build_optimiser(model, config.optimiser), config.optimiser.clip)


def their_step(peer: nn.Module, config: TrainConfig, batch: Batch, precision: str) -> Step:
    """Return the same step of transformers' model with the same optimiser."""
    device = batch.images.device
    peer = peer.to(device).to(memory_format=torch.channels_last).train()
    computing, peer_loss = autocast(precision, device), PeerLoss(peer)
    laid_out = replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))

    def loss() -> Tensor:
        with computing():
            logits, boxes = peer_loss.predict(laid_out)
        return peer_loss.loss(logits, boxes, batch)

    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in peer.named_parameters():
        if parameter.requires_grad:
            groups[".backbone." in name].append(parameter)
    rates = {True: config.optimiser.backbone_lr, False: config.optimiser.lr}
    parameters = [{"params": group, "lr": rates[backbone]} for backbone, group in groups.items()]
    optimiser = torch.optim.AdamW(parameters, weight_decay=config.optimiser.weight_decay, fused=True)
    return with_optimiser(loss, peer, optimiser, config.optimiser.clip)


def with_optimiser(loss: Step, model: nn.Module, optimiser: torch.optim.Optimizer, clip: float) -> Step:
    """Return a whole step: loss, backward, clip, AdamW."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> Tensor:
        total = loss()
        total.backward()
        nn.utils.clip_grad_norm_(parameters, clip or float("inf"))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return total.detach()

    return step
