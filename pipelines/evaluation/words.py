"""Word and character error rates of speech: readers turn clips into words, transcripts say what the words should be."""

from __future__ import annotations

import csv
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.evaluation import metrics
from pipelines.evaluation.clips import Channels, ClipSet
from pipelines.evaluation.records import Score
from stages.errors import UserError, some
from stages.judges.whisper import Transcriber
from stages.text import normalise_transcript


class Reader(typing.Protocol):
    """Speech recognition."""

    fields: dict[str, Any]  # of a record's protocol: which network read the clips, and how they reached it

    def read(self, clips: ClipSet, channels: Channels) -> list[str] | None:
        """The words of every clip; None where this reader has not read the set."""


class AsrReader:
    """Reads with a Whisper from a local folder."""

    def __init__(self, transcriber: Transcriber) -> None:
        self._transcriber = transcriber
        self.fields: dict[str, Any] = {
            "judge": transcriber.name,
            "judge_sha256": transcriber.weights_hash,
            "sample_rate": transcriber.sample_rate,
            "resampler": "soxr-vhq",
            "level": "as recorded",
            "clip_rule": "whole clips",
        }

    def read(self, clips: ClipSet, channels: Channels) -> list[str]:
        return [self._transcriber.transcribe([wave], rate)[0] for wave, rate in clips.waveforms(channels)]


class Hypotheses:
    """What another recogniser, called `name`, has read in the clips of the system: a CSV with clip_id and text."""

    def __init__(self, name: str, path: Path) -> None:
        self.path = Path(path)
        self.fields: dict[str, Any] = {
            "judge": name,
            "judge_sha256": None,
            "sample_rate": None,
            "resampler": "not stated",
            "level": "as recorded",
            "clip_rule": "whole clips",
        }

    def read(self, clips: ClipSet, channels: Channels) -> list[str] | None:
        """Raises UserError when the table lacks a column or a clip."""
        if clips.role != "system":
            return None
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file)
            if not {"clip_id", "text"} <= set(table.fieldnames or ()):
                raise UserError(f"{self.path} has the columns {', '.join(table.fieldnames or ())}; expected clip_id and text")
            texts = {(row["clip_id"] or "").strip(): row["text"] or "" for row in table}
        missing = [clip.clip_id for clip in clips.clips if clip.clip_id not in texts]
        if missing:
            raise UserError(
                f"{self.path} lacks {len(missing)} of the {len(clips.clips)} generated clips: {some(missing)}; silence is an empty text"
            )
        return [texts[clip.clip_id] for clip in clips.clips]


def word_errors(transcripts: Sequence[str], hypotheses: Sequence[str]) -> list[Score]:
    """Word and character error rate of hypotheses, both sides in the spelling of Whisper's normaliser."""
    wanted, recognised = ([normalise_transcript(text) for text in texts] for texts in (transcripts, hypotheses))
    fields = {
        "implementation": "(S + D + I) / N over the set, Whisper's English normaliser without its spelling table",
        "rows_generated": len(recognised),
        "rows_reference": len(wanted),
        "pairing": "transcript by name",
    }
    wer = metrics.error_rate([text.split() for text in wanted], [text.split() for text in recognised])
    return [Score("wer", wer, fields), Score("cer", metrics.error_rate(wanted, recognised), fields)]
