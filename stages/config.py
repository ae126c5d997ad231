"""Settings as nested frozen dataclasses: the recipe of a stage, JSON and back, single settings put in by dotted names."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from stages.errors import UserError

TINY = "-tiny"
DECAY = 0.999  # per epoch, HiFi-GAN's (references.md#optimisers)


def tiny_name(variant: str) -> str:
    """What the tiny form of a variant is called everywhere it is shown: its scores are never mistaken for the full system's."""
    return variant.removesuffix(TINY) + TINY


@dataclass(frozen=True)
class Recipe:
    """How a stage is optimised. Rates are per optimiser step; `global_batch` counts clips over all workers.

    A training ends with its `steps`, its `epochs` or its `max_seconds`, whichever comes first, or when `patience` is spent.
    """

    steps: int
    global_batch: int
    learning_rate: float
    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8  # Adam divides by sqrt(second moment) + epsilon
    weight_decay: float = 0.01
    warmup_steps: int = 0
    decay: str = "constant"  # after the warm-up: "constant"; "linear" or "cosine" down to zero; "exponential", DECAY per epoch
    clip_norm: float | None = 1.0
    micro_batch: int | None = None  # clips per forward on one worker; None = the worker's whole share
    ema_decay: float | None = None  # release and validate the averaged weights
    validate_every: int = 2000
    checkpoint_every: int = 2000
    max_seconds: float | None = None  # stop earlier than `steps`, with the schedule brought to its end in time
    epochs: float | None = None  # how often all clips are seen
    patience: int | None = None  # stop after so many measures in a row that are no better (`Stage.best_by`)
    listen_epochs: float | None = None  # between two distances of generated clips from held-out ones; None = they are not measured
    listen_clips: int = 256  # at most so many of each
    keep_every: int | None = None  # steps between checkpoints that stay for good

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "listen_epochs", "listen_clips", "keep_every"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise UserError(f"{name} must be positive, got {value}")
        if self.decay not in ("constant", "linear", "cosine", "exponential"):
            raise UserError(f"decay is {self.decay!r}; expected constant, linear, cosine or exponential")
        if self.steps < 1 or self.global_batch < 1:
            raise UserError(f"steps and global_batch must be positive, got {self.steps} and {self.global_batch}")

    def scheduled(self, epoch: int) -> Recipe:
        """With the `steps` that its epochs of so many clips allow; a warm-up takes at most a tenth of a run that they end."""
        if self.epochs is None or not epoch or (steps := math.ceil(self.epochs * epoch / self.global_batch)) >= self.steps:
            return self
        return dataclasses.replace(self, steps=max(1, steps), warmup_steps=min(self.warmup_steps, steps // 10))

    def listen_every(self, epoch: int) -> int | None:
        """Steps between two distances of generated clips, where an epoch has so many clips; None where they are not measured."""
        return None if self.listen_epochs is None else max(1, round(self.listen_epochs * epoch / self.global_batch))

    def rate_at(self, step: int, progress: float, epoch: int) -> float:
        """Learning rate of the update after `step` finished ones.

        `progress` in [0, 1] is the share of the run done, `epoch` how often all clips have been seen.
        """
        rate = self.learning_rate
        if step < self.warmup_steps:
            return rate * (step + 1) / self.warmup_steps
        if self.decay == "linear":
            return rate * (1.0 - progress)
        if self.decay == "cosine":
            return rate * 0.5 * (1.0 + math.cos(math.pi * progress))
        if self.decay == "exponential":
            return float(rate * DECAY**epoch)
        return rate


def to_dict(config: Any) -> Any:
    """A configuration value as JSON: dataclasses become dicts, tuples become lists."""
    if isinstance(config, Mapping):
        return {name: to_dict(value) for name, value in config.items()}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, (tuple, list)):
        return [to_dict(v) for v in config]
    return config


def from_dict(like: Any, values: Mapping[str, Any]) -> Any:
    """The dataclass value `like` with the fields of `values` (a `to_dict` result) put in."""
    changes = {}
    for key, value in values.items():
        old = _field(like, key)
        changes[key] = from_dict(old, value) if dataclasses.is_dataclass(old) and isinstance(value, Mapping) else _retype(old, value, key)
    return dataclasses.replace(like, **changes)


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    if isinstance(values, Mapping):
        return {k: v for key, inner in values.items() for k, v in flat(inner, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): values}


def differences(was: Any, now: Any, most: int = 5) -> str:
    """What differs between two configurations (dataclasses or `to_dict` results): "name: was A, now B; …"; "" if nothing."""
    old, new = (flat(json.loads(json.dumps(to_dict(config)))) for config in (was, now))
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    changes = [f"{name}: was {_said(old.get(name))}, now {_said(new.get(name))}" for name in changed[:most]]
    return "; ".join(changes + ([f"and {len(changed) - most} more"] if len(changed) > most else []))


def _said(value: Any) -> str:
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def override(config: Any, settings: Mapping[str, str]) -> Any:
    """Apply dotted settings such as {"diffusion.recipe.learning_rate": "5e-5"} to a nested dataclass value.

    Raises UserError for a name that does not exist, with the nearest that do.
    """
    for path, text in settings.items():
        config = _set(config, path.split("."), text, path)
    return config


def _set(config: Any, keys: list[str], text: str, path: str) -> Any:
    old = _field(config, keys[0], path)
    fields = _fields(old)
    if len(keys) > 1:
        if fields is None:
            raise UserError(f"--set {path}: {keys[0]!r} is a plain value and has no field {keys[1]!r}")
        new = _set(old, keys[1:], text, path)
    elif fields is not None:
        raise UserError(f"--set {path}: this is a group; name one of its fields: {', '.join(fields) or 'it has none'}")
    else:
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        new = _retype(old, value, path)
    if isinstance(config, Mapping):
        return {**config, keys[0]: new}
    if isinstance(config, tuple):
        return tuple(new if str(i) == keys[0] else value for i, value in enumerate(config))
    return dataclasses.replace(config, **{keys[0]: new})


def _fields(value: Any) -> dict[str, Any] | None:
    """What a setting's name can go on into: fields, entries of a mapping, places of a tuple of groups. None for a plain value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return {str(i): each for i, each in enumerate(value)}
    return None


def _field(config: Any, name: str, path: str | None = None) -> Any:
    fields = _fields(config) or {}
    if name not in fields:
        near = difflib.get_close_matches(name, fields, 3, 0.4) or list(fields)
        raise UserError(f"unknown setting {path or name!r}: {type(config).__name__} has no field {name!r}; nearest: {', '.join(near)}")
    return fields[name]


def _retype(old: Any, value: Any, path: str) -> Any:
    """`value` (from JSON) in the type of the value it replaces; None in either place admits anything."""
    if isinstance(value, list):
        value = tuple(_retype(None, v, path) for v in value)
    if old is None or value is None:
        return value
    if isinstance(old, bool) or isinstance(value, bool):
        fits = isinstance(old, bool) and isinstance(value, bool)
    elif isinstance(old, float):
        fits = isinstance(value, (int, float))
        value = float(value) if fits else value
    else:
        fits = isinstance(value, type(old))
    if not fits:
        raise UserError(f"setting {path!r} expects a value like {old!r} ({type(old).__name__}), got {value!r}")
    return value
