"""Weight files and JSON files read without ever running code that they carry."""

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lucidetr.errors import InputError, unreadable

FORBIDDEN = re.compile(r"GLOBAL (\S+)")  # torch's own word for a name that a pickle wants to look up
REASON = re.compile(r"WeightsUnpickler error:\s*(.+)")
# what torch's reader raises on a file that is no archive, cut off, or scrambled
MALFORMED = (RuntimeError, EOFError, OSError, ValueError, TypeError, AttributeError, LookupError, AssertionError)


def read_pth(path: Path) -> Any:
    """Return what a `.pth` file holds: tensors, numbers, strings, containers, and an `argparse.Namespace`.

    A pickle is a program, so only torch's restricted reader is used. It builds a short list of harmless types and
    refuses to look up any other name. One type is added to its list: training scripts save their options as an
    `argparse.Namespace`. That class has no constructor side effects, no `__reduce__` and no `__setstate__`: the
    reader can only fill its attributes with values that were themselves allowed, and we read a few of them by name.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # it is refused below, with words
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        wanted = FORBIDDEN.search(str(error))
        if wanted:
            raise InputError(
                f"{path}: refused. Reading it would run code that the file chooses ({wanted[1]}), and "
                "weights need none. If you trust its author, load it there and save only the tensors"
            ) from None
        raise InputError(f"{path}: not a weight file that can be read safely ({_first_line(error)})") from None
    except MALFORMED as error:
        raise InputError(f"{path}: not a readable weight file ({_first_line(error)})") from None


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({_first_line(error)})") from None


def read_json(path: Path, kind: type = dict) -> Any:
    """Return the object, or what else is expected, in a JSON file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(unreadable(path, error)) from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, endless numbers or brackets
        raise InputError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(values, kind):
        expected = {dict: "object", list: "list"}[kind]
        raise InputError(f"{path}: expected a JSON {expected}, got {type(values).__name__}")
    return values


@contextmanager
def usable(place: str) -> Iterator[None]:
    """Say of values that are not what they should be where they stand: any fault met inside is an InputError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, InputError) and place in str(error):
            raise
        raise InputError(f"{place}: cannot be used ({_first_line(error)}); correct it, or get the file anew") from None


def _first_line(error: BaseException) -> str:
    """Return the telling line of an error: torch opens its own with advice to read the file unsafely."""
    told = REASON.search(str(error))
    return (told[1] if told else str(error).strip() or type(error).__name__).splitlines()[0][:200]
