"""Log-mel spectrogram → waveform: HiFi-GAN as transformers' `SpeechT5HifiGan` (references.md#vocoder), and its critics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from stages.audio import AudioConfig
from stages.errors import UserError

SLOPE = 0.1  # of every LeakyReLU but the generator's last


@dataclass(frozen=True)
class VocoderConfig:
    """HiFi-GAN's shape. The defaults are AudioLDM 2 at 16 kHz: 55,264,897 parameters.

    The weights are trained without weight norm, in the form in which they are released: normalised and folded
    layers compute the same function, and a folded one can be sharded and exported as it is.
    """

    upsample_rates: tuple[int, ...] = (5, 4, 2, 2, 2)  # their product is the hop length
    upsample_kernels: tuple[int, ...] = (16, 16, 8, 4, 4)
    initial_channels: int = 1024  # halved by every upsampling
    resblock_kernels: tuple[int, ...] = (3, 7, 11)
    resblock_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    initializer_range: float = 0.01  # deviation of fresh weights
    mel_mean: float = 0.0  # the network reads (mel - mel_mean) / mel_std; the reference reads mels as they are
    mel_std: float = 1.0

    def __post_init__(self) -> None:
        if len(self.upsample_rates) != len(self.upsample_kernels):
            raise UserError(f"upsample_rates {self.upsample_rates} and upsample_kernels {self.upsample_kernels} differ in length")
        if len(self.resblock_kernels) != len(self.resblock_dilations):
            raise UserError(f"resblock_kernels {self.resblock_kernels} and resblock_dilations {self.resblock_dilations} differ in length")
        if self.initial_channels % 2 ** len(self.upsample_rates):
            raise UserError(f"initial_channels {self.initial_channels} cannot be halved {len(self.upsample_rates)} times")

    @classmethod
    def tiny(cls) -> VocoderConfig:
        """For two CPU cores: most of the work happens at low rates (trials in docs/log.md)."""
        return cls(
            upsample_rates=(8, 5, 4),
            upsample_kernels=(16, 11, 8),
            initial_channels=128,
            resblock_kernels=(3, 7),
            resblock_dilations=((1, 3), (1, 1)),  # kernel 7 dilated takes two to three times as long on a CPU
            initializer_range=0.05,
            mel_mean=-5.0,
            mel_std=2.2,
        )

    def build(self, audio: AudioConfig) -> SpeechT5HifiGan:
        """Fresh weights for mels of `audio`. Raises UserError when the rates do not give its hop length."""
        product = math.prod(self.upsample_rates)
        if product != audio.hop_length:
            raise UserError(f"upsample_rates {self.upsample_rates} multiply to {product}, the hop is {audio.hop_length}")
        vocoder = SpeechT5HifiGan(
            SpeechT5HifiGanConfig(
                model_in_dim=audio.mel_bins,
                sampling_rate=audio.sample_rate,
                upsample_initial_channel=self.initial_channels,
                upsample_rates=list(self.upsample_rates),
                upsample_kernel_sizes=list(self.upsample_kernels),
                resblock_kernel_sizes=list(self.resblock_kernels),
                resblock_dilation_sizes=[list(d) for d in self.resblock_dilations],
                initializer_range=self.initializer_range,
                leaky_relu_slope=SLOPE,
                normalize_before=(self.mel_mean, self.mel_std) != (0.0, 1.0),
            )
        )
        vocoder.mean.fill_(self.mel_mean)
        vocoder.scale.fill_(self.mel_std)
        return vocoder


class Verdict(NamedTuple):
    """What the critics say about a batch of waveforms: one entry per sub-discriminator."""

    scores: list[Tensor]  # [B, n] each
    features: list[list[Tensor]]  # the activations of every layer, the scores included


@dataclass(frozen=True)
class CriticConfig:
    """Shapes of HiFi-GAN's critics; the defaults are the reference's."""

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    period_channels: tuple[int, ...] = (32, 128, 512, 1024, 1024)
    scales: int = 3  # the waveform, then twice (and so on) as coarse
    scale_channels: tuple[int, ...] = (128, 128, 256, 512, 1024, 1024, 1024)

    def build(self) -> Critics:
        """Fresh weights."""
        return Critics(self)


class Critics(nn.Module):
    """All period and scale discriminators as one part."""

    def __init__(self, config: CriticConfig) -> None:
        super().__init__()
        if not config.periods and not config.scales:
            raise UserError("the vocoder's critics need at least one period or one scale")
        self.periods = nn.ModuleList(PeriodCritic(period, config.period_channels) for period in config.periods)
        self.scales = nn.ModuleList(
            ScaleCritic(config.scale_channels, spectral_norm if scale == 0 else weight_norm) for scale in range(config.scales)
        )

    def forward(self, waveform: Tensor) -> Verdict:
        """Judge waveforms [B, T]."""
        judged = [critic(waveform) for critic in self.periods]
        for i, critic in enumerate(self.scales):
            if i:
                waveform = F.avg_pool1d(waveform[:, None], 4, 2, 2)[:, 0]
            judged.append(critic(waveform))
        return Verdict([features[-1].flatten(1) for features in judged], judged)


class PeriodCritic(nn.Module):
    """Sees every `period`-th sample: the waveform folded to [T / period, period], convolved along time alone."""

    def __init__(self, period: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.period = period
        widths = [1, *channels]
        layers = [nn.Conv2d(a, b, (5, 1), (3, 1), (2, 0)) for a, b in zip(widths, widths[1:-1], strict=False)]
        layers.append(nn.Conv2d(widths[-2], widths[-1], (5, 1), 1, (2, 0)))
        self.layers = nn.ModuleList(weight_norm(layer) for layer in layers)
        self.last = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), 1, (1, 0)))

    def forward(self, waveform: Tensor) -> list[Tensor]:
        """Activations of all layers for waveforms [B, T]."""
        x = F.pad(waveform[:, None], (0, -waveform.shape[-1] % self.period), mode="reflect").unflatten(-1, (-1, self.period))
        return _activations(x, self.layers, self.last)


class ScaleCritic(nn.Module):
    """Sees the waveform itself through long grouped convolutions that shorten it 64-fold."""

    def __init__(self, channels: Sequence[int], norm: Callable[..., nn.Module]) -> None:
        super().__init__()
        if len(channels) != 7:
            raise UserError(f"a scale critic has seven layers, got scale_channels {tuple(channels)}")
        kernels, strides, groups = (15, 41, 41, 41, 41, 41, 5), (1, 2, 2, 4, 4, 1, 1), (1, 4, 16, 16, 16, 16, 1)
        widths = [1, *channels]
        self.layers = nn.ModuleList(
            norm(nn.Conv1d(a, b, k, s, k // 2, groups=math.gcd(g, a, b)))
            for a, b, k, s, g in zip(widths, channels, kernels, strides, groups, strict=False)
        )
        self.last = norm(nn.Conv1d(widths[-1], 1, 3, 1, 1))

    def forward(self, waveform: Tensor) -> list[Tensor]:
        """Activations of all layers for waveforms [B, T]."""
        return _activations(waveform[:, None], self.layers, self.last)


def _activations(x: Tensor, layers: nn.ModuleList, last: nn.Module) -> list[Tensor]:
    features = []
    for layer in layers:
        x = F.leaky_relu(layer(x), SLOPE)
        features.append(x)
    return [*features, last(x)]


@dataclass(frozen=True)
class VocoderLossConfig:
    """Weights of the objective and the length it is computed on; the defaults are HiFi-GAN's."""

    segment_samples: int = 8192
    mel_weight: float = 45.0
    feature_weight: float = 2.0
    spectral_weight: float = 0.0  # of the multi-resolution STFT loss, which HiFi-GAN has not
    spectral_windows: tuple[int, ...] = (256, 512, 1024, 2048)  # samples
    critic_start: int = 0  # steps without critics at the beginning
    critics: CriticConfig = CriticConfig()

    @classmethod
    def tiny(cls) -> VocoderLossConfig:
        """Spectral losses lead, and small critics join late (trials in docs/log.md)."""
        return cls(
            segment_samples=8000,
            spectral_weight=15.0,
            critic_start=2400,
            critics=CriticConfig(periods=(2, 3, 5), period_channels=(8, 16, 32, 64), scales=1, scale_channels=(8, 16, 16, 32, 32, 64, 64)),
        )
