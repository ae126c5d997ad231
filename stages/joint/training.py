"""Joint finetuning: the T-UNet learns to live with the translator's LOA, and its loss reaches the translator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from stages.base import ClipSource, Stage
from stages.conditions import ClapDropout, condition_example, cut_padding
from stages.diffusion.model import LatentDiffusion, TUNet, latent_scale
from stages.diffusion.training import load_latents, prepare_latents, require_prediction, save_diffusion
from stages.files import write_json
from stages.frozen import SoundDecoder
from stages.joint.model import JointConfig, System
from stages.translator.model import PhonemeEncoderConfig, Translator
from stages.translator.training import build_translator, translation_loss
from stages.variants import Variant


class JointStage(Stage):
    """Stage 2 of the paper: diffusion loss plus translation loss, LOA true with P_gt and generated otherwise."""

    name = "joint"
    needs = ("captions", "labels", "transcript")
    any_corpus = False
    best_by = "noise"
    generates = True
    blocks = (GPT2Block, ResnetBlock2D, BasicTransformerBlock)
    entries = (Translator, TUNet)
    averaged = "system.network."  # the authors average the T-UNet alone

    def __init__(
        self,
        system: System,
        process: LatentDiffusion,
        decoder: SoundDecoder,
        config: JointConfig,
        loss: str,
        text_length: int,
        phonemes: PhonemeEncoderConfig | None,
        drop_clap: ClapDropout,
    ) -> None:
        super().__init__()
        self.drop_clap = drop_clap
        self.system, self.process, self.config = system, process, config
        self.loss, self.text_length, self.phonemes = loss, text_length, phonemes
        self.decoder = decoder

    @classmethod
    def reads(cls, variant: Variant) -> tuple[str, ...]:
        return "latent", f"loa-{variant.translator.pooling}", "speech" if variant.phonemes else "text"

    @classmethod
    def builds_on(cls, variant: Variant) -> tuple[str, ...]:
        words = ("clap",) if variant.translator.clap_dropout or not variant.phonemes else ()
        return *words, "vae", "vocoder", "translator", "diffusion"

    @classmethod
    def prepare(
        cls, variant: Variant, released: Callable[[str], Path], dataset: ClipSource, folder: Path, start: Path | None = None
    ) -> None:
        """Take over the scale factor of the diffusion stage, or of the start; a fresh one would shift what it learned."""
        unet = start or released("diffusion")
        require_prediction(variant, unet)
        prepare_latents(variant, released, dataset, folder)
        ClapDropout.prepare(variant, released, folder)
        write_json(folder / "scale.json", {"scale_factor": latent_scale(unet)})

    @classmethod
    def build(cls, variant: Variant, released: Callable[[str], Path]) -> JointStage:
        translator = build_translator(variant)
        translator.load(released("translator"))
        network = TUNet(AudioLDM2UNet2DConditionModel.from_pretrained(released("diffusion") / "unet", low_cpu_mem_usage=False))
        return cls(
            System(translator, network),
            load_latents(variant, released("prepared")),
            SoundDecoder(released),
            variant.joint,
            variant.translator.loss,
            variant.text_length,
            variant.phonemes,
            ClapDropout.load(variant, released),
        )

    @classmethod
    def asks(cls, variant: Variant) -> str:
        return "clips with transcripts" if variant.phonemes else "clips with captions or labels"

    def parts(self) -> dict[str, nn.Module]:
        return {"system": self.system}

    def example(self, clip: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Tensor]:
        caption = 0 if self.phonemes else int(rng.integers(len(clip["t5"])))
        loa = torch.from_numpy(np.asarray(clip["loa"], np.float32))
        example = self.process.example(clip, rng) | condition_example(clip, caption, self.text_length) | {"loa": loa}
        return self.drop_clap(example, rng)

    def losses(self, batch: dict[str, Any]) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        rng = batch["step_rng"]
        use_truth = bool(rng.random() < self.config.ground_truth)
        dropped = self.process.drops(rng)
        noisy, target = self.process.noisy(batch)
        predicted, forced = self.system(
            batch["clap"],
            *cut_padding(batch),
            batch["loa"],
            noisy,
            batch["timestep"],
            use_truth=use_truth,
            without=self.process.without_conditions if dropped else None,
        )
        noise = F.mse_loss(predicted.float(), target)
        translation = translation_loss(forced, batch["loa"], self.loss)
        # The authors' conditioner returns no translation loss for a batch without conditions.
        loss = noise if dropped else noise + self.config.translation_weight * translation
        yield "system", loss, {"noise": noise, "loa": translation}

    @torch.no_grad()
    def validate(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """With the translator's own LOA, as in use."""
        noisy, target = self.process.noisy(batch)
        predicted, forced = self.system(batch["clap"], *cut_padding(batch), batch["loa"], noisy, batch["timestep"], use_truth=False)
        return {"noise": F.mse_loss(predicted.float(), target), "loa": translation_loss(forced, batch["loa"], self.loss)}

    def _sample(self, batch: Mapping[str, Any]) -> Tensor:
        text, mask = cut_padding(batch)
        loa = self.system.translator(batch["clap"], text, mask)
        return self.process.sample(self.system.network, loa, text, mask, noise=batch["noise"])

    @torch.no_grad()
    def generate(self, batch: dict[str, Any]) -> Tensor:
        """From the clips' own captions."""
        return self.decoder.waveforms(self._sample(batch))

    @torch.no_grad()
    def listen(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The clips' own captions, turned into sound."""
        return self.decoder.listen("from_caption", self._sample(batch))

    def homes(self) -> dict[str, nn.Module]:
        return {**self.system.translator.homes(), "unet": self.system.network.unet}

    def save(self, folder: Path) -> None:
        self.system.translator.save(folder)
        save_diffusion(folder, self.system.network, self.process)
        if self.phonemes:
            self.phonemes.save_tokenizer(folder / "tokenizer_2")
