"""The T-UNet: noise prediction on VAE latents, with cross-attention to the LOA and to the text (facts 7)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from diffusers import DDIMScheduler
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel

from stages.base import UserError

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
    condition_dropout: float = 0.1  # all conditions of a batch together (facts 7.4)

    def build(self, latent_channels: int, latent_frames: int, loa_width: int, text_width: int | None) -> AudioLDM2UNet2DConditionModel:
        """A T-UNet with fresh weights. Every place attends to itself, the LOA and, if `text_width`, the text."""
        place: tuple[int | None, ...] = (None, loa_width)
        if text_width is not None:
            place += (text_width,)
        if self.trailing_self_attention:
            place += (None,)
        levels = len(self.channels)
        return AudioLDM2UNet2DConditionModel(
            sample_size=latent_frames,
            in_channels=latent_channels,
            out_channels=latent_channels,
            block_out_channels=self.channels,
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (levels - 1),
            up_block_types=("CrossAttnUpBlock2D",) * (levels - 1) + ("UpBlock2D",),
            layers_per_block=self.layers_per_block,
            transformer_layers_per_block=self.transformer_depth,
            cross_attention_dim=(place,) * levels,
            attention_head_dim=self.heads,
            norm_num_groups=self.norm_groups,
            norm_eps=1e-5,
            flip_sin_to_cos=True,
            freq_shift=0,
        )


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
    """The forward process: 1000 steps, β = linspace(√0.0015, √0.0195)² (facts 7.3), and DDIM to run it backwards."""
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
