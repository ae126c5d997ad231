"""PANNs CNN14 (Kong et al. 2020): the judge behind FD, IS and KL of the AudioLDM family (references.md#cnn14).

Parameters carry the names of the published checkpoints. Their stored Fourier kernels and mel filters are not parameters
here: they are computed, and `drop_front_end` compares what a checkpoint stores with them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from stages.audio import slaney_filterbank
from stages.errors import UserError
from stages.judges.network import Network
from stages.judges.winograd import WinogradConv2d

POWER_FLOOR = 1e-10  # of the mel spectrogram before its logarithm, -100 dB
MEL_MEAN, MEL_STD = -40.0, 20.0  # rough level and spread in dB, so that random weights give usable outputs; a checkpoint has its own
WINOGRAD_WIDTH = 512  # channels from which WinogradConv2d is the faster convolution for ten-second clips
FRONT_END = ("spectrogram_extractor.stft.conv_real.weight", "spectrogram_extractor.stft.conv_imag.weight", "logmel_extractor.melW")


@dataclass(frozen=True)
class Cnn14Config:
    """Sizes of CNN14; the defaults are `Cnn14_16k_mAP=0.438.pth`."""

    sample_rate: int = 16_000  # Hz
    n_fft: int = 512  # samples; also the length of the Hann window
    hop_length: int = 160  # samples
    mel_bins: int = 64
    fmin: float = 50.0  # Hz
    fmax: float = 8000.0  # Hz
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)  # channels of each block; the last is the embedding's
    classes: int = 527  # of AudioSet

    @property
    def min_samples(self) -> int:
        """Samples of the shortest clip: every block but the last halves the frames, and one must remain."""
        return max((2 ** (len(self.widths) - 1) - 1) * self.hop_length, self.n_fft // 2 + 1)


CNN14_16K = Cnn14Config()
CNN14_32K = Cnn14Config(sample_rate=32_000, n_fft=1024, hop_length=320, fmax=14_000.0)  # `Cnn14_mAP=0.431.pth`


class ConvBlock(nn.Module):
    """Two 3x3 convolutions, each normalised and rectified, then average pooling; `[B, C, F, M]` to `[B, D, F / pool, M / pool]`."""

    def __init__(self, channels: int, width: int, pool: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.avg_pool2d(x, self.pool)


class Cnn14(Network):
    """Waveform to an embedding and the logits of AudioSet's classes."""

    has_logits = True

    def __init__(self, config: Cnn14Config) -> None:
        super().__init__()
        self.config = config
        self.sample_rate = config.sample_rate
        self.embedding_width = config.widths[-1]
        self.bn0 = nn.BatchNorm1d(config.mel_bins)
        self.bn0.running_mean = torch.full((config.mel_bins,), MEL_MEAN)
        self.bn0.running_var = torch.full((config.mel_bins,), MEL_STD**2)
        channels = (1, *config.widths)
        for k, width in enumerate(config.widths, 1):
            self.add_module(f"conv_block{k}", ConvBlock(channels[k - 1], width, 2 if k < len(config.widths) else 1))
        self.fc1 = nn.Linear(config.widths[-1], config.widths[-1])
        self.fc_audioset = nn.Linear(config.widths[-1], config.classes)
        self.singly = 0  # leading blocks that run clip by clip

    @property
    def blocks(self) -> list[ConvBlock]:
        return [module for module in self.children() if isinstance(module, ConvBlock)]

    def forward(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings `[B, widths[-1]]` (rectified) and logits `[B, classes]` (before the sigmoid) of waveforms `[B, T]` in [-1, 1].

        Raises ValueError for fewer than `config.min_samples` samples.
        """
        x = self.bn0(log_mel(waveform, self.config).transpose(1, 2)).transpose(1, 2)[:, None]
        singly, together = self.blocks[: self.singly], self.blocks[self.singly :]
        if singly:
            x = torch.cat([functools.reduce(lambda y, block: block(y), singly, clip) for clip in x.split(1)])
        x = functools.reduce(lambda y, block: block(y), together, x)
        x = x.mean(3)  # over frequency: [B, D, F]
        embedding = F.relu(self.fc1(x.amax(2) + x.mean(2)))
        return embedding, self.fc_audioset(embedding)

    def published(self, state: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
        """The checkpoint's weights without its front end, once that is seen to be the one computed here."""
        return drop_front_end(state, self.config, source)

    def fuse(self) -> None:
        """Put the normalisations into the convolutions, and run each block as suits its size on a CPU.

        The first blocks have large images and few weights: clip by clip they stay in the cache. The last have small images
        and most of the weights: a batch shares the reading of those, and Winograd's form saves over half of the products.
        """
        self.singly = sum(block.conv1.out_channels < WINOGRAD_WIDTH for block in self.blocks)
        for place, block in enumerate(self.blocks):
            for conv, norm in (("conv1", "bn1"), ("conv2", "bn2")):
                fused = fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm))
                setattr(block, conv, fused if place < self.singly else WinogradConv2d(fused))
                setattr(block, norm, nn.Identity())


# ------------------------------------------------------------------------------------------------------ front end


def log_mel(waveform: Tensor, config: Cnn14Config) -> Tensor:
    """Mel power spectrogram in dB of waveforms `[B, T]`: `[B, 1 + T // hop_length, mel_bins]`.

    10 log10 max(M |STFT|², 1e-10) with M Slaney's filterbank, under a periodic Hann window, centred by reflection.
    """
    if waveform.shape[-1] < config.min_samples:
        needed = f"{config.min_samples} samples at {config.sample_rate} Hz"
        raise ValueError(f"CNN14 needs clips of at least {needed}, got {waveform.shape[-1]}")
    window, filters = (constant.to(waveform.device) for constant in _constants(config))
    spectrum = torch.stft(waveform, config.n_fft, config.hop_length, window=window, center=True, pad_mode="reflect", return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()
    return 10.0 * (power.transpose(1, 2) @ filters).clamp(min=POWER_FLOOR).log10()


def fourier_kernels(n_fft: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Real and imaginary part of the windowed Fourier basis as the checkpoints store it, each `[n_fft // 2 + 1, 1, n_fft]`."""
    time = np.arange(n_fft)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * time / n_fft)
    basis = window * np.exp(-2j * np.pi * (np.outer(np.arange(n_fft // 2 + 1), time) % n_fft) / n_fft)
    return basis.real[:, None], basis.imag[:, None]


def drop_front_end(state: Mapping[str, Tensor], config: Cnn14Config, source: object) -> dict[str, Tensor]:
    """`state` without the stored front end.

    The checkpoint's front end decides what the network was trained on, so one that differs from the computed one by more
    than 1e-5 of its largest value raises UserError: it belongs to another sample rate or another network.
    """
    kernels = fourier_kernels(config.n_fft)
    filters = slaney_filterbank(config.sample_rate, config.n_fft, config.mel_bins, config.fmin, config.fmax).T
    for key, computed in zip(FRONT_END, (*kernels, filters), strict=True):
        stored = state.get(key)
        if stored is None:
            continue
        if tuple(stored.shape) != computed.shape:
            problem = f"is {list(stored.shape)} instead of {list(computed.shape)}"
        elif (error := float(np.abs(stored.double().cpu().numpy() - computed).max() / np.abs(computed).max())) > 1e-5:
            problem = f"differs by {error:.1e} of its largest value"
        else:
            continue
        raise UserError(
            f"{source} has another front end than CNN14 at {config.sample_rate} Hz ({config.n_fft}-point transform, "
            f"{config.mel_bins} mel bins from {config.fmin:g} to {config.fmax:g} Hz): {key} {problem}; "
            "name it in the manifest as the judge that it is (cnn14-16k or cnn14-32k)"
        )
    return {key: value for key, value in state.items() if key not in FRONT_END}


@lru_cache(maxsize=8)
def _constants(config: Cnn14Config) -> tuple[Tensor, Tensor]:
    filters = slaney_filterbank(config.sample_rate, config.n_fft, config.mel_bins, config.fmin, config.fmax)
    with torch.inference_mode(False):
        return torch.hann_window(config.n_fft), torch.from_numpy(np.ascontiguousarray(filters.T, dtype=np.float32))
