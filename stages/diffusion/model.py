"""The T-UNet: noise prediction on VAE latents, with cross-attention to the LOA and to the text (references.md#t-unet)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
from torch import Tensor, nn

from stages.errors import UserError

DIFFUSERS_SCALE = 0.18215  # AutoencoderKL's own default, for a configuration that names none


@dataclass(frozen=True)
class DiffusionConfig:
    """Sizes and objective of the T-UNet; the defaults are AudioLDM 2 base (346,943,496 parameters)."""

    channels: tuple[int, ...] = (128, 256, 384, 640)
    layers_per_block: int = 2
    transformer_depth: int = 1
    trailing_self_attention: bool = False  # AudioLDM 2 large ends each place with one more self-attention transformer
    # Heads per level: 32 channels each is the authors' network; 8 everywhere is what the public diffusers configs say.
    heads: tuple[int, ...] = (4, 8, 12, 20)
    norm_groups: int = 32
    prediction: str = "epsilon"  # or "v_prediction"
    poolings: tuple[int, ...] = (1, 2, 4, 8)  # λ of the self-supervised LOA, drawn per batch
    condition_dropout: float = 0.1  # all conditions of a batch together (references.md#condition-dropout)

    def build(self, latent_channels: int, latent_frames: int, loa_width: int, text_width: int | None) -> AudioLDM2UNet2DConditionModel:
        """A T-UNet with fresh weights. Every place attends to itself, the LOA and, if `text_width`, the text."""
        widths: tuple[int | None, ...] = (None, loa_width)
        if text_width is not None:
            widths += (text_width,)
        if self.trailing_self_attention:
            widths += (None,)
        levels = len(self.channels)
        unet = AudioLDM2UNet2DConditionModel(
            sample_size=latent_frames,
            in_channels=latent_channels,
            out_channels=latent_channels,
            block_out_channels=self.channels,
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (levels - 1),
            up_block_types=("CrossAttnUpBlock2D",) * (levels - 1) + ("UpBlock2D",),
            layers_per_block=self.layers_per_block,
            transformer_layers_per_block=self.transformer_depth,
            cross_attention_dim=(widths,) * levels,
            attention_head_dim=self.heads,
            norm_num_groups=self.norm_groups,
            norm_eps=1e-5,
            flip_sin_to_cos=True,
            freq_shift=0,
        )
        _zero_outputs(unet)
        return unet


def _zero_outputs(unet: AudioLDM2UNet2DConditionModel) -> None:
    """Every residual branch, and the network itself, begins by saying nothing (references.md#t-unet): a first loss of 1.00, not 1.10."""
    outputs: list[nn.Module] = [unet.conv_out]
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            outputs.append(module.conv2)
        elif isinstance(module, Transformer2DModel):
            outputs.append(module.proj_out)
    for output in outputs:
        for parameter in output.parameters():
            nn.init.zeros_(parameter)


def latent_scale(folder: Path) -> float:
    """The factor on the VAE's latents with which the T-UNet in `folder` was trained.

    A released stage keeps it in `scale.json`; bundles and folders in diffusers' layout have it in the VAE's configuration.

    Raises:
        UserError: the folder has neither.
    """
    ours, theirs = folder / "scale.json", folder / "vae" / "config.json"
    if ours.is_file():
        return float(json.loads(ours.read_text())["scale_factor"])
    if theirs.is_file():
        return float(json.loads(theirs.read_text()).get("scaling_factor", DIFFUSERS_SCALE))
    raise UserError(
        f"{folder} does not say how its T-UNet expects latents to be scaled: expected scale.json (a released stage) or "
        "vae/config.json (a folder in diffusers' layout); name a folder that has one of them"
    )


def noise_schedule(prediction: str = "epsilon") -> DDIMScheduler:
    """The forward process: 1000 steps, β = linspace(√0.0015, √0.0195)² (references.md#noise-schedule), and DDIM to run it backwards."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=False,  # the last ᾱ is ᾱ_0
        steps_offset=1,
        timestep_spacing="leading",
    )


class TUNet(nn.Module):
    """The T-UNet behind the signature that training uses."""

    def __init__(self, unet: AudioLDM2UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        self.reads_text = len(unet.config.cross_attention_dim[0]) > 2

    def forward(self, noisy: Tensor, timestep: Tensor, loa: Tensor, text: Tensor | None, text_mask: Tensor | None) -> Tensor:
        """Prediction [B, C, T', F'] for noisy latents, timesteps [B], LOA [B, N, D], text states [B, L, D'], mask [B, L]."""
        extra = {"encoder_hidden_states_1": text, "encoder_attention_mask_1": text_mask} if self.reads_text else {}
        predicted: Tensor = self.unet(noisy, timestep, encoder_hidden_states=loa, **extra).sample
        return predicted


class LatentDiffusion:
    """What self-supervised and joint training share: latents, noise, the null conditions, the loss."""

    def __init__(self, schedule: DDIMScheduler, scale: float, null_text: Tensor | None, dropout: float) -> None:
        self.schedule, self.scale, self.null_text, self.dropout = schedule, scale, null_text, dropout

    def example(self, clip: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Tensor]:
        """A posterior sample (not the mode, references.md#latent-scale) [C, T', F'], its noise and its timestep."""
        mean, deviation = np.split(np.asarray(clip["latent"], np.float32), 2)
        latent = (mean + deviation * rng.standard_normal(mean.shape, np.float32)) * self.scale
        return {
            "latent": torch.from_numpy(latent),
            "noise": torch.from_numpy(rng.standard_normal(mean.shape, np.float32)),
            "timestep": torch.tensor(int(rng.integers(self.schedule.config.num_train_timesteps))),
        }

    def drops(self, rng: np.random.Generator) -> bool:
        """Whether a batch loses all its conditions, with probability `dropout` (references.md#condition-dropout)."""
        return bool(rng.random() < self.dropout)

    def without_conditions(self, loa: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What takes the conditions' place in such a batch: LOA → zeros, text → T5("")."""
        if self.null_text is None:  # speech: the T-UNet reads no text
            return torch.zeros_like(loa), text, mask
        null = self.null_text.to(text).expand(len(text), -1, -1)
        return torch.zeros_like(loa), null, mask.new_ones(null.shape[:2])

    def noisy(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """z_t and what the network should say about it."""
        z, noise, t = batch["latent"], batch["noise"], batch["timestep"]
        noisy = self.schedule.add_noise(z, noise, t)
        target = noise if self.schedule.config.prediction_type == "epsilon" else self.schedule.get_velocity(z, noise, t)
        return noisy, target

    @torch.no_grad()
    def sample(
        self, network: TUNet, loa: Tensor, text: Tensor, mask: Tensor, noise: Tensor, steps: int = 20, guidance: float = 3.5
    ) -> Tensor:
        """Latents [B, C, T', F'] sampled for listening, from noise of that shape; scaled back for the decoder."""
        solver = DPMSolverMultistepScheduler.from_config(self.schedule.config)
        solver.set_timesteps(steps, device=noise.device)
        z = noise
        # The empty prompt is padded to the prompts' length, so that both branches fit in one batch.
        null, null_mask = torch.zeros_like(text), torch.zeros_like(mask)
        if self.null_text is not None:
            length = self.null_text.shape[0]
            null[:, :length], null_mask[:, :length] = self.null_text.to(text), 1
        both = torch.cat([torch.zeros_like(loa), loa]), torch.cat([null, text]), torch.cat([null_mask, mask])
        for t in solver.timesteps:
            out = network(torch.cat([z, z]), t.expand(2 * len(z)).to(z.device), *both).to(z.dtype)
            without, with_ = out.chunk(2)
            z = solver.step(without + guidance * (with_ - without), t, z).prev_sample
        return z / self.scale
