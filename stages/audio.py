"""Waveforms in and out, and the two spectrogram front ends of AudioLDM 2.

The log-mel spectrogram feeds the VAE and the vocoder; the Kaldi-style filterbank feeds AudioMAE. Preprocessing,
training, evaluation and serving all call the functions here: the constants below have no second home.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike, fspath
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from stages.errors import AudioError
from stages.recordings import open_recording, parse_address

Waveform = NDArray[np.float32]
Source = str | PathLike[str] | bytes | BinaryIO

SILENCE = 1e-4  # a clip whose samples all lie below holds no sound
PEAK = 0.5  # level of every training waveform
LOG_FLOOR = 1e-5  # the log-mel spectrogram bottoms out at ln 1e-5 = -11.5129

FBANK_RATE = 16_000  # Hz; the published AudioMAE reads 16 kHz, other rates are resampled first
FBANK_SHIFT_SECONDS = 0.010
FBANK_MEAN, FBANK_STD = -4.2677393, 4.5689974  # over AudioSet; the features are divided by twice the deviation


@dataclass(frozen=True)
class AudioConfig:
    """How a clip is sampled and seen. The defaults are AudioLDM 2 at 16 kHz."""

    sample_rate: int = 16_000  # Hz
    clip_seconds: float = 10.24
    n_fft: int = 1024  # samples; also the length of the Hann window
    hop_length: int = 160  # samples
    mel_bins: int = 64
    fmin: float = 0.0  # Hz
    fmax: float = 8000.0  # Hz
    fbank_bins: int = 128

    @property
    def clip_samples(self) -> int:
        """Samples of one clip."""
        return round(self.clip_seconds * self.sample_rate)

    @property
    def mel_frames(self) -> int:
        """Log-mel frames of one clip."""
        return self.clip_samples // self.hop_length

    @property
    def fbank_frames(self) -> int:
        """AudioMAE frames of one clip, 10 ms each at any sampling rate."""
        return round(self.clip_seconds / FBANK_SHIFT_SECONDS)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AudioConfig:
        """The inverse of `to_dict`; raises ValueError for a name that is no setting."""
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown audio settings: {', '.join(sorted(unknown))}")
        return cls(**values)


# The front end of the authors' 48 kHz model (references.md#log-mel): 1024 frames in 10.24 s as at 16 kHz, 256 bins.
AUDIO_48K = AudioConfig(sample_rate=48_000, n_fft=2048, hop_length=480, mel_bins=256, fmin=20.0, fmax=24_000.0)


# ---------------------------------------------------------------------------------------------------- recordings


@dataclass(frozen=True)
class Header:
    """What a recording's header says of it, without decoding."""

    seconds: float
    sample_rate: int  # Hz
    channels: int


def probe(source: Source) -> Header:
    """Read a recording's header. Raises AudioError when it is missing, empty or in no known format."""
    with _open(source) as file:
        return Header(file.frames / file.samplerate, file.samplerate, file.channels)


def load_audio(source: Source, sample_rate: int, start: float = 0.0, seconds: float | None = None, channel: int | None = 0) -> Waveform:
    """Decode (part of) one channel of a recording, or their mean, and resample it.

    Args:
        source: a path, an address (`stages.recordings`), the bytes of a whole file, or a seekable binary file.
        sample_rate: wanted rate in Hz.
        start: where to begin, in seconds.
        seconds: how much to read at most; None reads to the end.
        channel: which channel to keep. The reference takes the first and never mixes down; None takes the mean of all.

    Returns:
        float32 `[T]`, as loud as recorded; shorter than asked when the recording ends earlier.

    Raises:
        AudioError: the recording is missing, unreadable, empty, ends before `start`, or holds non-finite samples.
        OSError: the file of an address that is more than a path cannot be read.
    """
    name = _name(source)
    with _open(source) as file:
        rate = file.samplerate
        first = round(start * rate)
        if first < 0 or first >= file.frames:
            raise AudioError(f"{name} lasts {file.frames / rate:.2f} s, so nothing can be read from {start:g} s on")
        if channel is not None and not 0 <= channel < file.channels:
            raise AudioError(f"{name} has {file.channels} channel(s), so channel {channel} does not exist (they count from 0)")
        try:
            file.seek(first)
            samples = file.read(-1 if seconds is None else round(seconds * rate), dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise AudioError(f"{name} is damaged: decoding from {start:g} s failed ({_reason(error)})") from error
    if not len(samples):
        raise AudioError(f"{name} has no samples from {start:g} s on although its header promises some; it may be truncated")
    waveform = np.ascontiguousarray(samples.mean(1) if channel is None else samples[:, channel])
    if not np.isfinite(waveform).all():
        raise AudioError(f"{name} contains samples that are not finite numbers")
    if rate != sample_rate:
        waveform = soxr.resample(waveform, rate, sample_rate, quality="HQ")
    return waveform if seconds is None else waveform[: round(seconds * sample_rate)]


def check_audio(source: Source) -> float:
    """Decode a whole recording piece by piece, in bounded memory, and return its seconds.

    Raises AudioError as `load_audio` does, also when it ends before its header says or is silent throughout; OSError likewise.
    """
    name = _name(source)
    decoded, peak = 0, 0.0
    with _open(source) as file:
        try:
            for block in file.blocks(1 << 16, dtype="float32", always_2d=True):
                loudest = float(np.abs(block).max(initial=0.0))  # NaN where a sample is
                if not math.isfinite(loudest):
                    raise AudioError(f"{name} contains samples that are not finite numbers")
                decoded, peak = decoded + len(block), max(peak, loudest)
        except soundfile.SoundFileError as error:
            raise AudioError(f"{name} is damaged: decoding failed at {decoded / file.samplerate:.2f} s ({_reason(error)})") from error
        seconds, promised = decoded / file.samplerate, file.frames / file.samplerate
        if decoded < file.frames:
            raise AudioError(f"{name} is truncated: its header promises {promised:.2f} s and {seconds:.2f} s can be decoded")
        if peak <= SILENCE:
            raise AudioError(f"{name} is silent: no sample is louder than {SILENCE:g} of full scale")
        return seconds


def write_wav(target: str | PathLike[str] | BinaryIO, waveform: Waveform, sample_rate: int) -> None:
    """Write `[T]` samples in [-1, 1] as 16-bit WAV; louder samples are clipped."""
    soundfile.write(target, _to_int16(waveform), sample_rate, format="WAV", subtype="PCM_16")


def encode_flac(waveform: Waveform, sample_rate: int) -> bytes:
    """`[T]` samples in [-1, 1] as a 16-bit FLAC file; the same samples always give the same bytes."""
    buffer = io.BytesIO()
    soundfile.write(buffer, _to_int16(waveform), sample_rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def decode_flac(data: bytes) -> Waveform:
    """The float32 samples `[T]` of `encode_flac`, within 2^-16 of the original."""
    with _open(data) as file:
        samples: Waveform = file.read(dtype="float32")
        return samples


def _to_int16(waveform: Waveform) -> NDArray[np.int16]:
    # libsndfile writes floats at scale 32767 but reads them at 32768, which would lose 0.003 % per round trip
    scaled = np.asarray(waveform, dtype=np.float32) * 32768.0
    np.rint(scaled, out=scaled)
    return np.clip(scaled, -32768, 32767, out=scaled).astype(np.int16)


def _open(source: Source) -> soundfile.SoundFile:
    name = _name(source)
    readable = _readable(source)
    try:
        file = soundfile.SoundFile(readable)
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: ".raw", which soundfile reads only with a format
        if isinstance(readable, (str, PathLike)):
            try:
                with open(readable, "rb"):
                    pass
            except OSError as reason:
                raise AudioError(f"{name} cannot be opened: {reason.strerror}") from error
        raise AudioError(f"{name} cannot be decoded as a recording (supported: WAV, FLAC, OGG, MP3, AIFF): {_reason(error)}") from error
    if file.frames == 0:
        file.close()
        raise AudioError(f"{name} is empty: it has no samples")
    return file


def _readable(source: Source) -> str | PathLike[str] | BinaryIO:
    """What libsndfile opens: a plain path by itself, anything else through a file object."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not isinstance(source, (str, PathLike)):
        return source
    return source if parse_address(source).plain else open_recording(source)


def _name(source: Source) -> str:
    if isinstance(source, bytes):
        return f"recording of {len(source)} bytes in memory"
    if isinstance(source, (str, PathLike)):
        return fspath(source)
    return str(getattr(source, "name", "recording in an open file"))


def _reason(error: Exception) -> str:
    return str(getattr(error, "error_string", error)).strip().rstrip(".")


# ---------------------------------------------------------------------------------------------------- waveforms


def normalise(waveform: Waveform) -> Waveform:
    """`[T]` without its mean and with peak 0.5; silence stays silent. Comes before any padding."""
    centred = np.asarray(waveform - waveform.mean(), np.float32)
    loudest = np.float32(peak(centred)) + np.float32(1e-8)
    centred *= PEAK
    centred /= loudest
    return centred


def peak(waveform: Waveform) -> float:
    """The largest magnitude of `[T]` samples."""
    return max(float(waveform.max()), -float(waveform.min()))


def pad_or_cut(waveform: Waveform, samples: int) -> Waveform:
    """`[T]` brought to `[samples]`: zeros are added, or samples dropped, at the end."""
    brought = np.zeros(samples, waveform.dtype)
    brought[: len(waveform)] = waveform[:samples]
    return brought


def rolled(batch: Tensor, shifts: Tensor) -> Tensor:
    """Every clip of `[B, T, …]` shifted in time by its own number of places `[B]`; what leaves at the end comes in at the beginning."""
    length = batch.shape[1]
    source = (torch.arange(length, device=batch.device)[None] - shifts[:, None]) % length
    return batch.gather(1, source.reshape(*source.shape, *[1] * (batch.dim() - 2)).expand_as(batch))


def resample(waveform: Tensor, source_rate: int, target_rate: int) -> Tensor:
    """Change the rate of `[..., T]` on its own device, differentiably, to `[..., ceil(T * target / source)]`.

    A Hann-windowed sinc with 6 zero crossings and a cut-off at 0.99 Nyquist, the reference's choice. Its cost grows
    with the reduced ratio; decoding, where any ratio occurs, resamples with soxr instead.
    """
    if source_rate == target_rate:
        return waveform
    divisor = math.gcd(source_rate, target_rate)
    source, target = source_rate // divisor, target_rate // divisor
    with _full_precision(waveform):
        kernel, width = _sinc_kernel(source, target, waveform.device)
        flat = F.pad(waveform.float().reshape(-1, 1, waveform.shape[-1]), (width, width + source))
        phases = F.conv1d(flat, kernel, stride=source)  # [B, target, steps]
        length = math.ceil(waveform.shape[-1] * target / source)
        return phases.transpose(1, 2).reshape(*waveform.shape[:-1], -1)[..., :length]


@lru_cache(maxsize=16)
def _sinc_kernel(source: int, target: int, device: torch.device) -> tuple[Tensor, int]:
    zero_crossings, rolloff = 6, 0.99
    cutoff = min(source, target) * rolloff
    width = math.ceil(zero_crossings * source / cutoff)
    taps = np.arange(-width, width + source) / source
    phase = -np.arange(target)[:, None] / target
    time = np.clip((phase + taps) * cutoff, -zero_crossings, zero_crossings)
    window = np.cos(time * np.pi / zero_crossings / 2) ** 2
    return _constant(np.sinc(time)[:, None] * window[:, None] * cutoff / source, device), width


# ---------------------------------------------------------------------------------------------------- spectrograms


def log_mel(waveform: Tensor, audio: AudioConfig) -> Tensor:
    """Log-mel spectrogram of a batch, differentiable, in float32 whatever the autocast.

    ln max(M |STFT|, 1e-5) with M the Slaney filterbank and |STFT| the magnitude (not power) under a periodic Hann
    window. Reflecting (n_fft - hop) / 2 samples at each end makes the frame count exactly T // hop.

    Args:
        waveform: `[B, T]` at `audio.sample_rate`.

    Returns:
        `[B, T // hop, mel_bins]`.
    """
    missing = audio.n_fft - audio.hop_length
    if waveform.shape[-1] <= missing - missing // 2:
        raise AudioError(f"a log-mel spectrogram needs more than {missing - missing // 2} samples, got {waveform.shape[-1]}")
    with _full_precision(waveform):
        window, filters = _mel_constants(audio, waveform.device)
        padded = F.pad(waveform.float(), (missing // 2, missing - missing // 2), mode="reflect")
        spectrum = torch.stft(padded, audio.n_fft, audio.hop_length, window=window, center=False, return_complex=True)
        return (spectrum.abs().transpose(1, 2) @ filters).clamp(min=LOG_FLOOR).log()


def clip_mel(waveform: Waveform, audio: AudioConfig) -> Tensor:
    """`log_mel` of a clip `[T]` that is padded with zeros to a clip's length, `[F, M]`: frames of padding alone are not computed."""
    missing = audio.n_fft - audio.hop_length
    # The last frame computed looks so far beyond its end as log_mel reflects, and what is reflected must be zeros as well.
    frames = min(audio.mel_frames, -(-(len(waveform) + missing - missing // 2 + 1) // audio.hop_length))
    sounding = log_mel(torch.from_numpy(pad_or_cut(waveform, frames * audio.hop_length))[None], audio)[0]
    return F.pad(sounding, (0, 0, 0, audio.mel_frames - frames), value=math.log(LOG_FLOOR))


@lru_cache(maxsize=16)
def _mel_constants(audio: AudioConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    filters = slaney_filterbank(audio.sample_rate, audio.n_fft, audio.mel_bins, audio.fmin, audio.fmax)
    return _hann(audio.n_fft, True, device), _constant(filters.T, device)


def slaney_filterbank(sample_rate: int, n_fft: int, mel_bins: int, fmin: float, fmax: float) -> NDArray[np.float64]:
    """Triangular mel filters `[mel_bins, n_fft // 2 + 1]` on Slaney's scale, each of unit area per Hz.

    The scale is linear below 1 kHz (3 mel per 200 Hz) and logarithmic above (27 mel per factor of 6.4).
    """
    step = np.log(6.4) / 27.0

    def to_mel(hz: float) -> float:
        return 15.0 + float(np.log(hz / 1000.0)) / step if hz >= 1000.0 else 3.0 * hz / 200.0

    mel = np.linspace(to_mel(fmin), to_mel(fmax), mel_bins + 2)
    edges = np.where(mel >= 15.0, 1000.0 * np.exp(step * (mel - 15.0)), 200.0 * mel / 3.0)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bins = np.linspace(0.0, sample_rate / 2, n_fft // 2 + 1)
    triangles = np.maximum(0.0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)))
    filters: NDArray[np.float64] = triangles * 2.0 / (high - low)
    return filters


def mel_centres(audio: AudioConfig) -> NDArray[np.float64]:
    """The frequency in Hz of each mel bin, `[M]`: the mean of its filter."""
    filters = slaney_filterbank(audio.sample_rate, audio.n_fft, audio.mel_bins, audio.fmin, audio.fmax)
    return np.asarray(filters @ np.linspace(0.0, audio.sample_rate / 2, filters.shape[1]) / filters.sum(1))


def htk_filterbank(sample_rate: int, n_fft: int, mel_bins: int, fmin: float, fmax: float) -> NDArray[np.float64]:
    """Triangular mel filters `[mel_bins, n_fft // 2 + 1]` on the scale 1127 ln(1 + f / 700) of HTK and Kaldi.

    They are straight in mel, not in Hz, all of height 1; as in Kaldi the Nyquist bin has no share.
    """

    def to_mel(hz: NDArray[np.float64]) -> NDArray[np.float64]:
        mel: NDArray[np.float64] = 1127.0 * np.log1p(hz / 700.0)
        return mel

    first, last = to_mel(np.array([fmin, fmax]))
    edges = np.linspace(first, last, mel_bins + 2)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    mel = to_mel(np.arange(n_fft // 2 + 1) * sample_rate / n_fft)
    filters: NDArray[np.float64] = np.maximum(0.0, np.minimum((mel - low) / (centre - low), (high - mel) / (high - centre)))
    filters[:, -1] = 0.0
    return filters


def fbank(waveform: Tensor, audio: AudioConfig) -> Tensor:
    """The input of AudioMAE: Kaldi's log filterbank, normalised with the statistics of AudioSet.

    25 ms frames every 10 ms, whole frames only; per frame the mean is removed, pre-emphasis 0.97 and a symmetric
    Hann window applied, and the 512-point power spectrum summed into mel triangles from 20 Hz to 8 kHz. Missing
    frames are filled with 0.0 *before* normalising, as the published weights have seen it.

    Args:
        waveform: `[B, T]` at `audio.sample_rate`, peak 0.5.

    Returns:
        `[B, fbank_frames, fbank_bins]`, float32.
    """
    frame, shift, n_fft = 400, 160, 512  # samples at 16 kHz
    with _full_precision(waveform):
        waveform = resample(waveform.float(), audio.sample_rate, FBANK_RATE)
        if waveform.shape[-1] < frame:
            raise AudioError(f"a filterbank needs at least {frame} samples at 16 kHz, got {waveform.shape[-1]}")
        waveform = waveform[..., : (audio.fbank_frames - 1) * shift + frame] - waveform.mean(-1, keepdim=True)
        window, filters = _fbank_constants(n_fft, frame, audio.fbank_bins, waveform.device)
        frames = waveform.unfold(-1, frame, shift)  # [B, F, 400]
        frames = frames - frames.mean(-1, keepdim=True)
        previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        spectrum = torch.fft.rfft((frames - 0.97 * previous) * window, n=n_fft)
        power = spectrum.real.square() + spectrum.imag.square()
        energies = (power @ filters).clamp(min=torch.finfo(torch.float32).eps).log()
        energies = F.pad(energies, (0, 0, 0, audio.fbank_frames - energies.shape[1]))
        return (energies - FBANK_MEAN) / (2 * FBANK_STD)


@lru_cache(maxsize=16)
def _fbank_constants(n_fft: int, frame: int, bins: int, device: torch.device) -> tuple[Tensor, Tensor]:
    filters = htk_filterbank(FBANK_RATE, n_fft, bins, 20.0, FBANK_RATE / 2)
    return _hann(frame, False, device), _constant(filters.T, device)


def _hann(length: int, periodic: bool, device: torch.device) -> Tensor:
    # computed in float32 like the reference's: a float64 one moves the quietest bins by 1e-3
    with torch.inference_mode(False):
        return torch.hann_window(length, periodic=periodic, device="cpu").to(device)


def _constant(values: NDArray[np.float64], device: torch.device) -> Tensor:
    # a tensor born under inference mode could not take part in a later backward pass
    with torch.inference_mode(False):
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(device)


def _full_precision(waveform: Tensor) -> torch.autocast:
    # 8 bits of mantissa are too few for a spectrum whose bins differ by 100 dB
    return torch.autocast(waveform.device.type, enabled=False)
