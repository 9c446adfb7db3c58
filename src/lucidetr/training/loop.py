"""The training loop, top to bottom in the order in which a run happens."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
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
from lucidetr.training.clock import Clock, check_length, count_steps, stopwatch
from lucidetr.training.distributed import (
    ALONE,
    Ranks,
    average_batch_norm,
    check_share,
    cut,
    exchange,
    joined,
    parallel,
    place,
    share_batch_norm,
)
from lucidetr.training.ema import MovingAverage
from lucidetr.training.engine import FAST, Engine
from lucidetr.training.guards import FiniteGuard, find_stall, skip_sentence, stall_sentence
from lucidetr.training.interrupt import Interruption, Stopped
from lucidetr.training.memory import fitting_micro_batch
from lucidetr.training.optimiser import build_optimiser, freeze, learning_mode, rate, set_rate
from lucidetr.training.precision import autocast, choose_precision
from lucidetr.training.preflight import preflight
from lucidetr.training.progress import ProgressLine, duration
from lucidetr.training.recompute import recompute
from lucidetr.training.run_log import NoLog, RunLog, as_it_began, describe_run, prepare_folder, read_metrics
from lucidetr.training.start import load_start, settle
from lucidetr.training.statistics import Recorder, forget_after

FIRST_BATCH = "first-batch.png"
LOG_EVERY = 10  # optimiser steps between lines of metrics.jsonl


def train(config: TrainConfig, engine: Engine = FAST) -> Path:
    """Train a detector as the config says and return the run's folder; `engine` computes predictions and loss.

    Where torchrun has started several processes, each is a rank of one run.
    """
    with joined(config.timeout_minutes, config.engine) as ranks, closing(ProgressLine(quiet=not ranks.first)) as line:
        return Run(config, line, engine, ranks).train()


class Run:
    """Hold everything that moves during a run."""

    def __init__(self, config: TrainConfig, line: ProgressLine, engine: Engine, ranks: Ranks = ALONE):
        self.line, self.folder, self.engine, self.ranks = line, Path(config.out), engine, ranks
        check_length(config)
        resumes = prepare_folder(self.folder, config)

        asked = config
        self.train_set, self.val_set, notes = open_training_data(config)
        with ranks.first_goes_ahead():
            start = None if resumes else load_start(config)
        if resumes:
            config = as_it_began(self.folder, config)
        else:
            config, changes = settle(config, start, self.train_set)
            notes += changes
        self.config = config
        check_share(config.batch, ranks)

        self.device = place(config.device, ranks)
        self.now = stopwatch(config, self.device)
        self.precision = choose_precision(config.precision, self.device)
        self.autocast = autocast(self.precision, self.device)
        self.dtype = torch.float64 if self.precision == "fp64" else torch.float32
        torch.manual_seed(config.seed)
        model = DETR(config.model)
        if start:
            notes += start_from(model, start.state, start.card, self.train_set.annotations.categories)
        model, shared = share_batch_norm(model, self.device, ranks)
        for note in notes + shared:
            line.say(note)
        self.model = model.to(self.device, self.dtype).to(memory_format=torch.channels_last)
        freeze(self.model, config.freeze)
        if config.recompute:
            recompute(self.model, config.compile)  # type: ignore[arg-type]
        if not config.micro_batch:
            config = self.config = self.fill_memory(config)
        computing: Any = torch.compile(self.model) if config.compile else self.model
        self.forward = parallel(computing, ranks)
        self.optimiser = build_optimiser(self.model, config.optimiser)
        horizon = config.optimiser.ema
        self.average = MovingAverage(self.model, horizon) if horizon else None
        self.clock = Clock(steps=count_steps(config, len(self.train_set)), minutes=config.minutes)
        self.best, self.saved_at = -1.0, 0.0
        self.guard = FiniteGuard(self.model, self.device)
        if resumes:
            self.resume()
        self.log: RunLog | NoLog = NoLog()
        if ranks.first:
            description = describe_run(config, self.device, self.precision, ranks.size)
            self.log = RunLog(self.folder, asked, description, self.clock.step)
            forget_after(self.folder, self.clock.step)
        looks = config.statistics if ranks.first else 0
        self.recorder = Recorder(self.folder, config.model, looks, self.clock.looks(looks))
        self.introduce()
        if asked.resume:
            line.say(f"resumed after step {self.clock.step}" if resumes else "nothing to resume: starting at step 0")

    def fill_memory(self, config: TrainConfig) -> TrainConfig:
        """Return the config with as many images in a forward pass as fit; on every rank the same, the fewest."""
        annotations, share = self.train_set.annotations, check_share(config.batch, self.ranks)
        fits = fitting_micro_batch(config, self.model, annotations, self.autocast, share)
        return replace(config, micro_batch=min(self.ranks.gather([fits])))

    def introduce(self) -> None:
        """Say what is trained, on what, and how the batch is cut."""
        config = self.config
        learning = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.line.say(
            f"{config.recipe}: {sum(p.numel() for p in self.model.parameters()):,} parameters, {learning:,} learn; "
            f"{len(self.train_set)} training and {len(self.val_set)} validation images of "
            f"{config.model.num_classes} classes; {self.device}, {self.precision}; "
            f"{cut(config.batch, config.micro_batch, self.ranks)}"
        )

    def train(self) -> Path:
        """Take optimiser steps until the run is over; evaluate and save on the way."""
        config, clock = self.config, self.clock
        if not clock.step and config.preflight != "off":
            drawing = self.folder / FIRST_BATCH if self.ranks.first else None
            preflight(config, self.model, self.train_set, drawing, self.autocast, self.line.say)
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
            share=self.ranks.share,
        )
        learning_mode(self.model, config.freeze)
        with Interruption() as interruption, closing(steps):
            started = self.now()
            while clock.progress < 1.0:
                looks_before = clock.looks(config.evaluations)
                report = self.step(self.receive(steps, interruption))
                clock.step += 1
                now = self.now()
                report["images_per_second"] = config.batch / (now - started)
                clock.seconds, stop = self.ranks.agree(clock.seconds + now - started, interruption.number)
                self.recorder.write(clock.step, clock.seconds)
                self.report(report)
                if clock.looks(config.evaluations) > looks_before or clock.progress >= 1.0:
                    self.look()
                elif stop or clock.seconds - self.saved_at > 60 * config.save_minutes:
                    self.save_state()
                if stop and clock.progress < 1.0:
                    self.ranks.agree()  # nobody leaves before rank 0 has saved: torchrun would end the others
                    self.line.say(f"stopped and saved after step {clock.step}; --resume goes on from there")
                    raise Stopped(stop)
                started = self.now()
        self.log.close()
        self.line.say(
            f"done: {clock.step} steps in {duration(clock.seconds)} of training, best AP {self.best:.3f}; "
            f"the model is {self.folder / 'best.safetensors'}"
        )
        return self.folder

    def receive(self, steps: Iterator[list[Batch]], interruption: Interruption) -> list[Batch]:
        """Return the next step's batch; where it cannot be read, save first: between two steps the state is whole."""
        try:
            return next(steps)
        except InputError as error:
            if self.clock.seconds > self.saved_at:
                self.save_state()
            step = self.clock.step
            saved = f"saved after step {step}; --resume goes on from there" if step else "before the first step"
            if interruption.number:  # it also reached the reading processes, before they could leave it to this one
                self.line.say(f"stopped, {saved}")
                raise Stopped(interruption.number) from None
            raise InputError(f"{error} ({saved})" if self.ranks.first else str(error)) from None

    def step(self, parts: list[Batch]) -> dict[str, Any]:
        """Take one optimiser step over all parts of the batch and return what it was like."""
        config, recorder = self.config, self.recorder
        recorder.begin(self.clock.step, self.clock.looks_after_step(config.statistics))
        set_rate(self.optimiser, rate(self.clock.progress, config.optimiser))
        self.ranks.seed_step(config.seed, self.clock.step)
        self.guard.begin()
        counts = self.ranks.gather([count for part in parts for count in part.counts.tolist()])
        groups = config.model.query_groups + (config.model.denoising > 0)
        norm = normalisers(counts, config.model.num_queries, config.loss, groups)
        losses = []
        for part in parts:
            batch = part.to(self.device, self.dtype)
            hints = self.hints(batch)
            with exchange(self.forward, last=part is parts[-1]):
                with self.autocast():
                    predictions = self.engine.forward(self.forward, batch, hints)
                losses.append(self.guard.loss(self.engine, predictions, batch, norm, config.loss))
                (losses[-1].total * self.ranks.size).backward()  # gradients become the mean over ranks
            recorder.see_predictions(predictions, batch, losses[-1].assignment)
        recorder.see_gradients(self.model)
        learning = [p for p in self.model.parameters() if p.requires_grad]
        gradient = nn.utils.get_total_norm([p.grad for p in learning if p.grad is not None])
        total = torch.stack([loss.total.detach() for loss in losses]).sum()
        if not self.guard.passes(total, gradient, self.ranks):
            return self.skip(parts, total, gradient)
        nn.utils.clip_grads_with_norm_(learning, config.optimiser.clip or float("inf"), gradient)
        self.optimiser.step()
        recorder.see_update(self.model)
        recorder.see_matching(parts, [loss.assignment for loss in losses], len(losses[0].l1))
        self.optimiser.zero_grad(set_to_none=True)
        average_batch_norm(self.model, self.ranks)
        if self.average:
            self.average.update(self.model, self.clock.expected_steps)
        terms = {
            name: sum(getattr(loss, name).detach() for loss in losses) for name in ("classification", "l1", "giou")
        }
        return {"loss": total, **terms, "gradient_norm": gradient}

    def skip(self, parts: list[Batch], loss: Tensor, gradient: Tensor) -> dict[str, Any]:
        """Undo a step whose numbers are not finite, and return which images and which part of the model were in it."""

        def replay() -> None:
            for part in parts:
                batch = part.to(self.device, self.dtype)
                with self.autocast():
                    self.engine.forward(self.model, batch, self.hints(batch))  # type: ignore[arg-type]

        self.recorder.pass_over()
        images = self.ranks.gather([image for part in parts for image in part.image_ids])
        numbers = {"loss": f"{float(loss):g}", "gradient_norm": f"{float(gradient):g}"}
        return {"skipped": {"images": images, **numbers, **self.guard.undo(replay)}}

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
        if skipped := report.get("skipped"):
            self.log.write(clock.step, {"skipped": skipped, "seconds": clock.seconds})
            self.line.say(skip_sentence(clock.step, skipped))
            self.guard.stop_if_lost(clock.step)
            return
        if clock.step % LOG_EVERY and clock.step > 1 and clock.progress < 1.0:
            return
        report |= self.ranks.total({name: report[name] for name in ("loss", "classification", "l1", "giou")})
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
            share=self.ranks.share,
            gather=self.ranks.interleave,
        )
        if not self.ranks.first:
            self.save_state()
            return
        metrics = evaluate(self.val_set.annotations, found)
        numbers = {name: value for name, value in metrics.numbers.items() if value is not None}
        self.log.write(
            clock.step, {f"val/{name}": value for name, value in numbers.items()} | {"seconds": clock.seconds}
        )
        self.look_for_stall()
        self.save(
            shipped, metrics, ModelCard(config.model, config.images, categories, config.recipe, clock.step, numbers)
        )
        self.line.say(
            f"{clock.progress:4.0%}  step {clock.step}  AP {metrics.average_precision:.3f}  "
            f"AP50 {metrics.numbers['AP50'] or 0:.3f}  after {duration(clock.seconds)} of training"
        )

    def look_for_stall(self) -> None:
        """Say once, and write down, that nothing is learned, if the log shows it."""
        lines, clock = read_metrics(self.folder), self.clock
        what = find_stall(lines, lambda line: replace(clock, step=line["step"], seconds=line["seconds"]).progress)
        if what:
            says = stall_sentence(what, lines, self.config)
            self.log.write(clock.step, {"stall": says, "seconds": clock.seconds})
            self.line.say(f"warning: {says}")

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
        """Write what is needed to go on with the next step; rank 0 does it for all."""
        self.saved_at = self.clock.seconds
        if not self.ranks.first:
            return
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= optimiser_tensors(self.optimiser)
        if self.average:
            tensors |= {f"average.{name}": value for name, value in self.average.model.state_dict().items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        numbers = {"step": self.clock.step, "seconds": self.clock.seconds, "best": self.best}
        numbers["averaged"] = self.average.updates if self.average else 0
        numbers["skipped"] = self.guard.in_a_row
        save_training(self.folder / "checkpoints", self.clock.step, tensors, numbers)

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
        self.guard.in_a_row = numbers.get("skipped", 0)
        self.clock.step, self.clock.seconds, self.best = numbers["step"], numbers["seconds"], numbers["best"]
        self.saved_at = self.clock.seconds


def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
