"""Sums of a data set: what changed is found, by the doctor and by sha256sum; a second lock blesses no damage."""

import io
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lucidetr.cli import data as verb
from lucidetr.data.doctor import diagnose
from lucidetr.data.export import open_splits, write_splits
from lucidetr.data.sums import SUMS, names_in
from lucidetr.errors import InputError

SCENES = "generated:digits?size=64&digit=14-24&objects=1-3&train=4&val=2"


@pytest.fixture
def folder(tmp_path):
    write_splits(open_splits(SCENES, "refuse"), tmp_path / "set", "coco")
    return tmp_path / "set"


def kinds(folder):
    """Return what the doctor says of sums, by kind."""
    found = [each for each in diagnose(folder).findings if each.kind.startswith(("file-", "sums-"))]
    return {each.kind: each.text for each in found}


def lock(folder, *options):
    """Lock in this process, and return the number of files."""
    verb.run(["lock", str(folder), *options])
    return (folder / SUMS).read_bytes().count(b"\n")


def data_lock(*arguments):
    command = [sys.executable, "-m", "lucidetr", "data", "lock", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("form", ["coco", "yolo", "voc"])
def test_a_locked_set_is_read_as_before_and_is_sound(tmp_path, form):
    folder = tmp_path / "set"
    write_splits(open_splits(SCENES, "refuse"), folder, form)
    before = list(diagnose(folder).findings)
    assert lock(folder) == len([path for path in folder.rglob("*") if path.is_file()]) - 1 > 6
    assert diagnose(folder).findings == before
    for split, dataset in open_splits(str(folder), "refuse").items():
        assert len(dataset) == {"train": 4, "val": 2}[split]


def test_a_picture_that_still_decodes_with_a_flipped_bit_is_found(folder):
    path = next(folder.rglob("train/*.png")).with_suffix(".jpg")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    lock(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    Image.open(io.BytesIO(content)).load()
    assert list(kinds(folder)) == ["file-changed"]
    assert kinds(folder)["file-changed"].startswith(f"{path}: has changed since lock.sha256 was written")


def test_files_that_went_or_came_and_lines_that_are_none_are_named(folder):
    lock(folder)
    gone = next(folder.rglob("val/*.png"))
    gone.unlink()
    (folder / "notes.txt").write_text("new")
    with (folder / SUMS).open("a") as file:
        file.write("abc  x\n")
    said = kinds(folder)
    assert list(said) == ["file-gone", "sums-file", "file-new"]
    assert str(gone) in said["file-gone"]
    assert str(folder / "notes.txt") in said["file-new"]
    assert "line 9: 'abc  x' is no SHA-256 and name" in said["sums-file"]


def test_a_second_lock_blesses_no_damage_unless_it_shall(folder):
    assert data_lock(folder).stdout == f"8 files: {folder / SUMS}\n"
    assert data_lock(folder).returncode == 0
    path = folder / "annotations" / "train.json"
    path.write_text(path.read_text() + "\n")
    before = (folder / SUMS).read_bytes()
    said = data_lock(folder)
    assert said.returncode == 2
    assert f"{path}: has changed" in said.stderr
    assert (folder / SUMS).read_bytes() == before
    assert data_lock(folder, "--renew").returncode == 0
    assert kinds(folder) == {}


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="this machine has no sha256sum")
def test_sha256sum_reads_it_and_its_own_are_read(folder):
    (folder / "one\\two\nthree").write_text("an odd name")
    lock(folder)
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=folder, check=True)
    theirs = subprocess.run(["sha256sum", *names_in(folder)], cwd=folder, capture_output=True, check=True).stdout
    assert theirs == (folder / SUMS).read_bytes()
    (folder / SUMS).write_bytes(theirs.replace(b"  ", b" *./"))
    assert kinds(folder) == {}


def test_what_lies_outside_is_not_opened(folder, tmp_path):
    (tmp_path / "secret").write_text("x")
    (folder / SUMS).write_text(f"{'0' * 64}  ../secret\n")
    assert "not there" in kinds(folder)["file-gone"]


def test_what_is_no_data_set_is_not_locked(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    for place, words in ((tmp_path, "no data set"), (tmp_path / "a.txt", "no folder")):
        said = data_lock(place)
        assert said.returncode == 2
        assert words in said.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_that_the_disk_does_not_give_is_named(folder, monkeypatch):
    from lucidetr.data import sums

    lock(folder)
    real, bad = sums.sum_of, folder / "annotations" / "val.json"

    def refuse(path):
        if path == bad:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(sums, "sum_of", refuse)
    assert kinds(folder) == {
        "file-unreadable": f"{bad}: cannot be read (Permission denied); check what it is, its rights and its disk"
    }
    with pytest.raises(InputError, match=r"val\.json: cannot be read"):
        lock(folder, "--renew")
