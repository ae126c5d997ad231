"""Vocoder training: sound like the mel it came from, and fool the critics (references.md#vocoder-loss)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.speecht5.modeling_speecht5 import HifiGanResidualBlock

from stages.adversarial import feature_matching_loss, least_squares_adversarial_loss, least_squares_discriminator_loss, standing
from stages.audio import AudioConfig, log_mel, pad_or_cut
from stages.base import Stage
from stages.errors import UserError
from stages.variants import Variant
from stages.vocoder.model import VocoderConfig, VocoderLossConfig


class VocoderStage(Stage):
    """Random segments of the store's waveforms; their mels are computed where the model is.

    Until `critic_start` the critics are neither run nor yielded.
    """

    name = "vocoder"
    series = ("waveform",)
    blocks = (HifiGanResidualBlock,)
    may_lack = ("discriminator.safetensors",)
    full_precision = True  # rounding real sound to bfloat16 alone costs 0.3 in log-mel, 1.0 to 1.4 in the highest bins

    def __init__(self, config: VocoderConfig, loss: VocoderLossConfig, audio: AudioConfig) -> None:
        super().__init__()
        if not audio.n_fft <= loss.segment_samples <= audio.clip_samples:
            raise UserError(f"segment_samples is {loss.segment_samples}; expected {audio.n_fft} to {audio.clip_samples}")
        self.loss, self.audio = loss, audio
        self.vocoder = config.build(audio)
        self.discriminator = loss.critics.build()

    @classmethod
    def build(cls, variant: Variant, released: Callable[[str], Path]) -> VocoderStage:
        return cls(variant.vocoder, variant.vocoder_loss, variant.audio)

    def parts(self) -> dict[str, nn.Module]:
        return {"discriminator": self.discriminator, "vocoder": self.vocoder}

    def example(self, clip: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Tensor]:
        """`waveform` [T], the whole clip, and a random `segment` [segment_samples] of it, at most half of it padding.

        A short sentence is mostly padding, of which there is nothing to learn but silence.
        """
        waveform, samples = pad_or_cut(np.asarray(clip["waveform"], np.float32), self.audio.clip_samples), self.loss.segment_samples
        sounding = len(np.trim_zeros(waveform, "b"))
        end = min(len(waveform), max(sounding + samples // 2, samples))
        start = int(rng.integers(end - samples + 1))
        segment = waveform[start : start + samples]
        return {"waveform": torch.from_numpy(waveform), "segment": torch.from_numpy(segment.copy())}

    def losses(self, batch: dict[str, Any]) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """The critics' loss once they have started, then the vocoder's; `batch["step"]` counts finished updates."""
        real = batch["segment"]
        mel = log_mel(real, self.audio)
        adversarial = batch["step"] >= self.loss.critic_start
        again = adversarial and batch.get("in_pieces", False)
        with torch.set_grad_enabled(not again):
            fake = self.vocoder(mel).float()[:, : real.shape[-1]]
        real = real[:, : fake.shape[-1]]
        if adversarial:
            scores = self.discriminator(real).scores, self.discriminator(fake.detach()).scores
            loss = least_squares_discriminator_loss(*scores)
            yield "discriminator", loss, {"discriminator": loss} | standing(*scores, loss, middle=0.5, at_chance=0.5 * len(scores[0]))

        if again:
            fake = self.vocoder(mel).float()[:, : real.shape[-1]]
        mel_l1 = F.l1_loss(log_mel(fake, self.audio), mel)
        loss = self.loss.mel_weight * mel_l1
        logs = {"mel_l1": mel_l1}
        if self.loss.spectral_weight:
            spectral = spectral_loss(real, fake, self.loss.spectral_windows)
            loss = loss + self.loss.spectral_weight * spectral
            logs["spectral"] = spectral
        if adversarial:
            with torch.no_grad():
                wanted = self.discriminator(real).features
            verdict = self.discriminator(fake)
            deception = least_squares_adversarial_loss(verdict.scores)
            features = feature_matching_loss(wanted, verdict.features)
            loss = loss + deception + self.loss.feature_weight * features
            logs |= {"adversarial": deception, "features": features}
        yield "vocoder", loss, logs

    @torch.no_grad()
    def validate(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`mel_l1` between whole clips and their resynthesis, and the loss `spectral` of their linear spectra."""
        real, fake = self._resynthesise(batch["waveform"])
        return {
            "mel_l1": F.l1_loss(log_mel(fake, self.audio), log_mel(real, self.audio)),
            "spectral": spectral_loss(real, fake, self.loss.spectral_windows),
        }

    @torch.no_grad()
    def listen(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The first clip and its resynthesis [T]."""
        real, fake = self._resynthesise(batch["waveform"][:1])
        return {"audio/original": real[0], "audio/resynthesis": fake[0]}

    def _resynthesise(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        fake = self.vocoder(log_mel(waveform, self.audio)).float()
        samples = min(waveform.shape[-1], fake.shape[-1])
        return waveform[:, :samples], fake[:, :samples]

    def homes(self) -> dict[str, nn.Module]:
        return {"vocoder": self.vocoder, "discriminator.safetensors": self.discriminator}

    def save(self, folder: Path) -> None:
        self.vocoder.save_pretrained(folder / "vocoder")
        save_file(self.discriminator.state_dict(), folder / "discriminator.safetensors")


def spectral_loss(real: Tensor, fake: Tensor, windows: tuple[int, ...]) -> Tensor:
    """Multi-resolution STFT loss of waveforms [B, T]: per clip, convergence + L1 of log magnitudes, averaged over windows."""
    terms = []
    with torch.autocast(real.device.type, enabled=False):
        for window in windows:
            target, given = magnitude(real.float(), window), magnitude(fake.float(), window)
            missed, length = (target - given).norm(dim=(1, 2)), target.norm(dim=(1, 2))
            terms.append((missed / length).mean() + F.l1_loss(given.log(), target.log()))
    return torch.stack(terms).mean()


def magnitude(waveform: Tensor, window: int) -> Tensor:
    """|STFT| [B, bins, frames] with a hop of a quarter window, at least 1e-4 so that its logarithm stays tame."""
    hann = torch.hann_window(window, device=waveform.device)
    spectrum = torch.stft(waveform, window, window // 4, window=hann, return_complex=True)
    return (spectrum.real.square() + spectrum.imag.square()).clamp(min=1e-8).sqrt()
