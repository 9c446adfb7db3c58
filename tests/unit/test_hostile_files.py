"""Files from strangers: weights that are programs, headers and texts without end."""

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
import runpy
import shutil
import struct
import subprocess
import sys
import timeit
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save as packed

from hostile_tools import coco_set, limited, listening, look, outside, picture, voc_set
from lucidetr.conversion.convert import convert
from lucidetr.conversion.read import read_json
from lucidetr.data.dataset import open_dataset
from lucidetr.data.doctor import diagnose
from lucidetr.errors import InputError
from lucidetr.training.checkpoint import has_card, load_model, load_newest_training, load_tensors


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


def test_the_doctor_survives_a_side_without_end(tmp_path):
    picture(tmp_path / "images" / "good.png")
    file = coco_set(tmp_path, "good.png") / "train.json"
    file.write_text(file.read_text().replace('"height": 30', '"height": ' + "9" * 400))
    assert "image-size" in {finding.kind for finding in diagnose(tmp_path).findings}


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
def test_xml_that_wants_more_is_refused(tmp_path, name, encoding):
    folder = tmp_path / "set"
    picture(folder / "images" / "good.png")
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
