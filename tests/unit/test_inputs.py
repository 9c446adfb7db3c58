"""Folders as they are on disks: with links, with loops, with what programs put there for themselves."""

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
