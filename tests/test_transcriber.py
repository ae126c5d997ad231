"""Whisper from a local folder, small and random: what it is asked for, not what it has learnt."""

import json

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor, WhisperTokenizer

from stages.errors import UserError
from stages.judges.whisper import Transcriber

SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>", "<|nospeech|>", "<|notimestamps|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Whisper of 2 s windows that can say single characters."""
    place = tmp_path_factory.mktemp("whisper")
    letters = [chr(c) for c in range(33, 127)] + ["Ġ"]
    (place / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(letters + SPECIAL)}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = WhisperTokenizer(str(place / "vocab.json"), str(place / "merges.txt"), additional_special_tokens=SPECIAL[1:])
    number = {token: len(letters) + i for i, token in enumerate(SPECIAL)}
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(letters) + len(SPECIAL),
            num_mel_bins=80,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_source_positions=100,
            max_target_positions=16,
            decoder_start_token_id=number["<|startoftranscript|>"],
            bos_token_id=number["<|endoftext|>"],
            eos_token_id=number["<|endoftext|>"],
            pad_token_id=number["<|endoftext|>"],
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    )
    told = model.generation_config
    told.update(
        is_multilingual=True,
        lang_to_id={"<|en|>": number["<|en|>"]},
        no_timestamps_token_id=number["<|notimestamps|>"],
        task_to_id={"transcribe": number["<|transcribe|>"], "translate": number["<|translate|>"]},
        max_length=12,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model.save_pretrained(place)
    WhisperProcessor(WhisperFeatureExtractor(chunk_length=2), tokenizer).save_pretrained(place)
    return place


def test_words_do_not_depend_on_neighbours_or_on_the_rate_of_the_file(folder):
    reader = Transcriber(folder)
    clips = [np.random.default_rng(i).standard_normal(24_000).astype(np.float32) * 0.1 for i in range(3)]
    words = reader.transcribe(clips, 16_000)
    assert len(words) == 3 and all(isinstance(text, str) and "<|" not in text for text in words)
    assert [reader.transcribe([clip], 16_000)[0] for clip in clips] == words == reader.transcribe(clips, 16_000, batch=2)
    assert len(reader.transcribe([np.zeros(8000, np.float32)], 8000)) == 1
    assert len(reader.weights_hash) == 64 and reader.name == folder.name


def test_clips_beyond_its_window_and_other_folders_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="clip 1 lasts 2.5 s.*2 s at a time"):
        Transcriber(folder).transcribe([np.zeros(100, np.float32), np.zeros(40_000, np.float32)], 16_000)
    with pytest.raises(UserError, match="contains no Whisper"):
        Transcriber(tmp_path)
