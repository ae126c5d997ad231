"""Self-supervised latent diffusion: the clip's own LOA, at a random λ, tells the T-UNet what to denoise."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from stages.base import ClipSource, Stage
from stages.conditions import condition_example, cut_padding
from stages.diffusion.model import LatentDiffusion, TUNet, latent_scale, noise_schedule
from stages.errors import UserError
from stages.files import write_json
from stages.frozen import SoundDecoder, TextEncoders
from stages.variants import Variant

SCALE_CLIPS = 256  # clips whose latents set the scale factor; the reference takes its first batch (references.md#latent-scale)


def prepare_latents(variant: Variant, released: Callable[[str], Path], dataset: ClipSource, folder: Path) -> None:
    """Fix what a diffusion run needs from the data: the latents' scale 1/std, and T5's states of the empty text."""
    take = np.linspace(0, len(dataset) - 1, min(SCALE_CLIPS, len(dataset))).astype(int)
    rng = np.random.default_rng(0)
    samples = []
    for i in take:
        mean, deviation = np.split(np.asarray(dataset.clip(int(i), ["latent"])["latent"], np.float32), 2)
        samples.append((mean + deviation * rng.standard_normal(mean.shape, np.float32)).ravel())
    std = float(np.concatenate(samples).std(dtype=np.float64))
    if not (np.isfinite(std) and std > 1e-6):
        raise UserError(
            f"the latents of this store have the standard deviation {std}; the VAE that made them is not trained or has diverged"
        )
    write_json(folder / "scale.json", {"scale_factor": 1.0 / std, "clips": len(take)})
    if variant.phonemes is None:
        states, _ = TextEncoders.load(released("clap")).t5([""])
        np.save(folder / "null_text.npy", states[0].numpy().astype(np.float32), allow_pickle=False)


def load_latents(variant: Variant, prepared: Path) -> LatentDiffusion:
    """The diffusion process with what `prepare_latents` fixed."""
    scale = json.loads((prepared / "scale.json").read_text())["scale_factor"]
    null = prepared / "null_text.npy"
    null_text = torch.from_numpy(np.load(null, allow_pickle=False)) if null.is_file() else None
    return LatentDiffusion(noise_schedule(variant.diffusion.prediction), scale, null_text, variant.diffusion.condition_dropout)


def build_unet(variant: Variant) -> TUNet:
    """The variant's T-UNet with fresh weights."""
    channels, frames, _ = variant.latent_shape
    text = None if variant.phonemes else variant.t5.width
    return TUNet(variant.diffusion.build(channels, frames, variant.audiomae.width, text))


def save_diffusion(folder: Path, network: TUNet, process: LatentDiffusion) -> None:
    """Write unet/, scheduler/ and the scale factor that the VAE's bundle configuration takes over."""
    network.unet.save_pretrained(folder / "unet")
    process.schedule.save_pretrained(folder / "scheduler")
    write_json(folder / "scale.json", {"scale_factor": process.scale})


def require_prediction(variant: Variant, folder: Path) -> None:
    """Refuse a T-UNet that was taught to predict something else: it would start from nothing."""
    if not (folder / "scheduler").is_dir():
        raise UserError(f"{folder} has no scheduler/, which says what its T-UNet predicts; name a folder that has one")
    said = DDIMScheduler.load_config(folder / "scheduler").get("prediction_type", "epsilon")
    if said != variant.diffusion.prediction:
        raise UserError(
            f"the T-UNet in {folder} predicts {said!r}, this variant {variant.diffusion.prediction!r}; "
            f"give another one, or --set diffusion.prediction={said}"
        )


class DiffusionStage(Stage):
    """Stage 1a of the paper: LOA and latent come from the same sound, so no caption is needed.

    Its λ is drawn for every step before the clips are read, and only the LOA of that λ is read.

    Clips that have words show them to the T5 branch, the others the empty text (as the authors' loader does).
    """

    name = "diffusion"
    any_corpus = False
    best_by = "noise"
    generates = True
    blocks = (ResnetBlock2D, BasicTransformerBlock)

    def __init__(self, variant: Variant, process: LatentDiffusion, decoder: SoundDecoder) -> None:
        super().__init__()
        self.network = build_unet(variant)
        self.process, self.poolings = process, variant.diffusion.poolings
        self.speech, self.text_length = variant.phonemes is not None, variant.text_length
        self.listening_pooling = variant.translator.pooling
        self.decoder = decoder

    @classmethod
    def reads(cls, variant: Variant) -> tuple[str, ...]:
        loa = (f"loa-{pooling}" for pooling in variant.poolings)
        return ("latent", *loa) if variant.phonemes else ("latent", *loa, "text")

    @classmethod
    def builds_on(cls, variant: Variant) -> tuple[str, ...]:
        return ("vae", "vocoder") if variant.phonemes else ("clap", "vae", "vocoder")

    @classmethod
    def prepare(
        cls, variant: Variant, released: Callable[[str], Path], dataset: ClipSource, folder: Path, start: Path | None = None
    ) -> None:
        """The scale of the latents is the start's, where there is one: another would shift what it has learned."""
        if start is not None:
            require_prediction(variant, start)
        prepare_latents(variant, released, dataset, folder)
        if start is not None:
            write_json(folder / "scale.json", {"scale_factor": latent_scale(start)})

    @classmethod
    def build(cls, variant: Variant, released: Callable[[str], Path]) -> DiffusionStage:
        return cls(variant, load_latents(variant, released("prepared")), SoundDecoder(released))

    def parts(self) -> dict[str, nn.Module]:
        return {"unet": self.network}

    def example(self, clip: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Tensor]:
        example = self.process.example(clip, rng) | {"loa": torch.from_numpy(np.asarray(clip["loa"], np.float32))}
        if self.speech:
            return example
        caption = int(rng.integers(len(clip["t5"])))
        return example | condition_example(clip, caption, self.text_length)

    def reads_now(self, rng: np.random.Generator | None) -> tuple[str, ...]:
        loa = f"loa-{self.listening_pooling if rng is None else self._drawn_pooling(rng)}"
        return ("latent", loa) if self.speech else ("latent", loa, "text")

    def _drawn_pooling(self, rng: np.random.Generator) -> int:
        return int(rng.choice(self.poolings))

    def _conditions(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        loa = batch["loa"]
        text, mask = (loa[:, :0], batch["timestep"][:, None][:, :0]) if self.speech else cut_padding(batch)
        return loa, text, mask

    def losses(self, batch: dict[str, Any]) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        rng = batch["step_rng"]
        self._drawn_pooling(rng)  # λ, of which the batch has been read: what comes next must not depend on it
        conditions = self._conditions(batch)
        noisy, target = self.process.noisy(batch)
        if self.process.drops(rng):
            conditions = self.process.without_conditions(*conditions)
        predicted = self.network(noisy, batch["timestep"], *conditions)
        loss = F.mse_loss(predicted.float(), target)
        yield "unet", loss, {"noise": loss}

    @torch.no_grad()
    def validate(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        noisy, target = self.process.noisy(batch)
        predicted = self.network(noisy, batch["timestep"], *self._conditions(batch))
        return {"noise": F.mse_loss(predicted.float(), target)}

    def _sample(self, batch: Mapping[str, Any]) -> Tensor:
        return self.process.sample(self.network, *self._conditions(batch), noise=batch["noise"])

    @torch.no_grad()
    def generate(self, batch: dict[str, Any]) -> Tensor:
        """From the clips' true LOA."""
        return self.decoder.waveforms(self._sample(batch))

    @torch.no_grad()
    def listen(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The same sounds from their true LOA: what a perfect translator would give."""
        latents = self._sample(batch)
        return self.decoder.listen("from_true_loa", latents) | self.decoder.listen("real_latent", batch["latent"] / self.process.scale)

    def homes(self) -> dict[str, nn.Module]:
        return {"unet": self.network.unet}

    def save(self, folder: Path) -> None:
        save_diffusion(folder, self.network, self.process)
