"""Folders in the layout of `diffusers.AudioLDM2Pipeline`, as they are found on the hub, made into bundles of loa.

What such folders say of themselves stands: attention heads, CLAP's LayerNorm ε, scale factor. What they say wrongly is put
right by `stages.bundle`: the language model's class and, for speech, the length of the LOA (references.md#public-folders).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import ClapModel, GPT2LMHeadModel, SpeechT5HifiGan, T5EncoderModel, VitsModel

from stages.bundle import FILES, assemble, audio_of, read_info, read_json
from stages.checkpoints import misfits, read_checkpoint, weights_of
from stages.config import TINY
from stages.errors import UserError
from stages.files import Place
from stages.public.original import require_variant, variants_like
from stages.public.parts import beside
from stages.quiet import quiet
from stages.tokenizers import read_tokenizer
from stages.variants import resolve

NETWORKS: dict[str, Any] = {
    "text_encoder": ClapModel,
    "text_encoder_2": T5EncoderModel,
    "projection_model": AudioLDM2ProjectionModel,
    "language_model": GPT2LMHeadModel,
    "unet": AudioLDM2UNet2DConditionModel,
    "vae": AutoencoderKL,
    "vocoder": SpeechT5HifiGan,
}
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
STAGES = ("clap", "translator", "diffusion", "vae", "vocoder")


def import_folder(
    folder: Path, out: Path | Place, variant: str | None = None, provenance: Mapping[str, Any] | None = None, force: bool = False
) -> Path | Place:
    """Make the bundle `out` from a public AudioLDM 2 folder (or from another bundle), whole or not at all.

    Every network is loaded once, so that missing, unknown and misshaped weights are found here and not when a prompt waits.
    Weights in PyTorch's own format are read safely and rewritten as safetensors.

    Args:
        variant: the name the bundle goes by; by default the variant its T-UNet looks like.
        provenance: added to the bundle's card.
        force: replace another bundle at `out`.

    Raises:
        UserError: the folder is no AudioLDM 2 pipeline, lacks parts, holds weights or tokenizers that do not fit, or is another variant.
    """
    folder = Path(folder)
    with tempfile.TemporaryDirectory(prefix=".import-", dir=beside(out)) as draft:
        whole = _with_safetensors(folder, Path(draft))
        info = read_info(whole)
        for component, network in NETWORKS.items():
            speaks = component == "text_encoder_2" and info.speech
            config = _require_whole(whole / component, VitsModel if speaks else network, folder / component)
            if component in TOKENIZERS:
                read_tokenizer(folder / TOKENIZERS[component], config)
        ours = (folder / "loa.json").is_file()
        name = variant or (info.variant if ours else _looks_like(whole, folder))
        require_variant(_structure(whole), resolve(name), folder)
        unet = read_json(whole / "unet" / "config.json")
        meta = {
            "variant": name,
            "tiny": info.tiny if ours else tuple(unet["block_out_channels"]) != resolve(name.removesuffix(TINY)).diffusion.channels,
            "audio": info.audio if ours else audio_of(whole),
            "unconditional": info.unconditional,
            "provenance": {**info.provenance, **(provenance or {})},
        }
        stages = dict.fromkeys(STAGES, whole)
        if (folder / "audiomae" / "model.safetensors").is_file():
            stages["audiomae"] = folder / "audiomae"
        return assemble(stages, out, meta, force)


def _with_safetensors(folder: Path, draft: Path) -> Path:
    """`folder` itself if all its weights are safetensors; else a view of it in `draft` where they are."""
    old = {name: file for name in NETWORKS if (file := _pytorch_file(folder / name)) is not None}
    if not old:
        return folder
    for path in folder.iterdir():
        if path.name not in old:
            (draft / path.name).symlink_to(path.absolute())
    for name, file in old.items():
        (draft / name).mkdir()
        for path in (folder / name).iterdir():
            if path != file:
                (draft / name / path.name).symlink_to(path.absolute())
        target = next(f for f in FILES[name] if f.endswith(".safetensors"))
        weights = weights_of(read_checkpoint(file), file)
        save_file({key: value.clone() for key, value in weights.items()}, draft / name / target, metadata={"format": "pt"})
    return draft


def _pytorch_file(component: Path) -> Path | None:
    """The component's weights in PyTorch's format, if it has no others."""
    target = next(f for f in FILES[component.name] if f.endswith(".safetensors"))
    if (component / target).is_file() or (component / f"{target}.index.json").is_file():
        return None
    names = ("pytorch_model.bin", "diffusion_pytorch_model.bin")
    return next((component / name for name in names if (component / name).is_file()), None)


def _require_whole(component: Path, network: Any, named: Path) -> Any:
    """Load a network for the sole purpose of learning what does not fit; return its configuration."""
    argument = "torch_dtype" if issubclass(network, diffusers.ModelMixin) else "dtype"
    options = {argument: torch.float32, "use_safetensors": True, "local_files_only": True}
    with quiet():
        try:
            model, report = network.from_pretrained(component, output_loading_info=True, ignore_mismatched_sizes=True, **options)
        except (SafetensorError, OSError) as error:
            raise UserError(f"the weights of {named} are damaged or cannot be read; download that folder again") from error
    # The head of a language model saved without one is tied to its table; old buffers are recognised by the library.
    problems = misfits(
        model.state_dict(),
        missing=[key for key in report["missing_keys"] if key != "lm_head.weight"],
        unknown=list(report["unexpected_keys"]),
        misshaped={key: (list(was), list(wanted)) for key, was, wanted in report["mismatched_keys"]},
    )
    if problems:
        raise UserError(f"the weights in {named} do not fit {network.__name__} of its configuration: {problems}")
    return model.config


def _structure(folder: Path) -> tuple[int, int]:
    """Transformers per attention place and blocks per transformer, from the T-UNet's configuration."""
    unet = read_json(folder / "unet" / "config.json")
    widths, depth = unet["cross_attention_dim"][-1], unet.get("transformer_layers_per_block", 1)
    return len(widths) if isinstance(widths, list) else 1, max(depth) if isinstance(depth, list) else depth


def _looks_like(folder: Path, named: Path) -> str:
    counts = _structure(folder)
    like = variants_like(counts)
    if not like:
        raise UserError(
            f"the T-UNet of {named} matches no variant of loa: {counts[0]} transformers of {counts[1]} block(s) per attention place"
        )
    return like[0]
