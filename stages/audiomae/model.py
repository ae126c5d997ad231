"""AudioMAE (Huang et al. 2022): a vision transformer on filterbank patches, and the pooling of its features to LOA.

Parameters carry the names of the published checkpoint, so `pretrained.pth` of facebookresearch/AudioMAE loads as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.checkpoints import load_network, load_weights, read_checkpoint, save_network
from stages.errors import UserError


@dataclass(frozen=True)
class AudioMAEConfig:
    """Sizes of AudioMAE; the defaults are the published ViT-B."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    patch: int = 16  # frames and bins per patch
    frames: int = 1024
    bins: int = 128
    feature_blocks: int = 3  # LOA averages the outputs of the last three blocks (the paper's "16" exceeds the depth)
    mask_ratio: float = 0.8  # of patches, hidden in pretraining
    decoder: str = "swin"  # "swin" as published, "global" for plain attention, "none" for the encoder alone
    decoder_width: int = 512
    decoder_depth: int = 16
    decoder_heads: int = 16
    augment_roll: bool = True  # pretraining sees clips rolled in time,
    augment_gain: bool = True  # at 0.5 to 1.5 times their level

    def __post_init__(self) -> None:
        if self.decoder not in ("swin", "global", "none"):
            raise UserError(f"AudioMAE's decoder is {self.decoder!r}; expected swin, global or none")
        if self.frames % self.patch or self.bins % self.patch:
            raise UserError(f"AudioMAE sees {self.frames} frames x {self.bins} bins, which patches of {self.patch} do not tile")
        if not 1 <= self.feature_blocks <= self.depth:
            raise UserError(f"feature_blocks is {self.feature_blocks}, but AudioMAE has {self.depth} blocks")
        if self.decoder == "swin" and any(side % WINDOW for side in self.grid):
            raise UserError(f"the swin decoder needs a grid that windows of {WINDOW} tile, got {self.grid}; choose decoder=global")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along (time, frequency)."""
        return self.frames // self.patch, self.bins // self.patch

    @property
    def tokens(self) -> int:
        """Patches of one clip."""
        return self.grid[0] * self.grid[1]


class Reconstruction(NamedTuple):
    """What masked pretraining returns."""

    loss: Tensor  # [], mean squared error over the hidden patches
    prediction: Tensor  # [B, N, patch²], every patch, normalised by its own mean and deviation
    mask: Tensor  # [B, N], 1 where the encoder could not see


# -------------------------------------------------------------------------------------------------- transformers


class Attention(nn.Module):
    """Multi-head self-attention, [B, L, D] to [B, L, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


WINDOW = 4  # patches along each side of a decoder window


class WindowAttention(nn.Module):
    """Cosine attention inside windows, biased by a small network of the log distance (Swin V2, Liu et al. 2022)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.meta_mlp = nn.Sequential()  # named children: the published keys are meta_mlp.fc1 and meta_mlp.fc2
        self.meta_mlp.add_module("fc1", nn.Linear(2, 384))
        self.meta_mlp.add_module("relu", nn.ReLU())
        self.meta_mlp.add_module("fc2", nn.Linear(384, heads))
        self.tau = nn.Parameter(torch.ones(heads))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Windows `[B, W, 16, D]`; `mask` `[W, 16, 16]` is added to the logits."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)  # each [B, W, heads, 16, D / heads]
        q = F.normalize(q, dim=-1) / self.tau.clamp(min=0.01)[:, None, None]
        bias = self.distance_bias() + mask[:, None]
        mixed = F.scaled_dot_product_attention(q.to(v.dtype), F.normalize(k, dim=-1).to(v.dtype), v, bias.to(v.dtype), scale=1.0)
        return self.proj(mixed.transpose(2, 3).flatten(3))

    def distance_bias(self) -> Tensor:
        """Bias `[heads, 16, 16]` of every pair of places in a window: a function of sign(d) ln(1 + |d|)."""
        place = torch.arange(WINDOW * WINDOW, device=self.tau.device)
        place = torch.stack([place // WINDOW, place % WINDOW], dim=-1).float()
        distance = place[:, None] - place[None]
        return self.meta_mlp(distance.sign() * distance.abs().log1p()).permute(2, 0, 1)


class SwinBlock(nn.Module):
    """Windowed block with the norms *after* its branches; odd blocks shift the windows by half along time."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, grid: tuple[int, int], shifted: bool) -> None:
        super().__init__()
        self.grid = grid
        self.shift = WINDOW // 2 if shifted and grid[0] > WINDOW else 0
        self.attn = WindowAttention(width, heads)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        nn.init.zeros_(self.norm1.weight)  # every block starts as the identity
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.grid
        square = x.unflatten(1, self.grid).roll(-self.shift, 1)
        windows = square.unflatten(2, (-1, WINDOW)).unflatten(1, (-1, WINDOW)).transpose(2, 3)  # [B, rows / 4, columns / 4, 4, 4, D]
        mixed = self.attn(windows.flatten(3, 4).flatten(1, 2), self.wrap_mask(x.device))
        mixed = mixed.unflatten(2, (WINDOW, WINDOW)).unflatten(1, (rows // WINDOW, columns // WINDOW))
        mixed = mixed.transpose(2, 3).flatten(3, 4).flatten(1, 2).roll(self.shift, 1).flatten(1, 2)
        x = x + self.norm1(mixed)
        return x + self.norm2(self.mlp(x))

    def wrap_mask(self, device: torch.device) -> Tensor:
        """`[W, 16, 16]`: -100 between places of one window that only the roll brought together, else 0."""
        rows, columns = self.grid
        wrapped = torch.arange(rows, device=device) >= rows - self.shift
        wrapped = wrapped.view(-1, 1, WINDOW, 1).expand(-1, columns // WINDOW, -1, WINDOW).reshape(-1, WINDOW * WINDOW)
        return -100.0 * (wrapped[:, :, None] != wrapped[:, None]).float()


# ------------------------------------------------------------------------------------------------------ AudioMAE


class PatchEmbedding(nn.Module):
    """Non-overlapping patches `[B, F, M]` as tokens `[B, N, D]`; token i lies at (time i // f, frequency i % f)."""

    def __init__(self, config: AudioMAEConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, config.width, config.patch, config.patch)
        nn.init.xavier_uniform_(self.proj.weight.view(config.width, -1))

    def forward(self, fbank: Tensor) -> Tensor:
        return self.proj(fbank[:, None]).flatten(2).transpose(1, 2)


def position_table(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed sin-cos positions `[1, 1 + N, width]`, with a zero row for the class token.

    The published table was built for the transposed grid: of token i the first half of the channels encodes i mod t
    and the second i // t, although its place is (i // f, i mod f). The weights were trained with it, so it stays.
    """
    times, frequencies = grid
    omega = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
    token = np.arange(times * frequencies)
    angles = [np.outer(position, omega) for position in (token % times, token // times)]
    table = np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(np.concatenate([np.zeros((1, width)), table])[None].astype(np.float32))


class AudioMAE(nn.Module):
    """Masked autoencoder on AudioMAE filterbanks (`stages.audio.fbank`)."""

    pos_embed: Tensor
    decoder_pos_embed: Tensor

    def __init__(self, config: AudioMAEConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbedding(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.register_buffer("pos_embed", position_table(config.width, config.grid))
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        nn.init.normal_(self.cls_token, std=0.02)
        if config.decoder != "none":
            width = config.decoder_width
            self.decoder_embed = nn.Linear(config.width, width)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
            self.register_buffer("decoder_pos_embed", position_table(width, config.grid))
            self.decoder_blocks = nn.ModuleList(self._decoder_block(i) for i in range(config.decoder_depth))
            self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
            self.decoder_pred = nn.Linear(width, config.patch**2)
            nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def _decoder_block(self, index: int) -> nn.Module:
        config = self.config
        if config.decoder == "swin":
            return SwinBlock(config.decoder_width, config.decoder_heads, config.mlp_ratio, config.grid, shifted=index % 2 == 1)
        return Block(config.decoder_width, config.decoder_heads, config.mlp_ratio)

    def features(self, fbank: Tensor) -> Tensor:
        """Frame-level features, the source of LOA.

        The outputs of the last `feature_blocks` blocks, each through the final LayerNorm, averaged.

        Args:
            fbank: `[B, frames, bins]` of `stages.audio.fbank`.

        Returns:
            `[B, 1 + N, width]`; the first token is the class token, the others run time-major.
        """
        x = self._with_class_token(self._tokens(fbank))
        total = torch.zeros_like(x)
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index >= self.config.depth - self.config.feature_blocks:
                total = total + self.norm(x)
        return total / self.config.feature_blocks

    def forward(self, fbank: Tensor, noise: Tensor) -> Reconstruction:
        """Hide the patches with the largest noise and predict them from the others.

        Args:
            fbank: `[B, frames, bins]`.
            noise: `[B, N]`; its order decides which patches are seen.
        """
        tokens = self._tokens(fbank)
        order = noise.argsort(dim=1, stable=True)
        rank = order.argsort(dim=1)
        num_seen = int(self.config.tokens * (1 - self.config.mask_ratio))
        seen = tokens.gather(1, order[:, :num_seen, None].expand(-1, -1, tokens.shape[-1]))
        x = self._with_class_token(seen)
        for block in self.blocks:
            x = block(x)
        prediction = self._decode(self.norm(x), rank)
        mask = (rank >= num_seen).float()
        return Reconstruction(self.loss(fbank, prediction, mask), prediction, mask)

    def loss(self, fbank: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error of `prediction` `[B, N, patch²]` to the normalised patches of `fbank` where `mask` `[B, N]` is 1."""
        target, _, _ = self.normalised_patches(fbank)
        error = (prediction.float() - target).square().mean(-1)
        return (error * mask).sum() / mask.sum()

    def _tokens(self, fbank: Tensor) -> Tensor:
        expected = (self.config.frames, self.config.bins)
        if tuple(fbank.shape[1:]) != expected:
            raise ValueError(f"AudioMAE expects filterbanks [B, {expected[0]}, {expected[1]}], got {list(fbank.shape)}")
        return self.patch_embed(fbank) + self.pos_embed[:, 1:]

    def _with_class_token(self, tokens: Tensor) -> Tensor:
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        return torch.cat([first.to(tokens.dtype), tokens], dim=1)

    def _decode(self, encoded: Tensor, rank: Tensor) -> Tensor:
        """`[B, 1 + seen, D]` and the place of each patch in the noise order `[B, N]` to patches `[B, N, patch²]`."""
        x = self.decoder_embed(encoded)
        hidden = self.mask_token.to(x.dtype).expand(len(x), self.config.tokens + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], hidden], dim=1).gather(1, rank[..., None].expand(-1, -1, x.shape[-1]))
        if self.config.decoder == "swin":  # windows have no place for the class token
            x = patches + self.decoder_pos_embed[:, 1:]
        else:
            x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        prediction: Tensor = self.decoder_pred(self.decoder_norm(x))
        return prediction[:, -self.config.tokens :]

    def normalised_patches(self, fbank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patches `[B, N, patch²]` with mean 0 and deviation 1 each, and the means and deviations `[B, N, 1]` they had."""
        (times, frequencies), p = self.config.grid, self.config.patch
        patches = fbank.float().view(-1, times, p, frequencies, p).transpose(2, 3).reshape(-1, times * frequencies, p * p)
        mean = patches.mean(-1, keepdim=True)
        deviation = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        return (patches - mean) / deviation, mean, deviation

    def unpatch(self, patches: Tensor) -> Tensor:
        """Patches `[B, N, patch²]` laid out as filterbanks `[B, frames, bins]`."""
        (times, frequencies), p = self.config.grid, self.config.patch
        return patches.view(-1, times, frequencies, p, p).transpose(2, 3).reshape(-1, self.config.frames, self.config.bins)

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        save_network(self, self.config, folder)

    @classmethod
    def load(cls, folder: Path) -> AudioMAE:
        """The network that `save` wrote, in evaluation mode."""
        return load_network(cls, AudioMAEConfig(), folder, "run `loa train audiomae` or import the public weights")

    @classmethod
    def load_pretrained(cls, path: Path, config: AudioMAEConfig | None = None) -> AudioMAE:
        """The network of an official checkpoint (`{"model": weights}`, e.g. `pretrained.pth`), in evaluation mode.

        With `decoder="none"` the checkpoint's decoder, of whichever kind, is left out.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no AudioMAE checkpoint at {path}; pretrained.pth is linked from github.com/facebookresearch/AudioMAE")
        checkpoint = read_checkpoint(path)
        if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("model"), Mapping):
            held = f"the keys {', '.join(map(str, list(checkpoint)[:5]))}" if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
            raise UserError(f"{path} is not an AudioMAE checkpoint: expected a dictionary with the key 'model', got {held}")
        model = cls(config or AudioMAEConfig())
        state = checkpoint["model"]
        if model.config.decoder == "none":
            state = {key: value for key, value in state.items() if not key.startswith("decoder_") and key != "mask_token"}
        load_weights(model, state, path)
        return model.eval()


def pool_loa(feature: Tensor, grid: tuple[int, int], pooling: int) -> Tensor:
    """Pool AudioMAE features to the language of audio (references.md#loa-pooling).

    The mean of average and maximum pooling over `pooling` x min(pooling, f) patches of (time, frequency).

    Args:
        feature: `[B, 1 + N, D]` of `AudioMAE.features`.
        grid: patches along (time, frequency), t * f = N.
        pooling: λ; 8 for sound and music, 1 for speech.

    Returns:
        `[B, N / (pooling * min(pooling, f)), D]`, time-major.
    """
    times, frequencies = grid
    if feature.shape[1] != 1 + times * frequencies:
        raise ValueError(f"features of a {times} x {frequencies} grid are [B, {1 + times * frequencies}, D], got {list(feature.shape)}")
    kernel = (pooling, min(pooling, frequencies))
    if times % kernel[0] or frequencies % kernel[1]:
        raise ValueError(f"pooling {pooling} does not divide the {times} x {frequencies} grid of AudioMAE")
    plane = feature[:, 1:].transpose(1, 2).unflatten(2, grid)
    pooled = (F.avg_pool2d(plane, kernel) + F.max_pool2d(plane, kernel)) / 2
    return pooled.flatten(2).transpose(1, 2)
