"""CSV files whose quoted fields may span lines, as FMA's biographies do."""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from pipelines.corpora.files import BadLine

LONGEST = 2000  # lines of one record; more means that a quote is missing


def csv_records(path: Path, fallback: str | None = None) -> Iterator[tuple[int, list[str]] | BadLine]:
    """(number of its first line, fields) of every record that is not blank, each as wide as the first one.

    A record that is not costs its first line alone: reading goes on with the next. `fallback` is the encoding of lines that
    are not UTF-8; without one they are bad.
    """
    with path.open("rb") as stream:
        lines = enumerate(stream, 1)
        waiting: deque[tuple[int, bytes]] = deque()
        width = 0
        while True:
            if not waiting and not _more(lines, waiting):
                return
            number, first = waiting[0]
            if not first.strip():
                waiting.popleft()
                continue
            used, quotes = 1, first.count(b'"')
            while quotes % 2 and used < LONGEST and (used < len(waiting) or _more(lines, waiting)):
                quotes += waiting[used][1].count(b'"')
                used += 1
            record = _parsed(path, number, b"".join(raw for _, raw in list(waiting)[:used]), width, fallback)
            if isinstance(record, BadLine):
                used = 1
            else:
                width = width or len(record)
            for _ in range(used):
                waiting.popleft()
            yield record if isinstance(record, BadLine) else (number, record)


def _more(lines: Iterator[tuple[int, bytes]], waiting: deque[tuple[int, bytes]]) -> bool:
    line = next(lines, None)
    if line is not None:
        waiting.append(line)
    return line is not None


def _parsed(path: Path, number: int, raw: bytes, width: int, fallback: str | None) -> list[str] | BadLine:
    raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if fallback is None:
            return BadLine(path, number, f"not UTF-8 ({error.reason})")
        text = raw.decode(fallback, "replace")
    try:
        fields = next(csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True))
    except (csv.Error, StopIteration) as error:
        return BadLine(path, number, str(error) or "no fields")
    if width and len(fields) != width:
        return BadLine(path, number, f"{len(fields)} fields where the first line has {width}")
    return fields
