"""Where the weights of each stage are: trained here, a folder the user named, or a hub id the user named."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages import STAGES, require_stage
from stages.errors import UserError
from stages.files import Place

if TYPE_CHECKING:
    from stages.variants import Variant

# What makes a folder usable for a stage (the layout of a released stage, or of a diffusers AudioLDM 2 folder).
NEEDS: dict[str, tuple[str, ...]] = {
    "clap": ("text_encoder", "tokenizer", "feature_extractor"),
    "audiomae": ("model.safetensors",),
    "vae": ("vae",),
    "vocoder": ("vocoder",),
    "translator": ("language_model", "projection_model"),
    "diffusion": ("unet", "scheduler"),
    "joint": ("language_model", "projection_model", "unet", "scheduler"),
    "classifier": ("model.safetensors",),
}
IN_A_BUNDLE = ("clap", "vae", "vocoder", "translator", "diffusion")
FILE_ENDINGS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")  # a mistyped path is never looked up on the hub


def released_folders(work: str | Path | Place, given: Mapping[str, str]) -> dict[str, Place]:
    """Folder of every stage whose weights are available: `given` ones first, then those released in `work`.

    What needs them as files takes `local_copy()`, on the machine that needs them.

    Raises UserError for an unknown stage, a folder that is not one, or a hub id that cannot be had.
    """
    stages = Place.of(work) / "stages"
    folders = {s: stages / s for s in STAGES if (stages / s / "stage.json").exists()}
    for stage, source in given.items():
        require_stage(stage)
        folders[stage] = _folder_of(stage, source, f"--with {stage}={source}")
    return folders


def start_folder(stage: str, source: str) -> Place:
    """The folder of weights that `stage` shall begin with: a release, a bundle, a diffusers folder a hub id, or a GPT-2 for the translator.

    Raises UserError when it is none of these, or the hub does not give it.
    """
    from stages.starting import is_gpt2

    said = f"--init-from {source}"
    if stage == "translator":
        folder = _there(source)
        if folder is None:
            hub = from_hub(source, ["config.json", "model.safetensors", "language_model/*", "projection_model/*", "text_encoder_2/*"], said)
            folder = Place.of(hub)
        if is_gpt2(folder.local_copy()):
            return folder
    if (
        stage == "joint"
        and (folder := _there(source)) is not None
        and (folder / "unet").exists()
        and not (folder / "language_model").exists()
    ):
        raise UserError(f"{said}: that is a T-UNet alone; joint training takes it as --with diffusion={source}")
    return _folder_of(stage, source, said)


def _there(source: str) -> Place | None:
    """The folder that `source` names, if there is one."""
    folder = Place.of(source if "://" in source else Path(source).expanduser())
    return folder if folder.exists() or not folder.local else None


def _folder_of(stage: str, source: str, said: str) -> Place:
    """The folder with the weights of `stage` that `source` names, which the user called `said`."""
    folder = _there(source)
    if folder is None:
        folder = Place.of(_from_hub(stage, source, said))
    if not _lacking(stage, folder / stage):
        folder = folder / stage  # a bundle keeps AudioMAE in a folder of its own
    if missing := _lacking(stage, folder):
        also = {"audiomae": " or a bundle that has one", "classifier": ""}.get(stage, ", a bundle or a diffusers AudioLDM 2 folder")
        raise UserError(f"{said}: the folder lacks {', '.join(missing)}; expected a released stage{also}")
    return folder


def require_used(given: Mapping[str, str], used: Collection[str], who: str) -> None:
    """Refuse `given` weights that `who` does not read, which are most often a mistake for others.

    Raises UserError naming those it reads.
    """
    for stage, source in given.items():
        require_stage(stage)  # a misspelt name gets the nearest one
        if stage not in used:
            reads = f"it reads those of {', '.join(used)}" if used else "it reads no other stage's"
            why = "its weights are what this command trains" if stage == who else f"{who} does not read the weights of {stage}; {reads}"
            raise UserError(f"--with {stage}={source}: {why}; --with names weights that are used as they are, so leave it out")


def card_beside(folder: Place) -> dict[str, Any]:
    """What weights say of themselves: the card of a released stage, or of the bundle they lie in; public weights say nothing."""
    for path in (folder / "stage.json", folder / "loa.json", folder.parent / "loa.json"):
        if path.exists():
            card: dict[str, Any] = json.loads(path.read())
            return card
    return {}


def _lacking(stage: str, folder: Place) -> list[str]:
    return [name for name in NEEDS[stage] if not (folder / name).exists()]


def _from_hub(stage: str, name: str, said: str) -> Path:
    """Fetch what the stage needs from the hub; only ever called with an id the user typed."""
    text, scale = ("text_encoder_2", "tokenizer_2"), ("vae/config.json",)
    also = {"clap": text, "translator": text, "joint": (*text, *scale), "diffusion": scale, "audiomae": ("config.json", "audiomae")}
    parts = (*NEEDS[stage], *also.get(stage, ()))
    return from_hub(name, [f"{part}*/*" if "." not in part else part for part in parts], said)


def from_hub(name: str, patterns: list[str], said: str) -> Path:
    """The folder of the hub's `name` (an id the user typed), files of `patterns` alone; `said` is how the user named it.

    Raises UserError when `name` is no id, or the hub does not give it.
    """
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(FILE_ENDINGS):
        raise UserError(f"{said}: there is no such file or folder, and a hub id looks like owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*.bin", "*.pt", "*.ckpt", "*.pkl"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{said}: no such folder, and downloading it from the hub failed ({type(error).__name__}); download it and name the folder"
        ) from error


def frozen_of(bundle: Path) -> dict[str, str]:
    """The stages that a bundle holds, by name."""
    named = dict.fromkeys(IN_A_BUNDLE, str(bundle))
    return named | ({"audiomae": str(bundle)} if (bundle / "audiomae" / "model.safetensors").is_file() else {})


def variant_of(bundle: Path) -> Variant:
    """The variant whose networks are those of a bundle: what its card says, with what only its files show of how they compute.

    Raises UserError when it does not say which variant it is, or is another than that.
    """
    from stages.bundle import read_info, read_json
    from stages.config import from_dict
    from stages.variants import resolve

    info = read_info(bundle)
    if not (bundle / "loa.json").is_file():
        raise UserError(f"{bundle} does not say which variant it is (no loa.json); make a bundle of it: `loa import {bundle} --out DIR`")
    variant = replace(from_dict(resolve(info.variant), info.provenance.get("config", {})), audio=info.audio)
    unet = read_json(bundle / "unet" / "config.json")
    heads, levels = unet["attention_head_dim"], len(unet["block_out_channels"])
    prediction = read_json(bundle / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
    heads = tuple(heads) if isinstance(heads, list) else (heads,) * levels
    variant = replace(variant, diffusion=replace(variant.diffusion, heads=heads, prediction=prediction))
    if (tokens := variant.loa_tokens(variant.translator.pooling)) != info.loa_tokens:
        raise UserError(f"GPT-2 writes {info.loa_tokens} vectors in {bundle}, {tokens} in {variant.name}: its card is of another system")
    return variant
