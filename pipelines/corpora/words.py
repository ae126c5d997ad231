"""The words of all corpora in one form: one spelling of every class, and captions that are text of a sensible length."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

LONGEST_CAPTION = 2000  # characters; encoders read some hundred words, and nobody describes a clip at greater length


def class_name(label: str) -> str:
    """The one spelling of a class: AudioSet's display name where it matches, else lower case with blanks for "-" and "_".

    Names match when their letters and digits do: "dog" and "DOG." are "Dog", "waves surf" is "Waves, surf".
    """
    return _audioset_names().get(_letters(label)) or " ".join(re.sub(r"[\s_-]+", " ", label.casefold()).split()).strip(" .,;:")


def caption_problem(caption: str) -> str | None:
    """Why a caption cannot be used, or None: it is too long, or no text at all."""
    if len(caption) > LONGEST_CAPTION:
        return f"caption too long: {len(caption):,} characters, at most {LONGEST_CAPTION:,}; it begins {caption[:40]!r}"
    if not any(character.isalpha() for character in caption):
        return f"caption without words: {caption[:40]!r}"
    return None


@lru_cache(maxsize=1)
def _audioset_names() -> dict[str, str]:
    """AudioSet's 527 display names by their letters; the list is Google's, CC BY 4.0."""
    names = Path(__file__).with_name("audioset_classes.txt").read_text(encoding="utf-8").splitlines()
    return {_letters(name): name for name in names}


@lru_cache(maxsize=1 << 16)
def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())
