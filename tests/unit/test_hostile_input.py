"""Files from strangers: weights that are programs, headers and texts without end, names that lead elsewhere, noise."""

import argparse
import bdb
import code
import codecs
import collections
import ctypes
import functools
import io
import json
import marshal
import operator
import os
import pathlib
import pickle
import re
import runpy
import shutil
import struct
import subprocess
import sys
import sysconfig
import time
import timeit
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save as packed

from lucidetr.conversion.convert import convert
from lucidetr.conversion.read import read_json
from lucidetr.data.dataset import open_dataset
from lucidetr.data.decoding import read_image
from lucidetr.data.doctor import diagnose
from lucidetr.data.yolo import upright_size
from lucidetr.errors import InputError
from lucidetr.training.checkpoint import has_card, load_model, load_newest_training, load_tensors

LONGEST = 2.0  # seconds of computing that any one file may cost


class Call:
    """Pickled, it is a program that calls a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments

    def __call__(self):
        """Look callable, so that what a call returns can be called in turn."""


def attribute(owner: object, name: str) -> Call:
    return Call(getattr, owner, name)


def payloads(marker: Path) -> dict[str, object]:
    """Return programs that make the marker, by how they do it: things to pickle, and finished pickles."""
    command, place = f"touch {marker}", str(marker)
    source = f"__import__('pathlib').Path({place!r}).touch()"
    touch = Call(os.system, command)
    script = marker.with_name("script.py")
    script.write_text(source)
    inner = marker.with_name("inner.npy")
    np.save(inner, np.array([touch], dtype=object), allow_pickle=True)
    other = marker.with_name("inner.pth")
    torch.save({"a": touch}, other)
    line = command.encode()
    return {
        "os.system": touch,
        "os.popen": Call(attribute(Call(os.popen, command), "close")),
        "os.open": Call(os.open, place, os.O_CREAT | os.O_WRONLY),
        "os.mkdir": Call(os.mkdir, place),
        "os.symlink": Call(os.symlink, "nowhere", place),
        "subprocess.call": Call(subprocess.call, ["touch", place]),
        "subprocess.Popen": Call(attribute(Call(subprocess.Popen, ["touch", place]), "wait")),
        "subprocess.check_output": Call(subprocess.check_output, ["touch", place]),
        "subprocess.getoutput": Call(subprocess.getoutput, command),
        "eval": Call(eval, source),
        "exec": Call(exec, source),
        "exec of compiled": Call(exec, Call(compile, source, "x", "exec")),
        "exec of marshalled": Call(exec, Call(marshal.loads, marshal.dumps(compile(source, "x", "exec")))),
        "a function of code": Call(
            Call(attribute(Call(__import__, "types"), "FunctionType"), Call(compile, source, "x", "exec"), {})
        ),
        "open": Call(open, place, "w"),
        "codecs.open": Call(codecs.open, place, "w"),
        "io.FileIO": Call(io.FileIO, place, "w"),
        "Path.touch": Call(pathlib.Path.touch, marker),
        "shutil.copy": Call(shutil.copy, str(script), place),
        "getattr of __import__": Call(attribute(Call(__import__, "os"), "system"), command),
        "functools.partial": Call(Call(functools.partial, os.system, command)),
        "operator.methodcaller": Call(Call(operator.methodcaller, "system", command), Call(__import__, "os")),
        "operator.attrgetter": Call(Call(Call(operator.attrgetter, "system"), Call(__import__, "os")), command),
        "map": Call(list, Call(map, os.system, [command])),
        "runpy.run_path": Call(runpy.run_path, str(script)),
        "timeit": Call(timeit.timeit, source, "pass", timeit.default_timer, 1),
        "code": Call(attribute(Call(code.InteractiveInterpreter), "runsource"), source),
        "bdb": Call(attribute(Call(bdb.Bdb), "runcall"), os.system, command),
        "ctypes": Call(attribute(Call(ctypes.CDLL, None), "system"), line),
        "numpy objects": np.array([touch], dtype=object),
        "numpy.load": Call(np.load, str(inner), None, True),
        "torch.load": Call(torch.load, str(other), None, Call(__import__, "pickle")),
        "pickle in a pickle": Call(pickle.loads, pickle.dumps(touch)),
        "a value of an OrderedDict": collections.OrderedDict(model=collections.OrderedDict(a=touch)),
        "options": {"model": {"query_embed.weight": torch.zeros(1)}, "args": argparse.Namespace(nheads=touch)},
        "deep inside": {"model": {"a": [({"b": (1, [touch])},)]}},
        "a key": {touch: 1},
        "INST": b"(S'" + line + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'" + line + b"'\no.",
        "GLOBAL and REDUCE": b"cposix\nsystem\n(S'" + line + b"'\ntR.",
        "called and thrown away": b"cos\nsystem\n(S'" + line + b"'\ntR0}.",
    }


def as_pickle(program: object) -> bytes:
    return program if isinstance(program, bytes) else pickle.dumps(program, protocol=4)


def as_old_pickle(program: object) -> bytes:
    return program if isinstance(program, bytes) else pickle.dumps(program, protocol=2)


def as_archive(program: object) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", as_old_pickle(program))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def as_old_torch_file(program: object) -> bytes:
    head = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    return b"".join(pickle.dumps(part, protocol=2) for part in head) + as_old_pickle(program) + pickle.dumps([], 2)


def as_old_torch_head(program: object) -> bytes:
    """Hide the program where the system's properties stand."""
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    return head + as_old_pickle(program) + pickle.dumps({}, 2) + pickle.dumps([], 2)


CONTAINERS = (as_pickle, as_old_pickle, as_archive, as_old_torch_file, as_old_torch_head)


@pytest.mark.parametrize("container", CONTAINERS)
def test_weights_that_are_programs_are_refused_and_none_runs(tmp_path, container):
    marker = tmp_path / "marker"
    for name, program in payloads(marker).items():
        path = tmp_path / "evil.pth"
        path.write_bytes(container(program))
        with pytest.raises(InputError, match=r"evil\.pth: (refused\.|not a )"):
            convert(path)
        assert not os.path.lexists(marker), name


def test_the_programs_are_real_ones(tmp_path):
    """Python's own reader runs every one of them."""
    marker = tmp_path / "marker"
    programs = payloads(marker)
    assert len(programs) >= 40
    for name, program in programs.items():
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, pytest.MonkeyPatch.context() as patch:
            warnings.simplefilter("ignore")  # files and processes that are left to themselves
            patch.setattr(sys, "stdout", nowhere)
            pickle.loads(as_pickle(program))  # noqa: S301
        assert os.path.lexists(marker), name
        marker.rmdir() if marker.is_dir() else marker.unlink()


def headed(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file of a header, a stated length of it, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list, offsets: list, dtype: object = "F32") -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HEADERS = {
    "nothing": b"",
    "seven bytes": b"\x01\0\0\0\0\0\0",
    "a length alone": struct.pack("<Q", 8),
    "a length of all ones": headed(b"{}", length=2**64 - 1),
    "a length of half of them": headed(b"{}", length=2**63 - 1),
    "a length beyond the file": headed(b"{}", length=10_000),
    "a length of a gigabyte": headed(b"{}", length=2**30),
    "no length": headed(b"", length=0),
    "no JSON": headed(b"\xff\xfe\xfd"),
    "a list": headed([]),
    "a number": headed(3),
    "a text": headed("{}"),
    "brackets without end": headed(b"[" * 100_000),
    "objects without end": headed(b'{"a":' * 100_000),
    "half an object": headed(b'{"a": {"dtype": "F32"'),
    "a shape beyond all memory": headed(entry([2**62], [0, 4]), bytes(4)),
    "a shape whose product overflows": headed(entry([2**32, 2**32], [0, 0])),
    "a negative shape": headed(entry([-1], [0, 4]), bytes(4)),
    "a shape of texts": headed(entry(["1"], [0, 4]), bytes(4)),
    "an unknown type": headed(entry([1], [0, 4], "F31"), bytes(4)),
    "a type that is none": headed(entry([1], [0, 4], {}), bytes(4)),
    "offsets reversed": headed(entry([1], [4, 0]), bytes(4)),
    "offsets below zero": headed(entry([1], [-4, 0]), bytes(4)),
    "offsets beyond the data": headed(entry([1], [0, 4])),
    "offsets beyond all files": headed(entry([1], [2**63, 2**63 + 4]), bytes(4)),
    "offsets that begin late": headed(entry([1], [4, 8]), bytes(8)),
    "offsets of another size": headed(entry([2], [0, 4]), bytes(4)),
    "data after the end": headed(entry([1], [0, 4]), bytes(400)),
    "overlapping tensors": headed(entry([1], [0, 4]) | {"b": entry([1], [2, 6])["a"]}, bytes(6)),
    "the same tensor twice": headed(entry([1], [0, 4]) | {"b": entry([1], [0, 4])["a"]}, bytes(4)),
    "a card that is no text": headed({"__metadata__": {"card": 1}}),
    "metadata that is a list": headed({"__metadata__": ["card"]}),
    "a pickle": pickle.dumps({"a": 1}),
    "a card that is no JSON": packed({}, {"card": "{"}),
    "a card of brackets": packed({}, {"card": "[" * 100_000}),
    "a card of objects": packed({}, {"card": '{"schema":' * 100_000}),
    "a card with a number without end": packed({}, {"card": '{"schema": ' + "9" * 5000 + "}"}),
    "a card of a later year": packed({}, {"card": '{"schema": ' + "9" * 4000 + "}"}),
    "a card whose schema is a text": packed({}, {"card": '{"schema": "1"}'}),
    "a card whose schema is no number": packed({}, {"card": '{"schema": NaN}'}),
    "a card that is a list": packed({}, {"card": "[1]"}),
    "a card that is null": packed({}, {"card": "null"}),
    "a card that is empty": packed({}, {"card": "{}"}),
    "a card of unknown fields": packed({}, {"card": '{"__class__": "os.system"}'}),
    "a model of no size": packed({}, {"card": '{"model": {"d_model": -1}}'}),
    "a model of endless size": packed({}, {"card": '{"model": {"d_model": 1e999}}'}),
    "a model that is a text": packed({}, {"card": '{"model": "detr"}'}),
}


@contextmanager
def limited(what: object) -> Iterator[None]:
    """See that something costs little computing."""
    started = time.process_time()
    yield
    assert time.process_time() - started < LONGEST, what


@pytest.mark.parametrize("name", HEADERS)
def test_absurd_safetensors_files_are_refused(tmp_path, name):
    path = tmp_path / "absurd.safetensors"
    path.write_bytes(HEADERS[name])
    with limited(name), pytest.raises(InputError, match=r"absurd\.safetensors"):
        load_model(path)
    if "a card" not in name and "a model" not in name:
        for read in (has_card, load_tensors, convert):
            with limited(name), pytest.raises(InputError, match=r"absurd\.safetensors"):
                read(path)
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "step-00000001.safetensors").write_bytes(HEADERS[name])
    with limited(name), pytest.raises(InputError, match="no checkpoint in it can be read"):
        load_newest_training(checkpoints)


BOMBS = {
    "brackets": "[" * 100_000,
    "objects": '{"a":' * 100_000,
    "a number without end": '{"d_model": ' + "9" * 5000 + "}",
    "half a text": '{"a": "',
    "a list": "[]",
    "nothing": "",
}


@pytest.mark.parametrize("name", BOMBS)
def test_json_bombs_beside_weights_are_refused(tmp_path, name):
    path = tmp_path / "config.json"
    path.write_text(BOMBS[name])
    with limited(name), pytest.raises(InputError, match=r"config\.json"):
        read_json(path)


@pytest.mark.parametrize("name", BOMBS)
def test_json_bombs_as_annotations_are_refused(tmp_path, name):
    (tmp_path / "set" / "annotations").mkdir(parents=True)
    (tmp_path / "set" / "annotations" / "train.json").write_text(BOMBS[name])
    with limited(name), pytest.raises(InputError, match=r"train\.json"):
        open_dataset(str(tmp_path / "set"), "train")


@pytest.mark.parametrize("name", BOMBS)
def test_the_doctor_survives_json_bombs(tmp_path, name):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "train.json").write_text(BOMBS[name])
    with limited(name):
        assert diagnose(tmp_path).findings


OPENED: list[str] | None = None  # what was opened, while a test listens


def _listen(event: str, arguments: tuple) -> None:
    if OPENED is not None and event == "open" and isinstance(arguments[0], (str, bytes)):
        OPENED.append(os.fsdecode(arguments[0]))


@contextmanager
def listening() -> Iterator[list[str]]:
    """Return the names of all files that Python opens meanwhile, its own and those of its packages aside."""
    global OPENED
    if not getattr(_listen, "hooked", False):
        sys.addaudithook(_listen)  # it cannot be taken away again
        _listen.hooked = True
    OPENED = found = []
    try:
        yield found
    finally:
        OPENED = None
        own = (sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), str(Path(__file__).parents[2] / "src"))
        found[:] = [name for name in found if not os.path.realpath(name).startswith(own)]


def outside(opened: list[str], folder: Path) -> list[str]:
    return [name for name in opened if not Path(os.path.realpath(name)).is_relative_to(folder.resolve())]


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


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a folder `set` with links in `images`, and beside it what must not be opened."""
    picture(tmp_path / "outside" / "a.png")
    (tmp_path / "outside" / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "outside" / "list.txt").write_text("images/good.png\n")
    picture(tmp_path / "set" / "images" / "good.png")
    lay_links(tmp_path / "set" / "images")
    return tmp_path / "set"


def pixels(source: Path) -> None:
    dataset = open_dataset(str(source), "train")
    for index in range(len(dataset)):
        dataset.image(index)


def train(source: Path) -> str:
    """Read all of a set as training does; return why it was refused, if it was."""
    try:
        pixels(source)
    except InputError as error:
        return str(error)
    return ""


def examine(source: Path) -> str:
    """Read all of a set as the doctor does; return what it says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy's remarks on infinite numbers
            return "; ".join(finding.text for finding in diagnose(source).findings)
    except InputError as error:
        return str(error)


def look(source: Path) -> str:
    """Read all of a set both ways; return why training refused it, if it did."""
    examine(source)
    return train(source)


COCO = {"width": 40, "height": 30}
BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}


def coco_set(folder: Path, name: str) -> Path:
    images = [{"id": 2, "file_name": name} | COCO, {"id": 1, "file_name": "good.png"} | COCO]
    (folder / "train.json").write_text(
        json.dumps({"images": images, "annotations": [BOX], "categories": [{"id": 1, "name": "a"}]})
    )
    return folder


def voc_set(folder: Path, name: str) -> Path:
    (folder / "Annotations").mkdir(exist_ok=True)
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>4</xmax><ymax>6</ymax></bndbox>"
    size = "<size><width>40</width><height>30</height></size>"
    (folder / "Annotations" / "x.xml").write_text(
        f"<annotation><filename>{escape(name)}</filename>{size}<object><name>a</name>{box}</object></annotation>"
    )
    return folder


def yolo_set(folder: Path, name: str) -> Path:
    (folder / "labels").mkdir(exist_ok=True)
    (folder / "labels" / "good.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (folder / "data.yaml").write_text(f"train: {json.dumps(name)}\nnames: [a]\n")
    return folder


def yolo_list(folder: Path, name: str) -> Path:
    (folder / "list.txt").write_text(f"images/good.png\n{name}\n", encoding="utf-8")
    return yolo_set(folder, "list.txt")


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


XML = {
    "an entity that opens a file": '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>',
    "a document type elsewhere": '<!DOCTYPE a SYSTEM "http://127.0.0.1:9/a.dtd"><annotation/>',
    "entities of entities": "<!DOCTYPE a [<!ENTITY b 'bb'><!ENTITY c '&b;&b;'>]><annotation>&c;</annotation>",
    "an encoding that is none": '<?xml version="1.0" encoding="nothing"?><annotation/>',
    "an encoding of many bytes": '<?xml version="1.0" encoding="utf-7"?><annotation/>',
    "elements without end": "<annotation>" * 100_000,
    "a side that is no number": "<annotation><size><width>nan</width><height>30</height></size></annotation>",
    "a side without end": "<annotation><size><width>1e999</width><height>30</height></size></annotation>",
    "a side of the universe": "<annotation><size><width>1e300</width><height>30</height></size></annotation>",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("name", XML)
def test_xml_that_wants_more_is_refused(folder, name, encoding):
    voc_set(folder, "good.png")
    (folder / "Annotations" / "x.xml").write_bytes(XML[name].encode(encoding))
    with limited(name), listening() as opened:
        assert look(folder)
    assert outside(opened, folder) == []


ALIASES = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklmnopqrst", "bcdefghijklmnopqrstu", strict=True)
)
YAML = {
    "an object of Python": "train: images\nnames: !!python/object/apply:os.system ['touch marker']\n",
    "a module of Python": "train: images\nnames: !!python/module:os\n",
    "aliases of aliases": f"{ALIASES}train: images\nnames: *u\n",
    "brackets without end": "train: images\nnames: " + "[" * 3000,
    "a day that is none": "train: images\nnames: [2026-99-99]\n",
    "lists for names": "train: images\nnames: [[a, b], [c]]\n",
    "a list for a place": "train: [[images]]\nnames: [a]\n",
    "an object for a path": "path: {a: b}\ntrain: images\nnames: [a]\n",
    "a number without end": "train: images\nnames: {" + "9" * 5000 + ": a}\n",
    "a key that is a list": "? [a]\n: b\n",
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_wants_more_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "images" / "good.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "good.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text(YAML[name])
    with limited(name):
        assert look(tmp_path)
    assert not Path("marker").exists()


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """Return a file with bytes changed, cut out, put in, or doubled: one place or several."""
    for _ in range(int(random.integers(1, 6))):
        at = int(random.integers(len(data) + 1))
        size = int(random.choice([1, 1, 2, 4, 16, 200]))
        noise = random.bytes(size) if random.random() < 0.6 else bytes([int(random.choice([0, 255, 128, 127]))]) * size
        kind = int(random.integers(5))
        if kind <= 1:
            data = data[:at] + noise[: len(data) - at] + data[at + size :]
        elif kind == 2:
            data = data[:at] + noise + data[at:]
        elif kind == 3:
            data = data[:at] + data[at + size :]
        else:
            data = data[:at] + data[at : at + size] * 2 + data[at + size :]
    return data[: int(random.integers(len(data) + 1))] if random.random() < 0.15 else data


def sample_pictures(random: np.random.Generator) -> list[bytes]:
    """Return pictures of every kind that is read, with EXIF notes, palettes, transparency, frames, 16 bits."""
    noise = Image.fromarray(random.integers(0, 255, (12, 17, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    deep = Image.fromarray(random.integers(0, 65535, (12, 17), dtype=np.uint16))
    kinds = [
        (noise, "JPEG", {"exif": exif}), (noise, "JPEG", {"progressive": True}), (noise.convert("CMYK"), "JPEG", {}),
        (noise, "PNG", {"exif": exif}), (noise.convert("RGBA"), "PNG", {}), (deep, "PNG", {}),
        (noise.convert("P"), "PNG", {"transparency": 3}), (noise, "BMP", {}), (noise, "GIF", {}),
        (noise, "GIF", {"save_all": True, "append_images": [noise]}), (noise, "TIFF", {}),
        (noise, "TIFF", {"compression": "tiff_lzw"}), (deep, "TIFF", {}), (noise, "PPM", {}),
        (noise, "WEBP", {}), (noise, "WEBP", {"lossless": True}),
    ]  # fmt: skip
    files = []
    for image, form, options in kinds:
        file = io.BytesIO()
        image.save(file, form, **options)
        files.append(file.getvalue())
    return files


SIZES = [(0, 300), pytest.param(1, 3000, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("seed", "number"), SIZES, ids=["300", "3000"])
def test_mutated_pictures_are_read_or_refused(tmp_path, seed, number):
    random = np.random.default_rng(seed)
    samples, path, refused = sample_pictures(random), tmp_path / "picture", 0
    for i in range(number):
        path.write_bytes(mutated(samples[i % len(samples)], random))
        with limited(i), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on damaged notes
            for read in (read_image, upright_size):
                try:
                    read(path)
                except InputError as error:
                    assert str(path) in str(error)
                    refused += 1
    assert number / 4 < refused < 2 * number


WORDS = (
    "-1", "0", "1e999", "-1e999", "1e308", "9" * 400, "9" * 5000, "NaN", "Infinity", "null", "true", '""', "[]", "{}",
    "[[]]", '"\\u0000"', '"\\ud800"', '"../x"', "1.5", "nan", "inf", "1_0", "0x10", "2026-99-99", "*a", "!!set {}",
    "~", "&#0;", "<a>", "</object>", "\ufeff", "\u2028", "é", "🙂",
)  # fmt: skip


def reworded(data: bytes, random: np.random.Generator) -> bytes:
    """Return a text with some of its numbers and words exchanged for others that mean trouble."""
    text = data.decode()
    places = [match.span() for match in re.finditer(r"\"[^\"]*\"|-?[\d.]+|\w+", text)]
    for _ in range(int(random.integers(1, 4))):
        start, end = places[int(random.integers(len(places)))]
        if end <= len(text):
            text = text[:start] + WORDS[int(random.integers(len(WORDS)))] + text[end:]
    return text.encode("utf-8")


def annotation_files(folder: Path, make: Callable) -> list[Path]:
    picture(folder / "images" / "good.png")
    if make is coco_set:
        return [make(folder, "good.png") / "train.json"]
    if make is voc_set:
        make(folder, "good.png")
        listed = folder / "ImageSets" / "Main" / "train.txt"
        listed.parent.mkdir(parents=True)
        listed.write_text("x\n")
        return [folder / "Annotations" / "x.xml", listed]
    make(folder, "images/good.png")
    return [folder / "data.yaml", folder / "list.txt", folder / "labels" / "good.txt"]


NUMBERS = [(0, 100), pytest.param(1, 1000, marks=pytest.mark.slow)]
MAKERS = [coco_set, voc_set, yolo_list]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(("seed", "number"), NUMBERS, ids=["100", "1000"])
@pytest.mark.parametrize("read", [train, examine])
def test_mutated_annotations_are_read_or_refused(tmp_path, read, make, seed, number):
    random, refused = np.random.default_rng(seed), 0
    files = annotation_files(tmp_path, make)
    sound = {file: file.read_bytes() for file in files}
    assert not train(tmp_path)
    for i in range(number):
        file = files[i % len(files)]
        change = mutated if random.random() < 0.5 else reworded
        file.write_bytes(change(sound[file], random))
        with limited(i):
            try:
                refused += bool(read(tmp_path))
            except Exception as error:
                error.add_note(f"number {i}, {file.name}: {file.read_bytes()[:2000]!r}")
                raise
        file.write_bytes(sound[file])
    assert refused > number / 4
