"""Scores of a folder of generated sound beside a folder of real sound, whatever made it."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.evaluation import metrics
from pipelines.evaluation.clips import HeldOut, captions_hash, read_captions
from pipelines.evaluation.listening import (
    AT_A_TIME,
    Channels,
    ClapJudge,
    ClipFile,
    Found,
    Heard,
    Judge,
    clap_found,
    clip_files,
    hear_files,
    hearing,
    protocol_of,
    scores,
    set_hash,
)
from pipelines.evaluation.records import MEASURES, Record, check_sounds, some
from stages.audio import Waveform
from stages.errors import AudioError, UserError
from stages.files import code_version
from stages.judges.whisper import Transcriber
from stages.text import normalise_transcript

REAL = "real clips"


@dataclass(frozen=True)
class FolderScores:
    """What two folders gave: a record per score, and what a reader should know before believing one."""

    records: list[Record]
    missing: dict[str, str]  # metric -> why there is no score
    notes: list[str]

    def table(self) -> str:
        """All scores as lines of text, with what is missing and why."""
        order = list(MEASURES)
        rows = [
            (r.system, r.measure.heading, r.measure.form.format(r.value))
            for r in sorted(self.records, key=lambda r: (r.system == REAL, order.index(r.protocol.metric)))
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)] if rows else [0, 0, 0]
        lines = [f"{system:<{widths[0]}}  {title:<{widths[1]}}  {value:>{widths[2]}}" for system, title, value in rows]
        lines += [f"{MEASURES[name].title}: not measured, {reason}" for name, reason in self.missing.items()]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)]) + "\n"


def score_folders(
    generated: Path,
    reference: Path,
    judges: Sequence[Judge],
    *,
    name: str,
    captions: Path | None = None,
    channels: Channels = "mean",
    seconds: float | None = 10.0,
    hypotheses: Path | None = None,
    reader: str | None = None,
    transcriber: Transcriber | None = None,
    made: Mapping[str, Any] | None = None,
    candidates: int | None = None,
    ranker: str | None = None,
    cache: Path | None = None,
) -> FolderScores:
    """Score a folder of generated clips; clips of both folders belong together by their names without suffix.

    Args:
        name: what the system is called.
        captions: a frozen caption list whose clips are exactly the generated ones; CLAP scores and error rates need it.
        seconds: how long a clip should be; shorter ones are reported.
        hypotheses: a CSV with clip_id and text: what a speech recognition called `reader` read in the generated clips.
        transcriber: reads the generated clips, and the real ones as the floor to read error rates against.
        made: how the clips were made, for the record.
        candidates, ranker: of how many candidates each clip was taken, and by whose choice.
        cache: where what judges hear is kept.

    Raises:
        UserError: a folder is empty or holds clips that cannot be scored, or the caption list is of other clips.
    """
    ours, real = clip_files(generated), clip_files(reference)
    listed = read_captions(captions) if captions is not None else []
    if listed:
        _require_same(listed, ours, Path(captions or ""), generated)
    texts = {clip.clip_id: clip for clip in listed}
    names = sorted(ours)
    check = check_sounds(_sounds(ours, channels), seconds)
    notes = [*check.notes("generated"), *check_sounds(_sounds(real, channels)).notes("real")]
    paired = all(clip in real for clip in names)
    number = {clip: i for i, clip in enumerate(real)}
    pairs = [number[clip] for clip in names] if paired else None
    common = {
        "num_generated": len(names), "channels": channels, "candidates": candidates, "ranker": ranker,
        "captions_sha256": captions_hash(listed) if listed else None, "references_sha256": set_hash(real),
    }  # fmt: skip
    made = {**(made or {}), "sounds_sha256": set_hash(ours)}
    records: list[Record] = []
    missing: dict[str, str] = {}
    version = code_version()

    def note(system: str, found: Iterable[Found], heard_by: Mapping[str, Any]) -> None:
        own = system == name
        about = (made, check.counts()) if own else ({}, {"clips": len(names)})
        for one in found:
            records.append(Record(system, one.value, protocol_of(one, heard_by, common), *about, version, one.extra, ranked=own))

    for judge in judges:
        heard = hear_files(judge, [ours[clip] for clip in names], channels, cache)
        beside = hear_files(judge, list(real.values()), channels, cache)
        result = scores(judge.name, beside, heard, pairs)
        note(name, result.found, hearing(judge))
        missing |= result.missing
        notes += result.notes
        if isinstance(judge, ClapJudge):
            if not any(clip.text for clip in listed):
                missing["clap_score"] = "it compares clips with their captions; name a list with --captions"
                continue
            words = judge.embed_texts([texts[clip].text for clip in names])
            note(name, [clap_found(words, heard)], hearing(judge))
            if pairs is not None:
                note(REAL, [clap_found(words, Heard.of([(beside.rows[i : i + 1], None) for i in pairs]))], hearing(judge))

    transcripts = [texts[clip].transcript for clip in names] if listed else []
    if hypotheses is not None or transcriber is not None:
        if not all(transcripts) or not transcripts:
            raise UserError("error rates compare what was read with what should be said; name a caption list with transcripts (--captions)")
        if hypotheses is not None:
            if not reader:
                raise UserError(f"say with --reader what read {hypotheses}: error rates of different readers cannot be compared")
            note(name, word_errors(transcripts, _hypotheses(hypotheses, names)), read_by(reader))
        if transcriber is not None:
            by = read_by(transcriber)
            note(name, word_errors(transcripts, _transcripts(transcriber, [ours[clip] for clip in names], channels)), by)
            if paired:
                note(REAL, word_errors(transcripts, _transcripts(transcriber, [real[clip] for clip in names], channels)), by)
    return FolderScores(records, missing, notes)


def word_errors(transcripts: Sequence[str], hypotheses: Sequence[str]) -> list[Found]:
    """Word and character error rate of what was read, both sides in Whisper's normal spelling."""
    said, read = ([normalise_transcript(text) for text in texts] for texts in (transcripts, hypotheses))
    fields = {
        "implementation": "(S + D + I) / N over the set, Whisper's English normaliser without its spelling table",
        "rows_generated": len(read), "rows_reference": len(said), "num_reference": None, "pairing": "transcript by name", "ddof": None,
    }  # fmt: skip
    wer = metrics.error_rate([text.split() for text in said], [text.split() for text in read])
    return [Found("wer", wer, fields, {}), Found("cer", metrics.error_rate(said, read), fields, {})]


def read_by(reader: Transcriber | str) -> dict[str, Any]:
    """`judging.hearing` of what reads words: a network, or the name of another that loa did not run."""
    alike = {"level": "as recorded", "clip_rule": "whole clips"}
    if isinstance(reader, str):
        return alike | {"judge": reader, "judge_sha256": None, "sample_rate": None, "resampler": "not stated"}
    heard = {"sample_rate": reader.sample_rate, "resampler": "soxr-vhq"}
    return alike | heard | {"judge": reader.name, "judge_sha256": reader.weights_hash}


def _transcripts(transcriber: Transcriber, files: Sequence[ClipFile], channels: Channels) -> list[str]:
    read: list[str] = []
    for first in range(0, len(files), AT_A_TIME):
        for wave, rate in (file.read(channels) for file in files[first : first + AT_A_TIME]):
            read += transcriber.transcribe([wave], rate)
    return read


def _hypotheses(path: Path, names: Sequence[str]) -> list[str]:
    """What was read in each clip, from a CSV with clip_id and text."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file)
        if not {"clip_id", "text"} <= set(table.fieldnames or ()):
            raise UserError(f"{path} has the columns {', '.join(table.fieldnames or ())}; expected clip_id and text")
        read = {(row["clip_id"] or "").strip(): row["text"] or "" for row in table}
    lacking = [clip for clip in names if clip not in read]
    if lacking:
        raise UserError(f"{path} lacks {len(lacking)} of the {len(names)} generated clips: {some(lacking)}; silence is an empty text")
    return [read[clip] for clip in names]


def _sounds(files: Mapping[str, ClipFile], channels: Channels) -> Iterable[tuple[str, Waveform, int]]:
    for name, file in files.items():
        try:
            yield name, *file.read(channels)
        except AudioError:
            yield name, np.zeros(0, np.float32), 0  # counted with the others that cannot be scored


def _require_same(listed: Sequence[HeldOut], files: Mapping[str, ClipFile], captions: Path, folder: Path) -> None:
    wanted = [clip.clip_id for clip in listed]
    lacking, beyond = [clip for clip in wanted if clip not in files], sorted(set(files) - set(wanted))
    if lacking or beyond:
        told = [f"{len(lacking)} of its clips are not there ({some(lacking)})"] if lacking else []
        told += [f"{len(beyond)} clips there are not on it ({some(beyond)})"] if beyond else []
        raise UserError(f"{folder} does not hold the clips of {captions}: {'; '.join(told)}; a score is of the whole list and nothing else")
