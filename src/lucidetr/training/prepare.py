"""All that a run has before its first step: data, model, optimiser, clock and log, or what it goes on from."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lucidetr.config import TrainConfig
from lucidetr.conversion.names import Converted
from lucidetr.conversion.start import start_from
from lucidetr.data.dataset import Dataset, open_training_data
from lucidetr.errors import InputError
from lucidetr.evaluation.thresholds import BEST
from lucidetr.models.detr import DETR
from lucidetr.training.checkpoint import load_model, load_newest_training, newest_step
from lucidetr.training.clock import Clock, check_length, count_steps, stopwatch
from lucidetr.training.distributed import (
    ALONE,
    Ranks,
    check_same_step,
    check_share,
    cut,
    parallel,
    place,
    share_batch_norm,
)
from lucidetr.training.ema import MovingAverage
from lucidetr.training.engine import Engine
from lucidetr.training.guards import FiniteGuard
from lucidetr.training.lock import Lock
from lucidetr.training.memory import fitting_micro_batch
from lucidetr.training.optimiser import build_optimiser, freeze
from lucidetr.training.precision import autocast, choose_precision
from lucidetr.training.progress import ProgressLine
from lucidetr.training.recompute import recompute
from lucidetr.training.run_log import (
    NoLog,
    RunLog,
    as_it_began,
    check_data,
    describe_data,
    describe_run,
    last_start,
    prepare_folder,
    row_names,
)
from lucidetr.training.start import load_start, settle
from lucidetr.training.state import put_back
from lucidetr.training.statistics import Recorder, forget_after


class Prepared:
    """Hold everything that moves during a run: `Run` in loop.py has no other attributes than these."""

    line: ProgressLine
    engine: Engine
    ranks: Ranks
    asked: TrainConfig  # what was asked for
    config: TrainConfig  # what is done: also with what data, weights and memory decide
    folder: Path
    resumes: bool
    train_set: Dataset
    val_set: Dataset
    device: Any  # torch.device, which type checkers take for a descriptor
    precision: str
    dtype: torch.dtype  # of weights and pictures
    autocast: Callable[[], AbstractContextManager]
    now: Callable[[], float]  # seconds, of the wall or of the processor
    model: DETR
    forward: Any  # the model, perhaps compiled, replayed, or shared with the other ranks
    optimiser: torch.optim.Optimizer
    average: MovingAverage | None
    clock: Clock
    guard: FiniteGuard
    log: RunLog | NoLog
    recorder: Recorder
    best: float  # AP; -1 before the first evaluation
    saved_at: float  # seconds of training
    owes: bool  # whether the evaluation that the last step ends with is yet to come
    moved: bool  # whether the optimiser has begun to change the weights in this step
    held: ExitStack  # the folder's lock

    def __init__(self, config: TrainConfig, line: ProgressLine, engine: Engine, ranks: Ranks = ALONE):
        self.line, self.engine, self.ranks = line, engine, ranks
        self.folder, self.asked = Path(config.out), config
        check_length(config)
        self.resumes = prepare_folder(self.folder, config)
        with ExitStack() as stack:
            if ranks.first:
                stack.enter_context(Lock(self.folder))
                self.resumes = prepare_folder(self.folder, config)  # again: its last run may just have saved
            self.agree_on_the_step(newest_step(self.folder))  # before they exchange anything else
            start, notes = self.open_data()
            self.choose_device()
            self.build_model(start, notes)
            self.build_around_model()
            if self.resumes:
                self.resume()
            self.agree_on_the_step(self.clock.step)  # again: one of them may have passed over a damaged checkpoint
            self.open_log()
            self.held = stack.pop_all()

    def agree_on_the_step(self, step: int) -> None:
        """Refuse to go on from another step than the other ranks."""
        check_same_step(self.ranks.gather([step]), self.folder)

    def open_data(self) -> tuple[Converted | None, list[str]]:
        """Open both splits, settle the config; return the weights to start from, and what is worth knowing."""
        self.train_set, self.val_set, notes = open_training_data(self.asked)
        with self.ranks.first_goes_ahead():
            start = None if self.resumes else load_start(self.asked)
        if self.resumes:
            self.config = as_it_began(self.folder, self.asked)
            check_data(self.folder, self.train_set, self.val_set)
        else:
            self.config, changes = settle(self.asked, start, self.train_set)
            notes += changes
        check_share(self.config.batch, self.ranks)
        return start, notes

    def choose_device(self) -> None:
        """Settle where it is computed, in which precision, and what time counts."""
        self.device = place(self.config.device, self.ranks)
        self.now = stopwatch(self.config, self.device)
        self.precision = choose_precision(self.config.precision, self.device)
        began = last_start(self.folder).get("precision", self.precision) if self.resumes else self.precision
        if began == "bf16" != self.precision:  # "auto", on another kind of machine
            self.line.say(f"warning: the run began in bf16, which {self.device} does not multiply: fp32 from here on")
        else:
            self.precision = began
        self.autocast = autocast(self.precision, self.device)
        self.dtype = torch.float64 if self.precision == "fp64" else torch.float32

    def build_model(self, start: Converted | None, notes: list[str]) -> None:
        """Build the model, from trained weights if there are some, and say all that is worth knowing."""
        torch.manual_seed(self.config.seed)
        model = DETR(self.config.model)
        if start:
            notes += start_from(model, start.state, start.card, self.train_set.annotations.categories)
        for note in notes + share_batch_norm(model, self.device, self.ranks):
            self.line.say(note)
        self.model = model.to(self.device, self.dtype).to(memory_format=torch.channels_last)
        freeze(self.model, self.config.freeze)
        if self.config.recompute:
            recompute(self.model, self.config.compile)
        if not self.config.micro_batch:
            self.config = self.fill_memory(self.config)
        computing: Any = torch.compile(self.model) if self.config.compile else self.model
        self.forward = parallel(computing, self.ranks)

    def fill_memory(self, config: TrainConfig) -> TrainConfig:
        """Return the config with as many images in a forward pass as fit; on every rank the same, the fewest."""
        annotations, share = self.train_set.annotations, check_share(config.batch, self.ranks)
        fits = fitting_micro_batch(config, self.model, annotations, self.autocast, share)
        return replace(config, micro_batch=min(self.ranks.gather([fits])))

    def build_around_model(self) -> None:
        """Build what moves with the model: optimiser, average, clock, guard."""
        config = self.config
        self.optimiser = build_optimiser(self.model, config.optimiser)
        horizon = config.optimiser.ema
        self.average = MovingAverage(self.model, horizon) if horizon else None
        self.clock = Clock(steps=count_steps(config, len(self.train_set)), minutes=config.minutes)
        self.best, self.saved_at = -1.0, 0.0
        self.owes = self.moved = False
        self.guard = FiniteGuard(self.model, self.device)

    def open_log(self) -> None:
        """Begin to write down what happens, and say what is trained."""
        config, clock, first = self.config, self.clock, self.ranks.first
        self.log = NoLog()
        if first:
            data = describe_data(self.train_set, self.val_set)
            description = describe_run(config, self.device, self.precision, self.ranks.size) | {"data": data}
            self.log = RunLog(self.folder, self.asked, row_names(config.model), description, clock.step, self.owes)
            forget_after(self.folder, clock.step)
        looks = config.statistics if first else 0
        self.recorder = Recorder(self.folder, config.model, looks, clock.due(looks))
        self.introduce()
        if self.asked.resume:
            resumed = f"resumed after step {clock.step}"
            self.line.say(resumed if self.resumes else "nothing to resume: starting at step 0")

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

    def resume(self) -> None:
        """Take up the newest checkpoint that can be read."""
        tensors, numbers, notes = load_newest_training(self.folder / "checkpoints")
        for note in notes:
            self.line.say(note)
        own = {f"model.{name}": tuple(value.shape) for name, value in self.model.state_dict().items()}
        held = {name: tuple(value.shape) for name, value in tensors.items() if name.startswith("model.")}
        if other := sorted(dict(held.items() ^ own.items())):
            place = self.folder / "checkpoints"
            raise InputError(f"{place}: the newest is of another model ({other[0]}); take it away, then --resume")
        put_back(tensors, self.model, self.optimiser, self.average, self.device)
        if self.average:
            self.average.updates = numbers["averaged"]
        self.guard.in_a_row, self.owes = numbers.get("skipped", 0), numbers.get("owes", False)
        self.clock.step, self.clock.seconds = numbers["step"], numbers["seconds"]
        self.best, self.saved_at = self.best_there_is(numbers["best"]), self.clock.seconds

    def best_there_is(self, noted: float) -> float:
        """Return the AP of the best model in the folder, which may have been saved after the checkpoint noted one.

        Where its file is damaged, any other is better.
        """
        file = self.folder / BEST
        try:
            return max(noted, load_model(file)[1].metrics.get("AP", -1.0)) if file.is_file() else noted
        except InputError as error:
            self.line.say(f"warning: {error}; the next evaluation writes another")
            return -1.0
