"""CLAP and the second text encoder: what ties words to sound.

`transformers.ClapModel` is the two-tower network; this file holds its sizes, its front end in batched PyTorch, and
the small T5 encoder that stands in for FLAN-T5 where no public weights are available.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import (
    ClapConfig as HFClapConfig,
)
from transformers import (
    ClapFeatureExtractor,
    ClapModel,
    PreTrainedTokenizerBase,
    RobertaTokenizerFast,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers import (
    T5Config as HFT5Config,
)
from transformers.audio_utils import mel_filter_bank


@dataclass(frozen=True)
class ClapConfig:
    """Sizes of CLAP; the defaults are HTSAT-base with RoBERTa-base (references.md#clap, 193,913,882 parameters)."""

    projection_dim: int = 512
    text_vocab: int = 50265
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    audio_width: int = 128  # of the first level; doubles at every further one
    audio_depths: tuple[int, ...] = (2, 2, 12, 2)
    audio_heads: tuple[int, ...] = (4, 8, 16, 32)
    window_size: int = 8
    spec_size: int = 256  # side of the square image that the spectrogram is folded into
    sample_rate: int = 48_000  # Hz
    max_seconds: int = 10
    n_fft: int = 1024
    hop_length: int = 480
    mel_bins: int = 64
    fmin: float = 50.0
    fmax: float = 14_000.0
    text_length: int = 77  # tokens; longer captions are cut

    def build(self) -> ClapModel:
        """A ClapModel with fresh weights."""
        text = {
            "vocab_size": self.text_vocab,
            "hidden_size": self.text_width,
            "num_hidden_layers": self.text_layers,
            "num_attention_heads": self.text_heads,
            "intermediate_size": 4 * self.text_width,
            "layer_norm_eps": 1e-5,  # RoBERTa-base's own; the class default of 1e-12 moves embeddings by 1e-5
            "projection_dim": self.projection_dim,
        }
        audio = {
            "patch_embeds_hidden_size": self.audio_width,
            "hidden_size": self.audio_width * 2 ** (len(self.audio_depths) - 1),
            "depths": list(self.audio_depths),
            "num_attention_heads": list(self.audio_heads),
            "num_hidden_layers": len(self.audio_depths),
            "window_size": self.window_size,
            "spec_size": self.spec_size,
            "num_mel_bins": self.mel_bins,
            "projection_dim": self.projection_dim,
        }
        return ClapModel(HFClapConfig(text_config=text, audio_config=audio, projection_dim=self.projection_dim))

    def feature_extractor(self) -> ClapFeatureExtractor:
        """The matching front end of transformers; `clap_mel` computes the same values in batches."""
        return ClapFeatureExtractor(
            feature_size=self.mel_bins,
            sampling_rate=self.sample_rate,
            hop_length=self.hop_length,
            max_length_s=self.max_seconds,
            fft_window_size=self.n_fft,
            frequency_min=self.fmin,
            frequency_max=self.fmax,
            truncation="rand_trunc",
            padding="repeatpad",
        )


@dataclass(frozen=True)
class T5Config:
    """Sizes of the T5 encoder; the defaults are FLAN-T5-large (references.md#flan-t5, 341,231,104 parameters)."""

    vocab: int = 32128
    width: int = 1024
    head_width: int = 64
    heads: int = 16
    layers: int = 24
    feed_forward: int = 2816
    max_length: int = 128  # tokens; longer captions are cut

    def build(self) -> T5EncoderModel:
        """A T5 encoder with fresh weights."""
        return T5EncoderModel(
            HFT5Config(
                vocab_size=self.vocab,
                d_model=self.width,
                d_kv=self.head_width,
                num_heads=self.heads,
                num_layers=self.layers,
                d_ff=self.feed_forward,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
                use_cache=False,
            )
        )


@lru_cache(maxsize=4)
def _clap_filters(rate: int, n_fft: int, bins: int, fmin: float, fmax: float) -> Tensor:
    filters = mel_filter_bank(n_fft // 2 + 1, bins, fmin, fmax, rate, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters.astype(np.float32))


def clap_mel(waveform: Tensor, extractor: ClapFeatureExtractor) -> Tensor:
    """CLAP's log-mel spectrogram, [B, T] at the extractor's rate → [B, 1, frames, mel bins], in dB.

    Clips are cut to the extractor's length from the start (the extractor itself cuts at random), shorter ones are
    repeated whole and then zero-padded (references.md#clap-front-end). Equal to `ClapFeatureExtractor` otherwise.
    """
    target, length = extractor.nb_max_samples, waveform.shape[-1]
    if length < target:
        waveform = waveform.repeat(1, target // length)
        waveform = F.pad(waveform, (0, target - waveform.shape[-1]))
    waveform = waveform[:, :target]
    n_fft = extractor.fft_window_size
    window = torch.hann_window(n_fft, device=waveform.device)
    spectrum = torch.stft(waveform, n_fft, extractor.hop_length, window=window, center=True, return_complex=True)
    filters = _clap_filters(extractor.sampling_rate, n_fft, extractor.feature_size, extractor.frequency_min, extractor.frequency_max)
    mel = spectrum.abs().square().transpose(1, 2) @ filters.to(waveform.device)
    return (10.0 * torch.log10(mel.clamp_min(1e-10)))[:, None]


def train_tokenizers(captions: Sequence[str], clap: ClapConfig, t5: T5Config) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """A byte-level BPE and a unigram tokenizer of at most the configured vocabularies, learned from captions.

    The unigram pieces are those of a BPE and cost the same, so that a word falls into as few as possible: a unigram
    trainer sums in the order of a hash table, and equal captions would give other token ids in every process.
    """
    corpus = list(captions) or [""]
    roberta = RobertaTokenizerFast(vocab={"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}, model_max_length=clap.text_length)
    roberta = roberta.train_new_from_iterator(corpus, vocab_size=clap.text_vocab, show_progress=False)
    pieces = Tokenizer(BPE(unk_token="<unk>"))
    pieces.pre_tokenizer = Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    pieces.train_from_iterator(corpus, BpeTrainer(vocab_size=t5.vocab, special_tokens=special, show_progress=False))
    ranked = sorted(pieces.get_vocab().items(), key=lambda entry: entry[1])
    vocabulary = [(piece, 0.0 if piece in special else -1.0) for piece, _ in ranked]
    return roberta, T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=t5.max_length)


class SecondTextTower(nn.Module):
    """T5 encoder whose mean state is projected into CLAP's space, so that contrast teaches its token states."""

    def __init__(self, t5: T5Config, projection_dim: int) -> None:
        super().__init__()
        self.encoder = t5.build()
        self.projection = nn.Linear(t5.width, projection_dim)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids [B, L] → unit embeddings [B, D]."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)
        mean = (states * mask).sum(1) / mask.sum(1).clamp_min(1)
        return F.normalize(self.projection(mean), dim=-1)
