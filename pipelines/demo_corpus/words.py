"""How people speak of the sounds: captions that tell pitch and tempo, in wordings of which some are kept for the test split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.demo_corpus.sounds import Traits


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


WORDS: dict[str, Words] = {
    "Bark": Words("dog", "barks", "barking", ("big", "deep"), ("small", "high"), "/m/05tny_"),
    "Siren": Words("siren", "wails", "wailing", ("low", "deep"), ("high", "shrill"), "/m/03kmc9"),
    "Rain": Words("rain", "falls", "falling", ("soft", "dull"), ("bright", "sharp"), "/m/06mb1", False, "lightly", "heavily"),
    "Tick-tock": Words("clock", "ticks", "ticking", ("big", "old"), ("small", "little"), "/m/07qjznl"),
    "Church bell": Words("church bell", "rings", "ringing", ("big", "deep"), ("small", "high"), "/m/03w41f"),
    "Chirp, tweet": Words("birds", "chirp", "chirping", ("big", "low"), ("small", "high"), "/m/07pggtn", True),
    "Vehicle horn, car horn, honking": Words("car horn", "honks", "honking", ("low", "deep"), ("high", "shrill"), "/m/0912c9"),
    "Walk, footsteps": Words("footsteps", "pass by", "passing by", ("heavy", "dull"), ("light", "soft"), "/m/07pbtc8", True),
    "Helicopter": Words("helicopter", "flies overhead", "flying overhead", ("big", "deep"), ("small", "light"), "/m/09ct_"),
    "Wind": Words("wind", "howls", "howling", ("low", "deep"), ("high", "shrill"), "/m/03m9d0z"),
    "Telephone bell ringing": Words("telephone", "rings", "ringing", ("old", "low"), ("shrill", "high"), "/m/07pp8cl"),
    "Engine": Words("engine", "runs", "running", ("big", "deep"), ("small", "high"), "/m/02mk9"),
    "Cricket": Words("crickets", "sing", "singing", ("low", "soft"), ("high", "shrill"), "/m/09xqv", True),
    "Thunder": Words("thunder", "rumbles", "rumbling", ("low", "deep"), ("bright", "sharp"), "/m/0ngt1"),
    "Smoke detector, smoke alarm": Words("smoke alarm", "beeps", "beeping", ("low", "dull"), ("high", "shrill"), "/m/01y3hg"),
    "Waves, surf": Words("waves", "roll ashore", "rolling ashore", ("low", "dull"), ("bright", "sharp"), "/m/034srq", True),
    "Laser": Words("laser", "zaps", "zapping", ("low", "deep"), ("high", "sharp"), "/x/laser"),
    "Piano": Words("piano", "plays an arpeggio", "playing an arpeggio", ("low", "dark"), ("high", "bright"), "/m/05r5c"),
    "Drum kit": Words("drum kit", "plays a beat", "playing a beat", ("big", "deep"), ("small", "light"), "/m/02hnl"),
    "Organ": Words("organ", "plays chords", "playing chords", ("low", "dark"), ("high", "bright"), "/m/013y1f"),
}
MUSIC = ("Piano", "Drum kit", "Organ")
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
    words = WORDS[label]
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
