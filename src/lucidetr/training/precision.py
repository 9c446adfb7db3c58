"""Which machine and which number format: chosen once, said in the log."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from lucidetr.errors import InputError, did_you_mean

PRECISIONS = ("auto", "bf16", "fp32", "fp64")


def choose_device(name: str | torch.device) -> torch.device:
    """Return the device of that name; auto takes CUDA, then Apple's MPS, then the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(
            f"--device {name} cannot be used here: {str(error).splitlines()[0]}; try auto or cpu"
        ) from None
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """Return bf16, fp32 or fp64; auto takes bf16 only where the hardware multiplies it.

    A CPU that does not multiply bf16 computes it far slower than fp32. An unknown word is an InputError, and so is fp64
    on MPS, which has none.
    """
    if name not in PRECISIONS:
        raise InputError(f"unknown precision {name}: {did_you_mean(name, PRECISIONS)}")
    if name == "fp64" and device.type == "mps":
        raise InputError("--precision fp64: mps computes no float64; choose fp32, or --device cpu")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return "bf16" if fast else "fp32"
    return "fp32"


def autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Return what to open around a forward pass."""
    if precision == "bf16":
        return partial(torch.autocast, device.type, dtype=torch.bfloat16)  # no lambda: a Detector can be pickled
    return nullcontext
