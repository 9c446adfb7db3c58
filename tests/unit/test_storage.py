"""Checkpoints on a disk that fails: the old or the new one is always whole, and damage is found and named."""

import errno
import json
import os
import re
import shutil
import time
from collections import namedtuple
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from lucidetr.categories import Categories
from lucidetr.config import ImageConfig, ModelCard
from lucidetr.errors import InputError
from lucidetr.fields import to_dict
from lucidetr.recipes import recipe
from lucidetr.training import checkpoint
from lucidetr.training.checkpoint import (
    check_training,
    load_model,
    load_newest_training,
    packed,
    save_model,
    save_training,
    training_checkpoints,
    write_atomically,
)

Usage = namedtuple("Usage", "total used free")
PLENTY = Usage(10**12, 0, 10**12)
SIZE = 64


def save(folder: Path, step: int) -> None:
    save_training(folder, step, {"a": torch.full((SIZE,), float(step)), "b": torch.arange(step)}, {"step": step})


def loaded(folder: Path) -> int:
    """Return the step of the checkpoint that loads, having seen that none of it is another's."""
    tensors, state, _ = load_newest_training(folder)
    step = state["step"]
    assert torch.equal(tensors["a"], torch.full((SIZE,), float(step)))
    assert torch.equal(tensors["b"], torch.arange(step))
    return step


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def lay_out(folder: Path, files: dict[str, bytes]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, each in files.items():
        (folder / name).write_bytes(each)
    return folder


class PowerCut(BaseException):
    """End the process, as nothing in it could expect."""


class Disk:
    """Stand between checkpoints and the disk: count every operation, and let the one of a number fail.

    At a power cut, half of what was written but not flushed is lost, and so are renames whose folder was not flushed.
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: int, fault: object, lasting: bool = False):
        self.at, self.fault, self.lasting = at, fault, lasting
        self.done: list[str] = []
        self.handles: dict[int, Path] = {}
        self.unflushed: set[Path] = set()
        self.renames: list[tuple[Path, Path, bytes | None]] = []
        self.real = {"open": os.open, "close": os.close, "replace": os.replace, "unlink": Path.unlink}
        patch.setattr(checkpoint, "open", self.open, raising=False)
        patch.setattr(checkpoint, "PAUSE", 0.0)
        patch.setattr(os, "open", self.open_folder)
        patch.setattr(os, "close", self.close_folder)
        patch.setattr(os, "fsync", self.flush)
        patch.setattr(os, "replace", self.rename)
        patch.setattr(shutil, "disk_usage", self.ask_room)
        mkdir, unlink = Path.mkdir, Path.unlink
        patch.setattr(Path, "mkdir", lambda path, **how: (self.hits("mkdir"), mkdir(path, **how)))
        patch.setattr(Path, "unlink", lambda path, **how: (self.hits("unlink"), unlink(path, **how)))

    def hits(self, what: str) -> bool:
        self.done.append(what)
        number = len(self.done) - 1
        if number != self.at and not (self.lasting and number > self.at):
            return False
        if self.fault is PowerCut:
            self.cut()
            raise PowerCut
        if isinstance(self.fault, int):
            raise OSError(self.fault, os.strerror(self.fault))
        return True

    def cut(self) -> None:
        for source, target, before in reversed(self.renames):
            self.real["replace"](target, source)
            if before is not None:
                target.write_bytes(before)
        for path in self.unflushed:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def open(self, path: Path, mode: str) -> "File":
        self.hits("open")
        return File(self, Path(path), mode)

    def open_folder(self, path, *flags):
        self.hits("open folder")
        handle = self.real["open"](path, *flags)
        self.handles[handle] = Path(path)
        return handle

    def close_folder(self, handle):
        self.real["close"](handle)
        self.handles.pop(handle, None)
        self.hits("close folder")

    def flush(self, handle):
        self.hits("fsync")
        path = self.handles[handle]
        self.unflushed.discard(path)
        self.renames = [each for each in self.renames if each[1].parent != path]

    def rename(self, source, target):
        self.hits("replace")
        before = target.read_bytes() if target.exists() else None
        self.real["replace"](source, target)
        self.renames.append((Path(source), Path(target), before))

    def ask_room(self, folder):
        self.hits("disk_usage")
        return PLENTY


class File:
    """A file opened for writing on a failing disk."""

    def __init__(self, disk: Disk, path: Path, mode: str):
        self.disk, self.path, self.file = disk, path, path.open(mode)
        disk.handles[self.file.fileno()] = path
        disk.unflushed.add(path)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.file.close()
        if kind is None:
            self.disk.hits("close")

    def write(self, data: bytes) -> int:
        short = self.disk.hits("write")
        written = self.file.write(data[: len(data) // 2] if short else data)
        self.file.flush()
        return len(data) if self.disk.fault == "lying write" else written

    def flush(self):
        self.disk.hits("flush")

    def fileno(self):
        return self.file.fileno()


FAULTS = {
    "full": (errno.ENOSPC, False),
    "full for good": (errno.ENOSPC, True),
    "faulty once": (errno.EIO, False),
    "faulty for good": (errno.EIO, True),
    "forbidden": (errno.EACCES, True),
    "short write": ("short write", False),
    "short writes": ("short write", True),
    "lying write": ("lying write", False),
    "power cut": (PowerCut, False),
}


@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_at_every_operation_of_a_save_leaves_the_old_or_the_new(tmp_path, name, before):
    """With no, one, or two checkpoints already there; afterwards a sound disk tidies up."""
    fault, lasting = FAULTS[name]
    folder = tmp_path / "checkpoints"
    for step in range(1, before + 1):
        save(folder, step)
    start, new, tried = content(folder) if before else {}, before + 1, 0
    for at in count():
        lay_out(folder, start)
        if not before:
            folder.rmdir()
        failed = False
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, at, fault, lasting)
            try:
                save(folder, new)
            except (InputError, PowerCut) as error:
                failed = True
                said = isinstance(error, PowerCut) or "step-0000000" in str(error)
                assert said, f"{error} after {disk.done}"
        if at >= len(disk.done):
            break
        tried += 1
        try:
            found = loaded(folder)
        except InputError:
            found = 0
        place = f"{name} at {at}, {disk.done[at]}"
        assert found in (before, new), place
        assert failed or found == new or fault == "lying write", place
        save(folder, new + 1)
        assert loaded(folder) == new + 1, place
        assert len(training_checkpoints(folder)) <= 2, place
        assert not [file for file in folder.iterdir() if file.suffix == ".tmp"], place
    assert tried >= 20
    assert {"open", "write", "fsync", "replace", "open folder"} <= set(disk.done)


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "lying write"])
def test_a_fault_at_every_operation_leaves_the_old_or_the_new_file(tmp_path, name):
    """Models, metrics and configs have no manifest and are written over: there, nothing else is allowed."""
    path, old, new = tmp_path / "best.json", b"old" * 100, b"new" * 200
    for at in count():
        lay_out(tmp_path, {path.name: old})
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, at, *FAULTS[name])
            with suppress(InputError, PowerCut):
                write_atomically(path, new)
        if at >= len(disk.done):
            break
        assert path.read_bytes() in (old, new), f"{name} at {at}, {disk.done[at]}"
    assert at >= 8
    assert path.read_bytes() == new


def flip(data: bytes, random: np.random.Generator) -> bytes:
    at, bit = int(random.integers(len(data))), int(random.integers(8))
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def cut(data: bytes, random: np.random.Generator) -> bytes:
    return data[: int(random.integers(len(data)))]


def lengthen(data: bytes, random: np.random.Generator) -> bytes:
    return data + random.bytes(int(random.integers(1, 100)))


def overwrite(data: bytes, random: np.random.Generator) -> bytes:
    """Lay a block over a part, as a disk does that mixes up its blocks."""
    at, size = int(random.integers(len(data))), int(random.integers(1, 512))
    block = random.bytes(size)[: len(data) - at]
    changed = data[:at] + block + data[at + len(block) :]
    return changed if changed != data else flip(data, random)


MUTATIONS = (flip, cut, lengthen, overwrite)


def damage(folder: Path, random: np.random.Generator) -> tuple[str, set[int]]:
    """Damage one checkpoint or both of steps 1 and 2; return how, and which."""
    one, other = (1, 2) if random.random() < 0.5 else (2, 1)
    end, far = (".safetensors", ".json") if random.random() < 0.5 else (".json", ".safetensors")
    mine, theirs = (folder / f"step-0000000{step}{end}" for step in (one, other))
    kind = int(random.integers(8))
    if kind < len(MUTATIONS):
        mine.write_bytes(MUTATIONS[kind](mine.read_bytes(), random))
        return f"{MUTATIONS[kind].__name__} {mine.name}", {one}
    if kind == 4:
        a, b = mine.read_bytes(), theirs.read_bytes()
        mine.write_bytes(b), theirs.write_bytes(a)
        return f"{end} exchanged", {1, 2}
    if kind == 5:
        mine.unlink()
        return f"{mine.name} missing", {one}
    mine.write_bytes(theirs.read_bytes())
    if kind == 6:
        return f"{mine.name} copied from the other", {one}
    mine.with_suffix(far).write_bytes(theirs.with_suffix(far).read_bytes())
    return f"both files of step {one} copied from the other", {one}


@pytest.mark.parametrize(
    ("seed", "number"), [(0, 100), pytest.param(1, 1000, marks=pytest.mark.slow)], ids=["100", "1000"]
)
def test_damaged_checkpoints_are_found_named_and_passed_over(tmp_path, seed, number):
    random = np.random.default_rng(seed)
    for step in (1, 2):
        save(tmp_path / "sound", step)
    sound, kinds = content(tmp_path / "sound"), set()
    for _ in range(number):
        folder = lay_out(tmp_path / "damaged", sound)
        what, damaged = damage(folder, random)
        kinds.add(what.split()[0])
        for step in (1, 2):
            path = folder / f"step-0000000{step}.safetensors"
            if step in damaged:
                with pytest.raises(InputError) as error:
                    check_training(path)
                assert str(path) in str(error.value), what
            else:
                check_training(path)
        if damaged == {1, 2}:
            with pytest.raises(InputError, match=r"no checkpoint in it can be read: .*step-00000002.*step-00000001"):
                load_newest_training(folder)
            continue
        assert loaded(folder) == 3 - max(damaged), what
        notes = load_newest_training(folder)[2]
        assert ["step-00000002.safetensors" in note for note in notes] == ([True] if 2 in damaged else []), what
    assert len(kinds) >= 7


MODEL, IMAGES = recipe("detr-xs").model, recipe("detr-xs").images
CARD = ModelCard(replace(MODEL, num_classes=2), IMAGES, Categories((3, 4), ("x", "y" * 64)), "detr-xs")


@pytest.mark.parametrize(
    ("seed", "number"), [(0, 500), pytest.param(1, 2000, marks=pytest.mark.slow)], ids=["500", "2000"]
)
def test_a_damaged_model_is_noticed_when_it_is_loaded(tmp_path, seed, number):
    """Header and tensors are about as long as each other."""
    path, random = tmp_path / "best.safetensors", np.random.default_rng(seed)
    tensors = {name: torch.randn(32, generator=torch.manual_seed(0)) for name in "abcdefgh"}
    save_model(path, tensors, CARD)
    state, card = load_model(path)
    assert card == CARD
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)
    sound = path.read_bytes()
    for _ in range(number):
        kind = MUTATIONS[int(random.integers(len(MUTATIONS)))]
        path.write_bytes(kind(sound, random))
        with pytest.raises(InputError, match=re.escape(str(path))):
            load_model(path)


def test_every_bit_of_a_tensor_counts_and_the_message_says_what_to_do(tmp_path):
    path = tmp_path / "best.safetensors"
    save_model(path, {"a": torch.ones(4)}, CARD)
    sound = path.read_bytes()
    for bit in range(8 * 16):
        damaged = bytearray(sound)
        damaged[-1 - bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"best\.safetensors: damaged: its SHA-256 .*; get the file anew"):
            load_model(tmp_path)


def test_models_from_before_there_were_seals_load(tmp_path):
    path = tmp_path / "old.safetensors"
    write_atomically(path, packed({"a": torch.ones(4)}, {"card": json.dumps(to_dict(CARD), indent=2)}))
    state, card = load_model(path)
    assert card == CARD
    assert torch.equal(state["a"], torch.ones(4))


def test_a_manifest_says_what_the_file_is(tmp_path):
    save(tmp_path, 7)
    path = tmp_path / "step-00000007.safetensors"
    said = json.loads((tmp_path / "step-00000007.json").read_text())
    assert said["file"] == path.name
    assert said["bytes"] == path.stat().st_size
    assert len(said["sha256"]) == 64
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(InputError, match=r"step-00000007\.safetensors: it is not what .* says: bytes, sha256 differ"):
        check_training(path)


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{}", '{"sha256": NaN}', "[" * 100_000, "9" * 5000])
def test_a_manifest_that_is_none_is_damage(tmp_path, text):
    save(tmp_path, 1)
    (tmp_path / "step-00000001.json").write_text(text)
    with pytest.raises(InputError, match=r"no checkpoint in it can be read: .*step-00000001"):
        load_newest_training(tmp_path)


def test_checkpoints_older_than_manifests_load_and_say_so(tmp_path):
    for step in (1, 2):
        write_atomically(
            tmp_path / f"step-0000000{step}.safetensors",
            packed({"a": torch.zeros(1)}, {"state": f'{{"step": {step}}}'}),
        )
    _, state, notes = load_newest_training(tmp_path)
    assert state == {"step": 2}
    assert notes == [
        f"{tmp_path}/step-00000002.safetensors has no manifest: whether it is what was written cannot be checked"
    ]
    save(tmp_path, 3)  # from now on, what has none was not finished
    (tmp_path / "step-00000004.safetensors").write_bytes((tmp_path / "step-00000002.safetensors").read_bytes())
    _, state, notes = load_newest_training(tmp_path)
    assert state == {"step": 3}
    assert "step-00000004.safetensors: it has no manifest" in notes[0]


@pytest.mark.parametrize("manifest", [False, True])
def test_what_was_just_saved_outlives_damaged_files_of_higher_steps(tmp_path, manifest):
    for step in (4, 6):
        save(tmp_path, step)
    (tmp_path / "step-00000006.safetensors").write_bytes(b"")
    (tmp_path / "step-00000008.safetensors").write_bytes(b"not finished")
    if manifest:
        (tmp_path / "step-00000008.json").write_text("{}")
    assert loaded(tmp_path) == 4
    save(tmp_path, 5)
    assert loaded(tmp_path) == 5
    assert len(training_checkpoints(tmp_path)) == 2
    save(tmp_path, 7)
    assert loaded(tmp_path) == 7


def test_a_step_saved_before_and_after_its_evaluation_is_two_checkpoints(tmp_path):
    """The later counts while it is sound; neither takes the other's place."""
    tensors = {"a": torch.zeros(SIZE)}
    save(tmp_path, 8)
    save_training(tmp_path, 9, tensors, {"owes": True}, before_evaluation=True)
    assert load_newest_training(tmp_path)[1] == {"owes": True}
    save_training(tmp_path, 9, tensors, {"owes": False})
    assert load_newest_training(tmp_path)[1] == {"owes": False}
    assert sorted(file.name for _, file in training_checkpoints(tmp_path)) == [
        "step-00000009-owed.safetensors",
        "step-00000009.safetensors",
    ]
    (tmp_path / "step-00000009.safetensors").write_bytes(b"not finished")
    assert load_newest_training(tmp_path)[1] == {"owes": True}
    for step in (10, 11):
        save(tmp_path, step)
    assert [step for step, _ in sorted(training_checkpoints(tmp_path))] == [10, 11]


def test_thresholds_go_with_the_model_that_they_were_of(tmp_path):
    card = ModelCard(replace(MODEL, num_classes=1), ImageConfig(), Categories((1,), ("cat",)), "detr-xs", 1, {})
    for name, kept in (
        ("best.safetensors", "thresholds.json"),
        ("last.safetensors", "last.safetensors.thresholds.json"),
    ):
        (tmp_path / kept).write_text("of the model before")
        save_model(tmp_path / name, {"a": torch.zeros(2)}, card)
        assert not (tmp_path / kept).exists()


def test_the_date_of_a_file_means_nothing(tmp_path):
    for step in (9, 10):
        save(tmp_path, step)
    os.utime(tmp_path / "step-00000010.safetensors", (0, 0))
    assert loaded(tmp_path) == 10


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    before = content(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(1000, 990, 10))
    monkeypatch.setattr(checkpoint, "open", lambda *_: pytest.fail("a file was opened"), raising=False)
    with pytest.raises(InputError, match=r"\(No space left on device\): [\d,]+ bytes are needed, 10 are free"):
        save(tmp_path, 2)
    assert content(tmp_path) == before
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 0))  # some network drives know nothing
    save(tmp_path, 2)
    assert loaded(tmp_path) == 2


def test_a_fault_that_may_pass_is_tried_once_more(tmp_path, monkeypatch):
    pauses, faults = [], [errno.EIO]

    def sometimes(source, target):
        if faults:
            raise OSError(faults.pop(), "no")
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(os, "replace", sometimes)
    write_atomically(tmp_path / "a", b"abc")
    assert (tmp_path / "a").read_bytes() == b"abc"
    assert pauses == [checkpoint.PAUSE]
    faults += [errno.EIO, errno.EIO]
    with pytest.raises(InputError, match="cannot be written"):
        write_atomically(tmp_path / "a", b"abcd")
    faults.append(errno.EACCES)
    with pytest.raises(InputError, match="cannot be written"):
        write_atomically(tmp_path / "a", b"abcd")
    assert pauses == [checkpoint.PAUSE] * 2
    assert content(tmp_path) == {"a": b"abc"}


def test_what_killed_saves_left_is_removed_by_the_next(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".step-00000002.safetensors.123.tmp").write_bytes(b"half")
    save(tmp_path, 3)
    assert not [file for file in tmp_path.iterdir() if file.suffix == ".tmp"]
