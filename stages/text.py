"""The words of a clip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def clip_texts(row: Mapping[str, Any]) -> list[str]:
    """Captions of a clip; without any, its labels as one sentence; without those, the empty text (facts 1.5)."""
    captions = [str(c) for c in (row.get("captions") if row.get("captions") is not None else ()) if str(c).strip()]
    if captions:
        return captions
    labels = [str(label) for label in (row.get("labels") if row.get("labels") is not None else ())]
    return [", ".join(labels) + "."] if labels else [""]
