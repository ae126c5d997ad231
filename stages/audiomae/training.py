"""AudioMAE pretraining: hide most patches of a filterbank, predict them from the rest (references.md#audiomae-pretraining)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stages.audio import AudioConfig, fbank, rolled
from stages.audiomae.model import AudioMAE, AudioMAEConfig, Block, Reconstruction, SwinBlock
from stages.base import Stage
from stages.errors import UserError
from stages.variants import Variant


class AudioMAEStage(Stage):
    """Masked reconstruction on waveforms of the store; filterbanks are computed per batch, where the model is."""

    name = "audiomae"
    best_by = "reconstruction"
    series = ("waveform",)
    blocks = (Block, SwinBlock)

    def __init__(self, config: AudioMAEConfig, audio: AudioConfig) -> None:
        super().__init__()
        if config.decoder == "none":
            raise UserError("AudioMAE cannot be pretrained without a decoder: set audiomae.decoder to swin or global")
        if (config.frames, config.bins) != (audio.fbank_frames, audio.fbank_bins):
            raise UserError(
                f"AudioMAE sees {config.frames} x {config.bins} filterbanks, "
                f"but clips of {audio.clip_seconds:g} s give {audio.fbank_frames} x {audio.fbank_bins}"
            )
        self.config, self.audio = config, audio
        self.model = AudioMAE(config)

    @classmethod
    def build(cls, variant: Variant, released: Callable[[str], Path]) -> AudioMAEStage:
        return cls(variant.audiomae, variant.audio)

    def parts(self) -> dict[str, nn.Module]:
        return {"audiomae": self.model}

    def example(self, clip: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Tensor]:
        """`waveform` [T], `noise` [N] that orders the mask, and the augmentation's `roll` (samples) and `gain`."""
        waveform = np.asarray(clip["waveform"], np.float32)
        noise = rng.random(self.config.tokens, dtype=np.float32)
        roll = rng.integers(len(waveform)) if self.config.augment_roll else 0
        gain = rng.beta(10.0, 10.0) + 0.5 if self.config.augment_gain else 1.0
        return {
            "waveform": torch.from_numpy(waveform),
            "noise": torch.from_numpy(noise),
            "roll": torch.tensor(int(roll)),
            "gain": torch.tensor(float(gain)),
        }

    def losses(self, batch: dict[str, Any]) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        augmented = rolled(batch["waveform"], batch["roll"]) * batch["gain"][:, None]
        loss = self.model(fbank(augmented, self.audio), batch["noise"]).loss
        yield "audiomae", loss, {"reconstruction": loss}

    @torch.no_grad()
    def validate(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`reconstruction` of the clips as they are, under one mask that never changes."""
        _, result = self._reconstruct(batch)
        return {"reconstruction": result.loss}

    @torch.no_grad()
    def listen(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The first clip's filterbank, what the encoder saw of it, and the decoder's completion, [F, 128] each."""
        original, result = self._reconstruct({"waveform": batch["waveform"][:1]})
        target, mean, deviation = self.model.normalised_patches(original)
        hidden = result.mask[..., None]
        lowest = original.min()
        seen = (target * deviation + mean) * (1 - hidden) + lowest * hidden
        completed = (target * (1 - hidden) + result.prediction.float() * hidden) * deviation + mean
        images = {"original": original, "seen": self.model.unpatch(seen), "completed": self.model.unpatch(completed)}
        return {f"mel/{name}": image[0] for name, image in images.items()}

    def _reconstruct(self, batch: Mapping[str, Any]) -> tuple[Tensor, Reconstruction]:
        original = fbank(batch["waveform"], self.audio)
        noise = np.random.default_rng(0).random(self.config.tokens, dtype=np.float32)
        return original, self.model(original, torch.from_numpy(noise).to(original.device).expand(len(original), -1))

    def homes(self) -> dict[str, nn.Module]:
        return {"model.safetensors": self.model}

    def save(self, folder: Path) -> None:
        self.model.save(folder)
