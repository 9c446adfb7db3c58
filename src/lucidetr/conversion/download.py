"""Weights from the web: https only, checked by SHA-256, kept in a cache."""

import hashlib
import http.client
import os
import re
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from lucidetr.data.sums import sum_of
from lucidetr.errors import InputError

CHUNK = 1 << 20
LONGEST = 60  # letters of a name, of up to 4 bytes each: disks take 255, and the end says what the file is
TIMEOUT = 30.0  # seconds without a byte
SHA256 = re.compile(r"[0-9a-f]{64}")


def cache_folder() -> Path:
    """Return $LUCIDETR_CACHE, or ~/.cache/lucidetr."""
    chosen = os.environ.get("LUCIDETR_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "lucidetr"


def fetch(url: str, sha256: str, opener: Callable[..., Any] = urllib.request.urlopen) -> Path:
    """Return the file at an https address, downloaded once; its content must have this SHA-256.

    Without a network the InputError says what to download and where to put it.
    """
    sha256 = sha256.strip().lower()
    if not SHA256.fullmatch(sha256):
        raise InputError(f"{sha256!r} is not a SHA-256 (64 hexadecimal digits): give that of the file at {url}")
    try:
        scheme = urlsplit(url).scheme
    except ValueError as error:
        raise InputError(f"{url}: no address that can be downloaded ({error})") from None
    if scheme != "https":
        raise InputError(f"{url}: only https addresses are downloaded")
    place = cached_path(url, sha256)
    if place.is_file():
        found = sum_of(place)
        if found != sha256:
            raise InputError(f"{place}: its SHA-256 is {found}, not {sha256}: delete it, it is not the file wanted")
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{place.parent}: cannot be created ({error}): set LUCIDETR_CACHE to another folder") from None
    _download(url, sha256, place, opener)
    return place


def cached_path(url: str, sha256: str) -> Path:
    """Return where the file of an address is kept: under its own name, in a folder of its content.

    >>> cached_path("https://example.org/a/weights.pth?download=1", "0123456789abcdef" * 4).relative_to(cache_folder())
    PosixPath('0123456789ab/weights.pth')
    """
    name = re.sub(r"[^\w.+-]", "_", Path(unquote(urlsplit(url).path)).name).lstrip(".") or "weights"
    return cache_folder() / sha256[:12] / name[-LONGEST:]


def _download(url: str, sha256: str, place: Path, opener: Callable[..., Any]) -> None:
    """Write to a temporary file beside the place and rename it once the content is known to be right."""
    handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=".download-")
    try:
        with os.fdopen(handle, "wb") as file, opener(url, timeout=TIMEOUT) as response:
            if urlsplit(response.geturl()).scheme != "https":
                raise InputError(f"{url}: leads to {response.geturl()}, and only https addresses are downloaded")
            digest = hashlib.sha256()
            while chunk := response.read(CHUNK):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != sha256:
            raise InputError(
                f"{url}: its SHA-256 is {digest.hexdigest()}, not {sha256}: "
                "the download broke off, or it is another file"
            )
        os.replace(temporary, place)
    except InputError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:  # no network or file there, a full disk, odd URL
        raise InputError(
            f"{url}: cannot be downloaded ({error}). Download it elsewhere and put it at {place}; "
            f"its SHA-256 is {sha256}"
        ) from None
    finally:
        Path(temporary).unlink(missing_ok=True)
