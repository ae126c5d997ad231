"""Starting a stage from given weights: a released stage, a bundle, a folder in diffusers' layout, GPT-2."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.base import Stage
from stages.checkpoints import misfits
from stages.errors import UserError
from stages.quiet import quiet

MISSING, SHAPE = "missing", "shape"  # what `allow` may name
_COMPUTATION = ("attention_head_dim", "num_attention_heads", "n_head", "num_heads", "norm_num_groups")  # no shape shows them


class Started(NamedTuple):
    """What became of a stage's weights: names that kept their fresh values, network by network."""

    source: str
    fresh: dict[str, list[str]]

    def summary(self) -> str:
        """In words."""
        left = {name: len(names) for name, names in self.fresh.items() if names}
        kept = "; ".join(f"{count} weights of {name} begin fresh" for name, count in left.items())
        return f"starts from {self.source}" + (f" ({kept})" if kept else "")


def start_from(stage: Stage, folder: Path, source: str, allow: Collection[str] = ()) -> Started:
    """Put the weights of `folder` into a freshly built stage.

    Networks that the stage may begin without (critics) stay fresh where the folder has none.

    Args:
        source: how the user named the folder.
        allow: "missing": weights that the folder lacks stay fresh; "shape": so do those that have another shape there.

    Raises:
        UserError: the folder lacks a network, or its weights do not fit; the message names the first of each kind.
    """
    fresh: dict[str, list[str]] = {}
    homes = stage.homes()
    if is_gpt2(folder):
        if "language_model" not in homes:
            raise UserError(f"--init-from {source} is a GPT-2, with which only the translator starts; expected a release of {stage.name}")
        fresh = {name: sorted(network.state_dict()) for name, network in homes.items() if name != "language_model"}
        homes = {"language_model": homes["language_model"]}
        places = {"language_model": folder}
    else:
        places = {name: folder / name for name in homes}
    for name, network in homes.items():
        if not places[name].exists():
            if name in stage.may_lack or MISSING in allow:
                fresh[name] = sorted(network.state_dict())
                continue
            raise UserError(f"--init-from {source}: there is no {name}; expected weights of {stage.name}, or --init-allow missing")
        given = _read(network, places[name])
        fresh[name] = _fit(network, given, f"--init-from {source}: {name}", allow)
    stage.started(folder)
    return Started(source, {name: names for name, names in fresh.items() if names})


def is_gpt2(folder: Path) -> bool:
    """Whether a folder is a GPT-2 of transformers itself, and no release that holds one."""
    path = Path(folder) / "config.json"
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("model_type") == "gpt2")
    except (OSError, ValueError, AttributeError):
        return False


def _read(network: nn.Module, place: Path) -> dict[str, Tensor]:
    """The weights at a place, by the names that the network gives them; weights that the files lack are left out."""
    if place.suffix == ".safetensors":
        try:
            return load_file(place)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{place} is damaged or cannot be read ({error}); get it again") from error
    kind: Any = type(network)
    precision = {"torch_dtype" if issubclass(kind, ModelMixin) else "dtype": torch.float32}
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True, "local_files_only": True}
    with quiet():
        try:  # the library knows tied weights, old names and files in several pieces
            loaded, report = kind.from_pretrained(place, **precision, **options)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"the weights in {place} are damaged or cannot be read ({type(error).__name__}); get that folder again"
            ) from error
    _require_same(network.config, loaded.config, place)
    lacking = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])} - {"lm_head.weight"}  # tied to the token table
    return {key: value for key, value in loaded.state_dict().items() if key not in lacking}


def _require_same(ours: Any, theirs: Any, place: Path) -> None:
    """Refuse weights of the same shapes that mean another computation."""
    for name in _COMPUTATION:
        mine, other = (getattr(config, name, None) for config in (ours, theirs))
        wide, narrow = (list(value) if isinstance(value, list | tuple) else value for value in (mine, other))
        if isinstance(wide, list) and isinstance(narrow, int):
            narrow = [narrow] * len(wide)
        if None not in (mine, other) and wide != narrow:
            raise UserError(
                f"{place} has {name} {other}, this variant {mine}: its weights would compute something else; change the variant with --set"
            )


def _fit(network: nn.Module, given: Mapping[str, Tensor], what: str, allow: Collection[str]) -> list[str]:
    """Load `given` and return the names that stay fresh. Raises UserError for misfits that are not allowed."""
    ours = network.state_dict()
    missing = [key for key in ours if key not in given]
    misshaped = {
        key: (list(given[key].shape), list(ours[key].shape)) for key in ours if key in given and given[key].shape != ours[key].shape
    }
    unknown = [key for key in given if key not in ours]
    problems = misfits(ours, missing=[] if MISSING in allow else missing, unknown=unknown, misshaped={} if SHAPE in allow else misshaped)
    if problems:
        cures = [f"--init-allow {name}" for name, found in ((MISSING, missing), (SHAPE, misshaped)) if found and name not in allow]
        raise UserError(f"{what} does not fit this variant: {problems}" + (f"; {' '.join(cures)} leaves those fresh" if cures else ""))
    fresh = sorted({*missing, *misshaped})
    network.load_state_dict({key: value for key, value in given.items() if key not in misshaped}, strict=not fresh)
    return fresh
