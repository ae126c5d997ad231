"""The translator: conditions → language of audio, by GPT-2 on projected condition sequences (references.md#translator)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2ProjectionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, VitsConfig, VitsModel, VitsTokenizer

from stages.phonemes import MAX_LENGTH, phoneme_vocab


@dataclass(frozen=True)
class TranslatorConfig:
    """Sizes of the translator; the defaults are GPT-2 base (124,439,808 parameters)."""

    width: int = 768  # equals AudioMAE's, the states are used as LOA vectors directly
    layers: int = 12
    heads: int = 12
    positions: int = 1024
    vocab: int = 50257  # the token table is unused but part of the published weights
    dropout: float = 0.1
    pooling: int = 8  # λ of the target
    loss: str = "l1"  # what made the public weights; "mse" is the paper's (fidelity.md, row 2)
    clap_dropout: float = 0.1  # share of clips whose CLAP embedding becomes CLAP(""): the authors' code, not the paper (fidelity.md, row 9)

    def build(self, num_tokens: int) -> GPT2LMHeadModel:
        """GPT-2 with fresh weights.

        The head is tied to the token table and never used: the class is the one that can generate in current
        transformers, which plain diffusers needs (references.md#diffusers-pipeline).
        """
        config = GPT2Config(
            vocab_size=self.vocab,
            n_positions=self.positions,
            n_embd=self.width,
            n_layer=self.layers,
            n_head=self.heads,
            resid_pdrop=self.dropout,
            embd_pdrop=self.dropout,
            attn_pdrop=self.dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
        config.max_new_tokens = num_tokens
        return GPT2LMHeadModel(config)


@dataclass(frozen=True)
class PhonemeEncoderConfig:
    """Sizes of the VITS-style text encoder for speech (references.md#phonemes); the defaults have 6,327,744 parameters."""

    width: int = 192
    layers: int = 6
    heads: int = 2
    feed_forward: int = 768
    kernel: int = 3
    window: int = 4
    dropout: float = 0.1
    max_length: int = MAX_LENGTH

    def build(self) -> VitsModel:
        """A VitsModel of which only `text_encoder` is used; the unused rest is as small as the class allows."""
        return VitsModel(
            VitsConfig(
                vocab_size=len(phoneme_vocab()),
                hidden_size=self.width,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                ffn_dim=self.feed_forward,
                ffn_kernel_size=self.kernel,
                window_size=self.window,
                hidden_dropout=self.dropout,
                attention_dropout=self.dropout,
                activation_dropout=self.dropout,
                layerdrop=0.0,
                hidden_act="relu",
                flow_size=self.width,
                spectrogram_bins=3,
                upsample_initial_channel=16,
                upsample_rates=[2],
                upsample_kernel_sizes=[4],
                resblock_kernel_sizes=[3],
                resblock_dilation_sizes=[[1]],
                prior_encoder_num_flows=2,
                prior_encoder_num_wavenet_layers=1,
                posterior_encoder_num_wavenet_layers=1,
                depth_separable_num_layers=1,
                duration_predictor_num_flows=2,
                duration_predictor_filter_channels=16,
            )
        )

    def save_tokenizer(self, folder: Path) -> None:
        """Write a VitsTokenizer that takes phonemes and gives the ids of `stages.phonemes`."""
        folder.mkdir(parents=True, exist_ok=True)
        vocab = folder / "vocab.json"
        vocab.write_text(json.dumps(phoneme_vocab(), ensure_ascii=False), encoding="utf-8")
        tokenizer = VitsTokenizer(
            str(vocab),
            pad_token="_",
            unk_token="_",
            add_blank=False,
            normalize=False,
            phonemize=False,
            is_uroman=False,
            model_max_length=self.max_length,
        )
        tokenizer.save_pretrained(folder)


SEGMENT = 16  # vectors that are computed again on the way back, together


def generate_loa(language_model: GPT2LMHeadModel, states: Tensor, mask: Tensor, num_tokens: int, segment: int = SEGMENT) -> Tensor:
    """Autoregressive LOA, [B, S, D] conditions with mask [B, S] → [B, num_tokens, D]; differentiable.

    Every state after the final layer norm is fed back unchanged; no sampling, no stop (references.md#translator). Keys and values are
    cached: the first step sees the whole prefix, each later one a single vector. With gradients, what longer rollouts than
    `segment` need on the way back is not kept but computed again, segment by segment, from the keys and values before it.
    """
    if not torch.is_grad_enabled() or num_tokens <= segment:
        return _roll(language_model, num_tokens, states, mask)[0]
    written: list[Tensor] = []
    step_input, cache = states, list[Tensor]()
    while (done := sum(part.shape[1] for part in written)) < num_tokens:
        count = min(segment, num_tokens - done)
        part, *cache = checkpoint(_roll, language_model, count, step_input, mask, *cache, use_reentrant=False)
        step_input, mask = part[:, -1:], torch.cat([mask, mask.new_ones(len(mask), count)], dim=1)
        written.append(part)
    return torch.cat(written, dim=1)


def _roll(language_model: GPT2LMHeadModel, count: int, step_input: Tensor, mask: Tensor, *cached: Tensor) -> tuple[Tensor, ...]:
    """The next `count` vectors [B, count, D], and the keys and values of all layers, in turn, to go on from."""
    tokens: list[Tensor] = []
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(cached[::2], cached[1::2], strict=True)):
        cache.update(keys, values, layer)
    for _ in range(count):
        out = language_model.transformer(inputs_embeds=step_input, attention_mask=mask, past_key_values=cache, use_cache=True)
        step_input, cache = out.last_hidden_state[:, -1:], out.past_key_values
        tokens.append(step_input)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return torch.cat(tokens, dim=1), *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


class Translator(nn.Module):
    """CLAP embedding and text states (or phonemes) → LOA [B, num_tokens, width]."""

    def __init__(
        self, config: TranslatorConfig, clap_dim: int, text_dim: int, num_tokens: int, phonemes: PhonemeEncoderConfig | None = None
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.language_model = config.build(num_tokens)
        self.language_model.lm_head.requires_grad_(False)
        # Inputs arrive as embeddings: the token table takes no part, and tied to the head it would only be decayed.
        self.language_model.transformer.wte.requires_grad_(False)
        self.phoneme_model = phonemes.build() if phonemes else None
        self.projection_model = AudioLDM2ProjectionModel(
            clap_dim,
            phonemes.width if phonemes else text_dim,
            config.width,
            use_learned_position_embedding=True if phonemes else None,
            max_seq_length=phonemes.max_length if phonemes else None,
        )
        for row in (n for n, _ in self.projection_model.named_parameters() if n.startswith(("sos", "eos"))):
            nn.init.normal_(getattr(self.projection_model, row))  # a row of torch's nn.Embedding, as the reference has
        if self.phoneme_model is not None:
            self.phoneme_model.requires_grad_(False)
            self.phoneme_model.text_encoder.requires_grad_(True)

    def trained(self) -> Iterator[nn.Parameter]:
        """The parameters that take part."""
        return (p for p in self.parameters() if p.requires_grad)

    def condition(self, clap: Tensor, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """CLAP [B, C] and text states [B, L, D] (or phoneme ids [B, L]) with mask → GPT-2 prefix [B, S, width], mask."""
        if self.phoneme_model is not None:
            encoder = self.phoneme_model.text_encoder
            text = encoder(text, padding_mask=text_mask[..., None].float(), attention_mask=text_mask).last_hidden_state
        ones = text_mask.new_ones(len(clap), 1)
        joined = self.projection_model(clap[:, None], text, ones, text_mask)
        return joined.hidden_states, joined.attention_mask

    def forward(self, clap: Tensor, text: Tensor, text_mask: Tensor, loa: Tensor | None = None) -> Tensor:
        """With the true `loa` [B, N, width]: teacher-forced predictions of it. Without: generate autoregressively."""
        states, mask = self.condition(clap, text, text_mask)
        if loa is None:
            return generate_loa(self.language_model, states, mask, self.num_tokens)
        known = loa[:, :-1].to(states.dtype)
        inputs = torch.cat([states, known], dim=1)
        mask = torch.cat([mask, mask.new_ones(known.shape[:2])], dim=1)
        hidden = self.language_model.transformer(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden[:, states.shape[1] - 1 :]

    def homes(self) -> dict[str, nn.Module]:
        """Its networks by the folders of `save`."""
        speech = {} if self.phoneme_model is None else {"text_encoder_2": self.phoneme_model}
        return {"language_model": self.language_model, "projection_model": self.projection_model, **speech}

    def save(self, folder: Path) -> None:
        """Write language_model/, projection_model/ and, for speech, text_encoder_2/."""
        self.language_model.save_pretrained(folder / "language_model")
        self.projection_model.save_pretrained(folder / "projection_model")
        if self.phoneme_model is not None:
            self.phoneme_model.save_pretrained(folder / "text_encoder_2")

    def load(self, folder: Path) -> None:
        """Take the weights that `save` (or a diffusers AudioLDM 2 folder) holds."""
        # Public folders name GPT2Model; the head class reads them as well (references.md#diffusers-pipeline).
        self.language_model.load_state_dict(GPT2LMHeadModel.from_pretrained(folder / "language_model").state_dict())
        self.projection_model.load_state_dict(AudioLDM2ProjectionModel.from_pretrained(folder / "projection_model").state_dict())
        if self.phoneme_model is not None:
            self.phoneme_model.load_state_dict(VitsModel.from_pretrained(folder / "text_encoder_2").state_dict())
