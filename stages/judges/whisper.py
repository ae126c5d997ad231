"""Whisper reads speech, so that what was said can be compared with what was asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import soxr
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from stages.audio import Waveform
from stages.errors import UserError
from stages.files import weights_hash


class Transcriber:
    """A Whisper in a local folder as transformers saves it, decoding greedily in English.

    Attributes:
        name: the folder's name, for the record beside an error rate.
        weights_hash: sha256 of its weights.
        sample_rate: of its input, in Hz; other rates are resampled.
    """

    def __init__(self, folder: Path, device: str | torch.device = "cpu") -> None:
        self.name = Path(folder).name
        config = Path(folder) / "config.json"
        if not config.is_file() or json.loads(config.read_text(encoding="utf-8")).get("model_type") != "whisper":
            raise UserError(f"{folder} contains no Whisper model (by its config.json); name a folder as transformers saves one")
        self.weights_hash = weights_hash(folder)
        self._processor = WhisperProcessor.from_pretrained(folder, local_files_only=True)
        network = WhisperForConditionalGeneration.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        self._network = network.eval().requires_grad_(False).to(device)
        self.sample_rate: int = self._processor.feature_extractor.sampling_rate

    @torch.inference_mode()
    def transcribe(self, waveforms: Sequence[Waveform], sample_rate: int, batch: int = 8) -> list[str]:
        """The words of clips `[T]`, each at most as long as Whisper's window (30 s).

        No clip sees another's words, there are no timestamps and no sampling: loops of invented words, which would count
        as errors of the speech, are rarest so (references.md#word-errors).
        """
        window = self._processor.feature_extractor.chunk_length
        long = [i for i, wave in enumerate(waveforms) if len(wave) > window * sample_rate]
        if long:
            raise UserError(
                f"clip {long[0]} lasts {len(waveforms[long[0]]) / sample_rate:.1f} s; {self.name} transcribes at most {window} s at a time"
            )
        groups = [waveforms[first : first + batch] for first in range(0, len(waveforms), batch)]
        return [text for group in groups for text in self._read(group, sample_rate)]

    def _read(self, waveforms: Sequence[Waveform], sample_rate: int) -> list[str]:
        if sample_rate != self.sample_rate:
            waveforms = [soxr.resample(wave, sample_rate, self.sample_rate, quality="VHQ") for wave in waveforms]
        inputs = self._processor(list(waveforms), sampling_rate=self.sample_rate, return_tensors="pt", return_attention_mask=True)
        language = {"language": "en", "task": "transcribe"} if getattr(self._network.generation_config, "is_multilingual", False) else {}
        tokens = self._network.generate(
            inputs.input_features.to(self._network.device, self._network.dtype),
            attention_mask=inputs.attention_mask.to(self._network.device),
            do_sample=False,
            num_beams=1,
            return_timestamps=False,
            **language,
        )
        return [str(text).strip() for text in self._processor.batch_decode(tokens, skip_special_tokens=True)]
