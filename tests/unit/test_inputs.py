"""Folders as they are on disks: with links, with loops, with what programs put there for themselves."""

import os
from pathlib import Path

import pytest

from lucidetr.deployment.inputs import find_sources


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make a folder with a picture, and stand above it; only the names of pictures matter."""
    touch(tmp_path / "in" / "a.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "in"


def touch(file: Path):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"")


def found(*inputs):
    return [str(source.file) for source in find_sources(list(inputs), Path("out"))]


def test_linked_folders_are_entered_and_loops_end(folder, tmp_path):
    touch(tmp_path / "elsewhere" / "b.png")
    touch(folder / "deep" / "c.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "deep" / "up").symlink_to(folder)
    (tmp_path / "elsewhere" / "over").symlink_to(folder / "deep")
    assert found("in") == ["in/a.png", "in/deep/c.png", "in/linked/b.png"]


def test_a_folder_and_a_link_to_it_count_once(folder):
    touch(folder / "z" / "b.png")
    (folder / "latest").symlink_to(folder / "z")
    assert found("in") == ["in/a.png", "in/z/b.png"]


@pytest.mark.parametrize("name", [".ipynb_checkpoints/a.png", "@eaDir/a.png", "__MACOSX/._a.png", "deep/._a.png"])
def test_what_programs_keep_for_themselves_does_not_count(folder, name):
    touch(folder / name)
    assert found("in") == ["in/a.png"]
    assert len(found(f"in/{name}")) == 1  # named itself
    if not name.endswith("._a.png"):
        assert len(found(f"in/{Path(name).parent}")) == 1


def test_a_name_that_begins_like_such_a_folder_is_a_picture_and_patterns_pass_over_folders_of_programs(folder):
    touch(folder / "@b.png")
    touch(folder / "@eaDir" / "thumb.png")
    assert found("in") == found("in/**/*.png") == ["in/@b.png", "in/a.png"]


def test_folders_of_programs_are_not_even_entered(folder, tmp_path, monkeypatch):
    entered = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: entered.append(str(place)) or scandir(place))
    (folder / ".wine").mkdir()
    (folder / ".wine" / "z:").symlink_to(tmp_path)
    assert found("in") == ["in/a.png"]
    assert entered
    assert not any(".wine" in place for place in entered)


def test_what_was_drawn_earlier_does_not_count_through_a_link_either(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path / "data" / "a.png")
    touch(tmp_path / "data" / "out" / "a.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "pics").symlink_to(tmp_path / "data")
    assert [str(source.file) for source in find_sources(["in"], Path("data/out"))] == ["in/pics/a.png"]
