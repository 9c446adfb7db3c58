"""How large a model is and how much it computes for a picture, found without memory for either."""

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lucidetr.config import TrainConfig
from lucidetr.models.detr import DETR


@dataclass(frozen=True)
class Size:
    """Hold the numbers of a recipe's table row."""

    parameters: int
    learning: int
    """Those of them that the recipe does not freeze."""
    gflops: float
    """For one picture at the recipe's largest size; a multiplication and its sum are two operations."""


@torch.no_grad()
def measure(config: TrainConfig) -> Size:
    """Return the size of a recipe's model."""
    side = config.images.size
    height, width = (side, side) if config.images.resize == "square" else (side, config.images.max_size)
    with FakeTensorMode():
        model = DETR(config.model).eval().requires_grad_(False)  # views that ask for gradients stop the counter
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        # the counter does not know a CPU's fused attention, but the two matrix products that it is made of
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(torch.zeros(1, 3, height, width), torch.zeros(1, height, width, dtype=torch.bool))
    frozen = sum(size for name, size in sizes.items() if any(name.startswith(f"{part}.") for part in config.freeze))
    total = sum(sizes.values())
    return Size(total, total - frozen, counter.get_total_flops() / 1e9)
