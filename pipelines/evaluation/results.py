"""The result of an evaluation, `evaluation.json`: scores as a table, classes and confusion, and what they look like."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import plots
from pipelines.evaluation.records import MEASURES
from stages.errors import UserError

EVALUATION_FORMAT = 1


# The columns of every table: without any skill, the system itself, its two ceilings, the real clips, and other real clips.
SYSTEMS = {
    "chance": "chance",
    "generated": "generated",
    "vae": "VAE + vocoder",
    "vocoder": "vocoder",
    "real": "real",
    "other_real": "other real clips",
}
HEARD = ("generated", "vae", "vocoder", "real")


@dataclass(frozen=True)
class Evaluation:
    """Scores with the record of how they came about; `<work>/evaluation/evaluation.json`."""

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
    def read(cls, work: Path) -> Evaluation | None:
        """The evaluation of a project folder, or None when there is none."""
        path = Path(work) / "evaluation" / "evaluation.json"
        if not path.is_file():
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("format") != EVALUATION_FORMAT:
            raise UserError(
                f"{path} has format {values.get('format')}, this version of loa reads {EVALUATION_FORMAT}; run `loa evaluate` again"
            )
        return cls(**values)

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
        for name, values in self.scores.items():
            cells = [MEASURES[name].form.format(values[s]) if s in values else "–" for s in columns]
            rows.append([MEASURES[name].heading, *cells])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        padded = [
            [f"{cell:{'<' if i == 0 else '>'}{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True))] for row in rows
        ]
        lines = ["  ".join(row).rstrip() for row in padded]
        lines += [f"{MEASURES[name].title}: not measured, {reason}" for name, reason in self.missing.items()]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)]) + "\n"


def confusion_picture(found: Evaluation, most: int = 24) -> plots.Picture | None:
    """Asked-for against recognised classes; of many classes the most frequent. None without a classifier."""
    if not found.confusion:
        return None
    counts = np.array(found.confusion["counts"])
    frequent = np.argsort(-(counts.sum(0) + counts.sum(1)), kind="stable")[:most]
    shown = sorted(i for i in frequent.tolist() if counts[i].sum() + counts[:, i].sum())
    return plots.confusion([found.confusion["names"][i] for i in shown], counts[np.ix_(shown, shown)])


def classes_picture(found: Evaluation, most: int = 24) -> plots.Picture | None:
    """Accuracy by class, of generated clips, restored ones and real ones. None without a classifier."""
    rows = sorted(found.classes, key=lambda row: -row["count"])[:most]
    if not rows:
        return None
    rows.sort(key=lambda row: str(row["name"]))
    shares = {SYSTEMS[s]: [row[s] for row in rows] for s in ("generated", "vae", "real")}
    return plots.class_bars([row["name"] for row in rows], shares, found.scores["accuracy"]["chance"])
