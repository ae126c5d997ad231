"""The passes of preprocessing: each turns the clips of one shard into members of a series.

What becomes of a clip depends on its row and features alone (of encoders, up to the rounding of a worker's device and
threads), so a pass may be stopped anywhere, repeated, and spread over any number of workers (`pipelines.features.run`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from options import Reservation
from pipelines.features import precision
from pipelines.features.outcomes import Failed, Filtered, Kept, Outcome, Rejected, describe, is_failure
from pipelines.features.recording import decibels, frame_power, measures, read_recording
from pipelines.features.shards import Member
from stages.audio import SILENCE, AudioConfig, clip_mel, encode_flac, fbank, normalise, pad_or_cut, peak
from stages.errors import AudioError
from stages.files import Place, code_version, weights_hash
from stages.text import clip_texts

PROOF_SECONDS = 0.1  # of a recording that a worker reads to prove that it can

Row = Mapping[str, Any]
Features = Mapping[str, np.ndarray]
T = TypeVar("T")


class Pass:
    """What one pass makes of clips. It is pickled to the workers with its settings; `load` fetches weights there."""

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()  # series whose features `encode` is given
    encoder: ClassVar[str] = ""  # the stage whose weights it needs; without one it runs as stateless CPU tasks
    weights: ClassVar[tuple[str, ...]] = ("",)  # folders of that stage's release that the pass reads
    fp16: ClassVar[bool] = False  # whether GPUs without native bf16 may use fp16: where the golden values hold
    batch: int = 1  # clips per call of `encode`
    needs: ClassVar[Reservation] = Reservation(cpus=4, gpus=1)  # of one worker

    def __init__(self, audio: AudioConfig, folder: Path | Place | None = None) -> None:
        self.audio, self.released = audio, None if folder is None else Place.of(folder)
        self.device = torch.device("cpu")
        self.precision = "fp32"  # of the encoder; belongs to the series, whatever device continues it
        self.made_on = "cpu"  # the kind of device that began the series
        self.known: Row | None = None  # a clip whose recording the driver could read
        self.reject_failed = False  # give up clips that fail: they count as rejected

    @property
    def folder(self) -> Path | None:
        """The weights of its encoder as a local folder: of those behind a URL every machine has a copy of its own."""
        return None if self.released is None else self.released.local_copy()

    @property
    def series(self) -> tuple[str, ...]:
        """The series it writes."""
        return (self.name,)

    def recipe(self, series: str) -> dict[str, Any]:
        """What identifies the data of a series, and under "provenance" what merely made it."""
        provenance = {"code": code_version()} | ({"device": self.made_on} if self.encoder else {})
        recipe: dict[str, Any] = {"format": 1, "audio": self.audio.to_dict(), "provenance": provenance}
        if self.folder is not None:
            recipe |= {
                "encoder": self.encoder,
                "weights": {part or self.encoder: weights_hash(self.folder / part) for part in self.weights},
                "precision": self.precision,
            }
        return recipe

    def wants(self, row: Row) -> bool:
        """Whether a clip belongs into the series at all."""
        return True

    def prove(self) -> None:
        """Read what the driver could read. Raises OSError where this node cannot."""

    def load(self, device: torch.device) -> None:
        """Called once per worker, before the first `encode`. Raises UserError when the device lacks the series' precision."""
        self.device = device
        if self.encoder:
            precision.require(self.precision, device, self.name)

    def encode(self, rows: Sequence[Row], clips: Sequence[Features]) -> list[Outcome]:
        """What becomes of each clip of a batch."""
        raise TypeError(f"{type(self).__name__} does not encode")

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the series, on any device."""
        return precision.autocast(self.precision, self.device)


class MelPass(Pass):
    """Recordings → normalised waveform (FLAC) and log-mel spectrogram of every clip.

    Args:
        skip_silence: leave out clips whose loudest 20 ms lie below so many dB of full scale; None keeps all that hold sound.
    """

    name = "mel"
    needs = Reservation(cpus=1, gpus=0)

    def __init__(self, audio: AudioConfig, skip_silence: float | None = None) -> None:
        super().__init__(audio)
        self.skip_silence = skip_silence

    def recipe(self, series: str) -> dict[str, Any]:
        return super().recipe(series) | ({} if self.skip_silence is None else {"skip_silence": self.skip_silence})

    @property
    def series(self) -> tuple[str, ...]:
        return ("mel", "waveform")

    def encode(self, rows: Sequence[Row], clips: Sequence[Features]) -> list[Outcome]:
        return [self._encode(row) for row in rows]

    def load(self, device: torch.device) -> None:
        super().load(device)
        _keep_freed_memory()

    def prove(self) -> None:
        if self.known is not None:
            read_recording(self.known["path"], self.audio.sample_rate, self.known["start"], PROOF_SECONDS)

    def _encode(self, row: Row) -> Outcome:
        try:
            recorded = read_recording(row["path"], self.audio.sample_rate, row["start"], row["seconds"])
            if not len(recorded) or peak(recorded) <= SILENCE:
                return Rejected("silent")
            power = frame_power(recorded)
            if self.skip_silence is not None and (loudest := decibels(float(power.max()))) < self.skip_silence:
                return Filtered(f"quiet: {loudest:.1f} dB at its loudest, below {self.skip_silence:g} dB")
            waveform = normalise(recorded)
            members: dict[str, dict[str, Member]] = {
                "mel": {"mel.npy": _half(clip_mel(waveform, self.audio))},
                "waveform": {"waveform.flac": encode_flac(pad_or_cut(waveform, self.audio.clip_samples), self.audio.sample_rate)},
            }
            return Kept(members, measures(power))
        except AudioError as error:
            return Rejected(str(error))
        except Exception as error:
            if not is_failure(error):
                raise
            return Failed(describe(error))


class LoaPass(Pass):
    """Waveforms → the language of audio: AudioMAE features pooled at every λ asked for, from one forward."""

    name, reads, encoder = "loa", ("waveform",), "audiomae"
    fp16 = True

    def __init__(self, audio: AudioConfig, folder: Path | Place, poolings: Sequence[int]) -> None:
        super().__init__(audio, folder)
        self.poolings = tuple(sorted(set(poolings)))
        self.batch = 16

    @property
    def series(self) -> tuple[str, ...]:
        return tuple(f"loa-{pooling}" for pooling in self.poolings)

    def recipe(self, series: str) -> dict[str, Any]:
        return super().recipe(series) | {"pooling": int(series.removeprefix("loa-"))}

    def load(self, device: torch.device) -> None:
        from stages.audiomae.model import AudioMAE

        super().load(device)
        assert self.folder is not None
        self.network = AudioMAE.load(self.folder).to(device)

    @torch.inference_mode()
    def encode(self, rows: Sequence[Row], clips: Sequence[Features]) -> list[Outcome]:
        from stages.audiomae.model import pool_loa

        frames = fbank(_stack(clips, "waveform", self.device), self.audio)
        with self.autocast():
            features = self.network.features(frames)
        pooled = {p: _half(pool_loa(features.float(), self.network.config.grid, p)) for p in self.poolings}
        return [_checked({f"loa-{p}": {"loa.npy": loa[i]} for p, loa in pooled.items()}) for i in range(len(rows))]


class LatentPass(Pass):
    """Log-mel spectrograms → mean and standard deviation of the VAE's posterior, unscaled."""

    name, reads, encoder, weights = "latent", ("mel",), "vae", ("vae",)
    batch = 8

    def load(self, device: torch.device) -> None:
        from diffusers import AutoencoderKL

        super().load(device)
        assert self.folder is not None
        self.network = AutoencoderKL.from_pretrained(self.folder / "vae").to(device).eval()

    @torch.inference_mode()
    def encode(self, rows: Sequence[Row], clips: Sequence[Features]) -> list[Outcome]:
        mel = _stack(clips, "mel", self.device)[:, None]
        with self.autocast():
            moments = self.network.encode(mel).latent_dist.parameters
        mean, log_variance = moments.float().chunk(2, dim=1)
        latents = _half(torch.cat([mean, (log_variance.clamp(-30.0, 20.0) / 2).exp()], dim=1))
        return [_checked({"latent": {"latent.npy": latent}}) for latent in latents]


class ClapPass(Pass):
    """What the passes by the towers of CLAP and T5 share: loading them."""

    encoder = "clap"

    def load(self, device: torch.device) -> None:
        from stages.frozen import TextEncoders

        super().load(device)
        assert self.folder is not None
        self.network = TextEncoders.load(self.folder, device)


class TextPass(ClapPass):
    """Captions (or labels) → CLAP embeddings and T5 states of all texts of a clip."""

    name, weights = "text", ("text_encoder", "text_encoder_2")
    batch = 256
    texts_at_once = 32

    @torch.inference_mode()
    def encode(self, rows: Sequence[Row], clips: Sequence[Features]) -> list[Outcome]:
        texts = [clip_texts(row) for row in rows]
        known: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        # Equal texts once (labels repeat), short ones together (padding costs as much as words).
        for chunk in chunks(sorted({text for group in texts for text in group}, key=lambda text: (len(text), text)), self.texts_at_once):
            with self.autocast():
                clap, (states, mask) = self.network.clap_text(chunk), self.network.t5(chunk)
            lengths = mask.sum(1).tolist()
            for text, embedding, state, length in zip(chunk, _half(clap), _half(states), lengths, strict=True):
                known[text] = embedding, state[:length]
        return [_checked({"text": _text_members([known[text] for text in group])}) for group in texts]


class SpeechPass(ClapPass):
    """Spoken clips → the speaker's CLAP embedding and the phonemes of the transcript. Clips without one are left out."""

    name, reads, weights = "speech", ("waveform",), ("text_encoder",)
    batch = 16

    def __init__(self, audio: AudioConfig, folder: Path | Place, max_phonemes: int) -> None:
        super().__init__(audio, folder)
        self.max_phonemes = max_phonemes

    def recipe(self, series: str) -> dict[str, Any]:
        return super().recipe(series) | {"max_phonemes": self.max_phonemes}

    def wants(self, row: Row) -> bool:
        return bool(row["transcript"])

    @torch.inference_mode()
    def encode(self, rows: Sequence[Row], clips: Sequence[Features]) -> list[Outcome]:
        from stages.phonemes import phoneme_ids

        with self.autocast():
            voices = _half(self.network.clap_audio(_stack(clips, "waveform", self.device), self.audio.sample_rate))
        ids = [phoneme_ids(row["transcript"], self.max_phonemes) for row in rows]
        return [
            _checked({"speech": {"clap_audio.npy": voice, "phonemes.npy": phonemes}}) for voice, phonemes in zip(voices, ids, strict=True)
        ]


def chunks(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """Consecutive groups of `size` items, the last one smaller."""
    for first in range(0, len(items), size):
        yield list(items[first : first + size])


def _keep_freed_memory() -> None:
    """Have glibc keep up to 128 MB of freed memory: giving it back costs 2,000 page faults for the arrays of every clip."""
    trim_threshold, mmap_threshold = -1, -3  # names of mallopt(3)
    with suppress(OSError, AttributeError):  # another C library
        c_library = ctypes.CDLL(None)
        c_library.mallopt(trim_threshold, 128 << 20)
        c_library.mallopt(mmap_threshold, 32 << 20)


def _stack(clips: Sequence[Features], name: str, device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack([clip[name] for clip in clips])).to(device).float()


def _half(values: Tensor) -> np.ndarray:
    halves: np.ndarray = values.detach().half().cpu().numpy()
    return halves


def _checked(members: dict[str, dict[str, Member]]) -> Outcome:
    """The members, unless an encoder left numbers that would poison a training."""
    for group in members.values():
        for name, value in group.items():
            if isinstance(value, np.ndarray) and not np.isfinite(value).all():
                return Rejected(f"{name} is not finite in half precision")
    return Kept(members)


def _text_members(texts: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Member]:
    """K texts of a clip side by side, T5 states padded with zeros to the longest."""
    lengths = np.array([len(states) for _, states in texts], np.int16)
    padded = np.zeros((len(texts), int(lengths.max()), texts[0][1].shape[1]), np.float16)
    for row, (_, states) in zip(padded, texts, strict=True):
        row[: len(states)] = states
    return {"clap_text.npy": np.stack([clap for clap, _ in texts]), "t5.npy": padded, "t5_length.npy": lengths}
