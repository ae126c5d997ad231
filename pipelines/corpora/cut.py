"""Recordings become clips: which stretch of a file a recording is, and the windows of a clip's length in it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.corpora.records import Recording, Rejected

if TYPE_CHECKING:
    from stages.audio import AudioConfig

FEWEST_SAMPLES = 100  # a shorter recording is none; the reference refuses it too
SPEECH_TOLERANCE = 0.25  # seconds that may be missing at the end of a transcribed segment


@dataclass(frozen=True)
class Clip:
    """A stretch of a recording that becomes one row of the clip table."""

    clip_id: str
    recording: Recording
    start: float  # seconds
    seconds: float

    def row(self) -> dict[str, Any]:
        """The row, in the columns of CLIP_SCHEMA."""
        r = self.recording
        return {
            "clip_id": self.clip_id,
            "corpus": r.corpus,
            "recording": r.recording_id,
            "path": r.path,
            "start": self.start,
            "seconds": self.seconds,
            "captions": list(r.captions),
            "transcript": r.transcript,
            "labels": list(r.labels),
            "split": r.split,
            "licence": r.licence,
            "origin": r.origin,
            "content": r.content,
        }


@dataclass(frozen=True)
class Windows:
    """How long recordings are cut."""

    most: int | None = None  # windows of one recording, drawn by its id; None takes all
    min_seconds: float = 0.0  # of a recording or window
    seed: int = 0


def stretch(recording: Recording, file_seconds: float) -> tuple[float, float]:
    """(start, seconds) of a recording in its file of `file_seconds`; seconds ≤ 0 when it lies behind the end.

    A file of a `precut` recording is the whole source, or just the stretch: then it is shorter than the stretch's end, or
    just as long as the stretch.
    """
    start, length = recording.start, recording.seconds
    if recording.precut and length is not None and not (file_seconds >= start + length / 2 and file_seconds > 1.2 * length):
        start, length = 0.0, None
    available = file_seconds - start
    return start, available if length is None else min(length, available)


def cut(recording: Recording, file_seconds: float, audio: AudioConfig, windows: Windows | None = None) -> list[Clip] | Rejected:
    """The clips of a recording whose file lasts `file_seconds`, or why there are none.

    Consecutive windows of a clip's length; the rest at the end becomes a window too when it is half a clip or more.
    Transcribed speech is one clip or none. A window's id ends in its number, which does not depend on how many are drawn.
    """
    windows = windows or Windows()
    start, seconds = stretch(recording, file_seconds)
    if seconds * audio.sample_rate < FEWEST_SAMPLES:
        late = f"outside the recording: starts at {start:g} s of {file_seconds:g} s"
        return recording.rejected(f"empty: {seconds:.3f} s" if seconds > 0 else late)
    if seconds < windows.min_seconds:
        return recording.rejected(f"short: {seconds:.2f} s, at least {windows.min_seconds:g} s were asked for")
    clip_id = recording.clip_id
    if recording.transcript:
        missing = 0.0 if recording.seconds is None or recording.precut else recording.seconds - seconds
        if missing > SPEECH_TOLERANCE:
            return recording.rejected(f"outside the recording: ends at {start + seconds + missing:g} s of {file_seconds:g} s")
        if seconds > audio.clip_seconds:
            return recording.rejected(f"speech longer than a clip: {seconds:.2f} s, a clip lasts {audio.clip_seconds:g} s")
        return [Clip(clip_id, recording, start, seconds)]
    count = int(seconds // audio.clip_seconds)
    if count == 0 or seconds - count * audio.clip_seconds >= max(audio.clip_seconds / 2, windows.min_seconds):
        count += 1
    return [
        Clip(
            f"{clip_id}-{window}" if count > 1 else clip_id,
            recording,
            start + window * audio.clip_seconds,
            min(audio.clip_seconds, seconds - window * audio.clip_seconds),
        )
        for window in _drawn(clip_id, count, windows)
    ]


def _drawn(clip_id: str, count: int, windows: Windows) -> list[int]:
    """Which of `count` windows are taken: all, or a choice that depends on the recording's id and the seed alone."""
    if windows.most is None or count <= windows.most:
        return list(range(count))
    rng = np.random.default_rng([windows.seed, int.from_bytes(hashlib.sha256(clip_id.encode()).digest()[:8])])
    return sorted(rng.choice(count, windows.most, replace=False).tolist())
