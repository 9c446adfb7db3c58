"""What a run writes down: its config, command and machine, one JSON line per report, TensorBoard events."""

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lucidetr.config import TrainConfig, to_dict
from lucidetr.errors import InputError
from lucidetr.training.checkpoint import write_atomically

LIBRARIES = ("torch", "torchvision", "numpy", "scipy", "safetensors", "faster-coco-eval")


def prepare_folder(folder: Path, resume: bool) -> None:
    """Make the run's folder and check that it can be written; a run that is already there is left alone."""
    if (folder / "config.json").exists() and not resume:
        raise InputError(f"{folder} holds a run already: add --resume to go on with it, or choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from None


def describe_run(config: TrainConfig, device: torch.device, precision: str) -> dict[str, Any]:
    """Return how this run was started, by which code, on what machine."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["lucidetr", *sys.argv[1:]],
        "config": to_dict(config),
        "commit": _commit(),
        "versions": {"lucidetr": version("lucidetr"), **{name: version(name) for name in LIBRARIES}},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "precision": precision,
    }


def _commit() -> str | None:
    """Return the git commit of this code, None where it is installed without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None


class RunLog:
    """Append one line of numbers at a time to metrics.jsonl and to TensorBoard's event file."""

    def __init__(self, folder: Path, description: dict[str, Any], keep_until: int | None):
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        if keep_until is None:
            write_atomically(folder / "config.json", json.dumps(description["config"], indent=2).encode())
            write_atomically(folder / "run.json", json.dumps([description], indent=2).encode())
        else:
            starts = json.loads((folder / "run.json").read_text())
            write_atomically(folder / "run.json", json.dumps([*starts, description], indent=2).encode())
            self._forget_after(keep_until)
        self.board = SummaryWriter(str(folder), purge_step=keep_until)

    def _forget_after(self, step: int) -> None:
        """Drop the lines of steps that were not saved: they are about to be done again."""
        lines = read_metrics(self.path.parent)
        kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= step]
        write_atomically(self.path, "".join(kept).encode())

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line; numbers go to TensorBoard too, lists by their index."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(name, value, step)
            elif isinstance(value, list):
                for layer, each in enumerate(value, start=1):
                    self.board.add_scalar(f"{name}/layer_{layer}", each, step)

    def close(self) -> None:
        """Finish the event file."""
        self.board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
