"""What a run writes down: its config, command and machine, one JSON line per report, TensorBoard events."""

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from lucidetr.config import ModelConfig, TrainConfig
from lucidetr.conversion.read import read_json
from lucidetr.data.annotations import Annotations
from lucidetr.data.dataset import Dataset
from lucidetr.errors import InputError
from lucidetr.fields import difference, from_dict, to_dict
from lucidetr.training.checkpoint import has_card, training_checkpoints, write_atomically

FREE_ON_RESUME = {
    "resume",
    "out",
    "device",
    "workers",
    "cache_gb",
    "save_minutes",
    "timeout_minutes",
    "preflight",
    "replay",
    "micro_batch",
    "recompute",
    "bad_pictures",
}
FIRST_SAVE = "first-save"  # stands in the folder while a run's first models are there and its first checkpoint is not
LIBRARIES = ("torch", "torchvision", "numpy", "scipy", "safetensors", "faster-coco-eval")


def prepare_folder(folder: Path, config: TrainConfig) -> bool:
    """Make the run's folder, check that it can be written, and say whether there is something to resume.

    A run that has saved something is left alone unless it is resumed, and resumed only with the settings that it
    began with; what does not change its course may differ. One whose checkpoints were deleted cannot go on.
    """
    resumes = bool(training_checkpoints(folder / "checkpoints"))
    holds = resumes or has_card(folder)
    if holds and not config.resume:
        raise InputError(f"{folder} holds a run already: add --resume to go on with it, or choose another --out")
    if holds and not resumes and not (folder / FIRST_SAVE).is_file():  # not one that was killed in its first save
        raise InputError(
            f"{folder} holds a model but no checkpoint to go on from: choose another --out, "
            f"or start from it by --weights {folder}"
        )
    if holds:
        began = from_dict(TrainConfig, read_json(folder / "config.json"))
        changed = {k: v for k, v in difference(config, began).items() if k not in FREE_ON_RESUME}
        if changed:
            listed = ", ".join(f"{name} {now!r} (was {then!r})" for name, (now, then) in changed.items())
            raise InputError(f"{folder} began with other settings: {listed}; repeat them, or choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{platform.node()}.{os.getpid()}"  # its own for each of many processes
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from None
    return resumes


def as_it_began(folder: Path, config: TrainConfig) -> TrainConfig:
    """Return the config that the run in this folder was trained as; only what may differ is taken from `config`.

    The same --micro-batch as before stays what it came to: 0 is not measured again, one larger than the batch was cut.
    """
    began, asked_before = trained_as(folder), from_dict(TrainConfig, read_json(folder / "config.json"))
    free = {name: getattr(config, name) for name in FREE_ON_RESUME}
    if config.micro_batch == asked_before.micro_batch:
        free["micro_batch"] = began.micro_batch
    return replace(began, **free | {"micro_batch": min(free["micro_batch"], began.batch)})


def asked_of(folder: Path) -> TrainConfig | None:
    """Return the config that was asked of the run in this folder when it began; None where the folder holds no run."""
    file = folder / "config.json"
    return from_dict(TrainConfig, read_json(file)) if file.is_file() else None


def trained_as(folder: Path) -> TrainConfig:
    """Return the config that the run in this folder was trained as."""
    return from_dict(TrainConfig, last_start(folder)["trained_as"])


def last_start(folder: Path) -> dict[str, Any]:
    """Return how the run in this folder was started the last time, as `describe_run` says it."""
    file = folder / "run.json"
    starts = read_json(file, list)
    if not starts or not isinstance(starts[-1], dict) or "trained_as" not in starts[-1]:
        raise InputError(
            f"{file}: damaged: it does not say how the run was started; start anew: another --out, with "
            f"--weights {folder}"
        )
    return starts[-1]


def describe_data(train: Dataset, val: Dataset) -> dict[str, Any]:
    """Return what a resumed run must find again: the categories in their order, the images, and what is on them.

    The contents stand for ids, names and sizes of the images and for their objects, in their order; not for pixels.
    Generated scenes are those that --data names: another kind of processor may round one of their boxes otherwise.
    """
    categories = train.annotations.categories
    listed = [[int(key), name] for key, name in zip(categories.ids, categories.names, strict=True)]
    numbers = {"training_images": len(train), "validation_images": len(val)}
    return {
        "categories": listed,
        **numbers,
        "contents": digest(*(each.annotations for each in (train, val) if each.stored)),
    }


def digest(*splits: Annotations) -> str:
    """Return the SHA-256 of what some splits say of their images."""
    found = hashlib.sha256()
    for each in splits:
        for values in (each.image_ids, each.sizes, each.starts, each.boxes_xywh, each.labels, each.crowd):
            found.update(values.tobytes())
        found.update("\0".join(map(str, each.file_names)).encode("utf-8", "surrogateescape"))
    return found.hexdigest()


def check_data(folder: Path, train: Dataset, val: Dataset) -> None:
    """Refuse to resume on other data than the run was on last; a run from before this was noted passes."""
    now = describe_data(train, val)
    began = last_start(folder).get("data", now)
    anew = f"or start anew: another --out, with --weights {folder}"
    for number, (was, found) in enumerate(zip_longest(began["categories"], now["categories"]), start=1):
        if was != found:
            raise InputError(
                f"{folder} began with other categories: number {number} is {_category(found)}, was {_category(was)} "
                f"({len(now['categories'])} now, {len(began['categories'])} then); put the old ones back, {anew}"
            )
    for name in ("training_images", "validation_images"):
        if began[name] != now[name]:
            raise InputError(
                f"{folder} began with {began[name]} {name.replace('_', ' ')}, now there are {now[name]}: "
                f"it could not go on as it would have; put the old images back, {anew}"
            )
    if began.get("contents", now["contents"]) != now["contents"]:
        raise InputError(
            f"{folder} began with as many images, but their names, sizes, order or objects were others; it could not "
            f"go on as it would have: put the old files back, {anew}"
        )


def _category(entry: list | None) -> str:
    """Return a category in words."""
    return f"{entry[1]!r} (id {entry[0]})" if entry else "none"


def processor() -> str:
    """Return how many processors of which name this machine has."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor() or platform.machine()


def describe_run(config: TrainConfig, device: torch.device, precision: str, ranks: int = 1) -> dict[str, Any]:
    """Return how this run was started, by which code, on what machine."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["lucidetr", *sys.argv[1:]],
        "trained_as": to_dict(config),
        "commit": _commit(),
        "versions": {"lucidetr": version("lucidetr"), **{name: version(name) for name in LIBRARIES}},
        "python": platform.python_version(),
        "machine": processor(),
        "system": platform.system(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "precision": precision,
    }


def _commit() -> str | None:
    """Return the git commit of this code, None where it is installed, whosever repository that may be in."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True)  # noqa: S603
        command = [*git, "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None


class RunLog:
    """Append one line of numbers at a time to metrics.jsonl and to TensorBoard's event file.

    The event file is for the eye alone: where it cannot be written, the run says so once and goes on without it.
    """

    def __init__(
        self,
        folder: Path,
        asked: TrainConfig,
        rows: Sequence[str],
        description: dict[str, Any],
        step: int,
        owes: bool = False,
    ):
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.rows = folder / "metrics.jsonl", rows
        starts = read_json(folder / "run.json", list) if (folder / "run.json").is_file() else []
        write_atomically(folder / "run.json", json.dumps([*starts, description], indent=2).encode())
        write_atomically(folder / "config.json", json.dumps(to_dict(asked), indent=2).encode())
        drop_lines_after(self.path, step, owes)
        self.board: SummaryWriter | None = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line; numbers go to TensorBoard too, lists by their rows."""
        append_line(self.path, {"step": step} | values)
        with self.board_may_fail():
            for name, number in flat(values, self.rows):
                if self.board:
                    self.board.add_scalar(name, number, step)

    @contextmanager
    def board_may_fail(self) -> Iterator[None]:
        """Go on without TensorBoard's file, if there is one still, once it cannot be written."""
        try:
            yield
        except OSError as error:
            self.board = None
            warnings.warn(f"TensorBoard's file cannot be written any more ({error.strerror})", stacklevel=3)

    def sync(self) -> None:
        """Have the disk keep what was written so far, as it keeps the checkpoint that speaks of it."""
        if self.path.is_file():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Finish the event file."""
        with self.board_may_fail():
            if self.board:
                self.board.close()


def row_names(config: ModelConfig) -> list[str]:
    """Return what each row of Predictions is in training: proposals, then the layers; hints and groups side by side.

    >>> from lucidetr.recipes import recipe
    >>> row_names(recipe("lucid-xs").model)
    ['proposals', 'layer 1', 'layer 2']
    >>> row_names(ModelConfig(decoder_layers=2, query_groups=2))
    ['layer 1', 'layer 1 group 2', 'layer 2', 'layer 2 group 2']
    """
    groups = ["", *(f" group {group + 1}" for group in range(1, config.query_groups))]
    proposals = [f"proposals{group}" for group in groups] if config.selects else []
    beside = [" hints"] if config.denoising else []
    return proposals + [
        f"layer {layer + 1}{each}" for layer in range(config.decoder_layers) for each in beside + groups
    ]


def flat(values: dict[str, Any], rows: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Yield all numbers by name, those of a list by the row of the predictions that each is of.

    >>> list(flat({"loss": 3.0, "giou": [0.2, 0.1], "stall": "nothing is learned"}, ["proposals", "layer 1"]))
    [('loss', 3.0), ('giou/proposals', 0.2), ('giou/layer_1', 0.1)]
    """
    for name, value in values.items():
        if isinstance(value, (int, float)):
            yield name, value
        elif isinstance(value, list):
            yield from ((f"{name}/{row.replace(' ', '_')}", each) for row, each in zip(rows, value, strict=True))


class NoLog:
    """Stand in for `RunLog` where another process writes."""

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write nothing."""

    def sync(self) -> None:
        """Keep nothing."""

    def close(self) -> None:
        """Close nothing."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    return read_lines(folder / "metrics.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file that a run appends to, oldest first; none where there is no such file.

    A killed run can leave half a last line, a power cut zeros among the last ones: such lines say nothing.
    """
    if not path.is_file():
        return []
    *whole, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [line for line in map(_line, whole) if line is not None]


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append a line to a file of a run; a full disk is an InputError."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); free some space, then --resume") from None


def _line(text: str) -> dict[str, Any] | None:
    """Return what a line says, None where it cannot be read."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def drop_lines_after(path: Path, step: int, owes: bool = False) -> None:
    """Drop the lines of later steps, and half a last one: those steps were not saved and are about to be done again.

    So is the evaluation of the last step where the run still `owes` it.
    """
    if path.is_file():
        lines = [line for line in read_lines(path) if line.get("step", math.inf) <= step]
        kept = [line for line in lines if not (owes and line["step"] == step and {"val/AP", "stall"} & line.keys())]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
