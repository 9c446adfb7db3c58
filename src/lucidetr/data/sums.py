"""SHA-256 sums of a data set's files: `lucidetr data lock` writes them down, the doctor compares.

A picture with flipped bits mostly decodes without an error and only looks wrong. `sha256sum --check` reads the file
too.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from lucidetr.data.faults import hidden, listing
from lucidetr.data.raw import Finding
from lucidetr.errors import InputError, unreadable

SUMS = "lock.sha256"
LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")
ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}  # in names, of lines that begin with a backslash


def refuse_changes(folder: Path) -> None:
    """Refuse a data set whose files are not those of its sums, by their names; one without sums is fine."""
    if found := list(compare(folder)):
        raise InputError(
            f"{folder / SUMS}: {len(found)} things differ: {listing([each.text for each in found])}. "
            "Put right what should not differ; --renew then writes the sums anew"
        )


def sums_of(folder: Path) -> list[str]:
    """Return a line for each file of a data set, as they stand in its file of sums."""
    lines = []
    for name in names_in(folder):
        try:
            lines.append(_line(name, sum_of(folder / name)))
        except OSError as error:
            raise InputError(unreadable(folder / name, error)) from None
    return lines


def compare(folder: Path) -> Iterator[Finding]:
    """Yield what differs between a data set and its sums; nothing where it has none."""
    path = folder / SUMS
    if not path.is_file():
        return
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        yield Finding("sums-file", "error", unreadable(path, error))
        return
    there, listed = set(names_in(folder)), set()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if not (parts := LINE.fullmatch(line.rstrip("\r"))):
            text = f"{path}: line {number}: {line[:80]!r} is no SHA-256 and name; lucidetr data lock --renew"
            yield Finding("sums-file", "error", text)
            continue
        escaped, value, name = parts.groups()
        name = _plain(name) if escaped else name
        listed.add(name)
        yield from _differs(folder, name, value.lower(), name in there)
    for name in sorted(there - listed):
        yield Finding(
            "file-new", "warning", f"{folder / name}: not among the sums of {SUMS}; lucidetr data lock --renew"
        )


def _differs(folder: Path, name: str, value: str, there: bool) -> Iterator[Finding]:
    """Yield what is wrong with one file that is listed; one outside the folder, or no file, is not opened."""
    file = folder / name
    if not there:
        yield Finding("file-gone", "error", f"{file}: listed in {SUMS}, and not there; put it back")
        return
    try:
        now = sum_of(file)
    except OSError as error:
        yield Finding("file-unreadable", "error", unreadable(file, error))
        return
    if now != value:
        text = f"{file}: has changed since {SUMS} was written (SHA-256 {now[:12]}…, not {value[:12]}…)"
        yield Finding("file-changed", "error", f"{text}; put the original back, or lucidetr data lock --renew")


def names_in(folder: Path) -> list[str]:
    """Return the paths of all files in a data set; its sums, and folders of programs like .git, are left out."""
    files = (path for path in folder.rglob("*") if path.is_file() and not hidden(path, folder))
    return sorted(path.relative_to(folder).as_posix() for path in files if path != folder / SUMS)


def sum_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _line(name: str, value: str) -> str:
    escaped = "".join(ESCAPES.get(letter, letter) for letter in name)
    return ("\\" if escaped != name else "") + f"{value}  {escaped}\n"


def _plain(name: str) -> str:
    r"""Return a name as it was before it was escaped.

    >>> _plain(r"a\\b\nc")
    'a\\b\nc'
    """
    return re.sub(r"\\(.)", lambda match: {"n": "\n", "r": "\r"}.get(match[1], match[1]), name)
