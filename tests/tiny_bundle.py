"""A whole AudioLDM 2 with random weights, small enough to build and run in a second: for tests of what uses bundles."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaTokenizerFast,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from stages.audio import AudioConfig
from stages.bundle import assemble
from stages.diffusion.model import noise_schedule
from stages.files import write_json
from stages.translator.model import PhonemeEncoderConfig

AUDIO = AudioConfig(clip_seconds=0.64)  # 10,240 samples, 64 mel frames
CLAP_WIDTH, TEXT_WIDTH, LOA_WIDTH, LOA_TOKENS, PHONEMES = 16, 24, 32, 4, 40
SCALE = 0.7


def roberta_tokenizer() -> RobertaTokenizerFast:
    """Byte-level BPE without merges: one token per byte."""
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "<mask>"])}
    return RobertaTokenizerFast(vocab=vocab, merges=[], model_max_length=48)


def t5_tokenizer() -> T5TokenizerFast:
    """A unigram model of single characters, with T5's closing </s>."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=24)


def write_stages(root: Path, speech: bool = False, seed: int = 0) -> dict[str, Path]:
    """Folders in the layout of released stages, by stage name; speech has a phoneme encoder in T5's place."""
    torch.manual_seed(seed)
    root = Path(root)
    stages = {name: root / name for name in ("clap", "translator", "diffusion", "vae", "vocoder")}

    clap = ClapModel(
        ClapConfig(
            text_config={
                "vocab_size": 261,
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "projection_dim": CLAP_WIDTH,
                "max_position_embeddings": 64,
            },
            audio_config={
                "hidden_size": 32,
                "patch_embeds_hidden_size": 16,
                "depths": [1, 1],
                "num_attention_heads": [2, 2],
                "num_hidden_layers": 2,
                "window_size": 2,
                "spec_size": 32,
                "num_mel_bins": 8,
                "patch_size": 4,
                "patch_stride": [4, 4],
                "projection_dim": CLAP_WIDTH,
            },
            projection_dim=CLAP_WIDTH,
        )
    )
    clap.eval().save_pretrained(stages["clap"] / "text_encoder")
    roberta_tokenizer().save_pretrained(stages["clap"] / "tokenizer")
    extractor = ClapFeatureExtractor(
        feature_size=8,
        sampling_rate=16_000,
        hop_length=160,
        max_length_s=1,
        fft_window_size=512,
        frequency_max=8000,
        truncation="rand_trunc",
        padding="repeatpad",
    )
    extractor.save_pretrained(stages["clap"] / "feature_extractor")
    t5 = T5EncoderModel(
        T5Config(vocab_size=30, d_model=TEXT_WIDTH, d_kv=8, num_heads=2, num_layers=1, d_ff=32, feed_forward_proj="gated-gelu")
    )
    t5.save_pretrained(stages["clap"] / "text_encoder_2")
    t5_tokenizer().save_pretrained(stages["clap"] / "tokenizer_2")

    config = GPT2Config(vocab_size=8, n_positions=128, n_embd=LOA_WIDTH, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    config.max_new_tokens = LOA_TOKENS
    GPT2LMHeadModel(config).save_pretrained(stages["translator"] / "language_model")
    projection = AudioLDM2ProjectionModel(CLAP_WIDTH, TEXT_WIDTH, LOA_WIDTH)
    if speech:
        phonemes = PhonemeEncoderConfig(width=16, layers=1, heads=2, feed_forward=32, max_length=PHONEMES)
        phonemes.build().save_pretrained(stages["translator"] / "text_encoder_2")
        phonemes.save_tokenizer(stages["translator"] / "tokenizer_2")
        projection = AudioLDM2ProjectionModel(CLAP_WIDTH, 16, LOA_WIDTH, use_learned_position_embedding=True, max_seq_length=PHONEMES)
    for parameter in projection.parameters():  # the library starts its tokens at one and its positions at zero
        torch.nn.init.normal_(parameter, std=0.5)
    projection.save_pretrained(stages["translator"] / "projection_model")

    place = (None, LOA_WIDTH) if speech else (None, LOA_WIDTH, TEXT_WIDTH)
    unet = AudioLDM2UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=(place, place),
        attention_head_dim=(1, 2),
    )
    for name, parameter in unet.named_parameters():  # fresh cross-attention whispers; tests want to see conditions at work
        if "attn2.to_out.0.weight" in name:
            parameter.data *= 20
    unet.save_pretrained(stages["diffusion"] / "unet")
    noise_schedule().save_pretrained(stages["diffusion"] / "scheduler")
    write_json(stages["diffusion"] / "scale.json", {"scale_factor": SCALE})

    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=1.0,
    )
    vae.save_pretrained(stages["vae"] / "vae")
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=AUDIO.mel_bins,
            sampling_rate=AUDIO.sample_rate,
            upsample_initial_channel=16,
            upsample_rates=[8, 5, 4],
            upsample_kernel_sizes=[16, 11, 8],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1]],
            normalize_before=False,
            initializer_range=0.2,
        )
    )
    vocoder.save_pretrained(stages["vocoder"] / "vocoder")
    return stages


def make_bundle(out: Path, speech: bool = False, seed: int = 0) -> Path:
    """A random bundle at `out`; its stages lie beside it in `<out>-stages`."""
    out = Path(out)
    stages = write_stages(out.with_name(out.name + "-stages"), speech, seed)
    meta = {"variant": "audioldm2-ljs" if speech else "audioldm2-full", "tiny": True, "audio": AUDIO, "provenance": {"made_by": "tests"}}
    return assemble(stages, out, meta)
