"""What a variant takes: parameters, floating-point operations, bytes per clip, and the hours of training that follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stages import require_stage
from stages.config import Recipe
from stages.variants import Variant

# One H200 does about 790 TFLOP/s in bf16 matrix products; training loops that are not tuned see about a third of that.
ASSUMED_FLOPS = 250e12
BYTES_PER_PARAMETER = 4 + 4 + 8  # weight, gradient, two Adam moments, all float32


def networks(variant: Variant) -> dict[str, nn.Module]:
    """Every network of the variant on the meta device: shapes and counts without memory."""
    from stages.audiomae.model import AudioMAE
    from stages.diffusion.training import build_unet
    from stages.translator.training import build_translator

    with torch.device("meta"):
        nets: dict[str, nn.Module] = {"clap": variant.clap.build()}
        if variant.phonemes is None:
            nets["t5"] = variant.t5.build()
        nets |= {
            "audiomae": AudioMAE(variant.audiomae),
            "vae": variant.vae.build(),
            "vocoder": variant.vocoder.build(variant.audio),
            "translator": build_translator(variant),
            "diffusion": build_unet(variant),
        }
    return {name: net.to("meta") for name, net in nets.items()}  # tables computed from numpy land on the CPU


def parameters(net: nn.Module) -> int:
    """Parameters of a network, each counted once."""
    return sum(p.numel() for p in net.parameters())


def forward_flops(variant: Variant) -> dict[str, float]:
    """Floating-point operations of one clip's forward pass, by network (meta tensors, no arithmetic done)."""
    nets = networks(variant)
    audio = variant.audio
    channels, frames, bins = variant.latent_shape
    loa = torch.zeros(1, variant.loa_tokens(variant.translator.pooling), variant.audiomae.width, device="meta")
    text = torch.zeros(1, 16, variant.t5.width, device="meta")
    mask = torch.ones(1, 16, device="meta", dtype=torch.long)
    speech = variant.phonemes is not None

    def unet() -> object:
        latent = torch.zeros(1, channels, frames, bins, device="meta")
        return nets["diffusion"](latent, torch.zeros(1, device="meta"), loa, None if speech else text, None if speech else mask)

    calls: dict[str, Callable[[], object]] = {
        "vae": lambda: nets["vae"](torch.zeros(1, 1, audio.mel_frames, audio.mel_bins, device="meta")),
        "vocoder": lambda: nets["vocoder"](torch.zeros(1, audio.mel_frames, audio.mel_bins, device="meta")),
        "audiomae": lambda: nets["audiomae"].features(torch.zeros(1, audio.mel_frames, audio.fbank_bins, device="meta")),  # type: ignore[operator]
        "diffusion": unet,
    }
    counts = {}
    for name, call in calls.items():
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        counts[name] = float(counter.get_total_flops())
    # GPT-2's masks ask for values that meta tensors have not; its blocks cost 2 operations per weight and place.
    length = loa.shape[1] + (variant.text_length + 5 if speech else 16 + 5)
    counts["translator"] = 2.0 * parameters(nets["translator"].language_model.transformer.h) * length  # type: ignore[union-attr,arg-type]
    return counts


def clip_bytes(variant: Variant) -> dict[str, int]:
    """Bytes one clip takes in each series of the feature store (FLAC at half the samples' size)."""
    audio, width = variant.audio, variant.audiomae.width
    channels, frames, bins = variant.latent_shape
    sizes = {
        "mel": 2 * audio.mel_frames * audio.mel_bins,
        "waveform": audio.clip_samples,
        **{f"loa-{pooling}": 2 * variant.loa_tokens(pooling) * width for pooling in variant.poolings},
        "latent": 2 * 2 * channels * frames * bins,
    }
    if variant.phonemes is None:
        sizes["text"] = 2 * (variant.clap.projection_dim + 16 * variant.t5.width)  # one caption of 16 tokens
    else:
        sizes["speech"] = 2 * (variant.clap.projection_dim + variant.phonemes.max_length)
    return sizes


def costs(stage: str, variant: Variant, nets: Mapping[str, nn.Module], flops: Mapping[str, float], workers: int) -> list[list[str]]:
    """Each phase of a stage's training in words: its name, steps, batch, memory of its state per worker, hours at most."""
    require_stage(stage)
    phases, rows = variant.phases_of(stage), []
    for number, (corpora, recipe) in enumerate(phases, 1):
        name = f"{stage} {number}/{len(phases)} ({', '.join(corpora)})" if stage in variant.phases else stage
        rows.append([name, *_cost(stage, recipe, nets, flops, workers)])
    return rows


def _cost(stage: str, recipe: Recipe, nets: Mapping[str, nn.Module], flops: Mapping[str, float], workers: int) -> list[str]:
    trained = {"joint": ("diffusion", "translator")}.get(stage, (stage,))
    size = sum(parameters(nets[n]) for n in trained if n in nets)
    state = size * (BYTES_PER_PARAMETER + (4 if recipe.ema_decay else 0)) / workers / 1e9
    work = sum(flops.get(n, 0.0) for n in trained)
    hours = f"{3 * work * recipe.steps * recipe.global_batch / (ASSUMED_FLOPS * workers) / 3600:,.1f} h" if work else "not estimated"
    steps = f"{recipe.steps:,} steps" + (f" or {recipe.epochs:g} epochs" if recipe.epochs else "")
    return [steps, f"of {recipe.global_batch} clips", f"{state:.2f} GB of state per worker + activations", hours]
