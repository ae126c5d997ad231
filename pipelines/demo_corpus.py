"""A small corpus made by arithmetic: sounds and music anyone can tell apart, spoken sentences, and words for all.

It is written in the published layouts of the corpora, so that the demo travels the same road as real recordings:

    wavcaps/      most sounds, captioned in many wordings; some wordings occur in the test split only
    audioset/     more of the sounds, with labels but no captions
    audiocaps/    more of the sounds, with captions but no labels; several captions per held-out clip
    msd/          the musical textures, with tags
    ljspeech/     short sentences by one voice        gigaspeech/   long recordings of several voices, in segments

A sound varies in pitch, tempo, loudness and onset. Pitch and tempo are told in the captions; loudness is not,
since every clip is brought to the same level. Spoken sentences need espeak-ng (extra `speech`).
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import butter, sosfilt

from stages.errors import UserError
from stages.files import write_json

SAMPLE_RATE = 16_000
CARD = "demo_corpus.json"  # written last: what the corpus was made with, and what it holds
FORMAT = 1
HELD_OUT = {"validation": 0.06, "test": 0.10}  # of every kind
UTTERANCES = 90
MARGIN = 0.15  # seconds by which speech stays shorter than a clip

Waveform = np.ndarray


@dataclass(frozen=True)
class Traits:
    """How one clip differs from others of its kind; both in [-1, 1]."""

    pitch: float
    tempo: float

    def scale(self, octaves: float) -> float:
        """A factor of frequency: `octaves` up or down at the extremes."""
        return float(2.0 ** (octaves * self.pitch))

    def rate(self, octaves: float) -> float:
        """A factor of speed."""
        return float(2.0 ** (octaves * self.tempo))


Synth = Callable[[np.random.Generator, Traits, int], Waveform]


# ------------------------------------------------------------------------------------------------- building blocks


def _time(samples: int) -> Waveform:
    return np.arange(samples) / SAMPLE_RATE


def _tone(hz: float | Waveform, samples: int, phase: float = 0.0) -> Waveform:
    """A sine of constant or changing frequency."""
    steps = np.broadcast_to(np.asarray(hz, float), (samples,)) / SAMPLE_RATE
    wave: Waveform = np.sin(2 * np.pi * (np.cumsum(steps) + phase))
    return wave


def _harmonics(hz: float | Waveform, samples: int, count: int, slope: float) -> Waveform:
    """`count` harmonics whose amplitude falls as n^-slope; those above 7 kHz are left out."""
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(np.asarray(hz, float), (samples,)) / SAMPLE_RATE)
    twice_cos, last, wave = 2 * np.cos(phase), np.zeros(samples), np.sin(phase)
    mix = wave.copy()
    for n in range(2, min(count, int(7000 / np.max(hz))) + 1):
        last, wave = wave, twice_cos * wave - last  # sin nx = 2 cos x sin (n-1)x - sin (n-2)x
        mix += n**-slope * wave
    return mix


def _noise(rng: np.random.Generator, samples: int, low: float, high: float, order: int = 2) -> Waveform:
    """White noise in a band, of unit deviation."""
    sections = butter(order, [low, min(high, 7900.0)], "bandpass", fs=SAMPLE_RATE, output="sos")
    noise = sosfilt(sections, rng.standard_normal(samples))
    return noise / (noise.std() + 1e-9)


def _decay(samples: int, seconds: float, attack: float = 0.003) -> Waveform:
    """An envelope that rises at once and falls to 1/e in `seconds`."""
    t = _time(samples)
    envelope: Waveform = np.minimum(t / attack, 1.0) * np.exp(-t / seconds)
    return envelope


def _hold(samples: int, edge: float = 0.02) -> Waveform:
    """An envelope that is on, with soft edges."""
    t = _time(samples)
    return np.clip(np.minimum(t, t[-1] - t) / edge, 0.0, 1.0)


def _sequence(samples: int, onsets: Sequence[float], event: Callable[[int], Waveform]) -> Waveform:
    """The sum of `event(i)` laid at `onsets` (seconds), cut at the end."""
    mix = np.zeros(samples)
    for i, onset in enumerate(onsets):
        first = int(onset * SAMPLE_RATE)
        if 0 <= first < samples:
            sound = event(i)[: samples - first]
            mix[first : first + len(sound)] += sound
    return mix


def _beats(rng: np.random.Generator, samples: int, period: float, jitter: float = 0.0) -> list[float]:
    """Onsets `period` seconds apart, the first one within a period."""
    onsets = np.arange(rng.uniform(0.02, 0.6 * period), samples / SAMPLE_RATE, period)
    return list(onsets + rng.uniform(-jitter, jitter, len(onsets)) * period)


# ------------------------------------------------------------------------------------------------------- the kinds


def _bark(rng: np.random.Generator, traits: Traits, samples: int) -> Waveform:
    length = int(0.16 * SAMPLE_RATE)
    pitch = 480 * traits.scale(0.8)

    def event(_: int) -> Waveform:
        glide = pitch * rng.uniform(0.94, 1.06) * (1.25 - 0.5 * np.linspace(0, 1, length))
        voice = _harmonics(glide, length, 12, 0.7) + 0.8 * _noise(rng, length, 500, 3500)
        return voice * np.sin(np.pi * np.linspace(0, 1, length)) ** 0.7

    period = 0.55 / traits.rate(0.7)
    onsets = [o for beat in _beats(rng, samples, 2 * period, 0.05) for o in (beat, beat + 0.24)]
    return _sequence(samples, onsets, event)


def _siren(rng: np.random.Generator, traits: Traits, samples: int) -> Waveform:
    sweep = 0.5 - 0.5 * np.cos(2 * np.pi * (0.75 * traits.rate(0.8) * _time(samples) + rng.uniform()))
    return _harmonics(650 * traits.scale(0.4) * 2.3**sweep, samples, 3, 1.2)


def _rain(rng: np.random.Generator, traits: Traits, samples: int) -> Waveform:
    steady = _noise(rng, samples, 900, 7800, 1)
    drops = np.zeros(samples)
    drops[rng.integers(0, samples, int(samples / SAMPLE_RATE * 220 * traits.rate(1.0)))] = rng.uniform(2, 9)
    return 0.7 * steady + 2.0 * _highpass(drops, 2500 * traits.scale(0.4))


def _highpass(x: Waveform, hz: float) -> Waveform:
    return sosfilt(butter(2, hz, "highpass", fs=SAMPLE_RATE, output="sos"), x)


def _tick_tock(rng: np.random.Generator, traits: Traits, samples: int) -> Waveform:
    length = int(0.03 * SAMPLE_RATE)

    def event(i: int) -> Waveform:
        hz = (3400 if i % 2 else 2300) * traits.scale(0.3)
        return (_tone(hz, length) + 0.6 * _noise(rng, length, 1800, 7000)) * _decay(length, 0.006, 0.001)

    return _sequence(samples, _beats(rng, samples, 0.36 / traits.rate(0.6)), event)


def _church_bell(rng: np.random.Generator, traits: Traits, samples: int) -> Waveform:
    base = 330 * traits.scale(0.5)
    partials = ((0.5, 0.5, 1.6), (1.0, 1.0, 1.2), (1.2, 0.7, 0.9), (1.5, 0.4, 0.8), (2.0, 0.8, 0.7), (2.74, 0.4, 0.4), (4.1, 0.25, 0.25))

    strike = np.sum([a * _tone(base * ratio, samples) * _decay(samples, tau) for ratio, a, tau in partials], axis=0)
    return _sequence(samples, _beats(rng, samples, 1.5 / traits.rate(0.5)), lambda _: strike)


def _chirps(rng: np.random.Generator, traits: Traits, samples: int) -> Waveform:
    length = int(0.09 * SAMPLE_RATE)
    low = 2900 * traits.scale(0.35)

    def event(_: int) -> Waveform:
        bend = np.sin(np.pi * np.linspace(0, 1, length)) * rng.uniform(0.25, 0.7)
        return _tone(low * (1 + bend), length) * _hold(length, 0.02)

    groups = _beats(rng, samples, 0.85 / traits.rate(0.5), 0.1)
    onsets = [group + 0.13 * i for group in groups for i in range(int(rng.integers(2, 5)))]
    return _sequence(samples, onsets, event)


def _car_horn(rng: np.random.Generator, traits: Traits, samples: int) -> Waveform:
    base = 390 * traits.scale(0.35)
    length = int(0.55 / traits.rate(0.6) * SAMPLE_RATE)
    blast = (_harmonics(base, length, 14, 0.5) + _harmonics(base * 1.26, length, 12, 0.5)) * _hold(length)
    return _sequence(samples, _beats(rng, samples, 0.85 / traits.rate(0.6)), lambda _: blast)


def _footsteps(rng: np.random.Generator, traits: Traits, samples: int) -> Waveform:
    length = int(0.12 * SAMPLE_RATE)

    def event(_: int) -> Waveform:
        thud = _noise(rng, length, 60, 260 * traits.scale(0.5)) * _decay(length, 0.035)
        return thud + 0.12 * _noise(rng, length, 400, 1500) * _decay(length, 0.012)

    return _sequence(samples, _beats(rng, samples, 0.52 / traits.rate(0.6), 0.04), event)


def _helicopter(rng: np.random.Generator, traits: Traits, samples: int) -> Waveform:
    beat = (0.5 + 0.5 * np.cos(2 * np.pi * (9.5 * traits.rate(0.35) * _time(samples) + rng.uniform()))) ** 3
    blades = _noise(rng, samples, 70, 900 * traits.scale(0.6)) + 0.25 * _noise(rng, samples, 900, 3000)
    return beat * blades + 0.04 * _noise(rng, samples, 100, 5000)


def _wind(rng: np.random.Generator, traits: Traits, samples: int) -> Waveform:
    """A resonance that wanders between 250 and 900 Hz: noise on a carrier, so that its place can move."""
    t = _time(samples)
    wander = np.sin(2 * np.pi * (0.45 * traits.rate(0.7) * t + rng.uniform())) + 0.4 * np.sin(2 * np.pi * (1.1 * t + rng.uniform()))
    carrier = _tone(480 * traits.scale(0.5) * 1.6**wander, samples, rng.uniform())
    slow = _noise(rng, samples, 2, 60, 1)
    return carrier * slow * (1.0 + 0.5 * wander) + 0.25 * _noise(rng, samples, 60, 500, 1)


def _telephone(rng: np.random.Generator, traits: Traits, samples: int) -> Waveform:
    length = int(0.8 * SAMPLE_RATE / traits.rate(0.4))
    base = 1500 * traits.scale(0.3)
    hammer = 0.55 + 0.45 * np.sign(np.sin(2 * np.pi * 20 * _time(length)))
    ring = (_tone(base, length) + 0.8 * _tone(1.22 * base, length) + 0.5 * _tone(2.7 * base, length)) * hammer * _hold(length)
    return _sequence(samples, _beats(rng, samples, 1.25 / traits.rate(0.4)), lambda _: ring)


def _engine(rng: np.random.Generator, traits: Traits, samples: int) -> Waveform:
    rev = np.sin(2 * np.pi * (0.35 * traits.rate(0.8) * _time(samples) + rng.uniform()))
    hz = 75 * traits.scale(0.6) * 1.35**rev
    return _harmonics(hz, samples, 22, 0.75) + 0.15 * _noise(rng, samples, 80, 1500)


def _crickets(rng: np.random.Generator, traits: Traits, samples: int) -> Waveform:
    t = _time(samples)
    gate = np.clip(0.5 + 8 * np.sin(2 * np.pi * (3.2 * traits.rate(0.4) * t + rng.uniform())), 0, 1)
    pulses = np.clip(np.sin(2 * np.pi * 33 * t), 0, 1)
    return _tone(4700 * traits.scale(0.22), samples) * gate * pulses + 0.01 * _noise(rng, samples, 3000, 7000)


def _thunder(rng: np.random.Generator, traits: Traits, samples: int) -> Waveform:
    rumble = _noise(rng, samples, 40, 160 * traits.scale(0.5), 2)
    crack = _noise(rng, samples, 150, 3000) * _decay(samples, 0.12, 0.01)
    rolls = 1 + 0.5 * np.sin(2 * np.pi * (1.7 * traits.rate(0.6) * _time(samples) + rng.uniform()))
    strike = rumble * rolls * _decay(samples, 0.9 / traits.rate(0.5), 0.03) + 0.7 * crack
    return _sequence(samples, [rng.uniform(0.05, 0.5)], lambda _: strike)


def _alarm(rng: np.random.Generator, traits: Traits, samples: int) -> Waveform:
    length = int(0.2 / traits.rate(0.5) * SAMPLE_RATE)
    beep = _tone(2900 * traits.scale(0.25), length) * _hold(length, 0.01)
    return _sequence(samples, _beats(rng, samples, 2 * length / SAMPLE_RATE), lambda _: beep)


def _waves(rng: np.random.Generator, traits: Traits, samples: int) -> Waveform:
    swell = 0.5 - 0.5 * np.cos(2 * np.pi * (0.5 * traits.rate(0.4) * _time(samples) + rng.uniform()))
    return swell**2 * _noise(rng, samples, 250, 5500 * traits.scale(0.4), 1) + 0.15 * swell * _noise(rng, samples, 60, 250)


def _laser(rng: np.random.Generator, traits: Traits, samples: int) -> Waveform:
    length = int(0.28 * SAMPLE_RATE)
    top = 5200 * traits.scale(0.35)
    zap = _harmonics(top * np.exp(-3.4 * np.linspace(0, 1, length)), length, 3, 1.0) * _hold(length, 0.01)
    return _sequence(samples, _beats(rng, samples, 0.5 / traits.rate(0.5)), lambda _: zap)


def _note(hz: float, samples: int, seconds: float, count: int, slope: float) -> Waveform:
    return _harmonics(hz, samples, count, slope) * _decay(samples, seconds)


_CHORDS = ((0, 4, 7, 12), (0, 3, 7, 12), (0, 5, 9, 12), (0, 4, 9, 12))


def _piano(rng: np.random.Generator, traits: Traits, samples: int) -> Waveform:
    root = 262 * traits.scale(0.6)
    chord = _CHORDS[int(rng.integers(len(_CHORDS)))]
    length = int(0.7 * SAMPLE_RATE)
    notes = [_note(root * 2 ** (semitone / 12), length, 0.22, 8, 1.1) for semitone in (*chord, *chord[2:0:-1])]
    return _sequence(samples, _beats(rng, samples, 0.21 / traits.rate(0.6)), lambda i: notes[i % len(notes)])


def _drums(rng: np.random.Generator, traits: Traits, samples: int) -> Waveform:
    length = int(0.22 * SAMPLE_RATE)
    fall = np.exp(-np.linspace(0, 5, length))
    kick = 1.6 * _tone(48 * traits.scale(0.3) * (1 + 2.2 * fall), length) * _decay(length, 0.08)
    snare = 0.7 * (_noise(rng, length, 900, 6500) * _decay(length, 0.06) + 0.6 * _tone(190, length) * _decay(length, 0.04))
    hat = 0.3 * _noise(rng, length, 5500, 7900) * _decay(length, 0.018)
    pattern = (kick + hat, hat, snare + hat, hat)
    return _sequence(samples, _beats(rng, samples, 0.2 / traits.rate(0.5)), lambda i: pattern[i % 4])


def _organ(rng: np.random.Generator, traits: Traits, samples: int) -> Waveform:
    root = 196 * traits.scale(0.5)
    length = int(1.0 / traits.rate(0.6) * SAMPLE_RATE)

    def event(i: int) -> Waveform:
        chord = _CHORDS[(start + i) % len(_CHORDS)]
        return np.sum([_harmonics(root * 2 ** (s / 12), length, 4, 0.5) for s in chord[:3]], axis=0) * _hold(length, 0.05)

    start = int(rng.integers(len(_CHORDS)))
    return _sequence(samples, list(np.arange(0, samples / SAMPLE_RATE, length / SAMPLE_RATE)), event)


@dataclass(frozen=True)
class Words:
    """How people speak of a kind: a noun, what it does, and adjectives and adverbs for its extremes."""

    noun: str  # without article
    does: str
    doing: str
    low: tuple[str, str]
    high: tuple[str, str]
    mid: str  # AudioSet's id of the label
    plural: bool = False
    slow: str = "slowly"
    fast: str = "quickly"


_SOUNDS: dict[str, tuple[Synth, Words]] = {
    "Bark": (_bark, Words("dog", "barks", "barking", ("big", "deep"), ("small", "high"), "/m/05tny_")),
    "Siren": (_siren, Words("siren", "wails", "wailing", ("low", "deep"), ("high", "shrill"), "/m/03kmc9")),
    "Rain": (_rain, Words("rain", "falls", "falling", ("soft", "dull"), ("bright", "sharp"), "/m/06mb1", False, "lightly", "heavily")),
    "Tick-tock": (_tick_tock, Words("clock", "ticks", "ticking", ("big", "old"), ("small", "little"), "/m/07qjznl")),
    "Church bell": (_church_bell, Words("church bell", "rings", "ringing", ("big", "deep"), ("small", "high"), "/m/03w41f")),
    "Chirp, tweet": (_chirps, Words("birds", "chirp", "chirping", ("big", "low"), ("small", "high"), "/m/07pggtn", True)),
    "Vehicle horn, car horn, honking": (_car_horn, Words("car horn", "honks", "honking", ("low", "deep"), ("high", "shrill"), "/m/0912c9")),
    "Walk, footsteps": (_footsteps, Words("footsteps", "pass by", "passing by", ("heavy", "dull"), ("light", "soft"), "/m/07pbtc8", True)),
    "Helicopter": (_helicopter, Words("helicopter", "flies overhead", "flying overhead", ("big", "deep"), ("small", "light"), "/m/09ct_")),
    "Wind": (_wind, Words("wind", "howls", "howling", ("low", "deep"), ("high", "shrill"), "/m/03m9d0z")),
    "Telephone bell ringing": (_telephone, Words("telephone", "rings", "ringing", ("old", "low"), ("shrill", "high"), "/m/07pp8cl")),
    "Engine": (_engine, Words("engine", "runs", "running", ("big", "deep"), ("small", "high"), "/m/02mk9")),
    "Cricket": (_crickets, Words("crickets", "sing", "singing", ("low", "soft"), ("high", "shrill"), "/m/09xqv", True)),
    "Thunder": (_thunder, Words("thunder", "rumbles", "rumbling", ("low", "deep"), ("bright", "sharp"), "/m/0ngt1")),
    "Smoke detector, smoke alarm": (_alarm, Words("smoke alarm", "beeps", "beeping", ("low", "dull"), ("high", "shrill"), "/m/01y3hg")),
    "Waves, surf": (_waves, Words("waves", "roll ashore", "rolling ashore", ("low", "dull"), ("bright", "sharp"), "/m/034srq", True)),
    "Laser": (_laser, Words("laser", "zaps", "zapping", ("low", "deep"), ("high", "sharp"), "/x/laser")),
}  # fmt: skip
_MUSIC: dict[str, tuple[Synth, Words]] = {
    "Piano": (_piano, Words("piano", "plays an arpeggio", "playing an arpeggio", ("low", "dark"), ("high", "bright"), "/m/05r5c")),
    "Drum kit": (_drums, Words("drum kit", "plays a beat", "playing a beat", ("big", "deep"), ("small", "light"), "/m/02hnl")),
    "Organ": (_organ, Words("organ", "plays chords", "playing chords", ("low", "dark"), ("high", "bright"), "/m/013y1f")),
}  # fmt: skip
_ALL = _SOUNDS | _MUSIC
KINDS: dict[str, Synth] = {label: synth for label, (synth, _) in _ALL.items()}
_UNCOUNTED = {"rain", "wind", "thunder"}

# {it}: article, adjective and noun; {adverb}: " slowly", " quickly" or nothing.
TEMPLATES = (
    "{it} {does}{adverb}",
    "{it} {is_} {doing}{adverb}",
    "the sound of {it} {doing}{adverb}",
    "{it} can be heard {doing}{adverb}",
    "you can hear {it} {doing}{adverb}",
    "a recording of {it} {doing}{adverb}",
    "{it} {doing}{adverb} in the distance",
    "there {is_} {it} {doing}{adverb}",
    "{it} that {does}{adverb} again and again",
    "{it}, {doing}{adverb}",
)
# Wordings of the test split alone, made of words that the others have, too.
TEST_TEMPLATES = (
    "you can hear the sound of {it} {doing}{adverb}",
    "a recording of {it} that {does}{adverb}",
    "there is the sound of {it} {doing}{adverb} in the distance",
)


def caption(rng: np.random.Generator, label: str, traits: Traits, templates: Sequence[str] = TEMPLATES) -> str:
    """One sentence about a clip. Marked pitch and tempo are mentioned more often than not, and always truly."""
    words = _ALL[label][1]
    adjective = adverb = ""
    if abs(traits.pitch) > 0.4 and rng.uniform() < 0.7:
        adjective = (words.high if traits.pitch > 0 else words.low)[int(rng.integers(2))] + " "
    if abs(traits.tempo) > 0.4 and rng.uniform() < 0.7:
        adverb = " " + (words.fast if traits.tempo > 0 else words.slow)
    thing = adjective + words.noun
    if not words.plural and words.noun not in _UNCOUNTED:
        thing = ("an " if thing[0] in "aeiou" else "a ") + thing
    template = templates[int(rng.integers(len(templates)))]
    text = template.format(it=thing, does=words.does, doing=words.doing, adverb=adverb, is_="are" if words.plural else "is")
    return f"{text[0].upper()}{text[1:]}."


# ------------------------------------------------------------------------------------------------------- speech

_PEOPLE = ("The old man", "My sister", "The young girl", "A tall boy", "Your friend", "The teacher", "Our neighbour", "The captain")
_ACTS = ("found", "saw", "took", "painted", "opened", "carried", "sold", "lost", "liked", "washed")
_THINGS = ("a red boat", "the small key", "the green door", "an old book", "two apples", "a black horse", "the wooden box", "her blue coat")
_VOICES = ("en-us", "en-us+f3", "en-us+m7", "en-us+f5")


def _sentences(rng: np.random.Generator, count: int) -> list[str]:
    """Different short sentences, in random order."""
    everything = [f"{who} {did} {what}." for who in _PEOPLE for did in _ACTS for what in _THINGS]
    return [everything[i] for i in rng.choice(len(everything), min(count, len(everything)), replace=False)]


def _spoken(text: str, voice: str, speed: int, pitch: int, seconds: float) -> tuple[Waveform, int]:
    """The sentence, spoken faster until it is shorter than `seconds`; silence around it is cut off."""
    from stages.espeak import synthesise

    while True:
        waveform, rate = synthesise(text, voice, speed, pitch)
        loud = np.flatnonzero(np.abs(waveform) > 1e-3)
        waveform = waveform[loud[0] : loud[-1] + 1]
        if len(waveform) <= seconds * rate or speed > 320:
            return waveform[: int(seconds * rate)], rate
        speed = int(speed * 1.15)


# ------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class DemoCorpus:
    """What was made."""

    folder: str
    kinds: int
    recordings: dict[str, int]  # by corpus

    def __str__(self) -> str:
        return f"{sum(self.recordings.values())} recordings of {self.kinds} kinds of sound"


@dataclass(frozen=True)
class _Clip:
    """One sound to be made."""

    corpus: str
    label: str
    number: int
    split: str

    @property
    def name(self) -> str:
        return hashlib.sha256(f"{self.corpus} {self.label} {self.number}".encode()).hexdigest()[:11]

    def rng(self, seed: int) -> np.random.Generator:
        """Randomness of this clip alone, so that clips can be made in any order."""
        digest = hashlib.sha256(f"{seed} {self.corpus} {self.label} {self.number}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def make_clip(label: str, rng: np.random.Generator, seconds: float) -> tuple[Waveform, Traits]:
    """One sound of a kind: (float32 waveform [T] at 16 kHz, how it is pitched and paced)."""
    traits = Traits(float(rng.uniform(-1, 1)), float(rng.uniform(-1, 1)))
    samples = round(seconds * SAMPLE_RATE)
    waveform = KINDS[label](rng, traits, samples)
    floor = 10 ** (rng.uniform(-60, -46) / 20)  # a quiet room
    waveform = waveform / (np.abs(waveform).max() + 1e-9) + floor * rng.standard_normal(samples)
    return (rng.uniform(0.25, 0.9) * waveform / np.abs(waveform).max()).astype(np.float32), traits


def make_demo_corpus(
    out: Path,
    seed: int = 0,
    clips_per_kind: int = 90,
    seconds: float = 2.56,
    kinds: Sequence[str] | None = None,
    speech: int | None = None,
    processes: int = 2,
) -> DemoCorpus:
    """Write the corpus to `out`; a finished one is left as it is.

    The same arguments give the same bytes, but for the spoken samples: espeak never says a thing quite the same way twice.

    Args:
        clips_per_kind: over all layouts; about 10 % test and 6 % validation.
        seconds: length of every sound; spoken sentences are shorter.
        kinds: labels of KINDS to make; None makes all.
        speech: utterances in each of the two speech layouts; 0 leaves them out. None makes 90, or leaves them out when
            espeak-ng is not installed.
        processes: that make sounds side by side.

    Raises:
        UserError: unknown kinds, another corpus in `out`, or no espeak-ng for the speech.
    """
    labels = list(KINDS if kinds is None else kinds)
    unknown = [label for label in labels if label not in KINDS]
    if unknown:
        raise UserError(f"unknown kinds of sound: {', '.join(unknown)}; there are {', '.join(KINDS)}")
    if speech is None:
        speech = UTTERANCES if _can_speak() else 0
    made_with = {"format": FORMAT, "seed": seed, "clips_per_kind": clips_per_kind, "seconds": seconds, "kinds": labels, "speech": speech}
    card = out / CARD
    if card.is_file():
        there = json.loads(card.read_text(encoding="utf-8"))
        if there["made_with"] != made_with:
            raise UserError(f"{out} holds a demo corpus made with {there['made_with']}; delete it or choose another folder")
        return DemoCorpus(**there["made"])

    clips = [clip for label in labels for clip in _plan(label, clips_per_kind)]
    make = partial(_make_and_write, out=out, seed=seed, seconds=seconds)
    for folder in {_sound_path(out, clip).parent for clip in clips}:
        folder.mkdir(parents=True, exist_ok=True)
    recordings: dict[str, int] = {}
    # Fresh processes: the caller may hold threads (torch, Ray), and those do not survive a fork.
    with ProcessPoolExecutor(processes, mp_context=get_context("forkserver")) as pool:
        spoken = pool.submit(_write_speech, out, seed, speech, seconds) if speech else None
        traits = list(pool.map(make, clips, chunksize=50)) if processes > 1 and len(clips) > 200 else list(map(make, clips))
        if spoken is not None:
            recordings |= spoken.result()
    pairs = list(zip(clips, traits, strict=True))
    for corpus, write in (("wavcaps", _write_wavcaps), ("audioset", _write_audioset), ("audiocaps", _write_audiocaps), ("msd", _write_msd)):
        mine = [(clip, t) for clip, t in pairs if clip.corpus == corpus]
        if mine:
            write(out / corpus, mine, seed, seconds)
            recordings[corpus] = len(mine)
    made = DemoCorpus(str(out), len(labels), recordings)
    write_json(card, {"made_with": made_with, "made": asdict(made)})
    return made


def _can_speak() -> bool:
    from stages.espeak import phonemize

    try:
        phonemize("yes")
    except UserError:
        return False
    return True


def _plan(label: str, count: int) -> list[_Clip]:
    """The clips of a kind, dealt to layouts and splits."""
    shares = {"wavcaps": 0.5, "msd": 0.5} if label in _MUSIC else {"wavcaps": 0.66, "audioset": 0.22, "audiocaps": 0.12}
    clips: list[_Clip] = []
    for corpus, share in shares.items():
        size = count - len(clips) if corpus == list(shares)[-1] else round(share * count)
        held = {split: round(part * size) for split, part in HELD_OUT.items()}
        if corpus == "audioset":  # it has no validation split
            held = {"validation": 0, "test": held["test"]}
        if corpus == "wavcaps" and size > 2:
            held = {split: max(1, n) for split, n in held.items()}
        splits = ["test"] * held["test"] + ["validation"] * held["validation"]
        splits += ["train"] * (size - len(splits))
        clips += [_Clip(corpus, label, number, split) for number, split in enumerate(splits)]
    return clips


def _sound_path(out: Path, clip: _Clip) -> Path:
    if clip.corpus == "wavcaps":
        return out / "wavcaps" / "audio" / "FreeSound" / f"{clip.name}.flac"
    if clip.corpus == "msd":
        return out / "msd" / "audio" / _preview(clip)
    return out / clip.corpus / "audio" / f"{clip.name}.flac"


def _make_and_write(clip: _Clip, out: Path, seed: int, seconds: float) -> Traits:
    waveform, traits = make_clip(clip.label, clip.rng(seed), seconds)
    soundfile.write(_sound_path(out, clip), waveform, SAMPLE_RATE)
    return traits


Made = list[tuple[_Clip, Traits]]


def _words_rng(clip: _Clip, seed: int) -> np.random.Generator:
    return clip.rng(seed + 1_000_003)


def _captions(clip: _Clip, traits: Traits, seed: int, count: int = 1) -> list[str]:
    rng = _words_rng(clip, seed)
    templates = TEST_TEMPLATES if clip.split == "test" else TEMPLATES
    return list(dict.fromkeys(caption(rng, clip.label, traits, templates) for _ in range(count)))


def _write_wavcaps(root: Path, made: Made, seed: int, seconds: float) -> None:
    """With the optional key "split", which the reader understands: the layout itself has none."""
    data = [
        {
            "id": clip.name, "file_name": f"{clip.name}.wav", "href": "", "duration": seconds, "author": "loa", "tags": [clip.label],
            "description": "", "category": [], "audio": "wav_path", "download_link": "",
            "caption": _captions(clip, traits, seed)[0], "split": clip.split, "licence": "CC0",
        }
        for clip, traits in made
    ]  # fmt: skip
    folder = root / "json_files" / "FreeSound"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "fsd_final.json", {"num_captions_per_audio": 1, "data": data})


def _write_audioset(root: Path, made: Made, seed: int, seconds: float) -> None:
    classes = ["index,mid,display_name", *(f'{i},{words.mid},"{label}"' for i, (label, (_, words)) in enumerate(_ALL.items()))]
    (root / "class_labels_indices.csv").write_text("\n".join(classes) + "\n", encoding="utf-8")
    for name, split in (("balanced_train_segments.csv", "train"), ("eval_segments.csv", "test")):
        rows = [f'{clip.name}, 0.000, {seconds:.3f}, "{_ALL[clip.label][1].mid}"' for clip, _ in made if clip.split == split]
        header = ["# Segments csv of the demo corpus", f"# num_ytids={len(rows)}", "# YTID, start_seconds, end_seconds, positive_labels"]
        (root / name).write_text("\n".join(header + rows) + "\n", encoding="utf-8")


def _write_audiocaps(root: Path, made: Made, seed: int, seconds: float) -> None:
    number = 0
    for name, split in (("train.csv", "train"), ("val.csv", "validation"), ("test.csv", "test")):
        rows = ["audiocap_id,youtube_id,start_time,caption"]
        for clip, traits in made:
            if clip.split == split:
                for text in _captions(clip, traits, seed, count=1 if split == "train" else 5):
                    number += 1
                    rows.append(f'{number},{clip.name},0,"{text}"')
        (root / name).write_text("\n".join(rows) + "\n", encoding="utf-8")


def _preview(clip: _Clip) -> str:
    """The path of a track's preview below audio/, by its 7digital number."""
    number = _preview_id(clip)
    return f"{number[0]}/{number[1]}/{number}.clip.mp3"


def _preview_id(clip: _Clip) -> str:
    return str(1_000_000 + int(clip.name, 16) % 9_000_000)


def _write_msd(root: Path, made: Made, seed: int, seconds: float) -> None:
    tracks = {f"TR{clip.name.upper()}": (clip, traits) for clip, traits in made}
    annotation = {
        track: {
            "tag": _tags(clip, traits), "release": "Demo", "artist_name": "loa", "year": 2025,
            "title": f"{clip.label} {clip.number + 1}", "track_id": track,
        }
        for track, (clip, traits) in tracks.items()
    }  # fmt: skip
    lists = {"train_track": "train", "valid_track": "validation", "test_track": "test"}
    (root / "ecals_annotation").mkdir(parents=True, exist_ok=True)
    (root / "lastfm_annotation").mkdir(parents=True, exist_ok=True)
    write_json(root / "ecals_annotation" / "annotation.json", annotation)
    write_json(root / "ecals_annotation" / "ecals_tags.json", sorted({tag for clip, traits in made for tag in _tags(clip, traits)}))
    split = {key: [track for track, (clip, _) in tracks.items() if clip.split == name] for key, name in lists.items()}
    write_json(root / "ecals_annotation" / "ecals_track_split.json", {**split, "extra_track": []})
    ids = {track: _preview_id(clip) for track, (clip, _) in tracks.items()}
    for name, table in (("MSD_id_to_7D_id", ids), ("7D_id_to_path", {_preview_id(c): _preview(c) for c, _ in tracks.values()})):
        (root / "lastfm_annotation" / f"{name}.pkl").write_bytes(pickle.dumps(table, protocol=4))


def _tags(clip: _Clip, traits: Traits) -> list[str]:
    """The label first, then what is remarkable."""
    words = _ALL[clip.label][1]
    tags = [clip.label, words.does.split()[-1]]
    tags += [words.high[0] if traits.pitch > 0 else words.low[0]] if abs(traits.pitch) > 0.4 else []
    return tags + (["fast" if traits.tempo > 0 else "slow"] if abs(traits.tempo) > 0.4 else [])


def _write_speech(out: Path, seed: int, utterances: int, seconds: float) -> dict[str, int]:
    """Both speech layouts; how many recordings each has."""
    rng = np.random.default_rng([seed, 1])
    return {
        "ljspeech": _write_ljspeech(out / "ljspeech", rng, utterances, seconds),
        "gigaspeech": _write_gigaspeech(out / "gigaspeech", rng, utterances, seconds),
    }


def _write_ljspeech(root: Path, rng: np.random.Generator, count: int, seconds: float) -> int:
    (root / "wavs").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, text in enumerate(_sentences(rng, count), 1):
        name = f"LJ{number // 100 + 1:03d}-{number % 100:04d}"
        waveform, rate = _spoken(text, "en-us+f3", int(rng.integers(155, 175)), int(rng.integers(45, 56)), seconds - MARGIN)
        soundfile.write(root / "wavs" / f"{name}.wav", waveform, rate, subtype="PCM_16")
        lines.append(f"{name}|{text}|{text}")
    (root / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def _write_gigaspeech(root: Path, rng: np.random.Generator, count: int, seconds: float) -> int:
    """One long recording per voice, its sentences parted by pauses; a segment of silence ends it."""
    folder = Path("audio") / "podcast" / "P0001"
    (root / folder).mkdir(parents=True, exist_ok=True)
    audios = []
    for speaker, texts in enumerate(np.array_split(_sentences(rng, count), len(_VOICES))):
        aid = f"POD{speaker + 1:010d}"
        pieces: list[Waveform] = []
        segments, position = [], 0.0
        for number, text in enumerate([*texts.tolist(), ""]):
            if text:
                spoken, rate = _spoken(text, _VOICES[speaker], int(rng.integers(150, 185)), int(rng.integers(35, 66)), seconds - MARGIN)
            else:
                spoken = np.zeros(rate, np.float32)
            pause = np.zeros(int(rng.uniform(0.3, 0.7) * rate), np.float32)
            begin = position + len(pause) / rate
            position = begin + len(spoken) / rate
            pieces += [pause, spoken]
            segments.append({
                "sid": f"{aid}_S{number:07d}", "speaker": "N/A", "begin_time": round(begin, 3), "end_time": round(position, 3),
                "text_tn": f"{text[:-1].upper()} <PERIOD>" if text else "<SIL>", "subsets": ["{XL}"],
            })  # fmt: skip
        path = folder / f"{aid}.flac"
        soundfile.write(root / path, np.concatenate(pieces), rate)
        audios.append({
            "title": f"Voice {speaker + 1}", "url": "", "path": path.as_posix(), "aid": aid, "source": "Podcast", "codec": "flac",
            "channels": 1, "sample_rate": rate, "duration": round(position, 3), "subsets": ["{XL}"], "segments": segments,
        })  # fmt: skip
    write_json(root / "GigaSpeech.json", {"dataset": "GigaSpeech", "language": "EN", "version": "v1.0.0", "audios": audios})
    return len(audios)
