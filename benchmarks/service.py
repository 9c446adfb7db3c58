"""The service under load: below its capacity, the same among slow clients, at four times as much, and just after.

Requests come at their own pace (open loop), from another process, and their time counts from when they were due.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measure import Place, note, read_options
from benchmarks.open_loop import Line
from lucidetr.categories import Categories
from lucidetr.config import ModelCard
from lucidetr.data.dataset import open_dataset
from lucidetr.models.detr import DETR
from lucidetr.recipes import recipe
from lucidetr.training.checkpoint import save_model
from lucidetr.training.precision import choose_device

BELOW, ABOVE = 0.8, 4.0  # of capacity
SETTLED = 2.0  # times the usual time of an answer
SLOW, SLOW_SECONDS = 500, 5.0  # clients that never finish what they say, and how long the service lets them


@dataclass(frozen=True)
class Options(Place):
    """Start a service of untrained weights, find out what it can do, and ask for less and for more."""

    seconds: float = 60.0
    """Of each load; capacity, before and after, and recovery take a quarter each."""
    recipe: str = "lucid-xs"
    side: int = 320
    """Of the picture, in pixels."""
    queue: int = 16
    batch: int = 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and append one line to results.jsonl."""
    options = read_options(Options, arguments, "service")
    device = choose_device(options.device)
    with tempfile.TemporaryDirectory() as temporary:
        run, picture = Path(temporary) / "model.safetensors", Path(temporary) / "picture.png"
        save_untrained(run, options.recipe)
        scene = open_dataset(f"generated:digits?size={options.side}&train=1&val=1", "val").image(0)
        Image.fromarray(np.ascontiguousarray(scene.permute(1, 2, 0).numpy())).save(picture)
        measured = under_load(run, picture, options)
    settings = {name: getattr(options, name) for name in ("recipe", "side", "queue", "batch", "seconds")}
    print(f"service ({', '.join(f'{name} {value}' for name, value in settings.items())})")
    for name, value in measured.items():
        print(f"  {name:16} {value}")
    libraries = {"server": {name: version(name) for name in ("starlette", "uvicorn")}}
    note("service", settings, measured | libraries, device)


def save_untrained(path: Path, name: str) -> None:
    """Write a recipe's model as it starts."""
    config = recipe(name)
    numbers = range(config.model.num_classes)
    card = ModelCard(config.model, config.images, Categories(tuple(numbers), tuple(map(str, numbers))), name)
    save_model(path, DETR(config.model).state_dict(), card)


def under_load(run: Path, picture: Path, options: Options) -> dict[str, Any]:
    """Start the service, load it, stop it; return what was measured."""
    command = [sys.executable, "-m", "lucidetr", "serve", str(run), "--port", "0"]
    command += ["--device", options.device, "--queue", str(options.queue), "--batch", str(options.batch)]
    threads = {"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | threads) as service:
        try:
            assert service.stdout is not None
            host, port = service.stdout.readline().split()[0].removeprefix("http://").split(":")
            ask = [sys.executable, "-m", "benchmarks.open_loop", host, port, str(picture)]
            seconds, quarter = options.seconds, options.seconds / 4
            loaded(ask, "clients", (options.queue, 2.0))
            # as many as may wait: while some are looked at, enough others are there for the next batch
            capacity = len(answered(loaded(ask, "clients", (options.queue, quarter)))) / quarter
            below = loaded(ask, "rates", (BELOW * capacity, seconds))
            lines = loaded(ask, "rates", (ABOVE * capacity, seconds), (BELOW * capacity, quarter))
            capacity_after = len(answered(loaded(ask, "clients", (options.queue, quarter)))) / quarter
            among_slow, closed = among_slow_clients(ask, host, int(port), (BELOW * capacity, SLOW_SECONDS))
        finally:
            service.terminate()
    above, after = ([line for line in lines if (line[0] < seconds) == early] for early in (True, False))
    usual = float(np.median(answered(below)))
    again = [due + each - seconds for due, each, status in after if status == 200 and each < SETTLED * usual]
    return {
        "capacity": capacity,
        "capacity_after": capacity_after,  # where it is another, the machine was
        "below": summary(below, BELOW * capacity * seconds),
        "above": summary(above, capacity * seconds),
        "recovery_seconds": min(again, default=None),
        "among_slow": summary(among_slow, BELOW * capacity * SLOW_SECONDS)
        | {"slow": SLOW, "slow_closed_after": closed},
        "exit_status": service.returncode,
    }


def among_slow_clients(ask: list[str], host: str, port: int, phase: tuple[float, float]) -> tuple[list[Line], float]:
    """Run the client while many others begin a request and never end it; return when the last of them was closed."""
    started = time.monotonic()
    slow = [socket.create_connection((host, port)) for _ in range(SLOW)]
    for each in slow:
        each.sendall(b"POST /predict HTTP/1.1\r\nHost")
    with ThreadPoolExecutor(1) as pool:
        lines = pool.submit(loaded, ask, "rates", phase)
        for each in slow:
            with closing(each), suppress(ConnectionError):
                assert each.recv(1) == b"", "a request without an end was answered"
        closed = time.monotonic() - started
        return lines.result(), closed


def loaded(ask: list[str], way: str, *phases: tuple[float, float]) -> list[Line]:
    """Run the client, and return its requests one by one."""
    command = [*ask, way, *(f"{number}x{seconds}" for number, seconds in phases)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [tuple(line) for line in json.loads(done.stdout)]


def answered(lines: list[Line], status: int = 200) -> list[float]:
    """Return how long each answer of a status took: 200 detections, 503 a refusal."""
    return [each for _, each, said in lines if said == status]


def summary(lines: list[Line], possible: float) -> dict[str, Any]:
    """Return how much came through, as a share of what was possible, and how long answers and refusals took."""
    good, refused = answered(lines), answered(lines, 503)
    return {
        "asked": len(lines),
        "answered": len(good),
        "refused": len(refused),
        "lost": len(lines) - len(good) - len(refused),
        "goodput": len(good) / possible,
        "answer_p50": float(np.percentile(good, 50)),
        "answer_p99": float(np.percentile(good, 99)),
        "refusal_p99": float(np.percentile(refused, 99)) if refused else None,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
