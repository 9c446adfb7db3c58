"""lucidetr: DETR from scratch that you can read, train on one machine, and look inside.

    detector = lucidetr.load("runs/mine")
    detections = detector.predict("photo.jpg", threshold=0.5)

The names below are the public door; each is imported when it is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lucidetr.deployment.detector import Detector, load
    from lucidetr.recipes import recipe
    from lucidetr.structures import Detections

__all__ = ["Detections", "Detector", "load", "recipe"]

_PLACES = {
    "Detections": "lucidetr.structures",
    "Detector": "lucidetr.deployment.detector",
    "load": "lucidetr.deployment.detector",
    "recipe": "lucidetr.recipes",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    import importlib

    if name not in _PLACES:
        raise AttributeError(f"module 'lucidetr' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
