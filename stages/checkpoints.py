"""Weights in files that others wrote: read without running anything they hold, and fitted with the misfits named."""

from __future__ import annotations

import argparse
import difflib
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.config import from_dict, to_dict
from stages.errors import UserError
from stages.files import write_json

Network = TypeVar("Network", bound=nn.Module)
Config = TypeVar("Config")


class LeftOut:
    """Stands for an object of a training framework that a checkpoint carries beside its weights; keeps nothing of it."""

    def __setstate__(self, state: Any) -> None:
        pass


# What public checkpoints hold beside tensors and plain Python values (references.md#checkpoint-layout; PyTorch's own list has the rest).
# Nothing here runs code of the file's choosing: NumPy's scalars and arrays are numbers, and Lightning's objects become empty `LeftOut`s.
_LIGHTNING = ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric")
_FRAMEWORK = (
    "callbacks.model_checkpoint.ModelCheckpoint",
    "callbacks.early_stopping.EarlyStopping",
    "utilities.parsing.AttributeDict",
    "utilities.data.AttributeDict",
)
_SAFE: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"},
    *(
        (made.__reduce__()[0], f"numpy.{core}.multiarray.{name}")
        for made, name in ((np.float64(0), "scalar"), (np.zeros(0), "_reconstruct"))
        for core in ("core", "_core")  # NumPy 1's name, and 2's
    ),
    *((LeftOut, f"{package}.{name}") for package in _LIGHTNING for name in _FRAMEWORK),
]


def read_checkpoint(path: Path) -> Any:
    """The content of a PyTorch or safetensors file: tensors and plain values only; nothing the file asks for is executed.

    Tensors of PyTorch's current format stay on disk until they are used.

    Raises UserError when there is no such file, it is damaged, or it holds anything but plain values and weights.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}")
    refused = f"{path} is not a file of plain weights, so it was not loaded"
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_SAFE):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        asked = re.search(r"(?:GLOBAL|[Uu]nsupported class|unrecognized function) (\S+)", str(error))
        if asked:
            raise UserError(
                f"{refused}: it refers to {asked[1]}, which could run code; get the file from its original source, or save its weights "
                "as safetensors, on a machine that is allowed to run it"
            ) from error
        reason = str(error).partition("WeightsUnpickler error: ")[2] or str(error)  # without PyTorch's advice to drop the guard
        raise UserError(f"{refused}: {(reason.strip() or 'the file is truncated').splitlines()[0][:120]}") from error


def weights_of(checkpoint: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: those under "state_dict" or "model", or the file's own; data-parallel prefixes removed."""
    state = checkpoint
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}
    if not tensors:
        held = f"keys such as {', '.join(map(str, list(state)[:5]))}" if isinstance(state, Mapping) else type(state).__name__
        raise UserError(f"{path} holds no weights: expected tensors by name, as they are or under 'state_dict' or 'model', got {held}")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return fold_weight_norm(tensors)


def fold_weight_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with every pair of direction and length (weight_v and weight_g, old or new names) as the weight it stands for."""
    folded = dict(state)
    for lengths, directions in (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1")):
        for key in [key for key in folded if key.endswith(f".{lengths}")]:
            module = key.removesuffix(lengths)
            direction = folded.get(module + directions)
            if direction is None:
                continue
            length = folded.pop(key)
            # One length per place along the axis where `length` is not 1: the first, for all of HiFi-GAN's layers.
            axes = [axis for axis, size in enumerate(length.shape) if size == 1 or axis]
            folded[module + "weight"] = folded.pop(module + directions) * (length / direction.norm(dim=axes, keepdim=True))
    return folded


def require_fit(
    expected: Mapping[str, Iterable[int]], given: Mapping[str, Tensor], source: Path | str, what: str, optional: Iterable[str] = ()
) -> None:
    """Refuse weights that are not exactly those of `expected` (name → shape).

    Raises UserError naming the first missing, unknown and misshaped weights, unknown ones with the nearest known.
    """
    shapes = {key: list(shape) for key, shape in expected.items()}
    may_lack = set(optional)
    problems = misfits(
        shapes,
        missing=[key for key in shapes if key not in given and key not in may_lack],
        unknown=[key for key in given if key not in shapes],
        misshaped={
            key: (list(given[key].shape), shape) for key, shape in shapes.items() if key in given and list(given[key].shape) != shape
        },
    )
    if problems:
        raise UserError(f"the weights in {source} do not fit {what}: {problems}")


def misfits(known: Iterable[str], missing: list[str], unknown: list[str], misshaped: Mapping[str, tuple[list[int], list[int]]]) -> str:
    """What does not fit, in words: the first of each kind, unknown names with the nearest known; "" when all is well.

    `misshaped` holds the shape that was found and the one that was expected.
    """
    problems = []
    if missing:
        problems.append(_listed("missing", missing))
    if unknown:
        nearest = {key: difflib.get_close_matches(key, missing or list(known), 1) for key in unknown[:3]}
        problems.append(_listed("unknown", unknown, {key: f"nearest {near[0]}" for key, near in nearest.items() if near}))
    if misshaped:
        notes = {key: f"{found} instead of {wanted}" for key, (found, wanted) in misshaped.items()}
        problems.append(_listed("of another shape", list(misshaped), notes))
    return "; ".join(problems)


def load_weights(module: nn.Module, state: Mapping[str, Tensor], source: Path | str) -> None:
    """Put `state` into `module`, or raise a UserError that says what does not fit."""
    require_fit({key: value.shape for key, value in module.state_dict().items()}, state, source, type(module).__name__)
    module.load_state_dict(dict(state))


def save_network(network: nn.Module, config: Any, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`, which `load_network` reads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, folder / "model.safetensors")
    write_json(folder / "config.json", to_dict(config))


def load_network(build: Callable[[Config], Network], default: Config, folder: Path, advice: str) -> Network:
    """The network that `save_network` wrote, in evaluation mode; `default` gives its configuration's type and new fields.

    Raises UserError, with `advice`, when the folder holds none.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no {getattr(build, '__name__', 'network')} (no config.json); {advice}")
    network = build(from_dict(default, json.loads((folder / "config.json").read_text(encoding="utf-8"))))
    load_weights(network, load_file(folder / "model.safetensors"), folder / "model.safetensors")
    network.eval()
    return network


def _listed(what: str, keys: list[str], notes: Mapping[str, str] | None = None) -> str:
    shown = [f"{key}, {notes[key]}" if notes and key in notes else key for key in keys[:3]]
    return f"{len(keys)} {what} ({'; '.join(shown)}{' …' if len(keys) > 3 else ''})"
