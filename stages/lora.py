"""LoRA: small matrices beside those of the T-UNet and of GPT-2, trained in their place, and kept in PEFT's own format.

A folder of adapters holds one folder per network, `unet/` and `language_model/`, each with `adapter_config.json` and
`adapter_model.safetensors`; a single one of these folders serves as well. PEFT is imported where it is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from stages.errors import UserError
from stages.files import Place

if TYPE_CHECKING:
    from stages.base import Stage

# What is adapted: every linear map of the attention blocks. PEFT matches the ends of names.
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
    "language_model": ["c_attn", "c_proj", "c_fc"],
}
CLASSES = {"unet": "AudioLDM2UNet2DConditionModel", "language_model": "GPT2LMHeadModel"}  # as PEFT notes them
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Adapter(NamedTuple):
    """Where adapters lie, and how strongly they are applied: 1 as trained, 0 not at all."""

    folder: str
    scale: float = 1.0

    @classmethod
    def of(cls, text: str) -> Adapter:
        """FOLDER or FOLDER=SCALE. Raises UserError for a scale that is no number."""
        folder, equals, number = text.rpartition("=")
        if not equals or Place.of(text).exists():  # a folder may have = in its name
            return cls(text)
        try:
            scale = float(number)
        except ValueError:
            scale = math.nan
        if not folder or not math.isfinite(scale):
            raise UserError(f"--lora {text}: the scale {number!r} is no number; expected FOLDER or FOLDER=SCALE, such as {folder}=0.8")
        return cls(folder, scale)

    def trained_on(self) -> Place | None:
        """The bundle that these adapters were trained on, as their card names it; None where it says nothing, or there is none."""
        named = self._start().get("from", "")
        return where if named and ((where := Place.of(named)) / "model_index.json").exists() else None

    def fits(self, bundle: Place) -> bool:
        """Whether they were trained on the weights of this bundle; True where one of the two does not say."""
        card = bundle / "loa.json"
        ours = json.loads(card.read()).get("weights", "") if card.exists() else ""
        return not ours or self._start().get("weights", ours) == ours

    def _start(self) -> dict[str, str]:
        where = Place.of(self.folder)
        card = next((c for c in (where / "stage.json", where.parent / "stage.json") if c.exists()), None)
        start: dict[str, str] = json.loads(card.read()).get("made_from", {}).get("start", {}) if card is not None else {}
        return start


# ------------------------------------------------------------------------------------------------------ training


def attach(stage: Stage, rank: int) -> None:
    """Freeze a stage and put fresh adapters beside its T-UNet and its GPT-2: from here on they alone are trained.

    Fresh adapters change nothing. Those of `rank` r are r · (inputs + outputs) numbers per matrix, scaled by 1.

    Raises UserError when the stage has neither network, or the rank makes no sense.
    """
    from peft import LoraConfig, inject_adapter_in_model

    networks = _adapted(stage)
    if not networks:
        raise UserError(f"{stage.name} has neither T-UNet nor GPT-2, and only these have adapters: translator, diffusion and joint do")
    if rank < 1:
        raise UserError(f"the rank of adapters is {rank}; expected at least 1, such as 16")
    stage.requires_grad_(False)
    for name, network in networks.items():
        transposed = name == "language_model"  # its matrices are [inputs, outputs]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS[name]), fan_in_fan_out=transposed)
        inject_adapter_in_model(config, network)


def save_adapters(stage: Stage, folder: Path) -> None:
    """Write the adapters of a stage as `folder`/unet and `folder`/language_model, as `peft.PeftModel.from_pretrained` reads them."""
    for name, network in _adapted(stage).items():
        config = network.peft_config["default"]
        config.auto_mapping = {"base_model_class": CLASSES[name], "parent_library": type(network).__module__}
        config.inference_mode = True
        (folder / name).mkdir(parents=True)
        config.save_pretrained(folder / name)
        trained = {f"base_model.model.{k.replace('.default.', '.')}": v for k, v in network.state_dict().items() if ".lora_" in k}
        weights = {k: v.detach().cpu().contiguous() for k, v in trained.items()}
        save_file(weights, folder / name / WEIGHTS, metadata={"format": "pt"})


def _adapted(stage: Stage) -> dict[str, Any]:
    return {name: network for name, network in stage.homes().items() if name in TARGETS}


# ----------------------------------------------------------------------------------------------------------- use


def adapter_folders(place: str | Path | Place) -> dict[str, Path]:
    """The adapter of every network at a place, by the network's name, on this machine.

    Raises UserError when there is none, or one of another network.
    """
    where = Place.of(place)
    said = f"--lora {place}"
    if (where / CONFIG).exists():
        folder = where.local_copy()
        name = _network_of(folder)
        if name is None:
            raise UserError(f"{said}: {CONFIG} does not say which network it adapts; put the folder into one called unet or language_model")
        return {name: folder}
    found = [name for name in TARGETS if (where / name / CONFIG).exists()]
    if not found:
        raise UserError(
            f"{said}: there are no adapters (no {CONFIG} in it, nor in {' or '.join(TARGETS)} below it); "
            "`loa finetune` and `loa train STAGE --lora RANK` make some"
        )
    local = where.local_copy()
    return {name: local / name for name in found}


def _network_of(folder: Path) -> str | None:
    """The network that a single adapter is of: as it says itself, or as its folder is called."""
    said = (_read_config(folder).get("auto_mapping") or {}).get("base_model_class", "")
    return next((name for name, cls in CLASSES.items() if cls == said or (not said and folder.name == name)), None)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} is damaged or cannot be read; get that folder again") from error
    return config


def merge(networks: Mapping[str, nn.Module], adapters: Iterable[Adapter]) -> None:
    """Add adapters to the matrices of networks (`unet`, `language_model`, in float32), in place and one after another.

    W becomes W + scale · B A, so that a merged network is as fast as it was; with the scale 0 it stays the same to the bit.

    Raises UserError when an adapter does not fit its network.
    """
    for adapter in adapters:
        for name, folder in adapter_folders(adapter.folder).items():
            if adapter.scale:
                _merge_one(networks[name], folder, adapter, name)


def _merge_one(network: nn.Module, folder: Path, adapter: Adapter, name: str) -> None:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if (kind := _read_config(folder).get("peft_type")) != "LORA":
        raise UserError(f"--lora {adapter.folder}: {name} has adapters of the type {kind}, and loa applies LORA")
    try:
        model: Any = PeftModel.from_pretrained(network, str(folder), local_files_only=True)
        if lacking := sorted(_adapter_names(model) - load_file(folder / WEIGHTS).keys()):  # of which PEFT only warns
            raise KeyError(f"{len(lacking)} matrices are missing, such as {lacking[0]}")
    except (RuntimeError, ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(
            f"--lora {adapter.folder}: the adapter of {name} does not fit this bundle, or is damaged ({first}); "
            "give the bundle that it was trained on with --bundle"
        ) from error
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", adapter.scale)
    model.merge_and_unload(safe_merge=True)


def _adapter_names(model: nn.Module) -> set[str]:
    """What the file of a model's adapter has to hold."""
    return {key.replace(".default.", ".") for key in model.state_dict() if ".lora_" in key}
