"""The words of a clip."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any


def clip_texts(row: Mapping[str, Any]) -> list[str]:
    """Captions of a clip; without any, its labels as one sentence; without those, the empty text (references.md#captions)."""
    captions = [str(c) for c in _listed(row, "captions") if str(c).strip()]
    if captions:
        return captions
    labels = [str(label) for label in _listed(row, "labels")]
    return [", ".join(labels) + "."] if labels else [""]


def _listed(row: Mapping[str, Any], name: str) -> Iterable[Any]:
    """A list column of the clip table, which may be absent or null and may arrive as an array."""
    values = row.get(name)
    return () if values is None else values


def normalise_transcript(text: str) -> str:
    """What was said, in the one spelling in which transcripts are compared; blanks separate words.

    Whisper's English normaliser, the usual choice: lower case, no punctuation, no fillers, contractions and
    abbreviations spelled out, number words as digits. Its table of British spellings belongs to Whisper's checkpoints
    and is not used.
    """
    return str(_english()(text))


@lru_cache(maxsize=1)
def _english() -> Any:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})
