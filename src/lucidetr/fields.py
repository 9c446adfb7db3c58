"""Config dataclasses as plain values: ranges, JSON in and out, differences and changes by dotted names."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any, Literal

from lucidetr.errors import InputError, did_you_mean

HUGE = 1_000_000


def check_ranges(config: Any, place: str, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Refuse a field outside its range (both ends belong to it), be it one number or several; nan is always outside."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if any(not low <= each <= high for each in numbers):
            told = high < HUGE or any(each > high for each in numbers)
            upper = f" and at most {high:,.15g}" if told else ""
            said = name.replace("_", "-") if place.startswith("--") else name  # as options are written
            raise InputError(f"{place}{said} = {value}: choose at least {low:g}{upper}")


T = typing.TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain dictionaries, lists, numbers and strings."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type[T], values: Any, place: str = "") -> T:
    """Build a config dataclass from plain values; an unknown field or a wrong type is an InputError.

    >>> from lucidetr.config import OptimiserConfig
    >>> from_dict(OptimiserConfig, {"lr": 0.001}).lr
    0.001
    >>> from_dict(OptimiserConfig, {"lrr": 0.001})
    Traceback (most recent call last):
    lucidetr.errors.InputError: unknown field lrr: did you mean lr? Known: backbone_lr, clip, drop_at, ema, final, \
flat, lr, matrices, schedule, warmup, weight_decay
    """
    if not isinstance(values, dict):
        raise InputError(f"{place or kind.__name__}: expected an object with fields, got {values!r}")
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise InputError(f"unknown field {place}{name}: {did_you_mean(name, hints)}")
    parsed = {name: _parse(hints[name], value, f"{place}{name}") for name, value in values.items()}
    missing = [
        f.name
        for f in dataclasses.fields(typing.cast(Any, kind))
        if f.name not in parsed and f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{place or kind.__name__}: the field {missing[0]} is missing")
    return kind(**parsed)


def _parse(hint: Any, value: Any, place: str) -> Any:
    """Check one JSON value against the type of its field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, f"{place}.")
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{place} = {value!r}: choose one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple and isinstance(value, list):
        each = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(each) != len(value):
            raise InputError(f"{place} = {value!r}: expected {len(each)} values")
        return tuple(_parse(h, v, f"{place}[{i}]") for i, (h, v) in enumerate(zip(each, value, strict=True)))
    if origin is dict and isinstance(value, dict):
        return {key: _parse(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not (origin or hint):
        raise InputError(f"{place} = {value!r}: expected {getattr(hint, '__name__', hint)}")
    return value


def with_fields(config: T, changes: dict[str, Any]) -> T:
    """Return the config with some fields changed, nested ones named with dots; an unknown field is an InputError.

    >>> from lucidetr.config import TrainConfig
    >>> with_fields(TrainConfig(), {"model.backbone.width": 32, "seed": 7}).model.backbone.width
    32
    """
    values = to_dict(config)
    for name, value in changes.items():
        *path, last = name.split(".")
        place = values
        for step in path:
            if not isinstance(place.get(step), dict):
                raise InputError(f"unknown field {name}: {did_you_mean(step, place)}")
            place = place[step]
        place[last] = value
    return from_dict(type(config), values)


def difference(config: Any, other: Any, place: str = "") -> dict[str, tuple[Any, Any]]:
    """Return {field: (value here, value there)} of two configs of one kind, nested fields joined by dots.

    >>> from lucidetr.config import OptimiserConfig
    >>> difference(OptimiserConfig(lr=0.01), OptimiserConfig())
    {'lr': (0.01, 0.0001)}
    """
    changes: dict[str, tuple[Any, Any]] = {}
    for f in dataclasses.fields(config):
        here, there = getattr(config, f.name), getattr(other, f.name)
        if dataclasses.is_dataclass(here):
            changes |= difference(here, there, f"{place}{f.name}.")
        elif here != there:
            changes[f"{place}{f.name}"] = (here, there)
    return changes
