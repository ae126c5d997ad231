"""One stretch of a recording, wherever it is: storage that fails is told apart from sound that is broken."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from stages.audio import Waveform, load_audio
from stages.errors import AudioError
from stages.recordings import open_recording, parse_address

FRAME = 320  # samples over which silence is measured: 20 ms at 16 kHz
QUIET = 1e-6  # mean square of a silent frame: -60 dB of full scale

T = TypeVar("T")


def read_recording(path: str, sample_rate: int, start: float, seconds: float) -> Waveform:
    """The samples of a clip, `[T]` float32; of a recording behind a URL only the ranges that hold it are fetched.

    Raises:
        AudioError: the content is no usable sound.
        OSError: the bytes cannot be had now: missing, forbidden, unreachable, or the storage failed.
    """
    if not parse_address(path).plain:
        return _read_watched(path, sample_rate, start, seconds)
    open(path, "rb").close()  # raises what libsndfile would call an unknown format
    try:
        waveform = load_audio(path, sample_rate, start, seconds)
    except AudioError:
        return _read_watched(path, sample_rate, start, seconds)
    if len(waveform) < round(seconds * sample_rate) - 1:  # the recording ends there, or a read failed
        return _read_watched(path, sample_rate, start, seconds)
    return waveform


def _read_watched(path: str, sample_rate: int, start: float, seconds: float) -> Waveform:
    """As `read_recording`, every read through Python: a few percent slower, and no error of the storage is missed."""
    with open_recording(path) as file:
        watched = _Watched(file, path)
        try:
            return load_audio(watched, sample_rate, start, seconds)  # type: ignore[arg-type]
        finally:
            watched.raise_failure()  # libsndfile takes a failing read for the end of the file


def frame_power(waveform: Waveform) -> np.ndarray:
    """Mean square of the whole 20 ms frames of `[T]`, or of all of a shorter waveform: [frames]."""
    frames = waveform[: max(FRAME, len(waveform) // FRAME * FRAME)]
    frames = frames.reshape(-1, FRAME) if len(frames) >= FRAME else frames[None]
    power: np.ndarray = np.einsum("ij,ij->i", frames, frames) / frames.shape[1]
    return power


def decibels(power: float) -> float:
    """dB of full scale of a mean square; at least -120."""
    return 10 * float(np.log10(max(power, 1e-12)))


def measures(power: np.ndarray) -> dict[str, float]:
    """Loudness in dB of full scale (RMS), and the share of 20 ms frames below -60 dB, by the frames' power as recorded."""
    return {"loudness": round(decibels(float(power.mean())), 2), "silence": round(float((power < QUIET).mean()), 3)}


class _Watched(io.RawIOBase):
    """A file as libsndfile reads it, which remembers the error of a read: exceptions do not pass through its C code."""

    def __init__(self, file: Any, name: str) -> None:
        self.file, self.name = file, name
        self.failure: Exception | None = None

    def raise_failure(self) -> None:
        """Raise what a read met, as OSError."""
        if isinstance(self.failure, OSError):
            raise self.failure
        if self.failure is not None:  # what a remote filesystem's client raises is its own
            raise OSError(f"{self.name} cannot be read: {type(self.failure).__name__}: {self.failure}") from self.failure

    def _tried(self, call: Callable[[], T], otherwise: T) -> T:
        if self.failure is None:
            try:
                return call()
            except Exception as error:
                self.failure = error
        return otherwise

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._tried(lambda: self.file.read(size), b"")

    def readinto(self, buffer: Any) -> int:
        return self._tried(lambda: self.file.readinto(buffer), 0)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._tried(lambda: self.file.seek(offset, whence), 0)

    def tell(self) -> int:
        return self._tried(self.file.tell, 0)
