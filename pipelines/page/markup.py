"""Values as HTML and as words: escaping, inline data, definition lists, durations."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable
from typing import Any

from stages.config import to_dict


def escape(value: Any) -> str:
    """Text that HTML shows as it is."""
    return html.escape(str(value))


def data_uri(kind: str, content: bytes) -> str:
    """The content of a file as an address: `data:<kind>;base64,…`."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def absent(what: str, command: str) -> str:
    """A paragraph that says what is missing and which command makes it."""
    return f"<p class=absent>There is no {what} yet; <code>{command}</code> makes one.</p>"


def definitions(values: dict[str, Any]) -> str:
    """A definition list; names without a value are left out."""
    rows: Iterable[str] = (
        f"<dt>{escape(str(k).replace('_', ' '))}</dt><dd>{escape(_flat(v))}</dd>" for k, v in values.items() if v not in (None, "")
    )
    return f"<dl>{''.join(rows)}</dl>"


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_flat(v)}" for k, v in value.items())
    return str(value)


def pretty(value: Any) -> str:
    """A configuration as indented JSON."""
    return json.dumps(to_dict(value), indent=2, ensure_ascii=False)


def duration(seconds: float) -> str:
    """A length of time in at most two units."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def memory(megabytes: float) -> str:
    """A size in MB (10^6 bytes), or in GB from there on."""
    return f"{megabytes / 1000:.1f} GB" if megabytes >= 1000 else f"{megabytes:.0f} MB"
