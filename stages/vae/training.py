"""VAE training: reconstruct the mel, keep the posterior near N(0, 1), and later fool a patch critic (references.md#vae-loss)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import save_file
from torch import Tensor, nn

from stages.adversarial import balance, hinge_adversarial_loss, hinge_discriminator_loss, standing
from stages.audio import AudioConfig, rolled
from stages.base import Stage
from stages.vae.model import Autoencoder, VAEConfig, VAELossConfig
from stages.variants import Variant


class VAEStage(Stage):
    """Mel → latent → mel.

    Until `critic_start` the critic is neither run nor yielded: the reference multiplies its loss by zero there.
    Every worker measures the adaptive weight on its own clips, as the reference's data-parallel training does.
    """

    name = "vae"
    series = ("mel",)
    blocks = (ResnetBlock2D,)
    may_lack = ("discriminator.safetensors",)
    full_precision = True  # rounding real sound to bfloat16 alone costs 0.3 in log-mel, 1.0 to 1.4 in the highest bins

    def __init__(self, config: VAEConfig, loss: VAELossConfig, audio: AudioConfig) -> None:
        super().__init__()
        self.latent_shape = config.latent_shape(audio.mel_frames, audio.mel_bins)
        self.loss = loss
        self.autoencoder = Autoencoder(config.build())
        self.discriminator = loss.critic.build()

    @classmethod
    def build(cls, variant: Variant, released: Callable[[str], Path]) -> VAEStage:
        return cls(variant.vae, variant.vae_loss, variant.audio)

    def parts(self) -> dict[str, nn.Module]:
        return {"discriminator": self.discriminator, "autoencoder": self.autoencoder}

    def example(self, clip: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Tensor]:
        """`mel` [F, M], the posterior's `noise` [C, F', M'], and the augmentation's `roll` (frames)."""
        mel = np.asarray(clip["mel"], np.float32)
        noise = rng.standard_normal(self.latent_shape, np.float32)
        roll = rng.integers(len(mel)) if self.loss.augment_roll else 0
        return {"mel": torch.from_numpy(mel), "noise": torch.from_numpy(noise), "roll": torch.tensor(int(roll))}

    def losses(self, batch: dict[str, Any]) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """The critic's loss once it has started, then the autoencoder's; `batch["step"]` counts finished updates."""
        mel = rolled(batch["mel"], batch["roll"]) if self.loss.augment_roll else batch["mel"]
        adversarial = batch["step"] >= self.loss.critic_start
        again = adversarial and batch.get("in_pieces", False)
        with torch.set_grad_enabled(not again):
            reconstruction = self.autoencoder(mel, batch["noise"])
        if adversarial:
            real, fake = self.discriminator(mel), self.discriminator(reconstruction.mel.float().detach())
            loss = hinge_discriminator_loss(real, fake)
            logs = {"discriminator": loss, "real": real.float().mean(), "fake": fake.float().mean()}
            yield "discriminator", loss, logs | standing([real], [fake], loss, middle=0.0, at_chance=1.0)

        if again:
            reconstruction = self.autoencoder(mel, batch["noise"])
        decoded = reconstruction.mel.float()
        absolute = (decoded - mel).abs()
        fidelity = absolute.sum() / len(mel)
        kl = kl_divergence(reconstruction.mean, reconstruction.log_variance)
        loss = fidelity + self.loss.kl_weight * kl
        logs = {"mel_l1": absolute.mean(), "kl": kl}
        if adversarial:
            deception = hinge_adversarial_loss(self.discriminator(decoded))
            main, critical = (
                self.autoencoder.last_layer_gradient(reconstruction, torch.autograd.grad(term, decoded, retain_graph=True)[0])
                for term in (fidelity, deception)
            )
            weight = balance(main, critical, self.loss.adaptive_limit)
            loss = loss + self.loss.adversarial_weight * weight * deception
            logs |= {"adversarial": deception, "adaptive_weight": weight}
        yield "autoencoder", loss, logs

    @torch.no_grad()
    def validate(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`mel_l1` and `mel_l2` of the reconstruction from the posterior mean, `kl`, and the latents' `latent_std`."""
        mel = batch["mel"]
        reconstruction = self.autoencoder(mel)
        decoded, mean = reconstruction.mel.float(), reconstruction.mean.float()
        return {
            "mel_l1": F.l1_loss(decoded, mel),
            "mel_l2": F.mse_loss(decoded, mel),
            "kl": kl_divergence(mean, reconstruction.log_variance),
            "latent_std": mean.std(),
        }

    @torch.no_grad()
    def listen(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The first clip's mel and its reconstruction [F, M]; there may be no vocoder yet."""
        mel = batch["mel"][:1]
        return {"mel/original": mel[0], "mel/reconstruction": self.autoencoder(mel).mel[0].float()}

    def homes(self) -> dict[str, nn.Module]:
        return {"vae": self.autoencoder.vae, "discriminator.safetensors": self.discriminator}

    def save(self, folder: Path) -> None:
        self.autoencoder.vae.save_pretrained(folder / "vae")
        save_file(self.discriminator.state_dict(), folder / "discriminator.safetensors")


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) ‖ N(0, 1)) per latent value, averaged over all of them."""
    mean, log_variance = mean.float(), log_variance.float()
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
