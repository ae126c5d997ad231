"""The result of an evaluation, `evaluation.json`: scores as a table, classes and confusion, and what they look like."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import plots
from pipelines.evaluation import metrics
from pipelines.evaluation.clips import Clip, write_captions
from pipelines.evaluation.records import MEASURES, write_records
from pipelines.evaluation.scores import Scores
from pipelines.tables import aligned
from stages.errors import UserError
from stages.files import Place, write_json

EVALUATION_FORMAT = 1


# The columns of every table: without any skill, the system itself, real clips through its last parts, the real clips, and others.
SYSTEMS = {
    "chance": "chance",
    "generated": "generated",
    "vae": "VAE + vocoder",
    "vocoder": "vocoder",
    "real": "real",
    "other_real": "other real clips",
}
WITH_SOUND = ("generated", "vae", "vocoder", "real")  # those that people can listen to


@dataclass(frozen=True)
class Evaluation:
    """Scores of a system beside those of restored and real clips; `<work>/evaluation/evaluation.json`."""

    protocol: dict[str, Any]
    scores: dict[str, dict[str, float]]  # measure -> system -> value
    intervals: dict[str, dict[str, list[float]]]  # 95 % intervals, where there are any
    missing: dict[str, str]  # measure -> why there is no score
    notes: list[str]  # what a reader should know before believing a number
    classes: list[dict[str, Any]]  # per class: name, count, accuracy of every system
    confusion: dict[str, Any]  # names, counts: generated clips, asked for against recognised
    clips: list[dict[str, Any]]  # per clip: text, label, recognised, scores, files of every system
    format: int = EVALUATION_FORMAT

    @classmethod
    def read(cls, work: str | Path | Place) -> Evaluation | None:
        """The evaluation of a project folder, or None when there is none."""
        path = Place.of(work) / "evaluation" / "evaluation.json"
        if not path.exists():
            return None
        values = json.loads(path.read())
        if values.get("format") != EVALUATION_FORMAT:
            raise UserError(
                f"{path} has format {values.get('format')}, this version of loa reads {EVALUATION_FORMAT}; run `loa evaluate` again"
            )
        return cls(**values)

    @classmethod
    def of(cls, scores: Scores, clips: Sequence[Clip], protocol: Mapping[str, Any], folder: Path) -> Evaluation:
        """What the scores say, as tables; `clips` in the order in which they are shown, files relative to `folder`."""
        values = {name: scores.values[name] | _chance(scores, name) for name in MEASURES if scores.values[name]}
        hits = _hits(scores, clips)
        return cls(
            protocol=dict(protocol),
            scores={name: {column: by[column] for column in SYSTEMS if column in by} for name, by in values.items()},
            intervals={"accuracy": {c: list(metrics.interval(sum(hit.values()), len(hit))) for c, hit in hits.items()}} if hits else {},
            missing=scores.missing,
            notes=list(dict.fromkeys(scores.notes)),
            classes=_classes(hits, clips),
            confusion=_confusion(scores, clips) if hits else {},
            clips=[_row(scores, clip, folder) for clip in clips],
        )

    def save(self, scores: Scores, clips: Sequence[Clip], folder: Path) -> None:
        """Write records, the caption list, pictures and the table; evaluation.json last: when it is there, so is everything it names."""
        folder.mkdir(parents=True, exist_ok=True)
        if scores.system.captions_sha256 is not None:
            write_captions(folder / "captions.json", clips)
        write_records(folder / "records", scores.records)
        for name, picture in (("confusion", confusion_picture(self)), ("classes", classes_picture(self))):
            if picture is not None:
                (folder / f"{name}.png").write_bytes(picture.png())
            else:
                (folder / f"{name}.png").unlink(missing_ok=True)
        (folder / "table.txt").write_text(self.table(), encoding="utf-8")
        write_json(folder / "evaluation.json", asdict(self))

    def summary(self) -> str:
        """The headline in one line."""
        parts = []
        for name, short in (("accuracy", "recognised"), ("frechet_clap", "Fréchet (CLAP)"), ("clap_score", "CLAP score")):
            if "generated" in (values := self.scores.get(name, {})):
                form = MEASURES[name].form.format
                beside = ", ".join(f"{SYSTEMS[s]} {form(values[s])}" for s in ("chance", "vae", "real") if s in values)
                parts.append(f"{short} {form(values['generated'])}" + (f" ({beside})" if beside else ""))
        return f"{len(self.clips)} clips: " + "; ".join(parts or ["nothing could be scored"])

    def table(self) -> str:
        """All scores as a text table, with what is missing and why."""
        columns = [s for s in SYSTEMS if any(s in values for values in self.scores.values())]
        rows = [["", *(SYSTEMS[s] for s in columns)]]
        for name in (name for name in MEASURES if name in self.scores):  # JSON keeps no order
            values = self.scores[name]
            cells = [MEASURES[name].form.format(values[s]) if s in values else "–" for s in columns]
            rows.append([MEASURES[name].heading, *cells])
        lines = [aligned(rows)]
        lines += [f"{MEASURES[name].title}: not measured, {reason}" for name, reason in self.missing.items()]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)]) + "\n"


def confusion_picture(evaluation: Evaluation, most: int = 24) -> plots.Picture | None:
    """Asked-for against recognised classes; of many classes the most frequent. None without a classifier."""
    if not evaluation.confusion:
        return None
    counts = np.array(evaluation.confusion["counts"])
    frequent = np.argsort(-(counts.sum(0) + counts.sum(1)), kind="stable")[:most]
    shown = sorted(i for i in frequent.tolist() if counts[i].sum() + counts[:, i].sum())
    return plots.confusion([evaluation.confusion["names"][i] for i in shown], counts[np.ix_(shown, shown)])


def classes_picture(evaluation: Evaluation, most: int = 24) -> plots.Picture | None:
    """Accuracy by class, of generated clips, restored ones and real ones. None without a classifier."""
    rows = sorted(evaluation.classes, key=lambda row: -row["count"])[:most]
    if not rows:
        return None
    rows.sort(key=lambda row: str(row["name"]))
    shares = {SYSTEMS[s]: [row[s] for row in rows] for s in ("generated", "vae", "real")}
    return plots.class_bars([row["name"] for row in rows], shares, evaluation.scores["accuracy"]["chance"])


def _chance(scores: Scores, measure: str) -> dict[str, float]:
    return {"chance": scores.chance[measure]} if measure in scores.chance else {}


def _hits(scores: Scores, clips: Sequence[Clip]) -> dict[str, dict[str, bool]]:
    """Column → clip id → whether its class was recognised, of the clips whose class the classifier knows."""
    labelled = [clip for clip in clips if clip.label in scores.classes]
    columns = [column for column in WITH_SOUND if column in scores.values["accuracy"]]
    return {
        column: {clip.clip_id: scores.clips[column][clip.clip_id]["recognised"] == clip.label for clip in labelled} for column in columns
    }


def _classes(hits: Mapping[str, Mapping[str, bool]], clips: Sequence[Clip]) -> list[dict[str, Any]]:
    """Per class: its name, how many clips were asked for, and the accuracy of every column."""
    rows = []
    counted = next(iter(hits.values()), {})
    for name in sorted({str(clip.label) for clip in clips if clip.clip_id in counted}):
        members = [clip.clip_id for clip in clips if clip.label == name]
        shares = {column: float(np.mean([hit[clip_id] for clip_id in members])) for column, hit in hits.items()}
        rows.append({"name": name, "count": len(members), **shares})
    return rows


def _confusion(scores: Scores, clips: Sequence[Clip]) -> dict[str, Any]:
    """How often a class (row) was asked for and a class (column) recognised in the generated clips."""
    number = {name: i for i, name in enumerate(scores.classes)}
    labelled = [clip for clip in clips if clip.label in number]
    recognised = [number[scores.clips["generated"][clip.clip_id]["recognised"]] for clip in labelled]
    counts = metrics.confusion([number[str(clip.label)] for clip in labelled], recognised, len(number))
    return {"names": list(scores.classes), "counts": counts.tolist()}


def _row(scores: Scores, clip: Clip, folder: Path) -> dict[str, Any]:
    """What is known of one clip: texts, what the judges say of the generated and of the real sound, files."""
    details = scores.clips["generated"][clip.clip_id] | {
        f"{name}_real": value for name, value in scores.clips["real"].get(clip.clip_id, {}).items() if name != "confidence"
    }
    files = {}
    for column in WITH_SOUND:
        clips = scores.sets.get(column)
        if clips is not None and clip.clip_id in clips.numbers:
            path = clips.files[clips.numbers[clip.clip_id]].path
            files[column] = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
    return asdict(clip) | details | {"files": files}
