"""What the service and the process that computes say to each other: plain values, no torch, no web."""

import json
from dataclasses import dataclass, field
from typing import Any

MEGA = 1_000_000
BUSY = {"Retry-After": "1"}


@dataclass(frozen=True)
class Settings:
    """Say which model is served, and what is asked of it at most."""

    run: str
    threshold: float = 0.5
    precision: str = "auto"
    device: str = "auto"
    max_megabytes: float = 20.0
    max_megapixels: float = 50.0
    queue: int = 16
    batch: int = 8
    data: str = ""

    @property
    def max_bytes(self) -> int:
        """Return the most bytes of a request's body."""
        return int(self.max_megabytes * MEGA)

    @property
    def max_pixels(self) -> int:
        """Return the most pixels of a picture."""
        return int(self.max_megapixels * MEGA)


@dataclass(frozen=True)
class Job:
    """Ask for one thing: predict, look, point or usual, on the bytes of a picture, or of several for usual."""

    task: str
    pictures: tuple[bytes, ...]
    options: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """Hold an answer as it goes over the wire."""

    body: bytes
    status: int = 200
    media_type: str = "application/json"


@dataclass(frozen=True)
class Sample:
    """Hold the bytes of a sample picture, PNG or JPEG."""

    name: str
    media_type: str
    body: bytes


def in_json(content: Any, status: int = 200) -> Answer:
    """Return plain values as an answer.

    >>> in_json({"error": "no picture"}, 400)
    Answer(body=b'{"error": "no picture"}', status=400, media_type='application/json')
    """
    return Answer(json.dumps(content, ensure_ascii=False).encode(), status)
