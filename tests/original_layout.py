"""Files in the authors' layouts, made from the networks of loa: for tests of what reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.diffusion.model import noise_schedule
from stages.public.layout import Origin, ema
from stages.public.original import UNET, parts
from stages.variants import Variant

SCALE = 0.4110932946205139


def pack(tensors: Mapping[str, Tensor], places: Mapping[str, Origin]) -> dict[str, Tensor]:
    """The authors' tensors of a network: packed ones put together again, the rows nobody uses zero."""
    packed: dict[str, Tensor] = {}
    for name, place in places.items():
        whole = packed.setdefault(place.key, torch.zeros(place.shape, dtype=tensors[name].dtype))
        piece = whole.chunk(place.parts)[place.part] if place.parts > 1 else whole
        piece.copy_(tensors[name].reshape(piece.shape))
    return packed


class Made(NamedTuple):
    """A network that a file was made from."""

    stage: str
    folder: str
    network: Any
    tensors: dict[str, Tensor]


def authors_file(variant: Variant, seed: int = 0) -> tuple[dict[str, Any], list[Made]]:
    """A whole file of a variant with random weights, and the networks it was made from."""
    torch.manual_seed(seed)
    made, state = [], {}
    for part in parts(variant):
        network = part.build()
        tensors = part.held(network).state_dict()
        for tensor in tensors.values():
            if tensor.is_floating_point() and tensor.numel() > 1:
                tensor.add_(0.02 * torch.randn(tensor.shape))
        state.update(pack(tensors, part.places))
        made.append(Made(part.stage, part.folder, network, tensors))
    for name in [name for name in state if name.startswith(UNET)]:  # the average is a little different, or nobody would see the choice
        state[ema(name.removeprefix(UNET))] = state[name] + 0.01
    clap = "cond_stage_models.0.cond_stage_models.0.model."
    strays = {
        "scale_factor": torch.tensor(SCALE),
        "alphas_cumprod": noise_schedule(variant.diffusion.prediction).alphas_cumprod,
        "logvar": torch.zeros(1000),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(5),
        "clap.mel_transform.spectrogram.window": torch.hann_window(8),
        f"{clap}audio_branch.logmel_extractor.melW": torch.zeros(3, 3),
        f"{clap}audio_branch.layers.0.blocks.1.attn_mask": torch.zeros(2),
        f"{clap}text_transform.sequential.0.weight": torch.zeros(2, 2),
        "cond_stage_models.0.model.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    copies = {key.replace(clap, "clap.model."): value for key, value in state.items() if key.startswith(clap)}
    return {"epoch": 3, "global_step": 665_000, "state_dict": state | copies | strays}, made


# --------------------------------- the authors' networks, run as their names nest (references.md#vae, references.md#t-unet)


class Weights:
    """A view of a file below a prefix."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str) -> None:
        self.state, self.prefix = state, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.state[self.prefix + name]

    def __contains__(self, start: str) -> bool:
        return any(key.startswith(self.prefix + start) for key in self.state)

    def at(self, name: str) -> Weights:
        return Weights(self.state, f"{self.prefix}{name}.")

    def count(self, start: str = "") -> int:
        """How many numbered children there are."""
        whole = self.prefix + start
        return len({key.removeprefix(whole).split(".")[0] for key in self.state if key.startswith(whole)})

    def conv(self, x: Tensor, **options: int) -> Tensor:
        return F.conv2d(x, self["weight"], self["bias"], **options)

    def linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self["weight"], self.state.get(f"{self.prefix}bias"))

    def norm(self, x: Tensor, groups: int, eps: float) -> Tensor:
        return F.group_norm(x, groups, self["weight"], self["bias"], eps)

    def layer_norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self["weight"], self["bias"], 1e-5)


def _attend(w: Weights, x: Tensor, context: Tensor) -> Tensor:
    q, k, v = w.at("to_q").linear(x), w.at("to_k").linear(context), w.at("to_v").linear(context)
    q, k, v = (t.unflatten(-1, (-1, 32)).transpose(1, 2) for t in (q, k, v))  # 32 channels per head
    return w.at("to_out.0").linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _transformer(w: Weights, x: Tensor, context: Tensor | None, groups: int) -> Tensor:
    h = w.at("proj_in").conv(w.at("norm").norm(x, groups, 1e-6)).flatten(2).transpose(1, 2)
    for i in range(w.count("transformer_blocks.")):
        b = w.at(f"transformer_blocks.{i}")
        normed = b.at("norm1").layer_norm(h)
        h = h + _attend(b.at("attn1"), normed, normed)
        normed = b.at("norm2").layer_norm(h)
        h = h + _attend(b.at("attn2"), normed, normed if context is None else context)
        value, gate = b.at("ff.net.0.proj").linear(b.at("norm3").layer_norm(h)).chunk(2, dim=-1)
        h = h + b.at("ff.net.2").linear(value * F.gelu(gate))
    return x + w.at("proj_out").conv(h.transpose(1, 2).unflatten(2, x.shape[2:]))


def _residual(w: Weights, x: Tensor, time: Tensor, groups: int) -> Tensor:
    h = w.at("in_layers.2").conv(F.silu(w.at("in_layers.0").norm(x, groups, 1e-5)), padding=1)
    h = h + w.at("emb_layers.1").linear(F.silu(time))[..., None, None]
    h = w.at("out_layers.3").conv(F.silu(w.at("out_layers.0").norm(h, groups, 1e-5)), padding=1)
    return h + (w.at("skip_connection").conv(x) if "skip_connection" in w else x)


def _sequence(w: Weights, x: Tensor, time: Tensor, contexts: list[Tensor | None], groups: int) -> Tensor:
    """One numbered block: whatever stands in it, one after the other; its transformers read the contexts in order."""
    waiting = iter(contexts)
    for i in range(w.count()):
        layer = w.at(str(i))
        if "in_layers" in layer:
            x = _residual(layer, x, time, groups)
        elif "transformer_blocks" in layer:
            x = _transformer(layer, x, next(waiting), groups)
        elif "op" in layer:
            x = layer.at("op").conv(x, stride=2, padding=1)
        elif "conv" in layer:
            x = layer.at("conv").conv(F.interpolate(x, scale_factor=2.0), padding=1)
        else:
            x = layer.conv(x, padding=1)
    return x


def authors_unet(state: Mapping[str, Tensor], noisy: Tensor, timestep: int, contexts: list[Tensor | None], groups: int) -> Tensor:
    """The T-UNet of a file: noisy latents `[B, C, T', F']` → prediction."""
    w = Weights(state, UNET)
    half = w["time_embed.0.weight"].shape[1] // 2
    angle = timestep * torch.exp(-math.log(10_000) * torch.arange(half) / half)
    time = torch.cat([angle.cos(), angle.sin()])[None].expand(len(noisy), -1)
    time = w.at("time_embed.2").linear(F.silu(w.at("time_embed.0").linear(time)))
    contexts = [context for i, context in enumerate(contexts) if i in (0, 1, 3) or context is not None]
    h, kept = noisy, []
    for i in range(w.count("input_blocks.")):
        h = _sequence(w.at(f"input_blocks.{i}"), h, time, contexts, groups)
        kept.append(h)
    h = _sequence(w.at("middle_block"), h, time, contexts, groups)
    for i in range(w.count("output_blocks.")):
        h = _sequence(w.at(f"output_blocks.{i}"), torch.cat([h, kept.pop()], dim=1), time, contexts, groups)
    return w.at("out.2").conv(F.silu(w.at("out.0").norm(h, groups, 1e-5)), padding=1)


def authors_vae_decoder(state: Mapping[str, Tensor], latent: Tensor, groups: int) -> Tensor:
    """The VAE decoder of a file: latents `[B, C, T', F']` → mel `[B, 1, T, F]`."""
    w = Weights(state, "first_stage_model.")

    def block(w: Weights, x: Tensor) -> Tensor:
        h = w.at("conv1").conv(F.silu(w.at("norm1").norm(x, groups, 1e-6)), padding=1)
        h = w.at("conv2").conv(F.silu(w.at("norm2").norm(h, groups, 1e-6)), padding=1)
        return h + (w.at("nin_shortcut").conv(x) if "nin_shortcut" in w else x)

    h = w.at("decoder.conv_in").conv(w.at("post_quant_conv").conv(latent), padding=1)
    d = w.at("decoder")
    h = block(d.at("mid.block_1"), h)
    a = d.at("mid.attn_1")
    q, k, v = (a.at(name).conv(a.at("norm").norm(h, groups, 1e-6)).flatten(2).transpose(1, 2) for name in "qkv")
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(2, h.shape[2:])
    h = block(d.at("mid.block_2"), h + a.at("proj_out").conv(mixed))
    for level in reversed(range(d.count("up."))):
        for i in range(d.count(f"up.{level}.block.")):
            h = block(d.at(f"up.{level}.block.{i}"), h)
        if f"up.{level}.upsample" in d:
            h = d.at(f"up.{level}.upsample.conv").conv(F.interpolate(h, scale_factor=2.0), padding=1)
    return d.at("conv_out").conv(F.silu(d.at("norm_out").norm(h, groups, 1e-6)), padding=1)
