"""Names in annotations that lead out of the data set: no file elsewhere is opened, and what stays within is read."""

import os
import shutil
from pathlib import Path

import pytest

from hostile_tools import (
    coco_set,
    limited,
    listening,
    look,
    outside,
    picture,
    pixels,
    voc_set,
    yolo_list,
    yolo_set,
)
from lucidetr.data.decoding import read_image
from lucidetr.errors import InputError


def ways_out(folder: Path) -> dict[str, str]:
    """Return names that try to leave a folder for `outside` beside it; those that go through links need `lay_links`."""
    far = folder.parent / "outside" / "a.png"
    near = "outside/a.png"
    plain = [
        f"../{near}", f"../../{folder.parent.name}/{near}", f"./../{near}", f"images/../../{near}", f"x/../../{near}",
        f"images/../images/../../{near}", f"..//{near}", f".././{near}", f"../../../../../../../../../..{far}",
        str(far), f"/{far}", f"//{far}", f"/.{far}", f"{folder}/../{near}", f"{folder}/images/../../{near}",
        "..\\outside\\a.png", "images\\..\\..\\outside\\a.png", "..\\/outside/a.png", "../outside\\a.png",
        "C:\\a.png", "C:/a.png", "C:a.png", "\\a.png", "\\\\server\\share\\a.png", "//server/share/a.png",
        "\\\\?\\C:\\a.png", "\\\\.\\PhysicalDrive0", "a.png:stream", "CON", "NUL.png", "aux.png",
        f"file://{far}", f"file:{far}", f"FILE://localhost{far}", "http://127.0.0.1:9/a.png", "https://127.0.0.1:9/a.png",
        "ftp://127.0.0.1/a.png", "data:image/png;base64,AAAA", "s3://bucket/a.png",
        "%2e%2e/outside/a.png", "..%2foutside%2fa.png", "%2e%2e%2foutside%2fa.png", "..%252foutside/a.png",
        "%c0%ae%c0%ae/outside/a.png", "..%c0%af..", "....//outside/a.png", "..;/outside/a.png", ".. /outside/a.png",
        "\uff0e\uff0e/outside/a.png", "..\uff0foutside/a.png", "\u2025/outside/a.png", "\u2026/outside/a.png",
        "~/a.png", "~root/a.png", "$HOME/a.png", "${HOME}/a.png", "$(id).png", "`id`.png", "|id", "-", "--help",
        "/dev/zero", "/dev/stdin", "/dev/fd/0", "/proc/self/environ", "/proc/self/cwd/a.png", "/etc/passwd",
        "../" * 2000 + "etc/passwd", "a/" * 2000 + "a.png", "x" * 5000 + ".png", "x" * 300 + ".png",
    ]  # fmt: skip
    linked = [
        "link.png", "chain.png", "absolute.png", "linked/a.png", "up/../outside/a.png", "up/up/outside/a.png",
        "root/etc/passwd", f"root{far}", "passwd.png", "zero.png", "pipe.png", "loop.png", "nowhere.png", "cwd.png",
    ]  # fmt: skip
    return {name[:60] if name.startswith(("../../..", "a/a", "xxx")) else name: name for name in (*plain, *linked)}


def lay_links(folder: Path) -> None:
    """Lay links and devices into a folder of pictures, two below the common one."""
    above = folder.parent.parent
    (folder / "link.png").symlink_to("../../outside/a.png")
    (folder / "chain.png").symlink_to("link.png")
    (folder / "absolute.png").symlink_to(above / "outside" / "a.png")
    (folder / "linked").symlink_to(above / "outside")
    (folder / "up").symlink_to(above)
    (folder / "root").symlink_to("/")
    (folder / "passwd.png").symlink_to("/etc/passwd")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "cwd.png").symlink_to("/proc/self/environ")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "nowhere.png").symlink_to("../../outside/none.png")
    os.mkfifo(folder / "pipe.png")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a folder `set` with links in `images`, and beside it what must not be opened."""
    picture(tmp_path / "outside" / "a.png")
    (tmp_path / "outside" / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "outside" / "list.txt").write_text("images/good.png\n")
    picture(tmp_path / "set" / "images" / "good.png")
    lay_links(tmp_path / "set" / "images")
    return tmp_path / "set"


@pytest.mark.parametrize("make", [coco_set, voc_set, yolo_set, yolo_list])
def test_no_name_opens_a_file_outside_the_data_set(folder, make):
    names = ways_out(folder)
    assert len(names) >= 60
    for shown, name in names.items():
        for form in dict.fromkeys((name, f"images/{name}")):
            source = make(folder, form)
            with limited(shown), listening() as opened:
                refused = look(source)
            assert outside(opened, folder) == [], (shown, form)
            assert refused, (shown, form)


def test_the_listening_hears(folder):
    with listening() as opened:
        read_image(folder / "images" / "link.png")
    assert len(outside(opened, folder)) == 1


NASTY = ("images/a\0.png", "\0", "..\0/outside/a.png", "\ud800.png", "", " ", ".", "..", "/", "a\nb.png", "\x1b[2J.png")


@pytest.mark.parametrize("name", NASTY)
def test_names_that_no_disk_can_hold_are_refused(folder, name):
    with listening() as opened:
        assert look(coco_set(folder, name))
    assert outside(opened, folder) == []


def test_links_within_a_data_set_are_followed(folder):
    picture(folder / "all" / "b.png")
    (folder / "images" / "b.png").symlink_to("../all/b.png")
    pixels(coco_set(folder, "b.png"))
    (folder / "train.json").unlink()
    pixels(voc_set(folder, "b.png"))
    shutil.rmtree(folder / "Annotations")
    pixels(yolo_list(folder, "images/b.png"))


def test_a_yolo_set_may_lie_where_its_path_says(folder):
    far = folder.parent / "outside"
    yaml = folder / "data.yaml"
    yaml.write_text(f"path: {far}\ntrain: .\nnames: [a]\n")
    pixels(folder)
    yaml.write_text(f"train: {far}\nnames: [a]\n")
    with pytest.raises(InputError, match=r"data\.yaml: .*outside leads out of .*give its folder as path"):
        pixels(folder)
    yaml.write_text(f"train: {far / 'list.txt'}\nnames: [a]\n")
    with pytest.raises(InputError, match=r"data\.yaml: .*list\.txt leads out of"):
        pixels(folder)


@pytest.mark.parametrize("what", ["label", "list", "xml", "xml pipe"])
def test_annotation_texts_are_no_links_out_of_their_folder(folder, what):
    if what == "label":
        yolo_list(folder, "images/good.png")
        (folder / "labels" / "good.txt").unlink()
        (folder / "labels" / "good.txt").symlink_to("../../outside/a.txt")
    elif what == "list":
        yolo_set(folder, "list.txt")
        (folder / "list.txt").symlink_to("../outside/list.txt")
    else:
        voc_set(folder, "good.png")
        text = (folder / "Annotations" / "x.xml").rename(folder.parent / "outside" / "x.xml")
        if what == "xml":
            (folder / "Annotations" / "x.xml").symlink_to(text)
        else:
            os.mkfifo(folder / "Annotations" / "x.xml")
    with listening() as opened:
        assert look(folder)
    assert outside(opened, folder) == []
