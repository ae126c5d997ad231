"""Twenty kinds of sound and music, synthesised: each differs from clip to clip in pitch, tempo, loudness and onset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.signal import butter, sosfilt

SAMPLE_RATE = 16_000

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


KINDS: dict[str, Synth] = {
    "Bark": _bark,
    "Siren": _siren,
    "Rain": _rain,
    "Tick-tock": _tick_tock,
    "Church bell": _church_bell,
    "Chirp, tweet": _chirps,
    "Vehicle horn, car horn, honking": _car_horn,
    "Walk, footsteps": _footsteps,
    "Helicopter": _helicopter,
    "Wind": _wind,
    "Telephone bell ringing": _telephone,
    "Engine": _engine,
    "Cricket": _crickets,
    "Thunder": _thunder,
    "Smoke detector, smoke alarm": _alarm,
    "Waves, surf": _waves,
    "Laser": _laser,
    "Piano": _piano,
    "Drum kit": _drums,
    "Organ": _organ,
}


def make_clip(label: str, rng: np.random.Generator, seconds: float) -> tuple[Waveform, Traits]:
    """One sound of a kind: (float32 waveform [T] at 16 kHz, how it is pitched and paced)."""
    traits = Traits(float(rng.uniform(-1, 1)), float(rng.uniform(-1, 1)))
    samples = round(seconds * SAMPLE_RATE)
    waveform = KINDS[label](rng, traits, samples)
    floor = 10 ** (rng.uniform(-60, -46) / 20)  # a quiet room
    waveform = waveform / (np.abs(waveform).max() + 1e-9) + floor * rng.standard_normal(samples)
    return (rng.uniform(0.25, 0.9) * waveform / np.abs(waveform).max()).astype(np.float32), traits
