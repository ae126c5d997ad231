"""English pronunciation and a synthetic voice from espeak-ng, called through ctypes.

The library and its data come with the wheel `espeakng-loader`. espeak-ng is GPL-3.0, so it is never imported
until somebody asks for phonemes or speech; everything else in loa works without it.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from functools import lru_cache

import numpy as np

from stages.errors import UserError

LANGUAGE = "en-us"

# Constants of espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_PHONEMES_IPA = 0x02
_POSITION_CHARACTER = 1
_PARAMETER_RATE = 1
_PARAMETER_PITCH = 3

_SynthCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_LANGUAGE_SWITCH = re.compile(r"\([a-z-]{2,}\)")  # espeak marks borrowed words, e.g. "(fr)…(en-us)"

# espeak keeps one voice and one text position for the whole process: calls take turns.
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child must not inherit the lock while another thread holds it
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class _Engine:
    """The loaded library with its current voice; one per process."""

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError:
            raise UserError(
                "speech needs espeak-ng, which is not installed; install it with `pip install -e '.[speech]'` in loa's folder"
            ) from None
        try:
            self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        except OSError as error:
            raise UserError(f"the espeak-ng library of the wheel espeakng-loader cannot be loaded: {error}") from None
        self._library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        self._library.espeak_TextToPhonemes.argtypes = [ctypes.POINTER(ctypes.c_char_p), ctypes.c_int, ctypes.c_int]
        data = espeakng_loader.get_data_path().encode()
        self.sample_rate = self._library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data, _INITIALIZE_DONT_EXIT)
        if self.sample_rate <= 0:
            raise UserError(f"espeak-ng cannot load its data from {data.decode()}; reinstall espeakng-loader")
        self._pieces: list[np.ndarray] = []
        self._callback = _SynthCallback(self._collect)  # kept: espeak holds only the bare pointer
        self._library.espeak_SetSynthCallback(self._callback)
        self._voice = ""

    def _collect(self, samples: ctypes._Pointer[ctypes.c_short], count: int, _events: int) -> int:
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    def use(self, voice: str) -> None:
        if voice == self._voice:
            return
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise UserError(f"espeak-ng has no voice {voice!r}; try {LANGUAGE!r} or a variant such as 'en-us+f3'")
        self._voice = voice

    def phonemes(self, text: str) -> str:
        rest = ctypes.c_char_p(text.encode("utf-8"))
        clauses = []
        while rest.value:  # each call takes one clause and moves the pointer behind it
            clauses.append(self._library.espeak_TextToPhonemes(ctypes.byref(rest), _CHARS_UTF8, _PHONEMES_IPA) or b"")
        return b" ".join(clauses).decode("utf-8")

    def speak(self, text: str, speed: int, pitch: int) -> np.ndarray:
        self._library.espeak_SetParameter(_PARAMETER_RATE, speed, 0)
        self._library.espeak_SetParameter(_PARAMETER_PITCH, pitch, 0)
        data = text.encode("utf-8")
        self._pieces.clear()
        status = self._library.espeak_Synth(data, len(data) + 1, 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None)
        self._library.espeak_Synchronize()
        if status != 0:
            raise RuntimeError(f"espeak-ng could not speak {text!r} (status {status})")
        return np.concatenate(self._pieces) if self._pieces else np.zeros(0, np.int16)


@lru_cache(maxsize=1)
def _engine() -> _Engine:
    return _Engine()


def phonemize(text: str) -> str:
    """American English text as IPA with stress marks; espeak drops punctuation, words are parted by one space."""
    with _lock:
        engine = _engine()
        engine.use(LANGUAGE)
        ipa = engine.phonemes(text)
    return " ".join(_LANGUAGE_SWITCH.sub("", ipa).split())


def synthesise(text: str, voice: str = LANGUAGE, speed: int = 165, pitch: int = 50) -> tuple[np.ndarray, int]:
    """Speak `text`: (waveform [T] float32 in [-1, 1], sample rate in Hz).

    `voice` is an espeak name with an optional variant ("en-us+f3"), `speed` words per minute (80-450),
    `pitch` 0-99. espeak varies phase and noise from one call to the next, so neither the samples nor, by a few,
    their number repeat.
    """
    with _lock:
        engine = _engine()
        engine.use(voice)
        samples = engine.speak(text, speed, pitch)
        return samples.astype(np.float32) / 32768.0, engine.sample_rate
