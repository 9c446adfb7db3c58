"""Errors that the command line says in one line: a user's mistake, with place, value and fix, and a lost process."""

import difflib
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """Say that something given by the user cannot be used; the command line prints it without a traceback."""


class LostRank(RuntimeError):
    """Say that the processes of a run no longer hear each other, and which of them gives no sign."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a sentence that lists what is known and suggests the nearest spelling.

    >>> did_you_mean("detr-r5", ["detr-r50", "detr-xs"])
    'did you mean detr-r50? Known: detr-r50, detr-xs'
    """
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"Known: {', '.join(known)}"


def unreadable(path: Path | str, error: OSError) -> str:
    """Return a sentence on a file that the system does not give."""
    return f"{path}: cannot be read ({error.strerror or error}); check what it is, its rights and its disk"


def imported(name: str, package: str = "") -> Any:
    """Import a package that this one does without; where it is missing, say how to install it or what brings it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise InputError(f"this needs {name} ({error}): pip install {package or name}") from None
