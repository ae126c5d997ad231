"""Short sentences, spoken by espeak-ng."""

from __future__ import annotations

import numpy as np

from pipelines.demo_corpus.sounds import Waveform
from stages.errors import UserError

_PEOPLE = ("The old man", "My sister", "The young girl", "A tall boy", "Your friend", "The teacher", "Our neighbour", "The captain")
_ACTS = ("found", "saw", "took", "painted", "opened", "carried", "sold", "lost", "liked", "washed")
_THINGS = ("a red boat", "the small key", "the green door", "an old book", "two apples", "a black horse", "the wooden box", "her blue coat")
VOICES = ("en-us", "en-us+f3", "en-us+m7", "en-us+f5")


def sentences(rng: np.random.Generator, count: int) -> list[str]:
    """Different short sentences, in random order."""
    everything = [f"{who} {did} {what}." for who in _PEOPLE for did in _ACTS for what in _THINGS]
    return [everything[i] for i in rng.choice(len(everything), min(count, len(everything)), replace=False)]


def spoken(text: str, voice: str, speed: int, pitch: int, seconds: float) -> tuple[Waveform, int]:
    """The sentence, spoken faster until it is shorter than `seconds`; silence around it is cut off."""
    from stages.espeak import synthesise

    while True:
        waveform, rate = synthesise(text, voice, speed, pitch)
        loud = np.flatnonzero(np.abs(waveform) > 1e-3)
        waveform = waveform[loud[0] : loud[-1] + 1]
        if len(waveform) <= seconds * rate or speed > 320:
            return waveform[: int(seconds * rate)], rate
        speed = int(speed * 1.15)


def can_speak() -> bool:
    """Whether espeak-ng is installed."""
    from stages.espeak import phonemize

    try:
        phonemize("yes")
    except UserError:
        return False
    return True
