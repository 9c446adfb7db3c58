"""Time two or more things fairly, and keep what was measured."""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results.jsonl"


def alternate(contenders: dict[str, Callable[[], object]], runs: int, warmup: int = 1) -> dict[str, list[float]]:
    """Run the contenders in turn, A B A B …, so that a machine that slows down slows all of them; return seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in range(-warmup, runs):
        for name, work in contenders.items():
            started = time.perf_counter()
            work()
            if run >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def processor() -> str:
    """Return the processor's name."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()


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
        "versions": {name: version(name) for name in libraries},
    }


def report(benchmark: str, seconds: dict[str, list[float]], mine: str, settings: dict) -> None:
    """Print medians and ratios to ours, and append one JSON line to results.jsonl."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{benchmark} ({', '.join(f'{k} {v}' for k, v in settings.items())})")
    for name, median in medians.items():
        low, high = min(seconds[name]), max(seconds[name])
        print(f"  {name:28} {median:8.3f} s ({low:.3f} … {high:.3f}), {median / medians[mine]:.2f} × lucidetr's time")
    line = provenance(benchmark, ("lucidetr", "torch", "transformers"))
    line |= {"threads": torch.get_num_threads(), "settings": settings, "seconds": seconds}
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
