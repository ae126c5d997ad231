"""The sounds of an evaluation: generated, restored and real clips, made once, kept on disk, and given as sets of clips."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from pipelines.evaluation.clips import AudioFile, Chosen, Clip, ClipSet, Role
from pipelines.features.reader import StoreReader
from stages.audio import AudioConfig, Waveform, load_audio, log_mel, normalise, pad_or_cut, write_wav
from stages.files import digest, replacing
from stages.generator import AudioGenerator
from stages.sampling import OPTIONS

RESTORED = {"vae": "VAE + vocoder", "vocoder": "vocoder"}  # real clips through the last parts of the system


@dataclass(frozen=True)
class Making:
    """What decides the generated and the restored sounds.

    Attributes:
        sampling: every option of `stages.sampling`.
        ranker: what chooses among candidates; None for a single one.
    """

    weights_sha256: str
    seed: int
    seconds: float
    sampling: Mapping[str, Any]
    ranker: str | None = None

    def settings(self) -> dict[str, Any]:
        """As JSON values, for names of folders, records and MLflow."""
        return {"bundle_sha256": self.weights_sha256, "seed": self.seed, "seconds": self.seconds, **self.sampling}


class Sounds:
    """Waveforms under `<work>/evaluation`, 16-bit WAV.

    The folders are named by what the sounds depend on, so that an interrupted evaluation finds what it has made and
    another bundle or setting never meets it.
    """

    def __init__(self, folder: Path, audio: AudioConfig, making: Making) -> None:
        self.folder, self.audio, self.making = folder, audio, making
        restored = digest(making.weights_sha256, 12)
        self._folders = {"generated": f"generated-{digest(making.settings(), 12)}", "real": "real"}
        self._folders |= {system: f"{system}-{restored}" for system in RESTORED}

    def path(self, system: str, clip: Clip) -> Path:
        """The file of a clip. Real and restored sounds do not depend on the caption."""
        name = clip.key if system == "generated" else clip.clip_id
        return self.folder / self._folders[system] / f"{name}.wav"

    def sets(self, chosen: Chosen, name: str) -> dict[str, ClipSet]:
        """The sets to score: the system `name`, its restored clips, the real ones, and others where there are as many."""
        settings, weights = self.making.settings(), {"weights_sha256": self.making.weights_sha256}
        sampled = weights | {k: v for k, v in settings.items() if k not in ("bundle_sha256", "candidates")}
        sets = {"generated": self._set("generated", name, "system", chosen.clips, sampled)}
        for system, title in RESTORED.items():
            sets[system] = self._set(system, f"{name}: {title}", "restored", chosen.clips, weights)
        sets["real"] = self._set("real", "real clips", "reference", chosen.clips)
        if len(chosen.others) == len(chosen.clips):
            sets["other_real"] = self._set("real", "other real clips", "floor", chosen.others)
        return sets

    def _set(self, system: str, name: str, role: Role, clips: Sequence[Clip], made: Mapping[str, Any] | None = None) -> ClipSet:
        files = tuple(AudioFile.of(self.path(system, clip)) for clip in clips)
        chosen_from = {"candidates": self.making.sampling["candidates"], "ranker": self.making.ranker} if role == "system" else {}
        return ClipSet(name, role, tuple(clips), files, made or {}, self.audio.clip_seconds, **chosen_from)

    def keep_real(self, clips: Iterable[Clip], reader: StoreReader) -> None:
        """Write the real clips beside the others."""
        missing = self._missing("real", clips)
        numbers = reader.table.numbers([clip.clip_id for clip in missing]) if missing else {}
        for clip in missing:
            self._write("real", clip, reader.read(numbers[clip.clip_id])["waveform"])

    def generate(self, clips: Sequence[Clip], generator: Callable[[], AudioGenerator], speech: bool, batch: int) -> int:
        """Generate the missing clips; returns how many. Every clip has a seed of its own."""
        missing = self._missing("generated", clips)
        with tqdm(total=len(clips), initial=len(clips) - len(missing), desc="generate", unit="clip", disable=not missing) as bar:
            for first in range(0, len(missing), batch):
                group = missing[first : first + batch]
                waveforms = generator().generate(
                    [clip.text for clip in group],
                    transcriptions=[clip.transcript for clip in group] if speech else None,
                    seconds=self.audio.clip_seconds,
                    **{option: self.making.sampling[option] for option in OPTIONS},
                    seed=[zlib.crc32(f"{self.making.seed}/{clip.clip_id}".encode()) for clip in group],
                )
                for clip, waveform in zip(group, waveforms, strict=True):
                    self._write("generated", clip, waveform)
                bar.update(len(group))
        return len(missing)

    def restore(self, clips: Sequence[Clip], generator: Callable[[], AudioGenerator], batch: int) -> None:
        """Send the real clips through the vocoder, and through VAE and vocoder."""
        for system, title in RESTORED.items():
            missing = self._missing(system, clips)
            for first in tqdm(range(0, len(missing), batch), desc=title, unit="batch", disable=not missing):
                group = missing[first : first + batch]
                mel = mels([load_audio(self.path("real", clip), self.audio.sample_rate) for clip in group], self.audio)
                waveforms = generator().vocode(mel) if system == "vocoder" else generator().reconstruct(mel)
                for clip, waveform in zip(group, waveforms, strict=True):
                    self._write(system, clip, pad_or_cut(waveform, self.audio.clip_samples))

    def _missing(self, system: str, clips: Iterable[Clip]) -> list[Clip]:
        return [clip for clip in clips if not self.path(system, clip).is_file()]

    def _write(self, system: str, clip: Clip, waveform: Waveform) -> None:
        with replacing(self.path(system, clip)) as draft:
            write_wav(draft, waveform, self.audio.sample_rate)


def mels(waveforms: Sequence[Waveform], audio: AudioConfig) -> NDArray[np.float32]:
    """Log-mel spectrograms `[N, F, M]` of waveforms, treated as a recording is on its way into the store."""
    ready = np.stack([pad_or_cut(normalise(wave), audio.clip_samples) for wave in waveforms])
    result: NDArray[np.float32] = log_mel(torch.from_numpy(ready), audio).numpy()
    return result
