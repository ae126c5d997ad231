"""Real, restored and generated spectrograms of a few evaluated clips as one small PNG, for a README."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines import plots
from pipelines.evaluation.results import SYSTEMS
from pipelines.page.project import Project
from stages.errors import UserError
from stages.files import replacing

ROWS = ("real", "vae", "generated")
HUES, GREYS = 80, 16  # the file's palette, of spectrograms and of text: a fifth of the size in true colour


def write_picture(project: Project, path: Path, columns: int = 3) -> Path:
    """Write spectrograms of the first `columns` kinds of sound in the evaluation's list, not chosen by ear.

    One column per clip, under its caption; one row for the real clip, its reconstruction by VAE and vocoder, and what was
    generated from the caption. Without labels the first clips are taken.

    Raises:
        UserError: the project has no evaluation, or its sounds are gone.
    """
    if project.evaluation is None:
        raise UserError(f"{project.work} has no evaluation to draw; run `loa evaluate --work {project.work}` first")
    kinds = {row["label"] or row["clip_id"]: row for row in reversed(project.evaluation.clips)}  # the first clip of each kind stays
    rows = list(reversed(kinds.values()))[:columns]
    sounds = {system: [project.sound(row, system) for row in rows] for system in ROWS}
    if any(sound is None for drawn in sounds.values() for sound in drawn):
        raise UserError(f"sounds of the evaluation in {project.work} are gone; run `loa evaluate --work {project.work}` again")
    mels = {SYSTEMS[system]: [project.mel(sound) for sound in drawn if sound is not None] for system, drawn in sounds.items()}
    drawn = plots.spectrogram_grid(mels, [row["transcript"] or row["text"] for row in rows])
    image = Image.open(io.BytesIO(drawn.png(dpi=120)))
    with replacing(path) as draft:
        image.convert("RGB").quantize(palette=_palette(), dither=Image.Dither.NONE).save(draft, "PNG", optimize=True)
    return path


def _palette() -> Image.Image:
    hues = plots.mel_colours(HUES)
    greys = np.linspace(0, 255, GREYS).round().astype(np.uint8)[:, None].repeat(3, axis=1)
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.concatenate([hues, greys]).tobytes())
    return palette
