"""Parameters of a model, part by part, and operations for one picture, counted without allocating either."""

import functools
import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lucidetr.config import ModelConfig, TrainConfig
from lucidetr.models.detr import DETR


@dataclass(frozen=True)
class Size:
    """Hold the numbers of a recipe's table row."""

    parameters: int
    learning: int
    """Those that the recipe does not freeze."""
    gflops: float
    """For one picture at the recipe's largest size; a multiplication and its sum are two operations."""


@torch.no_grad()
def count_operations(config: TrainConfig) -> tuple[FlopCounterMode, dict[str, int]]:
    """Return what a recipe's model computes for a picture, by module, and the size of each parameter by name."""
    side = config.images.size
    height, width = (side, side) if config.images.resize == "square" else (side, config.images.max_size)
    with FakeTensorMode():
        model = DETR(config.model).eval().requires_grad_(False)  # views that ask for gradients stop the counter
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        # the counter does not know a CPU's fused attention, but the two matrix products that it is made of
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(torch.zeros(1, 3, height, width), torch.zeros(1, height, width, dtype=torch.bool))
    return counter, sizes


def measure(config: TrainConfig) -> Size:
    """Return the size of a recipe's model; recipes that differ elsewhere alone are counted once (a loss must fit)."""
    return _measure(TrainConfig(model=config.model, loss=config.loss, images=config.images, freeze=config.freeze))


@functools.lru_cache(maxsize=512)  # the ladder has 62 models, at several sides
def _measure(config: TrainConfig) -> Size:
    counter, sizes = count_operations(config)
    frozen = sum(size for name, size in sizes.items() if any(name.startswith(f"{part}.") for part in config.freeze))
    total = sum(sizes.values())
    return Size(total, total - frozen, counter.get_total_flops() / 1e9)


LAYER, MATRIX = r"layers\.(?P<layer>\d+)\.", r"(?:(?P<inner>query|key|value|output)\..*)?"
# names of parameters, and the part of a DETR that they belong to, in the order that a picture passes them
PARTS = (
    (r"backbone\.stem\..*", "backbone, stem"),
    (r"backbone\.stages\.(?P<stage>\d+)\..*", "backbone, stage {}"),
    (r"projection\..*", "projection to d_model"),
    (r"position\..*", "positions of tokens"),
    (rf"encoder\.{LAYER}attention\.{MATRIX}", "encoder, self-attention"),
    (rf"encoder\.{LAYER}feed_forward\..*", "encoder, feed-forward"),
    (rf"encoder\.(?:{LAYER})?.*norm\..*", "encoder, norms"),
    (r"fusion\..*", "fused map"),
    (r"queries\.(?:\d+\.)?(?:(?P<inner>category|taught_category|box)\.)?.*", "queries"),
    (r"hints\..*", "hints"),
    (rf"decoder\.{LAYER}self_attention\.{MATRIX}", "decoder, self-attention"),
    (rf"decoder\.{LAYER}cross_attention\.{MATRIX}", "decoder, cross-attention"),
    (rf"decoder\.{LAYER}box_bias\..*", "decoder, box bias"),
    (rf"decoder\.{LAYER}feed_forward\..*", "decoder, feed-forward"),
    (rf"decoder\.(?:{LAYER})?.*norm\..*", "decoder, norms"),
    (r"decoder\.position\..*", "positions of boxes"),
    (r"heads\.(?:(?P<layer>\d+)\.)?category\..*", "class head"),
    (r"heads\.(?:(?P<layer>\d+)\.)?box\..*", "box head"),
)
INNER = {  # of the proposals; an attention's matrices keep their own names
    "category": "class head",
    "taught_category": "class head of all tokens",
    "box": "box head",
}


def part_of(name: str) -> tuple[int, str, str]:
    """Return a parameter's index in `PARTS`, its part, and its piece of that part; layers and stages count from 1.

    >>> part_of("backbone.stages.0.1.conv1.weight"), part_of("decoder.norm.bias")
    ((1, 'backbone, stage 1', 'backbone, stage 1'), (14, 'decoder, norms', 'decoder, norms'))
    >>> part_of("encoder.layers.0.attention.query.weight"), part_of("queries.box.hidden.weight")
    ((4, 'encoder, self-attention', 'encoder layer 1, self-attention query'), (8, 'queries', 'queries box head'))
    """
    for place, (pattern, part) in enumerate(PARTS):
        if match := re.fullmatch(pattern, name):
            found = match.groupdict()
            part = part.format(int(found.get("stage", 0)) + 1)
            room, comma, rest = part.partition(",")
            layer = f" layer {int(found['layer']) + 1}" if found.get("layer") else ""
            inner = f" {INNER.get(found['inner'], found['inner'])}" if found.get("inner") else ""
            return place, part, f"{room}{layer}{comma}{rest}{inner}"
    raise AssertionError(f"{name} belongs to no part")


def parameters_by_part(model: ModelConfig) -> dict[tuple[int, str], int]:
    """Return the number of parameters of each part, by index and name, in the order that a picture passes them."""
    counts: Counter[tuple[int, str]] = Counter()
    with torch.device("meta"):
        for name, parameter in DETR(model).named_parameters():
            counts[part_of(name)[:2]] += parameter.numel()
    return dict(sorted(counts.items()))


def parts_table(*configs: TrainConfig) -> str:
    """Return a Markdown table of recipes side by side: a row for each part, then the sum."""
    columns = [parameters_by_part(config.model) for config in configs]
    parts = sorted({part for column in columns for part in column})
    heading = ["part", *(config.recipe for config in configs)]
    rows = [[part[1], *(f"{column.get(part, 0):,}" for column in columns)] for part in parts]
    total = ["**together**", *(f"**{sum(column.values()):,}**" for column in columns)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *rows, total))
