"""The training loop, top to bottom in the order in which a run happens."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lucidetr.config import ModelCard, TrainConfig
from lucidetr.criterion.denoising import draw_hints
from lucidetr.criterion.set_loss import normalisers
from lucidetr.data.batching import CountFrom, build_augmentation, training_steps
from lucidetr.errors import InputError
from lucidetr.evaluation.coco import Metrics, evaluate
from lucidetr.evaluation.detect import detect
from lucidetr.structures import Batch, Detections
from lucidetr.training.checkpoint import save_model, save_training, write_atomically
from lucidetr.training.distributed import average_batch_norm, exchange, joined
from lucidetr.training.engine import FAST, Engine
from lucidetr.training.guards import find_stall, skip_sentence, stall_sentence
from lucidetr.training.interrupt import Interruption, Stopped
from lucidetr.training.memory import is_out_of_memory, too_large
from lucidetr.training.optimiser import learning_mode, rate, set_rate
from lucidetr.training.preflight import preflight
from lucidetr.training.prepare import Prepared
from lucidetr.training.progress import ProgressLine, duration
from lucidetr.training.replay import advice, record, repeats
from lucidetr.training.run_log import FIRST_SAVE, read_metrics
from lucidetr.training.state import training_tensors

FIRST_BATCH = "first-batch.png"
LOG_EVERY = 10  # optimiser steps between lines of metrics.jsonl
TERMS = ("classification", "l1", "giou", "tokens")


def train(config: TrainConfig, engine: Engine = FAST) -> Path:
    """Train a detector as the config says and return the run's folder; `engine` computes predictions and loss.

    Where torchrun has started several processes, each is a rank of one run. A config that asks for another engine
    than is given is an InputError.
    """
    if config.engine == "reference" and engine is FAST:
        raise InputError(
            "engine = reference: train(*choose_engine(config)), of lucidetr.studies.engines, hands it over"
        )
    with (
        Interruption() as interruption,
        joined(config.timeout_minutes, config.engine) as ranks,
        closing(ProgressLine(quiet=not ranks.first)) as line,
    ):
        run = Run(config, line, engine, ranks)
        with run.held, closing(run.log):
            return run.train(interruption)


class Run(Prepared):
    """Take the steps of a run that is prepared, evaluate and save."""

    def train(self, interruption: Interruption) -> Path:
        """Take optimiser steps until the run is over; evaluate and save on the way."""
        config, clock = self.config, self.clock
        if not clock.step and config.preflight != "off":
            drawing = self.folder / FIRST_BATCH if self.ranks.first else None
            at_once = min(config.micro_batch, config.batch // self.ranks.size)  # no rank ever passes more
            tried = replace(config, micro_batch=at_once)
            preflight(tried, self.model, self.train_set, drawing, self.autocast, self.line.say)
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
        self.record_steps()
        interruption.wait()
        if self.owes:
            self.evaluate_and_save(interruption)
        with closing(steps):
            started = self.now()
            while clock.progress < 1.0:
                due_before = clock.due(config.evaluations)
                numbers = self.attempt(self.receive(steps, interruption))
                clock.step += 1
                now = self.now()
                numbers["images_per_second"] = config.batch / (now - started)
                clock.seconds, stop = self.ranks.agree(clock.seconds + now - started, interruption.number)
                self.recorder.write(clock.step, clock.seconds)
                self.log_step(numbers)
                self.owes = clock.due(config.evaluations) > due_before or clock.progress >= 1.0
                if self.owes:
                    self.evaluate_and_save(interruption)
                elif stop or clock.seconds - self.saved_at > 60 * config.save_minutes:
                    self.save_state()
                if stop and clock.progress < 1.0:
                    self.ranks.wait_for_all()  # nobody leaves before rank 0 has saved: torchrun would end the others
                    self.line.say(f"stopped and {self.saved}")
                    raise Stopped(stop)
                started = self.now()
        self.line.say(
            f"done: {clock.step} steps in {duration(clock.seconds)} of training, best AP {self.best:.3f}; "
            f"the model is {self.folder / 'best.safetensors'}"
        )
        return self.folder

    def record_steps(self) -> None:
        """Record forward and backward once on a GPU, if --replay asks for it and all steps are alike.

        That is before the reading processes start: nothing else may use the GPU meanwhile.
        """
        if not self.config.replay:
            if said := advice(self.config, self.device, self.ranks):
                self.line.say(said)
            return
        if not repeats(self.config, self.device, self.ranks):
            self.line.say("steps are not replayed: train --help says what --replay asks for")
            return
        recording = record(self.model, self.config, self.train_set.annotations, self.precision)  # type: ignore[arg-type]
        self.forward = recording or self.forward
        said = "replayed from a recording" if recording else "computed as ever: there is no memory to record one"
        self.line.say(f"steps are {said}")

    def receive(self, steps: Iterator[list[Batch]], interruption: Interruption) -> list[Batch]:
        """Return the next step's batch; where a rank cannot read it, save first: now the state is whole."""
        parts, fault = [], None
        try:
            parts = next(steps)
        except InputError as error:
            fault = error
        if not any(self.ranks.gather([int(fault is not None)])):
            return parts
        self.save_what_is_new()
        self.ranks.wait_for_all()  # nobody leaves before rank 0 has saved: torchrun would end the others
        saved = self.saved if self.clock.step else "before the first step"
        if interruption.number:  # it also reached the reading processes, before they could leave it to this one
            self.line.say(f"stopped, {saved}")
            raise Stopped(interruption.number) from None
        told = str(fault or "another rank cannot read its part of the next step: its own message says why")
        raise InputError(f"{told} ({saved})" if self.ranks.first else told) from None

    @property
    def saved(self) -> str:
        """Return in words what was just saved."""
        return f"saved after step {self.clock.step}; --resume goes on from there"

    def attempt(self, parts: list[Batch]) -> dict[str, Any]:
        """Take a step; where there is no memory for it, go back to before it, save, and say how to need less."""
        self.moved = False
        try:
            return self.step(parts)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or self.moved:  # in the midst of the optimiser nothing is whole
                raise
            self.guard.restore()
            self.optimiser.zero_grad(set_to_none=True)
            self.save_what_is_new()
            largest = max(parts, key=lambda part: part.images.numel())
            saved = f"{self.saved}, with another --micro-batch too" if self.clock.step else "before the first step"
            raise InputError(f"{too_large(self.config, largest, self.device)} ({saved})") from None

    def step(self, parts: list[Batch]) -> dict[str, Any]:
        """Take one optimiser step over all parts of the batch and return what it was like."""
        config, model, recorder = self.config, self.config.model, self.recorder
        recorder.begin(self.clock.step, self.clock.due_after_step(config.statistics))
        set_rate(self.optimiser, rate(self.clock.progress, config.optimiser))
        self.ranks.seed_step(config.seed, self.clock.step)
        self.guard.begin()

        # what the sums are divided by; hints are not counted, their loss comes on top as in DN-DETR
        counts = self.ranks.gather([count for part in parts for count in part.counts.tolist()])
        norm = normalisers(counts, model.num_queries, config.loss, model.query_groups)

        # forward and backward, part by part
        losses = []
        for part in parts:
            batch = part.to(self.device, self.dtype)
            hints = draw_hints(batch, model, config.seed, self.clock.step)
            with exchange(self.forward, last=part is parts[-1]):
                with self.autocast():
                    predictions = self.engine.forward(self.forward, batch, hints)
                losses.append(self.guard.loss(self.engine, predictions, batch, norm, config.loss))
                (losses[-1].total * self.ranks.size).backward()  # gradients become the mean over ranks
            recorder.see_predictions(predictions, batch, losses[-1].assignment)
        recorder.see_gradients(self.model)

        # is every number finite?
        learning = [p for p in self.model.parameters() if p.requires_grad]
        gradient = nn.utils.get_total_norm([p.grad for p in learning if p.grad is not None])
        total = torch.stack([loss.total.detach() for loss in losses]).sum()
        if not self.guard.passes(total, gradient, self.ranks):
            return self.skip(parts, total, gradient)

        # note the matching while a GPU has nothing else to do: later it would have to be waited for
        recorder.see_matching(parts, losses)

        # clip, step, average
        self.moved = True
        nn.utils.clip_grads_with_norm_(learning, config.optimiser.clip or float("inf"), gradient)
        self.optimiser.step()
        recorder.see_update(self.model)
        self.optimiser.zero_grad(set_to_none=True)
        average_batch_norm(self.model, self.ranks)
        if self.average:
            self.average.update(self.model, self.clock.expected_steps)
        terms = {name: sum(getattr(loss, name).detach() for loss in losses) for name in TERMS}
        return {"loss": total, **terms, "gradient_norm": gradient}

    def skip(self, parts: list[Batch], loss: Tensor, gradient: Tensor) -> dict[str, Any]:
        """Undo a step whose numbers are not finite, and return which images and which part of the model were in it."""

        def again() -> None:
            for part in parts:
                batch = part.to(self.device, self.dtype)
                hints = draw_hints(batch, self.config.model, self.config.seed, self.clock.step)
                with self.autocast():
                    self.engine.forward(self.model, batch, hints)  # type: ignore[arg-type]

        self.recorder.pass_over()
        images = self.ranks.gather([image for part in parts for image in part.image_ids])
        numbers = {"loss": f"{float(loss):g}", "gradient_norm": f"{float(gradient):g}"}
        return {"skipped": {"images": images, **numbers, **self.guard.undo(again)}}

    def log_step(self, numbers: dict[str, Any]) -> None:
        """Write a line to the log now and then, and show how the run goes."""
        clock, config = self.clock, self.config
        if skipped := numbers.get("skipped"):
            self.log.write(clock.step, {"skipped": skipped, "seconds": clock.seconds})
            self.line.say(skip_sentence(clock.step, skipped))
            self.guard.stop_if_lost(clock.step, last=clock.progress >= 1.0)
            return
        if clock.step % LOG_EVERY and clock.step > 1 and clock.progress < 1.0:
            return
        numbers |= self.ranks.total({name: numbers[name] for name in ("loss", *TERMS)})
        values = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in numbers.items()}
        epoch = clock.step * config.batch / len(self.train_set)
        values |= {"lr": self.optimiser.param_groups[-1]["lr"], "epoch": epoch, "seconds": clock.seconds}
        self.log.write(clock.step, values)
        best = f"AP {self.best:.3f}" if self.best >= 0 else "AP –"
        own = -config.model.query_groups  # the last layer, of the queries that are used after training
        last = {name: value[own] for name, value in values.items() if isinstance(value, list)}
        self.line.show(
            clock.progress,
            f"step {clock.step}  loss {values['loss']:.3f} (class {last['classification']:.3f}, l1 {last['l1']:.3f}, "
            f"giou {last['giou']:.3f})  {best}  {values['images_per_second']:.1f} images/s  "
            f"{duration(clock.seconds_left)} left",
        )

    def evaluate_and_save(self, interruption: Interruption) -> None:
        """Evaluate the validation split, then save: the model when it is the best so far, and the training state."""
        config, clock = self.config, self.clock
        shipped = self.average.model if self.average else self.model
        categories = self.train_set.annotations.categories
        if self.ranks.size > 1:  # whose launcher, once one of them fails, waits for no evaluation
            self.save_what_is_new()
        found = self.find(shipped, interruption)
        self.owes = False
        if not self.ranks.first:
            self.save_state()
            return
        metrics = evaluate(self.val_set.annotations, found)
        numbers = {name: value for name, value in metrics.numbers.items() if value is not None}
        judged = {f"val/{name}": value for name, value in numbers.items()}
        self.log.write(clock.step, judged | {"seconds": clock.seconds})
        self.look_for_stall()
        self.save(
            shipped, metrics, ModelCard(config.model, config.images, categories, config.recipe, clock.step, numbers)
        )
        self.line.say(
            f"{clock.progress:4.0%}  step {clock.step}  AP {metrics.average_precision:.3f}  "
            f"AP50 {metrics.numbers['AP50'] or 0:.3f}  after {duration(clock.seconds)} of training"
        )

    def find(self, shipped: nn.Module, interruption: Interruption) -> list[Detections]:
        """Return what the model finds in the validation split.

        What cuts this short, a signal or a picture that cannot be read, first has the state saved: what is resumed
        from there begins with the evaluation.
        """

        def look_up(done: int) -> None:
            if interruption.number and self.ranks.size == 1:  # several finish what they have begun together
                raise Stopped(interruption.number)
            self.line.show(self.clock.progress, f"evaluating {done} of {len(self.val_set)} images")

        try:
            return detect(
                shipped,
                self.val_set,
                self.config.images,
                self.train_set.annotations.categories,
                batch=self.config.micro_batch,
                precision=self.autocast,
                progress=look_up,
                share=self.ranks.share,
                gather=self.ranks.interleave,
            )
        except (Stopped, InputError, RuntimeError, MemoryError) as error:  # the last two: no room, or a rank has gone
            self.save_what_is_new()
            if isinstance(error, Stopped):
                self.line.say(f"stopped and {self.saved}")
            if isinstance(error, InputError) and self.ranks.first:
                raise InputError(f"{error} ({self.saved})") from None
            raise

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
        if not self.saved_at:
            write_atomically(self.folder / FIRST_SAVE, b"")
        state = shipped.state_dict()
        save_model(self.folder / "last.safetensors", state, card)
        if metrics.average_precision >= self.best:  # of equals the later: it has learned longer
            self.best = metrics.average_precision
            save_model(self.folder / "best.safetensors", state, card)
            text = json.dumps(metrics.to_dict(self.precision), indent=2)
            write_atomically(self.folder / "metrics-val.json", text.encode())
        self.save_state()

    def save_what_is_new(self) -> None:
        """Save the state unless it was just saved or read."""
        if self.clock.seconds > self.saved_at:
            self.save_state()

    def save_state(self) -> None:
        """Write what is needed to go on with the next step; rank 0 does it for all."""
        self.saved_at = self.clock.seconds
        if not self.ranks.first:
            return
        tensors = training_tensors(self.model, self.optimiser, self.average, self.device)
        numbers = {"step": self.clock.step, "seconds": self.clock.seconds, "best": self.best}
        numbers |= {"averaged": self.average.updates if self.average else 0, "skipped": self.guard.in_a_row}
        numbers |= {"owes": self.owes}
        self.log.sync()
        save_training(self.folder / "checkpoints", self.clock.step, tensors, numbers, before_evaluation=self.owes)
        (self.folder / FIRST_SAVE).unlink(missing_ok=True)
