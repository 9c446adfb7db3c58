"""Weights and training state on disk: safetensors with a JSON card inside, written whole or not at all.

RUN/best.safetensors and RUN/last.safetensors are models to use: weights, and the card that says how to build them. The
card begins with the file's own SHA-256, computed with zeros in its place, so that damage is noticed wherever it is.
RUN/checkpoints/step-N.safetensors hold everything needed to go on with step N + 1, and nothing else needs them.
Each has a manifest beside it, step-N.json, written last: without one, the save was not finished.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lucidetr.config import CARD_SCHEMA, ModelCard
from lucidetr.errors import InputError
from lucidetr.evaluation.thresholds import BEST, thresholds_file
from lucidetr.fields import from_dict, to_dict

MODEL_FILES = (BEST, "last.safetensors")  # in the order of preference
KEPT = 2  # training checkpoints
BEFORE = "-owed"  # ends the name of one whose step is yet to be evaluated
TRANSIENT = (errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT)  # a network drive may do better a moment later
PAUSE = 1.0  # seconds
CONVERT = "turn other weights into a model by lucidetr convert"
UNSEALED = "0" * 64  # where a model's SHA-256 will stand


def packed(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return the bytes of a safetensors file."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)


def write_atomically(path: Path, content: bytes) -> None:
    """Write bytes to a temporary file, flush them to the disk, rename, flush the folder; tell a failure in plain words.

    What cannot fit is not begun. A fault that may pass is tried once more.
    """
    try:
        try:
            _write(path, content)
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            time.sleep(PAUSE)
            _write(path, content)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}): {len(content):,} bytes are needed{_room(path.parent)}; "
            "free some space or choose another folder. What was saved before is unharmed"
        ) from None


def _write(path: Path, content: bytes) -> None:
    """Write a file so that at every moment, power cuts included, the old or the new one is whole in its place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            _flush_folder(path.parent.parent)
        if (free := free_bytes(path.parent)) is not None and free < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open(temporary, "wb") as file:
            if file.write(content) != len(content):
                raise OSError(errno.EIO, "only a part was written")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError:
        with suppress(OSError):  # where the folder itself is none, there is nothing to tidy
            temporary.unlink()
        raise


def _flush_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk: without it, a power cut can undo a rename."""
    if os.name != "posix":
        return  # Windows cannot open a folder
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network drives know no such call
            raise
    finally:
        os.close(handle)


def free_bytes(folder: Path) -> int | None:
    """Return the free space on a folder's disk, None where the disk does not say."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None


def _room(folder: Path) -> str:
    free = free_bytes(folder)
    return "" if free is None else f", {free:,} are free"


def save_model(path: Path, state: dict[str, Tensor], card: ModelCard) -> None:
    """Write a model: its weights, its card inside, and a copy of the card beside it to be read by people."""
    thresholds_file(path).unlink(missing_ok=True)  # those of the model that was here before
    values = to_dict(card)
    content = packed(state, {"card": json.dumps({"sha256": UNSEALED} | values, indent=2)})
    seal = hashlib.sha256(content).hexdigest()
    write_atomically(path, content.replace(UNSEALED.encode(), seal.encode(), 1))
    write_atomically(path.with_suffix(".json"), json.dumps(values, indent=2).encode())
    _remove_leftovers(path.parent, f".{path.stem}.")


def has_card(path: Path) -> bool:
    """Say whether this is a model of ours: a run's folder, or a safetensors file with a card inside."""
    if path.is_dir():
        return any((path / name).is_file() for name in MODEL_FILES)
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return "card" in (file.metadata() or {})
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); get the file anew") from None


def load_model(path: Path) -> tuple[dict[str, Tensor], ModelCard]:
    """Read a model's weights and card; `path` is the file, or a run's folder whose best (else last) model counts.

    A file that is not what was written is an InputError; files from before there were seals load unchecked.
    """
    if path.is_dir():
        found = [path / name for name in MODEL_FILES if (path / name).is_file()]
        if not found:
            fix = CONVERT if (path / "model.safetensors").is_file() else "has this run been trained?"
            raise InputError(f"{path}: no best.safetensors or last.safetensors in it; {fix}")
        path = found[0]
    tensors, metadata = load_tensors(path)
    if "card" not in metadata:
        raise InputError(f"{path}: these weights carry no lucidetr card; {CONVERT}")
    return tensors, read_card(path, metadata["card"])


def read_card(path: Path, text: str) -> ModelCard:
    """Return the card that a model file carries as JSON; one that cannot be read or used is an InputError."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its card is not readable JSON ({type(error).__name__}); get the file anew") from None
    if isinstance(values, dict) and "sha256" in values:
        check_seal(path, str(values.pop("sha256")))
    schema = values.get("schema", 0) if isinstance(values, dict) else None
    if type(schema) is not int:
        raise InputError(f"{path}: its card is no card of ours (schema {str(schema)[:50]}); get the file anew")
    if schema > CARD_SCHEMA:
        raise InputError(f"{path}: written by a newer lucidetr (schema {schema}); upgrade to read it")
    try:
        return from_dict(ModelCard, values)
    except (InputError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: its card cannot be used: {error}") from None


def check_seal(path: Path, seal: str) -> None:
    """Compare a model file with the SHA-256 that its card begins with."""
    content = path.read_bytes()
    at, whole = content.find(seal.encode()), memoryview(content)  # a view's slices are no copies
    digest = hashlib.sha256(whole[:at])
    digest.update(UNSEALED.encode())
    digest.update(whole[at + len(UNSEALED) :])
    if digest.hexdigest() != seal:
        raise InputError(f"{path}: damaged: its SHA-256 is not the one that its card names; get the file anew")


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors and the metadata of a safetensors file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        fix = "get the file anew" if path.suffix == ".safetensors" else CONVERT
        raise InputError(f"{path}: not a readable safetensors file ({error}); {fix}") from None


def save_training(
    folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], before_evaluation: bool = False
) -> None:
    """Write a training checkpoint, then its manifest; only then remove all but the newest few.

    A step whose evaluation was cut short is saved `before_evaluation`, and once more when that is made up for: under
    another name, for while one file takes another's place it is not what its manifest says.

    The one just written always stays. Of the others those with a manifest go before those without, then the
    higher step counts: after a damaged checkpoint was passed over, higher steps can be worth less.
    """
    path = folder / f"step-{step:08d}{BEFORE if before_evaluation else ''}.safetensors"
    content = packed(tensors, {"state": json.dumps(state)})
    manifest = _manifest(path, len(content), hashlib.sha256(content).hexdigest())
    write_atomically(path, content)
    write_atomically(path.with_suffix(".json"), json.dumps(manifest).encode())
    others = [(file.with_suffix(".json").is_file(), number, file) for number, file in training_checkpoints(folder)]
    for *_, old in sorted(each for each in others if each[-1] != path)[: -(KEPT - 1)]:
        for file in (old.with_suffix(".json"), old):  # its manifest first: half removed, it no longer counts
            with suppress(OSError):  # what was to be saved is saved; the next save tries again
                file.unlink(missing_ok=True)
    _remove_leftovers(folder, ".step-")


def _remove_leftovers(folder: Path, start: str) -> None:
    """Remove the temporary files that killed processes have left."""
    for file in folder.iterdir():
        if file.name.startswith(start) and file.suffix == ".tmp":
            with suppress(OSError):
                file.unlink()


def _manifest(path: Path, length: int, digest: str) -> dict[str, Any]:
    """Return what a checkpoint's manifest says: whose it is, and what the file holds."""
    return {"schema": 1, "file": path.name, "bytes": length, "sha256": digest}


def check_training(path: Path) -> None:
    """Compare a training checkpoint with its manifest; any difference is an InputError that names the file.

    One without a manifest passes where no checkpoint of the folder has one: it was written before there were
    manifests, or is the first of a run, killed between the two. Otherwise it was not finished, and is refused.
    """
    written = path.with_suffix(".json")
    if not written.is_file():
        if any(file.with_suffix(".json").is_file() for _, file in training_checkpoints(path.parent)):
            raise InputError(f"{path}: it has no manifest {written.name}: its save was not finished")
        return
    if not path.is_file():
        raise InputError(f"{path}: it is missing, though its manifest {written.name} is there")
    try:
        said = json.loads(written.read_bytes())
        with open(path, "rb") as file:
            found = _manifest(path, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: it or its manifest {written.name} cannot be read ({error})") from None
    if said != found:
        fields = [key for key in found if not isinstance(said, dict) or said.get(key) != found[key]]
        differ = f"{', '.join(fields) or 'fields'} differ"
        raise InputError(f"{path}: it is not what its manifest {written.name} says: {differ}")


def training_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, file) of the training checkpoints in a folder; a manifest alone counts, its file may be missing."""
    kinds = ("step-*.safetensors", "step-*.json")
    files = {file.with_suffix(".safetensors") for kind in kinds for file in folder.glob(kind)}
    found = ((re.fullmatch(rf"step-(\d+)(?:{BEFORE})?", file.stem), file) for file in files)
    return [(int(match[1]), file) for match, file in found if match]


def newest_step(folder: Path) -> int:
    """Return the step of a run's newest training checkpoint, readable or not; 0 where there is none."""
    return max((step for step, _ in training_checkpoints(folder / "checkpoints")), default=0)


def _how_far(checkpoint: tuple[int, Path]) -> tuple[int, bool]:
    """Return what orders checkpoints: the step, and whether it was evaluated."""
    step, file = checkpoint
    return step, not file.stem.endswith(BEFORE)


def load_newest_training(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Read the sound training checkpoint of the highest step number; the notes name those passed over.

    Of two of one step that of after its evaluation counts.

    The clock is never asked: copied files have any date.
    """
    notes: list[str] = []
    for _, path in sorted(training_checkpoints(folder), key=_how_far, reverse=True):
        try:
            check_training(path)
            tensors, metadata = load_tensors(path)
            state = json.loads(metadata["state"])
        except (InputError, KeyError, ValueError, RecursionError) as error:
            place = "" if str(path) in str(error) else f"{path}: "
            notes.append(f"passed over a damaged checkpoint: {place}{error}")
            continue
        if not path.with_suffix(".json").is_file():
            notes.append(f"{path} has no manifest: whether it is what was written cannot be checked")
        return tensors, state, notes
    raise InputError(f"{folder}: no checkpoint in it can be read: {'; '.join(notes)}")


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's moments under names such as optimiser.3.exp_avg."""
    states = optimiser.state_dict()["state"]
    return {f"optimiser.{i}.{name}": value for i, state in states.items() for name, value in state.items()}


def load_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimiser its moments back, each laid out in memory as its parameter is.

    The fused step walks through memory without looking at strides: moments in another order than their
    channels-last parameter would silently be those of other weights.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".")
            parameter = parameters[int(index)]
            same_shape = value.shape == parameter.shape
            moments = torch.empty_like(parameter).copy_(value) if same_shape else value
            state.setdefault(int(index), {})[key] = moments
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
