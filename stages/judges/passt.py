"""PaSST-S (Koutini et al. 2022): the judge behind the KL of AudioLDM 2 and AudioGen (references.md#passt).

Parameters carry the names of `passt-s-f128-p16-s10-ap.476-swa.pt`. Patches are dropped only in training, which is not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from stages.audio import htk_filterbank
from stages.audiomae.model import Block
from stages.judges.network import Network

SAMPLE_RATE = 32_000  # Hz
N_FFT, WINDOW, HOP = 1024, 800, 320  # samples
MEL_BINS, FMIN, FMAX = 128, 0.0, 15_000.0  # Hz
PRE_EMPHASIS = 0.97
LOG_OFFSET = 1e-5  # added to the mel powers before their logarithm


@dataclass(frozen=True)
class PaSSTConfig:
    """Sizes of PaSST; the defaults are the published PaSST-S."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    patch: int = 16  # frames and bins per patch
    stride: int = 10  # frames and bins from one patch to the next
    frames: int = 1000  # of the longest clip, 10 s
    classes: int = 527  # of AudioSet

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along (frequency, time) of the longest clip: 12 x 99."""
        return (MEL_BINS - self.patch) // self.stride + 1, (self.frames - self.patch) // self.stride + 1


class PatchEmbedding(nn.Module):
    """Overlapping patches of spectrograms `[B, 1, M, F]` as `[B, D, rows, columns]`."""

    def __init__(self, config: PaSSTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, config.width, config.patch, config.stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class PaSST(Network):
    """Waveform to the mean of its two special tokens, and the logits of AudioSet's classes."""

    has_logits = True
    sample_rate = SAMPLE_RATE

    def __init__(self, config: PaSSTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding_width = width = config.width
        rows, columns = config.grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
        self.new_pos_embed = nn.Parameter(torch.zeros(1, 2, width))  # of the two special tokens
        self.freq_new_pos_embed = nn.Parameter(torch.zeros(1, width, rows, 1))
        self.time_new_pos_embed = nn.Parameter(torch.zeros(1, width, 1, columns))
        for table in (self.cls_token, self.dist_token, self.new_pos_embed, self.freq_new_pos_embed, self.time_new_pos_embed):
            nn.init.trunc_normal_(table, std=0.02)
        self.patch_embed = PatchEmbedding(config)
        self.blocks = nn.Sequential(*(Block(width, config.heads, 4.0) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.classes))
        self.head_dist = nn.Linear(width, config.classes)  # only distillation used it; the checkpoint has it

    def forward(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings `[B, width]` and logits `[B, classes]` (before the sigmoid) of waveforms `[B, T]` in [-1, 1].

        Raises ValueError for clips shorter than a patch or longer than the time positions reach (10 s).
        """
        config, samples = self.config, waveform.shape[-1]
        columns = ((samples - 1) // HOP + 1 - config.patch) // config.stride + 1
        if not 1 <= columns <= config.grid[1]:
            shortest, longest = (config.patch - 1) * HOP + 1, (config.grid[1] * config.stride + config.patch - 1) * HOP
            raise ValueError(f"PaSST needs clips of {shortest} to {longest} samples at {SAMPLE_RATE} Hz, got {samples}")
        patches = self.patch_embed(log_mel(waveform).transpose(1, 2)[:, None])
        patches = patches + self.time_new_pos_embed[..., :columns] + self.freq_new_pos_embed
        special = torch.cat([self.cls_token, self.dist_token], dim=1) + self.new_pos_embed
        x = torch.cat([special.expand(len(patches), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        x = self.norm(self.blocks(x)[:, :2])  # the other tokens have done their work
        embedding = x.mean(1)
        return embedding, self.head(embedding)


def log_mel(waveform: Tensor) -> Tensor:
    """(ln(M |STFT|² + 1e-5) + 4.5) / 5 of waveforms `[B, T]`: `[B, 1 + (T - 1) // 320, 128]`.

    After pre-emphasis x[n + 1] - 0.97 x[n], which drops one sample, a symmetric Hann window of 25 ms every 10 ms, centred by
    reflection, in a 1024-point transform; M are Kaldi's triangles from 0 to 15 kHz.
    """
    window, filters = (constant.to(waveform.device) for constant in _constants())
    emphasised = waveform[:, 1:] - PRE_EMPHASIS * waveform[:, :-1]
    spectrum = torch.stft(emphasised, N_FFT, HOP, WINDOW, window, center=True, pad_mode="reflect", return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()
    return ((power.transpose(1, 2) @ filters + LOG_OFFSET).log() + 4.5) / 5.0


@lru_cache(maxsize=1)
def _constants() -> tuple[Tensor, Tensor]:
    filters = htk_filterbank(SAMPLE_RATE, N_FFT, MEL_BINS, FMIN, FMAX)
    with torch.inference_mode(False):
        return torch.hann_window(WINDOW, periodic=False), torch.from_numpy(np.ascontiguousarray(filters.T, dtype=np.float32))
