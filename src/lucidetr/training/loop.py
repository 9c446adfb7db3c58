"""The training loop, top to bottom in the order in which a run happens."""

import json
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lucidetr.config import ModelCard, TrainConfig
from lucidetr.conversion.start import start_from
from lucidetr.criterion.denoising import draw_hints
from lucidetr.criterion.set_loss import normalisers
from lucidetr.data.batching import CountFrom, build_augmentation, training_steps
from lucidetr.data.dataset import open_training_data
from lucidetr.errors import InputError
from lucidetr.evaluation.coco import Metrics, evaluate
from lucidetr.evaluation.detect import detect
from lucidetr.models.detr import DETR
from lucidetr.structures import Batch, Hints
from lucidetr.training.checkpoint import (
    load_newest_training,
    load_optimiser,
    optimiser_tensors,
    save_model,
    save_training,
    write_atomically,
)
from lucidetr.training.ema import MovingAverage
from lucidetr.training.engine import FAST, Engine
from lucidetr.training.interrupt import Interruption, Stopped
from lucidetr.training.optimiser import build_optimiser, freeze, learning_mode, rate, set_rate
from lucidetr.training.precision import autocast, choose_device, choose_precision
from lucidetr.training.progress import ProgressLine, duration
from lucidetr.training.run_log import RunLog, as_it_began, describe_run, prepare_folder
from lucidetr.training.start import load_start, settle
from lucidetr.training.statistics import Recorder, forget_after

LOG_EVERY = 10  # optimiser steps between lines of metrics.jsonl


def stopwatch(config: TrainConfig, device: torch.device) -> Callable[[], float]:
    """Return what reads the time in seconds; the processor's own time counts sums over threads, so it asks for one."""
    if config.clock == "wall":
        return time.perf_counter
    if torch.get_num_threads() > 1 or config.workers or device.type != "cpu":
        raise InputError(
            f"--clock processor counts one thread of one process, but there are {torch.get_num_threads()} threads, "
            f"--workers {config.workers} and --device {device}: set OMP_NUM_THREADS=1, --workers 0 --device cpu"
        )
    return time.process_time


@dataclass
class Clock:
    """Know how far the run is: by steps where these are given, else by minutes of training time."""

    steps: int
    minutes: float
    step: int = 0
    seconds: float = 0.0  # of training: no start-up, no evaluation

    @property
    def progress(self) -> float:
        """Return the share of the run that is done, 0…1."""
        return min(self.step / self.steps if self.steps else self.seconds / (60 * self.minutes), 1.0)

    def looks(self, evaluations: int) -> int:
        """Return how many of the run's evaluations are due by now."""
        return self.step * evaluations // self.steps if self.steps else int(self.progress * evaluations)

    def looks_after_step(self, number: int) -> int:
        """Return how many of that number of looks are due when the coming step ends, as far as can be told before it.

        How long a step takes is known only roughly, and the last one shall not be missed: it counts one and a half.
        """
        length = 1.5 * self.seconds / max(self.step, 1)
        return replace(self, step=self.step + 1, seconds=self.seconds + length).looks(number)

    @property
    def expected_steps(self) -> float:
        """Return how many steps the whole run will have, as far as can be told."""
        return self.steps or self.step / max(self.progress, 1e-3)

    @property
    def seconds_left(self) -> float:
        """Return the training time still to come."""
        return self.seconds / self.progress - self.seconds if self.progress else 0.0


def train(config: TrainConfig, engine: Engine = FAST) -> Path:
    """Train a detector as the config says and return the run's folder; `engine` computes predictions and loss."""
    line = ProgressLine()
    try:
        return Run(config, line, engine).train()
    finally:
        line.close()


class Run:
    """Hold everything that moves during a run."""

    def __init__(self, config: TrainConfig, line: ProgressLine, engine: Engine):
        self.line, self.folder, self.engine = line, Path(config.out), engine
        check_length(config)
        resumes = prepare_folder(self.folder, config)

        asked = config
        self.train_set, self.val_set, notes = open_training_data(config)
        start = None if resumes else load_start(config)
        if resumes:
            config = as_it_began(self.folder, config)
        else:
            config, changes = settle(config, start, self.train_set)
            notes += changes
        self.config = config

        self.device = choose_device(config.device)
        self.now = stopwatch(config, self.device)
        self.precision = choose_precision(config.precision, self.device)
        self.autocast = autocast(self.precision, self.device)
        self.dtype = torch.float64 if self.precision == "fp64" else torch.float32
        torch.manual_seed(config.seed)
        model = DETR(config.model)
        if start:
            notes += start_from(model, start.state, start.card, self.train_set.annotations.categories)
        for note in notes:
            line.say(note)
        self.model = model.to(self.device, self.dtype).to(memory_format=torch.channels_last)
        freeze(self.model, config.freeze)
        self.optimiser = build_optimiser(self.model, config.optimiser)
        horizon = config.optimiser.ema
        self.average = MovingAverage(self.model, horizon) if horizon else None
        self.clock = Clock(steps=count_steps(config, len(self.train_set)), minutes=config.minutes)
        self.best, self.saved_at = -1.0, 0.0
        if resumes:
            self.resume()
        description = describe_run(config, self.device, self.precision)
        self.log = RunLog(self.folder, asked, description, self.clock.step)
        forget_after(self.folder, self.clock.step)
        looks = config.statistics
        self.recorder = Recorder(self.folder, config.model, looks, self.clock.looks(looks))

        learning = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        line.say(
            f"{config.recipe}: {sum(p.numel() for p in self.model.parameters()):,} parameters, {learning:,} learn; "
            f"{len(self.train_set)} training and {len(self.val_set)} validation images of "
            f"{config.model.num_classes} classes; {self.device}, {self.precision}; "
            f"batch {config.batch} as {-(-config.batch // config.micro_batch)} × {config.micro_batch}"
        )
        if asked.resume:
            line.say(f"resumed after step {self.clock.step}" if resumes else "nothing to resume: starting at step 0")

    def train(self) -> Path:
        """Take optimiser steps until the run is over; evaluate and save on the way."""
        config, clock = self.config, self.clock
        augmentation = None if config.overfit else build_augmentation(config.augmentation, config.images)
        steps = training_steps(
            self.train_set,
            config.images,
            augmentation,
            seed=config.seed,
            batch=config.batch,
            micro_batch=config.micro_batch,
            workers=config.workers,
            numbers=CountFrom(clock.step, lambda step: step / clock.steps if clock.steps else clock.progress),
        )
        learning_mode(self.model, config.freeze)
        with Interruption() as interruption, closing(steps):
            started = self.now()
            while clock.progress < 1.0:
                looks_before = clock.looks(config.evaluations)
                report = self.step(next(steps))
                clock.step += 1
                now = self.now()
                report["images_per_second"] = config.batch / (now - started)
                clock.seconds += now - started
                self.recorder.write(clock.step, clock.seconds)
                self.report(report)
                if clock.looks(config.evaluations) > looks_before or clock.progress >= 1.0:
                    self.look()
                elif interruption.number or clock.seconds - self.saved_at > 60 * config.save_minutes:
                    self.save_state()
                if interruption.number and clock.progress < 1.0:
                    self.line.say(f"stopped and saved after step {clock.step}; --resume goes on from there")
                    raise Stopped(interruption.number)
                started = self.now()
        self.log.close()
        self.line.say(
            f"done: {clock.step} steps in {duration(clock.seconds)} of training, best AP {self.best:.3f}; "
            f"the model is {self.folder / 'best.safetensors'}"
        )
        return self.folder

    def step(self, parts: list[Batch]) -> dict[str, Any]:
        """Take one optimiser step over all parts of the batch and return what it was like."""
        config, recorder = self.config, self.recorder
        recorder.begin(self.clock.step, self.clock.looks_after_step(config.statistics))
        set_rate(self.optimiser, rate(self.clock.progress, config.optimiser))
        counts = [count for part in parts for count in part.counts.tolist()]
        groups = config.model.query_groups + (config.model.denoising > 0)
        norm = normalisers(counts, config.model.num_queries, config.loss, groups)
        losses = []
        for part in parts:
            batch = part.to(self.device, self.dtype)
            hints = self.hints(batch)
            with self.autocast():
                predictions = self.engine.forward(self.model, batch, hints)
            losses.append(self.engine.loss(predictions, batch, norm, config.loss))
            losses[-1].total.backward()
            recorder.see_predictions(predictions, batch, losses[-1].assignment)
        recorder.see_gradients(self.model)
        learning = [p for p in self.model.parameters() if p.requires_grad]
        gradient = nn.utils.clip_grad_norm_(learning, config.optimiser.clip or float("inf"))
        total = sum(loss.total.detach() for loss in losses)
        if not torch.isfinite(gradient + total):
            raise FloatingPointError(
                f"step {self.clock.step + 1}: loss {float(total)} and gradient norm {float(gradient)} are not finite "
                f"for the images {[i for part in parts for i in part.image_ids]}; the last checkpoint is unharmed"
            )
        self.optimiser.step()
        recorder.see_update(self.model)
        recorder.see_matching(parts, [loss.assignment for loss in losses], len(losses[0].l1))
        self.optimiser.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.model, self.clock.expected_steps)
        terms = {
            name: sum(getattr(loss, name).detach() for loss in losses) for name in ("classification", "l1", "giou")
        }
        return {"loss": total, **terms, "gradient_norm": gradient}

    def hints(self, batch: Batch) -> Hints | None:
        """Return what the hint group starts from, if there is one; the draws depend on step and images alone."""
        model = self.config.model
        if not model.denoising:
            return None
        seed = np.random.SeedSequence([self.config.seed, self.clock.step, *batch.image_ids]).generate_state(1)
        generator = torch.Generator().manual_seed(int(seed[0]))
        return draw_hints(batch, model.num_queries, model.num_classes, model.denoising, generator)

    def report(self, report: dict[str, Any]) -> None:
        """Write a line to the log now and then, and show how the run goes."""
        clock, config = self.clock, self.config
        if clock.step % LOG_EVERY and clock.step > 1 and clock.progress < 1.0:
            return
        values = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in report.items()}
        values |= {
            "lr": self.optimiser.param_groups[-1]["lr"],
            "epoch": clock.step * config.batch / len(self.train_set),
            "seconds": clock.seconds,
        }
        self.log.write(clock.step, values)
        best = f"AP {self.best:.3f}" if self.best >= 0 else "AP –"
        last = {name: values[name][-1] for name in ("classification", "l1", "giou")}
        self.line.show(
            clock.progress,
            f"step {clock.step}  loss {values['loss']:.3f} (class {last['classification']:.3f}, l1 {last['l1']:.3f}, "
            f"giou {last['giou']:.3f})  {best}  {values['images_per_second']:.1f} images/s  "
            f"{duration(clock.seconds_left)} left",
        )

    def look(self) -> None:
        """Evaluate the validation split, then save: the model when it is the best so far, and the training state."""
        config, clock = self.config, self.clock
        shipped = self.average.model if self.average else self.model
        categories = self.train_set.annotations.categories
        found = detect(
            shipped,
            self.val_set,
            config.images,
            categories,
            batch=config.micro_batch,
            precision=self.autocast,
            progress=lambda done: self.line.show(clock.progress, f"evaluating {done} of {len(self.val_set)} images"),
        )
        metrics = evaluate(self.val_set.annotations, found)
        numbers = {name: value for name, value in metrics.numbers.items() if value is not None}
        self.log.write(
            clock.step, {f"val/{name}": value for name, value in numbers.items()} | {"seconds": clock.seconds}
        )
        self.save(
            shipped, metrics, ModelCard(config.model, config.images, categories, config.recipe, clock.step, numbers)
        )
        self.line.say(
            f"{clock.progress:4.0%}  step {clock.step}  AP {metrics.average_precision:.3f}  "
            f"AP50 {metrics.numbers['AP50'] or 0:.3f}  after {duration(clock.seconds)} of training"
        )

    def save(self, shipped: nn.Module, metrics: Metrics, card: ModelCard) -> None:
        """Write the last and the best model, the metrics of the best, and what is needed to go on."""
        state = shipped.state_dict()
        save_model(self.folder / "last.safetensors", state, card)
        if metrics.average_precision >= self.best:  # of equals the later: it has learned longer
            self.best = metrics.average_precision
            save_model(self.folder / "best.safetensors", state, card)
            text = json.dumps(metrics.to_dict(), indent=2)
            write_atomically(self.folder / "metrics-val.json", text.encode())
        self.save_state()

    def save_state(self) -> None:
        """Write what is needed to go on with the next step."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= optimiser_tensors(self.optimiser)
        if self.average:
            tensors |= {f"average.{name}": value for name, value in self.average.model.state_dict().items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        numbers = {"step": self.clock.step, "seconds": self.clock.seconds, "best": self.best}
        numbers["averaged"] = self.average.updates if self.average else 0
        save_training(self.folder / "checkpoints", self.clock.step, tensors, numbers)
        self.saved_at = self.clock.seconds

    def resume(self) -> None:
        """Take up the newest checkpoint that can be read."""
        tensors, numbers, notes = load_newest_training(self.folder / "checkpoints")
        for note in notes:
            self.line.say(note)
        self.model.load_state_dict(part_of(tensors, "model."))
        load_optimiser(self.optimiser, tensors)
        if self.average:
            self.average.model.load_state_dict(part_of(tensors, "average."))
            self.average.updates = numbers["averaged"]
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        self.clock.step, self.clock.seconds, self.best = numbers["step"], numbers["seconds"], numbers["best"]
        self.saved_at = self.clock.seconds


def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def check_length(config: TrainConfig) -> None:
    """Refuse a config that does not say how long and where to."""
    lengths = {"epochs": config.epochs, "steps": config.steps, "minutes": config.minutes}
    given = {name: value for name, value in lengths.items() if value}
    if len(given) != 1 or not 0 < next(iter(given.values())) < math.inf:
        said = ", ".join(f"--{name} {value:g}" for name, value in given.items()) or "none"
        raise InputError(f"how long to train? Give one of --epochs, --steps, --minutes above 0 (given: {said})")
    if not config.out:
        raise InputError("where to? Give the run's folder by --out runs/NAME")


def count_steps(config: TrainConfig, images: int) -> int:
    """Return the steps of a run given by steps or epochs, 0 for one given by minutes."""
    return config.steps or math.ceil(config.epochs * images / config.batch)
