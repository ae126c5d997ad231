"""Where each tensor of our networks stands in the files of the authors: one map per network (references.md#checkpoint-layout).

A map goes from our name to theirs. So the same map reads a file, checks it key by key, and says what a whole file holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

SPECIAL_ROWS = 32  # rows of the authors' SOS and EOS tables, of which row k serves condition k (references.md#condition-sequence)


class Origin(NamedTuple):
    """Where one of our tensors stands: the tensor `key` of `shape`, or the `part`-th of `parts` equal pieces along its first axis."""

    key: str
    shape: tuple[int, ...]
    part: int = 0
    parts: int = 1


Map = Callable[[str, tuple[int, ...]], Origin]  # our name and shape → its origin

# Buffers that a network computes itself, and the vocoder's dummies: files may hold them or not.
_COMPUTED = re.compile(r"(position_ids|token_type_ids|relative_position_index|num_batches_tracked|^mean|^scale)$")
# What files hold and no network of ours needs: CLAP's front end (computed here), tagging head and transforms that embeddings do not
# pass; attention masks that older libraries stored; T5's second name of its table.
UNUSED = re.compile(
    r"(^|\.)((text|audio)_transform|mel_transform|audio_branch\.(spectrogram_extractor|logmel_extractor|stft|tscam_conv|head))\."
    r"|\.attn_mask$|\.attn\.(bias|masked_bias)$|(position_ids|token_type_ids|relative_position_index|num_batches_tracked|shared\.weight)$"
)
# Second names of one tensor: GPT-2's head, T5's embedding.
_TIED = {"lm_head.weight": "transformer.wte.weight", "shared.weight": "encoder.embed_tokens.weight"}


def origins(ours: Mapping[str, Tensor], where: Map, prefix: str = "") -> dict[str, Origin]:
    """The origin of every tensor of a network that lies below `prefix` in the file."""
    found = {name: where(name, tuple(tensor.shape)) for name, tensor in ours.items() if name not in _TIED}
    return {name: place._replace(key=prefix + place.key) for name, place in found.items()}


def expected(places: Mapping[str, Origin]) -> dict[str, tuple[int, ...]]:
    """What a whole file holds: the authors' names with their shapes."""
    return {place.key: place.shape for place in places.values()}


def computed(places: Mapping[str, Origin]) -> set[str]:
    """The authors' names that a file may lack."""
    return {place.key for name, place in places.items() if _COMPUTED.search(name)}


def take(ours: Mapping[str, Tensor], places: Mapping[str, Origin], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's tensors by our names out of a file that fits; what it need not hold stays as in `ours`."""
    taken = dict(ours)
    for name, place in places.items():
        if place.key in theirs:
            piece = theirs[place.key].chunk(place.parts)[place.part] if place.parts > 1 else theirs[place.key]
            taken[name] = piece.reshape(ours[name].shape).contiguous()
    return taken | {name: taken[table] for name, table in _TIED.items() if name in ours}


def _renamed(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def same(name: str, shape: tuple[int, ...]) -> Origin:
    """Networks that kept their names: T5 and AudioMAE."""
    return Origin(name, shape)


# ------------------------------------------------------------------------------------------------- latent diffusion

_RESNET = (
    (r"\bnorm1\b", "in_layers.0"),
    (r"\bconv1\b", "in_layers.2"),
    (r"\btime_emb_proj\b", "emb_layers.1"),
    (r"\bnorm2\b", "out_layers.0"),
    (r"\bconv2\b", "out_layers.3"),
    (r"\bconv_shortcut\b", "skip_connection"),
)
_AROUND = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet(layers: int, transformers: int) -> Map:
    """The T-UNet with `layers` residual blocks per level on the way down and `transformers` per attention place.

    Theirs counts places through all levels, downsampling included: a level is `layers` + 1 places long both ways down and
    up. Within a place the residual block comes first, then the transformers, then an upsampling where there is one.
    """

    def where(name: str, shape: tuple[int, ...]) -> Origin:
        head, _, leaf = name.rpartition(".")
        if head in _AROUND:
            return Origin(f"{_AROUND[head]}.{leaf}", shape)
        if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
            kind, index, inner = match[1], int(match[2]), match[3]
            if kind == "resnets":
                return Origin(f"middle_block.{index * (transformers + 1)}.{_renamed(inner, _RESNET)}", shape)
            return Origin(f"middle_block.{1 + index}.{inner}", shape)
        match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
        assert match, name
        down, level, kind, index, inner = match[1] == "down", int(match[2]), match[3], int(match[4]), match[5]
        side, first = ("input_blocks", 1) if down else ("output_blocks", 0)
        first += level * (layers + 1)
        if kind == "resnets":
            return Origin(f"{side}.{first + index}.0.{_renamed(inner, _RESNET)}", shape)
        if kind == "attentions":
            place, k = divmod(index, transformers)
            return Origin(f"{side}.{first + place}.{1 + k}.{inner}", shape)
        if kind == "downsamplers":
            return Origin(f"{side}.{first + layers}.0.{inner.replace('conv', 'op')}", shape)
        return Origin(f"{side}.{first + layers}.{1 + transformers}.{inner}", shape)

    return where


def ema(name: str) -> str:
    """The averaged copy of a T-UNet weight: dots are dropped from its name (references.md#checkpoint-layout)."""
    return "model_ema." + f"diffusion_model.{name}".replace(".", "")


def vae(levels: int) -> Map:
    """The autoencoder of `levels` resolutions. The decoder's levels count from the lowest; attention was of 1x1 convolutions."""
    rules = (
        (r"^encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block."),
        (r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
        (r"^decoder\.up_blocks\.(\d+)\.resnets\.", r"decoder.up.\1.block."),
        (r"^decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", r"decoder.up.\1.upsample."),
        (r"mid_block\.resnets\.0\.", "mid.block_1."),
        (r"mid_block\.resnets\.1\.", "mid.block_2."),
        (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
        (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
        (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
    )

    def where(name: str, shape: tuple[int, ...]) -> Origin:
        key = re.sub(r"^(decoder\.up)\.(\d+)", lambda m: f"{m[1]}.{levels - 1 - int(m[2])}", _renamed(name, rules))
        return Origin(key, (*shape, 1, 1) if ".attn_1." in key and len(shape) == 2 else shape)

    return where


def vocoder(name: str, shape: tuple[int, ...]) -> Origin:
    """HiFi-GAN; `mean` and `scale` exist on our side alone."""
    return Origin(re.sub(r"^upsampler\.", "ups.", name), shape)


# ------------------------------------------------------------------------------------------------------ conditions

_HTSAT = (
    (r"^audio_model\.audio_encoder\.", "audio_branch."),
    (r"^text_model\.", "text_branch."),
    (r"^(text|audio)_projection\.linear1\.", r"\1_projection.0."),
    (r"^(text|audio)_projection\.linear2\.", r"\1_projection.2."),
)
_HTSAT_BLOCKS = (
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.batch_norm\.", ".bn0."),
)


def clap(name: str, shape: tuple[int, ...]) -> Origin:
    """LAION CLAP: the text tower's names are RoBERTa's in both; the audio tower packs query, key and value."""
    key = _renamed(name, _HTSAT)
    if not key.startswith("audio_branch."):
        return Origin(key, shape)
    key = _renamed(key, _HTSAT_BLOCKS)
    if match := re.fullmatch(r"(.+\.attn)\.(query|key|value)\.(weight|bias)", key):
        return Origin(f"{match[1]}.qkv.{match[3]}", (3 * shape[0], *shape[1:]), ("query", "key", "value").index(match[2]), 3)
    return Origin(key, shape)


def gpt2(name: str, shape: tuple[int, ...]) -> Origin:
    """GPT-2 without its head."""
    return Origin(name.removeprefix("transformer."), shape)


def projection(name: str, shape: tuple[int, ...]) -> Origin:
    """The condition projections, and row k of the tables that hold what stands before and after condition k."""
    if match := re.fullmatch(r"(sos|eos)_embed(_1)?", name):
        table = {"sos": "start_of_sequence_tokens", "eos": "end_of_sequence_tokens"}[match[1]]
        return Origin(f"{table}.weight", (SPECIAL_ROWS, *shape), 1 if match[2] else 0, SPECIAL_ROWS)
    if match := re.fullmatch(r"projection(_1)?\.(.+)", name):
        return Origin(f"input_sequence_embed_linear.{1 if match[1] else 0}.{match[2]}", shape)
    assert name == "learnable_positional_embedding", name
    return Origin(f"cond_stage_models.1.{name}", shape)


_VITS = (
    (r"^embed_tokens\.", "emb."),
    (r"^project\.", "proj."),
    (r"^encoder\.layers\.(\d+)\.attention\.([kqv])_proj\.", r"encoder.attn_layers.\1.conv_\2."),
    (r"^encoder\.layers\.(\d+)\.attention\.out_proj\.", r"encoder.attn_layers.\1.conv_o."),
    (r"^encoder\.layers\.(\d+)\.attention\.", r"encoder.attn_layers.\1."),
    (r"^encoder\.layers\.(\d+)\.feed_forward\.", r"encoder.ffn_layers.\1."),
    (r"^encoder\.layers\.(\d+)\.layer_norm\.weight", r"encoder.norm_layers_1.\1.gamma"),
    (r"^encoder\.layers\.(\d+)\.layer_norm\.bias", r"encoder.norm_layers_1.\1.beta"),
    (r"^encoder\.layers\.(\d+)\.final_layer_norm\.weight", r"encoder.norm_layers_2.\1.gamma"),
    (r"^encoder\.layers\.(\d+)\.final_layer_norm\.bias", r"encoder.norm_layers_2.\1.beta"),
)


def phoneme_encoder(name: str, shape: tuple[int, ...]) -> Origin:
    """The VITS text encoder (its `text_encoder` alone); attention was of 1x1 convolutions."""
    key = _renamed(name, _VITS)
    return Origin(key, (*shape, 1) if ".conv_" in key and ".attn_layers." in key and len(shape) == 2 else shape)
