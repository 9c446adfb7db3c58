"""Guards of a run: a step whose numbers are not finite is undone, and a run that learns nothing says so."""

import math
import shlex
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lucidetr.config import LossConfig, TrainConfig
from lucidetr.criterion.set_loss import Losses, Normalisers
from lucidetr.structures import Assignment, Batch, Predictions
from lucidetr.training.distributed import ALONE, Ranks
from lucidetr.training.engine import Engine
from lucidetr.training.randomness import random_state, set_random_state

MOST_IN_A_ROW = 10  # skipped steps, after which a run stops
NOTHING_FOUND = 0.001  # AP up to which a model counts as having learned nothing
LOOKS, SHARE = 3, 0.3  # evaluations, and share of the run, over which it must have been so
FALLEN = 0.02  # a loss that lost no more than this share of itself has not fallen
FEWEST_LINES = 5  # of metrics.jsonl, below which nobody can tell a loss's course

Line = dict[str, Any]  # of metrics.jsonl


class FiniteGuard:
    """Know what the step before left behind, and go back to it where a step's numbers are not finite.

    Parameters and moments are safe because the optimiser takes no step then. What the forward pass itself moves is
    put back: statistics of batch norms, and the random state. So the run goes on as if the step had not been.
    """

    def __init__(self, model: nn.Module, device: torch.device, in_a_row: int = 0):
        self.model, self.device, self.in_a_row = model, device, in_a_row
        norms = [module for module in model.modules() if isinstance(module, _NormBase)]
        self.moving = [buffer for norm in norms for buffer in norm.buffers()]
        self.measured = [buffer for buffer in self.moving if buffer.is_floating_point()]
        self.kept = [buffer.clone() for buffer in self.moving]
        self.cause = ""
        self.random: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Remember what the coming step may have to go back to."""
        self.cause = ""
        self.random = random_state(self.device)
        if self.moving:
            torch._foreach_copy_(self.kept, self.moving)

    def loss(
        self, engine: Engine, predictions: Predictions, batch: Batch, norm: Normalisers, config: LossConfig
    ) -> Any:
        """Return the engine's loss; where nothing can be matched, one that is nan, so that every part has a backward.

        Parallel processes wait for each other in backward: none of them may leave a step on its own.
        """
        try:
            return engine.loss(predictions, batch, norm, config)
        except FloatingPointError as error:
            self.cause = self.cause or str(error)
            return undefined(predictions)

    def passes(self, total: Float[Tensor, ""], gradient: Float[Tensor, ""], ranks: Ranks = ALONE) -> bool:
        """Say whether the step may be taken: loss, gradient norm and norms' statistics are finite, on every rank."""
        numbers = [total, gradient]
        if self.measured:
            numbers += torch._foreach_norm(self.measured, float("inf"))
        faults = (~torch.stack([number.to(total.dtype) for number in numbers]).isfinite()).sum()
        fine = not ranks.total({"faults": faults})["faults"]
        if fine:
            self.in_a_row = 0
        return fine

    def undo(self, replay: Callable[[], None]) -> dict[str, str]:
        """Go back to before the step and return what was not finite; `replay` makes its predictions once more.

        "cause" is what the matcher said, "module" the first one whose output is not finite, "parameter" the first
        one, on the way back from the heads, whose gradient is not, and "largest" the one with the largest gradient
        where all are finite and the norm of all is not. What there is none of is left out.
        """
        self.in_a_row += 1
        self.restore()
        found = {
            "cause": self.cause,
            "module": first_module(self.model, replay),
            "parameter": first_gradient(self.model),
            "largest": overflowing_gradient(self.model),
        }
        self.restore()
        for parameter in self.model.parameters():
            parameter.grad = None
        return {what: name for what, name in found.items() if name}

    def restore(self) -> None:
        """Put back the norms' statistics and the random state."""
        if self.moving:
            with torch.no_grad():
                torch._foreach_copy_(self.moving, self.kept)
        set_random_state(self.random, self.device)

    def stop_if_lost(self, step: int, last: bool) -> None:
        """Raise a FloatingPointError after ten skipped steps in a row, or at the last one if none was taken."""
        if last and self.in_a_row >= step:
            raise FloatingPointError(
                f"none of the {step} steps was finite (metrics.jsonl names images and parts), so no weight has moved: "
                "look at what the run starts from, at those images, and at --precision"
            )
        if self.in_a_row >= MOST_IN_A_ROW:
            raise FloatingPointError(
                f"step {step}: {self.in_a_row} steps in a row were not finite and skipped (metrics.jsonl names images "
                "and parts); lower --optimiser.lr, or look at those images. The last checkpoint is unharmed"
            )


def undefined(predictions: Predictions) -> Losses:
    """Return a loss of predictions that nobody can match: every term and every gradient is nan."""
    predictions = predictions.in_full_precision()
    total = torch.stack([each.sum() for each in predictions.tensors()]).sum() * float("nan")  # ranks wait for each
    terms = predictions.logits.new_full((len(predictions.logits),), float("nan"))
    none = torch.zeros(0, dtype=torch.long, device=total.device)
    return Losses(total, terms, terms, terms, tokens=total.detach(), assignment=Assignment(none, none, none, none))


@torch.no_grad()
def first_module(model: nn.Module, replay: Callable[[], None]) -> str:
    """Return the name of the first module whose output is not finite while `replay` runs the model, "" if all are."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def see(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return see

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        replay()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""


def first_gradient(model: nn.Module) -> str:
    """Return the last parameter, the first on the way back, whose gradient is not finite, "" if all are."""
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return name
    return ""


def overflowing_gradient(model: nn.Module) -> str:
    """Return the parameter with the largest gradient where all are finite but the norm of all is not, else ""."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if not gradients or nn.utils.get_total_norm(list(gradients.values())).isfinite():
        return ""
    largest = {name: float(gradient.abs().max()) for name, gradient in gradients.items()}
    overflows = all(math.isfinite(value) for value in largest.values())
    return max(largest, key=lambda name: largest[name]) if overflows else ""


def skip_sentence(step: int, skipped: dict[str, Any]) -> str:
    """Return one line about a skipped step.

    >>> skip_sentence(3, {"images": [7], "loss": "nan", "gradient_norm": "nan", "module": "encoder"})
    'step 3 skipped: loss nan, gradient norm nan for the images [7]; first not finite: the output of encoder'
    """
    found = {
        "cause": "{}",
        "module": "the output of {}",
        "parameter": "the gradient of {}",
        "largest": "the norm of all gradients, of which that of {} is the largest",
    }
    first = next((says.format(skipped[what]) for what, says in found.items() if what in skipped), "a batch norm")
    return (
        f"step {step} skipped: loss {skipped['loss']}, gradient norm {skipped['gradient_norm']} "
        f"for the images {skipped['images']}; first not finite: {first}"
    )


def loss_course(lines: Sequence[Line]) -> tuple[float, float] | None:
    """Return the median loss of the first and of the last fifth of the lines, None where these are too few to tell.

    >>> loss_course([{"loss": loss} for loss in (9.0, 7.0, 6.0, 5.0, 4.0)])
    (9.0, 4.0)
    """
    losses = [line["loss"] for line in lines if "loss" in line]
    if len(losses) < FEWEST_LINES:
        return None
    fifth = max(len(losses) // 5, 1)
    return statistics.median(losses[:fifth]), statistics.median(losses[-fifth:])


def find_stall(lines: Sequence[Line], progress: Callable[[Line], float]) -> str | None:
    """Return what a run's log shows to be standing still: "AP", "loss", or None.

    Lines are those of metrics.jsonl up to an evaluation, `progress` tells the share of the run, 0…1, at one of them.
    AP stands still where it was at most 0.001 at the last three evaluations or more, over 30 % of the run, while the
    loss fell; the loss, where it has not fallen after 30 % of the run and nothing is found. A log that holds such a
    finding already gives None: it is said once.
    """
    looks = [line for line in lines if "val/AP" in line]
    course = loss_course(lines)
    if not looks or not course or any("stall" in line for line in lines):
        return None
    nothing = 0
    while nothing < len(looks) and looks[-1 - nothing]["val/AP"] <= NOTHING_FOUND:
        nothing += 1
    now, since = progress(looks[-1]), progress(looks[-1 - nothing]) if nothing < len(looks) else 0.0
    if not nothing or now - since < SHARE - 1e-6:
        return None
    first, last = course
    if last > (1 - FALLEN) * first:
        return "loss"
    return "AP" if nothing >= LOOKS else None


def stall_sentence(what: str, lines: Sequence[Line], config: TrainConfig) -> str:
    """Return what stands still, and the likely causes in their order."""
    first, last = loss_course(lines) or (0.0, 0.0)
    last_step, lr = lines[-1]["step"], config.optimiser.lr
    data = config.data or config.train_json
    few = (
        f"too few steps: the paper's design finds nothing for its first tens of epochs, and {last_step} steps are "
        "done; take a recipe that learns faster, such as lucid-s, or start from --weights"
        if is_papers(config)
        else f"too few steps: {last_step} are done; give the run more"
    )
    rate = f"a rate (--optimiser.lr {lr:g}) that is too high where the loss jumps, too low where it creeps"
    drawn = "the sheet of lucidetr data sample" if config.preflight == "off" else "first-batch.png in the run's folder"
    folder = data and not data.startswith("generated:") and not data.endswith(".json")
    doctor = f", and at what lucidetr doctor {shlex.quote(data)} says" if folder else ""
    boxes = f"boxes beside their objects: look at {drawn}{doctor}"
    classes = f"labels that do not mean what they say: compare the names in {drawn} with the pictures"
    heart = "if it is none of these: the same command with --overfit 8 must bring AP near 1, or data and model disagree"
    if what == "AP":
        says = f"nothing is found yet (AP at most {NOTHING_FOUND:g}) while the loss fell from {first:.3g} to {last:.3g}"
        causes = [few, rate, boxes, classes, heart]
    else:
        says = f"the loss does not fall: {first:.3g} at first, {last:.3g} now"
        causes = [rate, boxes, classes, few, heart]
    return f"{says}. Likely, in this order: " + "; ".join(f"({i}) {cause}" for i, cause in enumerate(causes, start=1))


def is_papers(config: TrainConfig) -> bool:
    """Say whether a config is of the paper's slow-learning design: queries that know no box.

    >>> from lucidetr.recipes import recipe
    >>> [is_papers(recipe(name)) for name in ("detr-r50", "detr-xs", "lucid-s")]
    [True, True, False]
    """
    return config.model.boxes == "absolute"
