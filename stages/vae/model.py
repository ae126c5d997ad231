"""Log-mel spectrogram ↔ latent: the KL autoencoder of AudioLDM 2 as diffusers' `AutoencoderKL` (references.md#vae), and its critic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from stages.errors import UserError


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder's shape. The defaults are AudioLDM 2 at 16 kHz: 55,376,873 parameters, compression 4."""

    block_channels: tuple[int, ...] = (128, 256, 512)  # one per resolution; each further one halves frames and bins
    layers_per_block: int = 2  # residual blocks per resolution in the encoder; the decoder has one more
    latent_channels: int = 8
    norm_groups: int = 32
    mid_attention: bool = True  # single-head self-attention at the lowest resolution
    start_mean: float = 0.0  # fresh weights see and return mels as (mel - start_mean) / start_std: a short training
    start_std: float = 1.0  # need not first learn that silence lies at -11.5; the reference starts from (0, 1)

    def __post_init__(self) -> None:
        wrong = [width for width in self.block_channels if width % self.norm_groups]
        if wrong or not self.block_channels:
            raise UserError(f"VAE block_channels {self.block_channels} must be multiples of norm_groups {self.norm_groups}")

    @classmethod
    def tiny(cls) -> VAEConfig:
        """For two CPU cores: few channels where there are many pixels, and compression 16 (trials in docs/log.md).

        16 x 4 places of 32 channels hold as much as 32 x 8 of 8, and the T-UNet's cost goes with places.
        """
        return cls(
            block_channels=(8, 16, 32, 64, 128),
            layers_per_block=1,
            latent_channels=32,
            norm_groups=4,  # of two channels at least: a group of one forgets its level
            mid_attention=False,
            start_mean=-5.0,  # the demo corpus: mean -5.11, deviation 2.15
            start_std=2.2,
        )

    @property
    def compression(self) -> int:
        """Frames (and bins) of mel per frame (and bin) of latent."""
        return 2 ** (len(self.block_channels) - 1)

    def latent_shape(self, frames: int, bins: int) -> tuple[int, int, int]:
        """Channels, frames and bins of the latent of a `frames` x `bins` mel.

        Raises UserError when the mel does not divide evenly.
        """
        if frames % self.compression or bins % self.compression:
            raise UserError(f"a mel of {frames} x {bins} does not divide by the VAE's compression {self.compression}")
        return self.latent_channels, frames // self.compression, bins // self.compression

    def build(self) -> AutoencoderKL:
        """Fresh weights. The scaling factor stays 1 until a diffusion run has measured it (references.md#latent-scale)."""
        levels = len(self.block_channels)
        vae = AutoencoderKL(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=self.block_channels,
            layers_per_block=self.layers_per_block,
            latent_channels=self.latent_channels,
            norm_num_groups=self.norm_groups,
            mid_block_add_attention=self.mid_attention,
            sample_size=1024,
            scaling_factor=1.0,
        )
        first, last = vae.encoder.conv_in, vae.decoder.conv_out
        with torch.no_grad():
            first.weight.div_(self.start_std)
            first.bias.sub_(self.start_mean * first.weight.sum((1, 2, 3)))
            last.weight.mul_(self.start_std)
            last.bias.mul_(self.start_std).add_(self.start_mean)
        return vae


class Reconstruction(NamedTuple):
    """What one pass through the autoencoder returns."""

    mel: Tensor  # [B, F, M]
    mean: Tensor  # [B, C, F', M'], of the posterior
    log_variance: Tensor  # [B, C, F', M'], clamped to [-30, 20]
    features: Tensor  # [B, W, F, M], what the decoder's last convolution read


class Autoencoder(nn.Module):
    """AutoencoderKL behind one `forward`: sharded weights are gathered for `forward` alone."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, mel: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """Reconstruct [B, F, M] from mean + deviation * noise, noise [B, C, F', M']; without noise from the mean."""
        posterior = self.vae.encode(mel[:, None]).latent_dist
        latent = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        seen: list[Tensor] = []
        hook = self.vae.decoder.conv_out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            decoded = self.vae.decode(latent).sample
        finally:
            hook.remove()
        return Reconstruction(decoded[:, 0], posterior.mean, posterior.logvar, seen[0])

    def last_layer_gradient(self, reconstruction: Reconstruction, output_gradient: Tensor) -> Tensor:
        """∂L/∂W of the decoder's last convolution, from ∂L/∂mel [B, F, M].

        Computed from what the layer read, because W itself may be sharded and thus no leaf of the graph.
        """
        layer = self.vae.decoder.conv_out
        features = reconstruction.features.detach()
        return conv2d_weight(features, layer.weight.shape, output_gradient[:, None].to(features.dtype), layer.stride, layer.padding)


@dataclass(frozen=True)
class PatchCriticConfig:
    """A PatchGAN's shape; the defaults are the reference's (references.md#vae-loss)."""

    channels: int = 64
    layers: int = 3  # strided convolutions
    norm: str = "batch"  # "batch" as the reference; "group" makes every clip independent of its batch

    def __post_init__(self) -> None:
        if self.norm not in ("batch", "group"):
            raise UserError(f"the patch critic's norm is {self.norm!r}; expected batch or group")

    def build(self) -> PatchCritic:
        """Fresh weights, N(0, 0.02)."""
        return PatchCritic(self)


class PatchCritic(nn.Module):
    """PatchGAN over mels: every logit judges one patch (70 x 70 with three layers)."""

    def __init__(self, config: PatchCriticConfig) -> None:
        super().__init__()
        widths = [config.channels * min(2**i, 8) for i in range(config.layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(1, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
            stride = 2 if i < config.layers - 1 else 1
            norm = nn.BatchNorm2d(after) if config.norm == "batch" else nn.GroupNorm(8, after)
            layers += [nn.Conv2d(before, after, 4, stride, 1, bias=False), norm, nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, mel: Tensor) -> Tensor:
        """Logits [B, 1, F', M'] of mels [B, F, M]."""
        logits: Tensor = self.layers(mel[:, None])
        return logits


@dataclass(frozen=True)
class VAELossConfig:
    """Weights of the objective, against an absolute error that is summed over a mel's pixels.

    The reference adds an LPIPS term in its training code, though the papers name none. It needs VGG weights made for
    photographs, which an offline installation has not, so it is left out. Its variance parameter s is never
    optimised and stays 0, which makes the reconstruction term the plain sum below.
    """

    kl_weight: float = 1000.0  # on the mean over C, F', M', not on the sum
    adversarial_weight: float = 0.5  # times the adaptive weight
    adaptive_limit: float = 1e4
    critic_start: int = 25_000  # steps; the reference writes 50,001 and counts both optimisers
    critic: PatchCriticConfig = PatchCriticConfig()
    augment_roll: bool = False  # training sees windows rolled in time, anew in every epoch; the reference draws new excerpts instead

    @classmethod
    def tiny(cls) -> VAELossConfig:
        """A small critic that joins late; the KL's weight per latent value is the reference's at a 16th of its pixels."""
        return cls(kl_weight=60.0, critic_start=1600, critic=PatchCriticConfig(channels=16, layers=2, norm="group"))
