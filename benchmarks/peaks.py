"""How fast this machine multiplies at best, and what share of that the recipes reach.

The peak is measured: one matrix product of 2048³ and one 3×3 convolution of 256 channels, whichever is faster.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Common, alternate, measurable, note, read_options
from benchmarks.pair import random_batch
from benchmarks.steps import inference, square, training
from lucidetr.models.size import measure
from lucidetr.training.precision import choose_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OBJECTS = 7


@dataclass(frozen=True)
class Options(Common):
    """Measure the peaks of each precision, then inference and a training step of each recipe."""

    recipes: str = "detr-r50,lucid-xs,lucid-s"
    precisions: str = "fp32,bf16"
    """bf16 is left out where the hardware has none, unless it is named alone."""
    side: int = 640
    """Of the pictures of detr-r50; the lucid recipes have their own."""
    matrix: int = 2048
    quick: bool = False
    """Models of a few thousand parameters on small pictures, only to see that this works."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and append a line for each precision to results.jsonl."""
    options = read_options(Options, arguments, "peaks")
    device = choose_device(options.device)
    for precision in measurable(options.precisions, device):
        peaks = measure_peaks(DTYPES[precision], options, device)
        peak = max(peaks.values())
        print(f"{precision}: " + ", ".join(f"{name} {speed:.0f} GFLOP/s" for name, speed in peaks.items()))
        shares = {}
        for name in options.recipes.split(","):
            shares[name] = share_of(name, precision, options, device)
            for kind, each in shares[name].items():
                each["share"] = each["gflops_per_second"] / peak
                speed = f"{each['gflops_per_second']:.0f} GFLOP/s, {each['share']:.0%} of the peak"
                print(f"  {name} {kind}: {each['gflops']:.1f} GFLOP in {each['seconds']:.3f} s, {speed}", flush=True)
        note("peaks", {"precision": precision, "side": options.side}, {"peaks": peaks, "recipes": shares}, device)


@torch.no_grad()
def measure_peaks(dtype: torch.dtype, options: Options, device: torch.device) -> dict[str, float]:
    """Return the GFLOP/s of the matrix product and of the convolution, the fastest of all runs."""
    n = options.matrix
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    images = torch.randn(1, 256, 64, 64, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    layer = nn.Conv2d(256, 256, 3, padding=1, bias=False).to(device, dtype).to(memory_format=torch.channels_last)
    work = {"matrix": (lambda: a @ b, 2 * n**3), "convolution": (lambda: layer(images), 2 * 256 * 256 * 9 * 64 * 64)}
    times = 20 if device.type == "cuda" else 1  # so that a GPU's start of each call is not what is measured

    def repeated(once: Callable[[], Any]) -> None:
        for _ in range(times):
            once()

    contenders = {name: lambda once=once: repeated(once) for name, (once, _) in work.items()}
    seconds = alternate(contenders, max(options.runs, 10), device=device)
    return {name: times * operations / min(seconds[name]) / 1e9 for name, (_, operations) in work.items()}


def share_of(name: str, precision: str, options: Options, device: torch.device) -> dict[str, dict[str, float]]:
    """Return operations and seconds of one picture's inference and of a training step of the recipe's micro batch."""
    side = 64 if options.quick else options.side if name == "detr-r50" else 0
    config = square(name, side, options.quick)
    kinds = {"inference": 1, "training": config.micro_batch}
    batches = {
        kind: random_batch(size, config.images.size, OBJECTS, config.model.num_classes, device)
        for kind, size in kinds.items()
    }
    infer = inference(config, batches["inference"], precision)
    learn = training(config, batches["training"], precision)
    gflops = {"inference": measure(config).gflops, "training": operations(learn)}
    contenders = {"inference": infer, "training": learn}
    seconds = {kind: median(each) for kind, each in alternate(contenders, options.runs, device=device).items()}
    return {
        kind: {
            "gflops": gflops[kind],
            "seconds": taken,
            "gflops_per_second": gflops[kind] / taken,
            "batch": kinds[kind],
        }
        for kind, taken in seconds.items()
    }


def operations(step: Callable[[], None]) -> float:
    """Return the GFLOP of one training step, counted while it runs; attention as its matrix products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return counter.get_total_flops() / 1e9
