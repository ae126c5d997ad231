"""The sounds of an evaluation: every system's waveform for every held-out clip, made once and kept."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from pipelines.evaluation.clips import HeldOut
from pipelines.evaluation.results import SYSTEMS
from pipelines.features.reader import StoreReader
from stages.audio import AudioConfig, Waveform, load_audio, log_mel, normalise, pad_or_cut, write_wav
from stages.files import replacing
from stages.generator import AudioGenerator
from stages.sampling import OPTIONS


class Sounds:
    """Waveforms of every system under `<work>/evaluation`, 16-bit WAV, made once.

    The folders are named by what the sounds depend on, so that an interrupted evaluation finds what it has made and
    another bundle or setting never meets it.
    """

    def __init__(self, place: Path, audio: AudioConfig, generated: str, restored: str) -> None:
        self.place, self.audio = place, audio
        self._folders = {"generated": f"generated-{generated}", "vae": f"vae-{restored}", "vocoder": f"vocoder-{restored}", "real": "real"}

    def path(self, system: str, clip: HeldOut) -> Path:
        """Where a sound lies. A clip's own sounds do not depend on its caption."""
        name = clip.key if system == "generated" else clip.clip_id
        return self.place / self._folders[system] / f"{name}.wav"

    def read(self, system: str, clip: HeldOut) -> Waveform:
        """A sound as it was written."""
        return load_audio(self.path(system, clip), self.audio.sample_rate)

    def _missing(self, system: str, clips: Sequence[HeldOut]) -> list[HeldOut]:
        return [clip for clip in clips if not self.path(system, clip).is_file()]

    def _write(self, system: str, clip: HeldOut, waveform: Waveform) -> None:
        with replacing(self.path(system, clip)) as draft:
            write_wav(draft, waveform, self.audio.sample_rate)

    def generate(
        self, clips: Sequence[HeldOut], generator: Callable[[], AudioGenerator], settings: Mapping[str, Any], speech: bool, batch: int
    ) -> int:
        """Generate what is missing; returns how many clips that were. Every clip has a seed of its own."""
        missing = self._missing("generated", clips)
        with tqdm(total=len(clips), initial=len(clips) - len(missing), desc="generate", unit="clip", disable=not missing) as bar:
            for first in range(0, len(missing), batch):
                group = missing[first : first + batch]
                waveforms = generator().generate(
                    [clip.text for clip in group],
                    transcriptions=[clip.transcript for clip in group] if speech else None,
                    seconds=self.audio.clip_seconds,
                    **{name: settings[name] for name in OPTIONS},
                    seed=[zlib.crc32(f"{settings['seed']}/{clip.clip_id}".encode()) for clip in group],
                )
                for clip, waveform in zip(group, waveforms, strict=True):
                    self._write("generated", clip, waveform)
                bar.update(len(group))
        return len(missing)

    def keep_real(self, clips: Sequence[HeldOut], reader: StoreReader) -> None:
        """Put the real clips beside the others."""
        for clip in self._missing("real", clips):
            self._write("real", clip, reader.read(clip.clip_id)["waveform"])

    def restore(self, clips: Sequence[HeldOut], generator: Callable[[], AudioGenerator], batch: int) -> None:
        """Send the real clips through the vocoder, and through VAE and vocoder."""
        for system in ("vocoder", "vae"):
            missing = self._missing(system, clips)
            for first in tqdm(range(0, len(missing), batch), desc=SYSTEMS[system], unit="batch", disable=not missing):
                group = missing[first : first + batch]
                mel = mels([self.read("real", clip) for clip in group], self.audio)
                waveforms = generator().vocode(mel) if system == "vocoder" else generator().reconstruct(mel)
                for clip, waveform in zip(group, waveforms, strict=True):
                    self._write(system, clip, pad_or_cut(waveform, self.audio.clip_samples))


def mels(waveforms: Sequence[Waveform], audio: AudioConfig) -> NDArray[np.float32]:
    """Log-mel spectrograms `[N, F, M]` of waveforms, treated as a recording is on its way into the store."""
    ready = np.stack([pad_or_cut(normalise(wave), audio.clip_samples) for wave in waveforms])
    result: NDArray[np.float32] = log_mel(torch.from_numpy(ready), audio).numpy()
    return result
