"""Transcripts as the phoneme ids of AudioLDM 2's speech models (references.md#phonemes)."""

from __future__ import annotations

import re
import unicodedata

import numpy as np

from stages.espeak import phonemize

PAD = "_"
STOP = "⚠"
MAX_LENGTH = 310

_PUNCTUATION = ';:,.!?¡¿—…"«»“” '
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_IPA = "ɑɐɒæɓʙβɔɕçɗɖðʤəɘɚɛɜɝɞɟʄɡɠɢʛɦɧħɥʜɨɪʝɭɬɫɮʟɱɯɰŋɳɲɴøɵɸθœɶʘɹɺɾɻʀʁɽʂʃʈʧʉʊʋⱱʌɣɤʍχʎʏʑʐʒʔʡʕʢǀǁǂǃˈˌːˑʼʴʰʱʲʷˠˤ˞↓↑→↗↘'\u0329'ᵻ"
SYMBOLS = PAD + _PUNCTUATION + _LETTERS + _IPA + "♪☎☒☝" + STOP

# The apostrophe stands twice in the published table; the later place is the one in use.
SYMBOL_TO_ID = {symbol: index for index, symbol in enumerate(SYMBOLS)}
PAD_ID = SYMBOL_TO_ID[PAD]
STOP_ID = SYMBOL_TO_ID[STOP]

_ABBREVIATIONS = [
    (re.compile(rf"\b{short}\.", re.IGNORECASE), long)
    for short, long in {
        "mrs": "misess", "mr": "mister", "dr": "doctor", "st": "saint", "co": "company", "jr": "junior",
        "maj": "major", "gen": "general", "drs": "doctors", "rev": "reverend", "lt": "lieutenant",
        "hon": "honorable", "sgt": "sergeant", "capt": "captain", "esq": "esquire", "ltd": "limited",
        "col": "colonel", "ft": "fort",
    }.items()
]  # fmt: skip
# What decomposition leaves behind: letters without a base letter, and typographic punctuation.
_TO_ASCII = str.maketrans({
    "ß": "ss", "ẞ": "SS", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L",
    "đ": "d", "Đ": "D", "ð": "d", "Ð": "D", "þ": "th", "Þ": "Th", "ı": "i", "ħ": "h", "Ħ": "H",
    "‘": "'", "’": "'", "‚": ",", "‛": "'", "′": "'", "“": '"', "”": '"', "„": '"', "″": '"', "«": "<<", "»": ">>",
    "‐": "-", "‑": "-", "‒": "-", "–": "-", "—": "--", "―": "--", "−": "-", "×": "x", "÷": "/", "€": "EUR",
    "£": "PS", "¥": "Y=", "¡": "!", "¿": "?", "©": "(c)", "®": "(r)", "°": "deg",
})  # fmt: skip
_MARKUP = re.compile(r"<.*?>")
# A run of marks with the blanks around it. The words between two runs are pronounced on their own. A comma or point
# between two digits belongs to the number, as in phonemizer since 3.4: espeak reads "42.50" as "forty two point five zero".
_MARKS = re.compile(r"(\s*(?:[;:!?¡¿—…\"«»“”(){}\[\]]|(?<!\d)[,.]|[,.](?!\d))+\s*)")


def clean(text: str) -> str:
    """Text ready to be pronounced: markup removed, plain ASCII, lower case, abbreviations written out."""
    text = _MARKUP.sub("", text).translate(_TO_ASCII)
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii").lower()
    for pattern, written_out in _ABBREVIATIONS:
        text = pattern.sub(written_out, text)
    return text


def pronounce(text: str) -> str:
    """The phonemes of a transcript as IPA with stress, its punctuation kept in place."""
    pieces = _MARKS.split(clean(text).strip())
    spoken = [piece if index % 2 else phonemize(piece) for index, piece in enumerate(pieces)]
    return " ".join("".join(spoken).split())


def encode(phonemes: str, max_length: int = MAX_LENGTH) -> np.ndarray:
    """Phonemes as ids, int16 [max_length]: the symbols, the stop symbol, then padding.

    A longer sequence is cut and so loses its stop symbol; a symbol outside the table becomes padding,
    both as in the reference.
    """
    ids = np.full(max_length, PAD_ID, np.int16)
    known = [SYMBOL_TO_ID.get(symbol, PAD_ID) for symbol in phonemes + STOP][:max_length]
    ids[: len(known)] = known
    return ids


def phoneme_ids(text: str, max_length: int = MAX_LENGTH) -> np.ndarray:
    """A transcript as phoneme ids, int16 [max_length]; "" gives the stop symbol alone."""
    return encode(pronounce(text), max_length)


def phoneme_vocab() -> dict[str, int]:
    """Symbol → id for `transformers.VitsTokenizer` (its vocab.json): 183 entries without a gap.

    The place of the first apostrophe, which no text reaches, is filled by a name of its own.
    """
    taken = set(SYMBOL_TO_ID.values())
    idle = {f"<unused-{index}>": index for index in range(len(SYMBOLS)) if index not in taken}
    return dict(sorted({**SYMBOL_TO_ID, **idle}.items(), key=lambda entry: entry[1]))
