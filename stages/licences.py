"""What the licences of recordings mean for weights that were trained on them. Reads the words; is no lawyer."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

Licences = Mapping[str, int]  # licence as its corpus states it → clips

UNKNOWN, NON_COMMERCIAL, NO_DERIVATIVES, SHARE_ALIKE = "unknown", "non-commercial", "no derivatives", "share-alike"
_SAYS = {
    NON_COMMERCIAL: r"\bnc\b|non.?commercial|academic|research|educational",
    NO_DERIVATIVES: r"\bnd\b|no.?deriv",
    SHARE_ALIKE: r"\bsa\b|share.?alike|gpl|odbl",
}
_ALLOWS = r"cc.?0\b|cc.?zero|public.?domain|\bby\b|attribution|\bmit\b|apache|\bbsd\b|unlicense"
_WORDS_ALONE = r"(labels|captions|annotations|tags)\b[^;]*$"  # a licence of a corpus's words leaves the sound's open


def terms(licence: str) -> set[str]:
    """What a licence asks or forbids, of the kinds above; nothing for one that asks for a name at most."""
    text = licence.strip().lower()
    kinds = {kind for kind, pattern in _SAYS.items() if re.search(pattern, text)}
    if re.match(_WORDS_ALONE, text) or not (kinds or re.search(_ALLOWS, text)) or "not stated" in text:
        kinds.add(UNKNOWN)
    return kinds


def union(*sets: Licences) -> dict[str, int]:
    """Every licence that occurs, with the most clips that one of the sets has of it: stages learn from the same clips."""
    return {name: max(counts.get(name, 0) for counts in sets) for name in sorted(set().union(*sets))}


def warnings(licences: Licences, unstated: Collection[str] = ()) -> list[str]:
    """One sentence for each kind of terms that forbids what people commonly do with a model.

    Args:
        licences: of the clips that the weights were trained on.
        unstated: stages whose weights do not say what they were trained on.
    """
    meanings = {
        NON_COMMERCIAL: "for non-commercial or research use alone: a product or a paid service needs the consent of their owners",
        NO_DERIVATIVES: "without derivatives: whether weights trained on them may be passed on is not settled",
        SHARE_ALIKE: "share-alike: what derives from them may have to be passed on under the same terms",
        UNKNOWN: "without a known licence of the sound: nobody has said that weights trained on them may be used or passed on",
    }
    sentences = []
    for kind, meaning in meanings.items():
        clips = {name or "(none)": count for name, count in licences.items() if kind in terms(name)}
        if clips:
            names = ", ".join(f"{name} ({count:,})" for name, count in sorted(clips.items(), key=lambda item: -item[1]))
            sentences.append(f"{sum(clips.values()):,} training clips are {meaning}. {names}")
    if unstated:
        sentences.append(
            f"the weights of {', '.join(sorted(unstated))} do not say what they were trained on: see where they come from "
            "(the public AudioLDM 2 weights are CC BY-NC-SA 4.0)"
        )
    return sentences


def inherited(cards: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What stages were trained on, taken together: `clips` by licence, and the stages with `unstated` origin.

    Args:
        cards: of the stages by name, or of bundles; one without `licences` says nothing.
    """
    said = {stage: card["licences"] for stage, card in cards.items() if card.get("licences")}
    silent = {stage for stage in cards if stage not in said}
    return {
        "clips": union(*(entry.get(part, {}) for entry in said.values() for part in ("clips", "inputs"))),
        "unstated": sorted(silent.union(*(entry["unstated"] for entry in said.values()))),
    }
