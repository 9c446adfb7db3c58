"""One picture and one optimiser step of a recipe, as functions to time; their parts can be watched."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.measure import CPU, synchronise
from benchmarks.pair import card_of, tiny, untrained
from lucidetr.config import ImageConfig, TrainConfig
from lucidetr.criterion.matcher import match
from lucidetr.criterion.set_loss import normalisers, set_loss
from lucidetr.deployment.detector import Detector
from lucidetr.recipes import recipe
from lucidetr.structures import Batch
from lucidetr.training.ema import MovingAverage
from lucidetr.training.optimiser import build_optimiser, freeze
from lucidetr.training.precision import autocast

REST, BOTH, MATCHING = "the rest of forward", "matching and losses", "… the matching alone"
EXPECTED_STEPS = 1000  # of the run that the moving average believes in


def square(name: str, side: int = 0, quick: bool = False, **model: Any) -> TrainConfig:
    """Return a recipe for squares, of its own side where none is given, with some fields of the model changed."""
    config = tiny(recipe(name)) if quick else recipe(name)
    side = side or config.images.size
    return replace(config, model=replace(config.model, **model), images=ImageConfig(resize="square", size=side))


class Stopwatch:
    """Add up the seconds of named parts; what runs inside another part counts for itself alone."""

    def __init__(self, device: torch.device = CPU):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.running: list[tuple[str, float]] = []

    def begin(self, part: str) -> None:
        """Count for this part from now on."""
        synchronise(self.device)
        now = time.perf_counter()
        if self.running:
            self._add(now)
        self.running.append((part, now))

    def end(self) -> None:
        """Count for the part around it again."""
        synchronise(self.device)
        now = time.perf_counter()
        self._add(now)
        self.running.pop()
        if self.running:
            self.running[-1] = (self.running[-1][0], now)

    def _add(self, now: float) -> None:
        part, since = self.running[-1]
        self.seconds[part] += now - since

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside for this part."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def watch(self, module: nn.Module, name: str) -> None:
        """Count every forward of a module."""
        module.register_forward_pre_hook(lambda *given: self.begin(name))
        module.register_forward_hook(lambda *given: self.end())

    def take(self) -> dict[str, float]:
        """Return the seconds since the last time."""
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


def watch_parts(model: Any, watch: Stopwatch) -> None:
    """Count the forward of each part of a network."""
    for number, stage in enumerate(model.backbone.stages, 1):
        watch.watch(stage, f"backbone, stage {number}")
    for name in ("stem", "projection", "encoder", "fusion", "queries", "decoder"):
        module = getattr(model.backbone, name) if name == "stem" else getattr(model, name)
        watch.watch(module, "backbone, stem" if name == "stem" else name)
    for head in model.heads if isinstance(model.heads, nn.ModuleList) else [model.heads]:
        watch.watch(head, "heads")


Timed = Callable[[], None]


def inference(config: TrainConfig, batch: Batch, precision: str, watch: Stopwatch | None = None) -> Timed:
    """Return the prediction of a batch by the network that `Detector` runs."""
    card = card_of(config, config.images)
    detector = Detector(untrained(config), card, str(batch.images.device), precision)
    part = watch.part if watch else unwatched
    if watch:
        watch_parts(detector.quick, watch)

    @torch.no_grad()
    def infer() -> None:
        with part(REST), detector.autocast():
            detector.quick(batch.images, batch.padding)

    return infer


def training(
    config: TrainConfig, batch: Batch, precision: str, watch: Stopwatch | None = None, plain: bool = False
) -> Timed:
    """Return the optimiser step of `training/loop.py` on a batch that is there already: no reading, no log.

    A plain one leaves tensors as torch lays them out, and its clip and AdamW take one after the other.
    """
    layout = torch.contiguous_format if plain else torch.channels_last
    model = untrained(config).to(batch.images.device).to(memory_format=layout).train()
    freeze(model, config.freeze)
    optimiser = build_optimiser(model, config.optimiser)
    if plain:
        for group in optimiser.param_groups:
            group |= {"fused": False, "foreach": False}
    average = MovingAverage(model, config.optimiser.ema) if config.optimiser.ema else None
    computing = autocast(precision, batch.images.device)
    learning = [p for p in model.parameters() if p.requires_grad]
    norm = normalisers(batch.counts.tolist(), config.model.num_queries, config.loss)
    part = watch.part if watch else unwatched
    if watch:
        watch_parts(model, watch)

    def learn() -> None:
        with part(REST), computing():
            predictions = model(batch.images, batch.padding)
        if watch:  # once more than a step does, to know how much of both is matching
            with part(MATCHING):
                match(predictions, batch, config.loss)
        with part(BOTH):
            total = set_loss(predictions, batch, norm, config.loss).total
        with part("backward"):
            total.backward()
        with part("clip, optimiser, moving average"):
            nn.utils.clip_grad_norm_(learning, config.optimiser.clip or float("inf"), foreach=False if plain else None)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            if average:
                average.update(model, EXPECTED_STEPS)

    return learn


def unwatched(part: str) -> AbstractContextManager:
    """Watch nothing."""
    return nullcontext()
