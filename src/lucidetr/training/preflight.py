"""Preflight: what can be seen of a run before its first step, in seconds, and without leaving a trace in it."""

import copy
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from lucidetr.config import ImageConfig, ModelConfig, TrainConfig
from lucidetr.data.annotations import Annotations
from lucidetr.data.batching import build_augmentation, training_steps
from lucidetr.data.dataset import Dataset
from lucidetr.data.sheet import CELL, arrange, draw_batch
from lucidetr.errors import InputError
from lucidetr.evaluation.coco import evaluate
from lucidetr.evaluation.detect import detect
from lucidetr.layers.attention import MultiHeadAttention
from lucidetr.models.detr import DETR
from lucidetr.structures import Batch
from lucidetr.training.checkpoint import write_atomically
from lucidetr.training.clock import count_steps
from lucidetr.training.guards import is_papers
from lucidetr.training.memory import Precision, add_gradients, is_out_of_memory, largest_batch, peak_memory, too_large
from lucidetr.training.optimiser import build_optimiser, freeze, learning_mode, set_rate
from lucidetr.training.randomness import random_state_kept

DRAWN = 16  # images of the first batch
COMPARED = 4  # images whose pixels are compared
SAME = 1e-5  # predictions that differ by less, as a share of the largest, are the same
NOISE = 1e-3  # put on a copy's parameters, as a share of their size
MANY = 20_000  # images; with fewer, the start decides
HEART, HEART_STEPS, HEART_EVERY, HEART_AP, HEART_SECONDS = 4, 300, 25, 0.9, 600.0  # images by heart


def preflight(
    config: TrainConfig, model: nn.Module, dataset: Dataset, drawing: Path | None, precision: Precision, say: Callable
) -> None:
    """Look at data, model and memory before the first step, and say what is odd.

    What would make the run worthless is an InputError: a start that cannot learn, an image with more objects than
    queries, a batch that does not fit into memory. The run itself is left as it was, bit for bit: all is tried on a
    copy, and the random state is put back. The first batch is drawn into the file `drawing`, if one is named;
    `precision` is opened around forward passes; `say` prints a line.
    """
    check_start(config.model, model)
    check_queries(config, dataset.annotations)
    say(expectation(config, len(dataset)))
    device = next(model.parameters()).device
    with random_state_kept(device):
        parts = first_batch(config, dataset)
        sheet = draw_batches(parts, config.images, dataset.annotations.categories.names)
        if drawing:
            write_atomically(drawing, as_png(sheet))
        trial = copy.deepcopy(model)
        for note in (*odd_pixels(dataset, parts[0]), *odd_predictions(trial, parts[0])):
            say(f"warning: {note}")
        learning_mode(trial, config.freeze)
        batch = largest_batch(config, dataset.annotations, config.micro_batch)
        count, (height, width) = int(batch.counts[0]), batch.images.shape[2:]
        say(f"trying the largest batch: {len(batch)} images of {width} × {height} pixels, {count} objects in each")
        for note in odd_gradients(config, trial, batch, precision):
            say(f"warning: {note}")
        memory = peak_memory(device)
        peak = "" if memory is None else f": peak memory {memory:.2f} GB"
        say(f"it fits{peak}; the first batch is drawn in {drawing}")
        if config.preflight == "full":
            del trial
            say(learn_by_heart(config, model, dataset, precision))


def check_start(config: ModelConfig, model: nn.Module) -> None:
    """Refuse branches that start at zero where nothing leads around them, or where they would leave norms of zeros.

    The paper's queries start without content. While all branches are zero, a norm after each sum divides a vector of
    zeros by √ε, and so multiplies its gradient by 316. Trained weights have no such start.
    """
    outputs = [part.output.weight for part in model.modules() if isinstance(part, MultiHeadAttention)]
    if config.residual_start != "zero" or any(bool(weight.any()) for weight in outputs):
        return
    for name in ("encoder_block", "decoder_block"):
        block = getattr(config, name)
        if block == "no_residual":
            why = "no path leads around them, so nothing would pass"
        elif name == "decoder_block" and config.queries == "learned" and block != "pre_norm":
            why = "queries without content would be norms of zeros, and their gradients without bound"
        else:
            continue
        raise InputError(
            f"model.residual_start = zero and model.{name} = {block}: branches start at zero, and {why}: set "
            f"--model.{name.replace('_', '-')} pre_norm or --model.residual-start xavier (--preflight off trains all "
            "the same)"
        )


def check_queries(config: TrainConfig, annotations: Annotations) -> None:
    """Refuse an image with more objects than the model has queries."""
    objects, queries = annotations.objects_per_image(), config.model.num_queries
    if len(objects) and objects.max() > queries:
        fullest = int(objects.argmax())
        raise InputError(
            f"image {annotations.image_ids[fullest]} ({annotations.file_names[fullest]}) has {objects.max()} objects, "
            f"the model only {queries} queries, and {int((objects > queries).sum())} of {len(objects)} images have "
            f"more: set --model.num-queries to {objects.max()} or more (--preflight off trains all the same)"
        )


def expectation(config: TrainConfig, images: int) -> str:
    """Return what can be expected of so many images, so long a run and this start.

    >>> from lucidetr.recipes import recipe
    >>> expectation(replace(recipe("lucid-s"), epochs=0.0, steps=1000, batch=8), 205)
    '205 images, seen 8,000 times in all, from random weights: --weights of a trained detector would start from more'
    """
    steps = count_steps(config, images)
    seen = f", seen {steps * config.batch:,} times in all," if steps else ""
    if config.weights:
        return f"{images:,} images{seen or ','} from the weights {config.weights}"
    if is_papers(config):
        return (
            f"{images:,} images{seen} from random weights: the paper's design saw 118,287 images 300 times, 35 million "
            "in all, with a pretrained backbone, and AP stays near 0 for long; lucid-s learns faster, so does a start "
            "from --weights"
        )
    advice = ": --weights of a trained detector would start from more" if images < MANY else ""
    return f"{images:,} images{seen} from random weights{advice}"


def first_batch(config: TrainConfig, dataset: Dataset) -> list[Batch]:
    """Return the first parts of the run's first batch, as the model will see them: enough to be drawn."""
    change = None if config.overfit else build_augmentation(config.augmentation, config.images)
    enough = -(-DRAWN // config.micro_batch) * config.micro_batch
    cut = {"batch": min(config.batch, enough), "micro_batch": config.micro_batch}
    return next(training_steps(dataset, config.images, change, seed=config.seed, **cut))


def draw_batches(parts: list[Batch], images: ImageConfig, names: tuple[str, ...]) -> Image.Image:
    """Return a sheet of the first images of a batch, padding included, with boxes and category names."""
    return arrange([cell for part in parts for cell in draw_batch(part, images, names)][:DRAWN], CELL)


def as_png(picture: Image.Image) -> bytes:
    """Return the bytes of a picture's PNG file."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def odd_pixels(dataset: Dataset, part: Batch) -> Iterator[str]:
    """Yield a sentence where all images are the same, or pixels do not lie about 0 ± 1 once normalised."""
    ids = list(dict.fromkeys(part.image_ids))[:COMPARED]
    if len(ids) == 1:
        ids = dataset.annotations.image_ids[:COMPARED].tolist()
    pictures = [dataset.image(int(np.flatnonzero(dataset.annotations.image_ids == i)[0])) for i in ids]
    if len(pictures) > 1 and all(torch.equal(pictures[0], other) for other in pictures[1:]):
        yield f"the images {ids} have the same pixels: is every file a copy of one, or the reader at fault?"
    colours = [image[:, ~padding] for image, padding in zip(part.images, part.padding, strict=True)]
    deviation = float(torch.cat([each.std(1, correction=0) for each in colours]).mean())
    mean = float(torch.cat(colours, dim=1).mean())
    if deviation < 0.05:
        yield f"the pixels of the first images hardly differ (deviation {deviation:.2g}): are they of one colour?"
    elif abs(mean) > 3 or deviation > 4:
        yield (
            f"normalised pixels lie at {mean:.2g} ± {deviation:.2g}, not about 0 ± 1: --images.mean and --images.std "
            "do not fit these pictures"
        )


def odd_predictions(model: nn.Module, part: Batch) -> Iterator[str]:
    """Yield a sentence where the model says the same about a picture and about noise; leaves it in evaluation mode."""
    some = next(model.parameters())
    one = torch.stack([part.images[0], torch.randn_like(part.images[0])]).to(some.device, some.dtype)
    padding = part.padding[:1].expand(2, -1, -1).to(some.device)
    with torch.no_grad():
        predictions = model.eval()(one, padding).in_full_precision()
    for values in (predictions.logits, predictions.boxes_cxcywh):
        if not values.isfinite().all():
            yield "the model's predictions are not finite before it has learned anything: look at --weights"
            return
    pairs = [predictions.logits, predictions.boxes_cxcywh]
    apart = max(float((x[:, 0] - x[:, 1]).abs().max() / x.abs().max().clamp_min(1e-12)) for x in pairs)
    if apart < SAME:
        yield (
            f"the model says the same about image {part.image_ids[0]} and about noise (they differ by {apart:.1g}): "
            "nothing of the picture reaches the predictions"
        )


def odd_gradients(config: TrainConfig, model: nn.Module, batch: Batch, precision: Precision) -> Iterator[str]:
    """Yield a sentence about parameters that nothing reaches; a batch too large for the memory is an InputError.

    A little noise is put on the model first: what starts at zero on purpose would hide what stands behind it.
    """
    (height, width), device = batch.images.shape[2:], next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    stir(model)
    try:
        # The run's own model and one more copy of what learns take the room that AdamW's two moments will.
        _spare = [torch.empty_like(p) for p in model.parameters() if p.requires_grad]
        add_gradients(config, model, batch, precision, [*batch.counts.tolist()])
    except FloatingPointError as error:
        yield f"the loss of a batch of noise is not finite: {error}"
        return
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        raise InputError(too_large(config, batch, device)) from None
    except ValueError as error:  # torch's, of a batch norm that has nothing to compare
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            f"{len(batch)} image of {width} × {height} pixels leaves batch norm a single value: raise --batch and "
            f"--micro-batch (now {config.micro_batch}), or --images.size (now {config.images.size})"
        ) from None
    silent = [name for name in silent_parameters(model) if not silent_by_nature(name, config.model)]
    if silent:
        more = f" and {len(silent) - 8} more" if len(silent) > 8 else ""
        yield f"no gradient reaches {', '.join(silent[:8])}{more}: these will not learn"


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Put a little noise on every parameter that learns."""
    for p in model.parameters():
        if p.requires_grad:
            p += NOISE * p.abs().mean().clamp_min(0.1) * torch.randn_like(p)


def silent_parameters(model: nn.Module) -> list[str]:
    """Return the names of parameters that should learn and whose gradient is exactly zero, or is none."""
    learning = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    return [name for name, gradient in learning if gradient is None or not gradient.any()]


def silent_by_nature(name: str, config: ModelConfig) -> bool:
    """Say whether a parameter has no gradient by the model's own nature.

    A softmax cannot see the bias of its keys, nor what is added to all scores of a head alike. Learned queries have no
    content before the first decoder layer, so its self-attention has nothing to choose among (the paper notes that it
    can be left out): all that learns there is a constant.

    >>> in_first = "decoder.layers.0.self_attention."
    >>> [silent_by_nature(in_first + name, ModelConfig()) for name in ("value.weight", "value.bias", "output.weight")]
    [True, False, False]
    """
    silent: tuple[str, ...] = ("key.bias", "box_bias.x.output.bias", "box_bias.y.output.bias")
    if config.queries == "learned" and name.startswith("decoder.layers.0.self_attention."):
        silent += ("query.weight", "query.bias", "key.weight", "value.weight")
    return name.endswith(silent)


def learn_by_heart(config: TrainConfig, model: nn.Module, dataset: Dataset, precision: Precision) -> str:
    """Train a copy on a few unchanged images without dropout, in memory only; return its AP, or what stopped it."""
    with_objects = np.flatnonzero(dataset.annotations.objects_per_image())[:HEART]
    if not len(with_objects):
        return "no image has an object: there is nothing to learn by heart"
    few = dataset.subset(with_objects, f"{dataset.name}, {len(with_objects)} images")
    some, student = next(model.parameters()), DETR(replace(config.model, dropout=0.0))
    student.load_state_dict(model.state_dict())
    student = student.to(some.device, some.dtype).to(memory_format=torch.channels_last)
    freeze(student, config.freeze)
    learning_mode(student, config.freeze)
    optimiser = build_optimiser(student, config.optimiser)
    cut = {"batch": len(few), "micro_batch": min(config.micro_batch, len(few))}
    steps = training_steps(few, config.images, None, seed=config.seed, **cut)
    losses: list[float] = []
    found, stopped, until = 0.0, f"{HEART_STEPS} steps are over", time.monotonic() + HEART_SECONDS
    for step, parts in zip(range(1, HEART_STEPS + 1), steps, strict=False):
        set_rate(optimiser, min(step / HEART_EVERY, 1.0))
        counts = [count for part in parts for count in part.counts.tolist()]
        try:
            losses.append(sum(float(add_gradients(config, student, part, precision, counts)) for part in parts))
        except FloatingPointError as error:
            stopped = f"{error} at step {step}"
            break
        clip = config.optimiser.clip or float("inf")
        norm = nn.utils.clip_grad_norm_([p for p in student.parameters() if p.requires_grad], clip)
        if not norm.isfinite():
            stopped = f"gradients are not finite at step {step}"
            break
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % HEART_EVERY == 0 or step == HEART_STEPS:
            categories = few.annotations.categories
            seen = detect(student, few, config.images, categories, batch=cut["micro_batch"], precision=precision)
            found = evaluate(few.annotations, seen).average_precision
            if found >= HEART_AP:
                return f"{len(few)} images by heart: AP {found:.3f} after {step} steps; data, model and loss agree"
            if time.monotonic() > until:
                stopped = f"{HEART_SECONDS:.0f} seconds are over"
                break
    course = f"loss {losses[0]:.3g} at first, {losses[-1]:.3g} at last" if losses else "no loss"
    return (
        f"{len(few)} images by heart: AP {found:.3f}, {course}; {stopped}. Where the loss falls it is time that lacks; "
        "where it does not, look at the rate and at first-batch.png"
    )
