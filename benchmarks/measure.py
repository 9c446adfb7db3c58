"""Time two or more things fairly, and keep what was measured."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro

from lucidetr.errors import InputError, did_you_mean
from lucidetr.training.precision import choose_precision
from lucidetr.training.run_log import processor

RESULTS = Path(__file__).parent / "results.jsonl"
CPU = torch.device("cpu")
LIBRARIES = ("lucidetr", "torch", "torchvision", "transformers")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Threads:
    """Hold what every benchmark that computes can be told."""

    threads: int = 0
    """0: as many as torch takes by itself."""


@dataclass(frozen=True)
class Place(Threads):
    """Hold what a benchmark can be told that computes where it is told to."""

    device: str = "auto"


@dataclass(frozen=True)
class Common(Place):
    """Hold what a benchmark can be told that takes medians."""

    runs: int = 5
    """Timed runs of each contender, after one that warms up."""


Options = TypeVar("Options", bound=Threads)


def read_options(kind: type[Options], arguments: Sequence[str] | None, name: str) -> Options:
    """Return the options of a benchmark from its command line; the number of threads is set at once."""
    options = tyro.cli(kind, args=arguments or [], prog=f"python -m benchmarks {name}")
    if options.threads < 0:
        raise InputError(f"--threads {options.threads}: choose 0 for as many as torch takes, or a number above it")
    if isinstance(options, Common) and options.runs < 1:
        raise InputError(f"--runs {options.runs}: choose a number above 0")
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was given, so that a clock shows it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(work: Callable[[], object], device: torch.device = CPU) -> float:
    """Return how long work takes, everything that it gave to the device included."""
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def alternate(
    contenders: dict[str, Callable[[], object]], runs: int, warmup: int = 1, device: torch.device = CPU
) -> dict[str, list[float]]:
    """Run the contenders in turn, A B A B …, so that a machine that slows down slows all of them; return seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in range(-warmup, runs):
        for name, work in contenders.items():
            taken = seconds_of(work, device)
            if run >= 0:
                seconds[name].append(taken)
    return seconds


def measurable(precisions: str, device: torch.device) -> list[str]:
    """Return the precisions to measure; bf16 is left out, and said to be, where the hardware does not multiply it.

    Asked for alone it is measured all the same.
    """
    asked = [word.strip() for word in precisions.split(",")]
    for word in asked:
        if word not in PRECISIONS:
            raise InputError(f"--precisions {precisions}: unknown precision {word}: {did_you_mean(word, PRECISIONS)}")
    if "bf16" in asked and asked != ["bf16"] and choose_precision("auto", device) != "bf16":
        print(f"bf16 is left out, because {device} here does not multiply it; --precisions bf16 asks for it alone")
        asked.remove("bf16")
    return asked


def provenance(benchmark: str, libraries: Sequence[str]) -> dict[str, Any]:
    """Return what every line of results begins with: what was run when, by which code, on what machine."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        "benchmark": benchmark,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.orig_argv[1:]),
        "commit": commit.stdout.strip(),
        "machine": processor(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "versions": {name: version(name) for name in libraries},
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """Return what computed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "threads": torch.get_num_threads()}


def note(benchmark: str, settings: dict[str, Any], measured: dict[str, Any], device: torch.device = CPU) -> None:
    """Append one JSON line to results.jsonl: what was run when, by which code, on what, and what was measured."""
    libraries = [name for name in LIBRARIES if find_spec(name)]
    line = provenance(benchmark, libraries) | hardware(device) | {"settings": settings} | measured
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def report(
    benchmark: str,
    seconds: dict[str, list[float]],
    mine: str,
    settings: dict[str, Any],
    device: torch.device = CPU,
    more: dict[str, Any] | None = None,
) -> None:
    """Print medians and ratios to ours, and append one JSON line with them and whatever `more` was measured."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{benchmark} ({', '.join(f'{k} {v}' for k, v in settings.items())})")
    for name, median in medians.items():
        low, high = min(seconds[name]), max(seconds[name])
        ratio = f", {median / medians[mine]:.2f} × the time of {mine}" if mine in medians else ""
        print(f"  {name:28} {median:8.3f} s ({low:.3f} … {high:.3f}){ratio}", flush=True)
    note(benchmark, settings, {"seconds": seconds} | (more or {}), device)
