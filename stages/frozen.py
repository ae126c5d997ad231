"""Networks that later stages use and never train: CLAP and T5, and the way from latents to sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import ClapFeatureExtractor, ClapModel, SpeechT5HifiGan, T5EncoderModel

from stages.audio import resample
from stages.clap.model import clap_mel
from stages.errors import UserError
from stages.tokenizers import read_tokenizer

# Small networks are loaded and saved at every turn: the bars of their libraries would drown loa's own.
transformers.utils.logging.disable_progress_bar()
diffusers.utils.logging.disable_progress_bar()


class TextEncoders(nn.Module):
    """CLAP and, where the folder has one, a T5 encoder, both frozen.

    The folder has the layout of a diffusers AudioLDM 2 pipeline (or of a released `clap` stage): text_encoder,
    tokenizer, feature_extractor, and text_encoder_2, tokenizer_2 for T5.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        folder = Path(folder)
        if not (folder / "text_encoder").is_dir():
            raise UserError(
                f"{folder} holds no CLAP (no text_encoder folder); train it with `loa train clap` or name a diffusers AudioLDM 2 folder"
            )
        self.clap = ClapModel.from_pretrained(folder / "text_encoder")
        self.tokenizer = read_tokenizer(folder / "tokenizer", self.clap.config)
        self.extractor = ClapFeatureExtractor.from_pretrained(folder / "feature_extractor")
        self.t5_model: T5EncoderModel | None = None
        if (folder / "text_encoder_2" / "config.json").is_file() and "T5" in (folder / "text_encoder_2" / "config.json").read_text():
            self.t5_model = T5EncoderModel.from_pretrained(folder / "text_encoder_2")
            self.t5_tokenizer = read_tokenizer(folder / "tokenizer_2", self.t5_model.config)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> TextEncoders:
        """Load from a local folder onto `device`."""
        return cls(Path(folder)).to(device)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.no_grad()
    def clap_text(self, texts: Sequence[str]) -> Tensor:
        """Unit CLAP embeddings of texts, [B, D]. Padding is masked, so a text does not depend on its neighbours."""
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        return F.normalize(self.clap.get_text_features(**tokens).pooler_output, dim=-1)

    @torch.no_grad()
    def clap_audio(self, waveform: Tensor, sample_rate: int) -> Tensor:
        """Unit CLAP embeddings of waveforms [B, T] at `sample_rate` Hz, [B, D]."""
        waveform = resample(waveform.to(self.device), sample_rate, self.extractor.sampling_rate)
        return F.normalize(self.clap.get_audio_features(input_features=clap_mel(waveform, self.extractor)).pooler_output, dim=-1)

    @torch.no_grad()
    def t5(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """T5 states [B, L, D] and mask [B, L]; L is the longest text of the batch, at most the tokenizer's limit."""
        if self.t5_model is None:
            raise UserError("these text encoders have no T5 (text_encoder_2); a speech bundle is conditioned by phonemes instead")
        tokens = self.t5_tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        states = self.t5_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return states, tokens.attention_mask


class SoundDecoder:
    """Frozen VAE and vocoder, for listening in while a later stage trains; loaded when first used."""

    def __init__(self, released: Callable[[str], Path]) -> None:
        self._folders = released("vae"), released("vocoder")
        self._models: tuple[AutoencoderKL, SpeechT5HifiGan] | None = None

    def _decode(self, latents: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Log-mel [F, M] and waveform [T] of unscaled latents [B, C, T', F'], one after the other."""
        if self._models is None:
            vae = AutoencoderKL.from_pretrained(self._folders[0] / "vae")
            vocoder = SpeechT5HifiGan.from_pretrained(self._folders[1] / "vocoder")
            self._models = vae.eval(), vocoder.eval()
        vae, vocoder = (model.to(latents.device) for model in self._models)
        for mel in vae.decode(latents.float()).sample[:, 0]:
            yield mel, vocoder(mel)

    @torch.no_grad()
    def waveforms(self, latents: Tensor) -> Tensor:
        """Waveforms [B, T] of unscaled latents [B, C, T', F'], in float32 on the CPU."""
        return torch.stack([waveform.float().cpu() for _, waveform in self._decode(latents)])

    @torch.no_grad()
    def listen(self, name: str, latents: Tensor) -> dict[str, Tensor]:
        """Unscaled latents [B, C, T', F'] → "mel/<name>_<i>" [F, M] and "audio/<name>_<i>" [T]."""
        out: dict[str, Tensor] = {}
        for i, (mel, waveform) in enumerate(self._decode(latents)):
            out[f"mel/{name}_{i}"] = mel.cpu()
            out[f"audio/{name}_{i}"] = waveform.cpu()
        return out
