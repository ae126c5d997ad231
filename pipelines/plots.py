"""Pictures of spectrograms, curves and scores, drawn with matplotlib objects: no display, no global state.

A `Picture` is drawn when it is asked for: as PNG bytes for files and MLflow, or as SVG whose text and lines take the
colours of the page around it, so that one picture suits a light page and a dark one.
"""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from stages.audio import LOG_FLOOR

# Log-mel values shown as black and as white; fixed, so that colours of different pictures compare.
MEL_LOW, MEL_HIGH = math.log(LOG_FLOOR), 1.0

SERIES_COLOURS = ("#4c78dd", "#e0653a", "#2f9e77", "#a35bc4", "#c99a1b", "#d14f80", "#5b9fc0", "#7d8590")


@dataclass(frozen=True)
class Theme:
    """The two colours that depend on the background: text, and what should stay behind it."""

    ink: str
    faint: str

    def style(self) -> dict[str, Any]:
        """matplotlib settings of every picture here."""
        return {
            "font.family": "sans-serif",
            "font.size": 9.0,
            "axes.titlesize": 9.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.edgecolor": self.faint,
            "axes.labelcolor": self.ink,
            "axes.titlecolor": self.ink,
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.color": self.faint,
            "ytick.color": self.faint,
            "xtick.labelcolor": self.ink,
            "ytick.labelcolor": self.ink,
            "xtick.labelsize": 8.0,
            "ytick.labelsize": 8.0,
            "text.color": self.ink,
            "legend.frameon": False,
            "legend.fontsize": 8.0,
            "svg.fonttype": "none",
            "svg.hashsalt": "loa",
        }


PAPER = Theme("#1f2328", "#8b949e")
PAGE = Theme("#0a0b0c", "#0a0b0d")  # stand-ins that `Picture.svg` replaces by the page's own colours


class Picture:
    """Something to draw in the colours of its background."""

    def __init__(self, draw: Callable[[Theme], Figure]) -> None:
        self._draw = draw

    def png(self, dpi: int = 144) -> bytes:
        """The picture on white, as a PNG file."""
        buffer = io.BytesIO()
        with matplotlib.rc_context(PAPER.style()):
            self._draw(PAPER).savefig(buffer, format="png", dpi=dpi, facecolor="white")
        return buffer.getvalue()

    def svg(self, label: str) -> str:
        """Inline SVG that shrinks with its place, coloured by the page's `--ink` and `--faint`.

        Args:
            label: what the picture shows, for those who cannot see it.
        """
        buffer = io.StringIO()
        with matplotlib.rc_context(PAGE.style()):
            figure = self._draw(PAGE)
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        markup = buffer.getvalue()
        markup = markup[markup.index("<svg") :]
        markup = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", markup, flags=re.S)
        markup = re.sub(r"font-family: [^;\"]*", "font-family: inherit", markup)
        width = figure.get_size_inches()[0] * 96  # CSS pixels at which the text has its natural size
        frame = f'<svg role="img" aria-label="{html.escape(label)}" style="width: {width:.0f}px; max-width: 100%; height: auto"'
        markup = re.sub(r'<svg (.*?)(height|width)="[^"]*pt" (.*?)(height|width)="[^"]*pt"', rf"{frame} \1\3", markup, count=1, flags=re.S)
        return markup.replace(PAGE.ink, "var(--ink)").replace(PAGE.faint, "var(--faint)")


# ----------------------------------------------------------------------------------------------------- spectrograms


@lru_cache(maxsize=2)
def mel_colours(count: int = 256) -> NDArray[np.uint8]:
    """The colours `[count, 3]` of spectrograms, from the lowest value to the highest."""
    colours: NDArray[np.uint8] = (matplotlib.colormaps["magma"](np.linspace(0.0, 1.0, count))[:, :3] * 255).round().astype(np.uint8)
    return colours


def mel_image(mel: NDArray[np.floating], scale: int = 1) -> NDArray[np.uint8]:
    """A log-mel spectrogram `[F, M]` as colours `[M * scale, F, 3]`: time runs right, pitch runs up."""
    share = (np.asarray(mel, dtype=np.float32).T[::-1] - MEL_LOW) / (MEL_HIGH - MEL_LOW)
    index = (np.nan_to_num(share).clip(0.0, 1.0) * 255).astype(np.uint8)
    return np.repeat(mel_colours()[index], scale, axis=0)


def spectrograms(mels: Mapping[str, NDArray[np.floating]], seconds: float, centres_hz: Sequence[float]) -> Picture:
    """Log-mel spectrograms `[F, M]` by name, one above the other, with axes in seconds and Hz.

    Args:
        seconds: how long each of them lasts.
        centres_hz: centre frequencies of the M bins.
    """

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(7.0, 0.5 + 1.5 * len(mels)), layout="constrained")
        axes = figure.subplots(len(mels), 1, sharex=True, squeeze=False)[:, 0]
        marks = [hz for hz in (100, 500, 1000, 2000, 4000, 8000, 16_000) if centres_hz[0] <= hz <= centres_hz[-1]]
        for axis, (name, mel) in zip(axes, mels.items(), strict=True):
            picture = axis.imshow(
                np.asarray(mel).T,
                origin="lower",
                aspect="auto",
                cmap="magma",
                vmin=MEL_LOW,
                vmax=MEL_HIGH,
                interpolation="nearest",
                extent=(0.0, seconds, -0.5, np.shape(mel)[1] - 0.5),
            )
            axis.set_title(name)
            axis.set_yticks(np.interp(marks, centres_hz, np.arange(len(centres_hz))), [_hertz(hz) for hz in marks])
            axis.set_ylabel("Hz")
            axis.spines[:].set_visible(False)
        axes[-1].set_xlabel("seconds")
        bar = figure.colorbar(picture, ax=list(axes), label="ln magnitude", pad=0.015, aspect=11 * len(mels))
        bar.outline.set_visible(False)
        return figure

    return Picture(draw)


def spectrogram_grid(rows: Mapping[str, Sequence[NDArray[np.floating]]], columns: Sequence[str]) -> Picture:
    """Log-mel spectrograms `[F, M]` without axes: a row per name, a column per title. All share one colour scale."""

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(2.6 * len(columns) + 0.2, 1.15 * len(rows) + 0.4), layout="constrained")
        axes = figure.subplots(len(rows), len(columns), squeeze=False)
        for line, (name, mels) in zip(axes, rows.items(), strict=True):
            for axis, mel in zip(line, mels, strict=True):
                axis.imshow(np.asarray(mel).T, origin="lower", aspect="auto", cmap="magma", vmin=MEL_LOW, vmax=MEL_HIGH)
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
            line[0].set_ylabel(name)
        for axis, title in zip(axes[0], columns, strict=True):
            axis.set_title(textwrap.fill(textwrap.shorten(title, 76, placeholder=" …"), 40), fontweight="normal", fontsize=8.5)
        return figure

    return Picture(draw)


def _hertz(hz: int) -> str:
    return f"{hz // 1000}k" if hz >= 1000 else str(hz)


# ----------------------------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Curve:
    """One line: its name and its points."""

    name: str
    steps: NDArray[np.int64]
    values: NDArray[np.float64]


def curves(panels: Mapping[str, Sequence[Curve]], columns: int = 4) -> Picture:
    """Small multiples of curves over optimiser steps. Noisy curves show a smooth line over their own faint points."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(2.62 * columns, 1.95 * rows), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis, (title, lines) in zip(axes, panels.items(), strict=False):
            _draw_curves(axis, title, lines, theme)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        return figure

    return Picture(draw)


def _draw_curves(axis: Axes, title: str, lines: Sequence[Curve], theme: Theme) -> None:
    shown = []
    for line, colour in zip(lines, SERIES_COLOURS, strict=False):
        fine = np.isfinite(line.values)
        steps, values = line.steps[fine], line.values[fine]
        if len(values) > 24:
            axis.plot(steps, values, color=colour, linewidth=0.7, alpha=0.28)
            axis.plot(steps, _smooth(values), color=colour, linewidth=1.6, label=line.name)
        else:
            axis.plot(steps, values, color=colour, linewidth=1.6, marker="o", markersize=3.0, markeredgewidth=0, label=line.name)
        shown.append(values)
    every = np.concatenate(shown)
    if len(every) and every.min() > 0 and every.max() / every.min() > 30:
        axis.set_yscale("log")
    elif len(every):
        # The first steps of a run would flatten all the rest.
        low, high = float(every.min()), float(np.percentile(every, 98.0) if len(every) > 50 else every.max())
        margin = 0.07 * (high - low) or 0.5
        axis.set_ylim(low - margin, high + margin)
        axis.yaxis.set_major_locator(MaxNLocator(4))
    axis.set_title(title)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step / 1000:g}k" if step >= 10_000 else f"{step:g}"))
    axis.grid(axis="y", color=theme.faint, alpha=0.18, linewidth=0.6)
    if len(lines) > 1:
        axis.legend(loc="best", handlelength=1.2, borderaxespad=0.1)


def histograms(panels: Mapping[str, tuple[NDArray[np.floating], NDArray[np.integer]]], columns: int = 2) -> Picture:
    """Histograms side by side.

    Args:
        panels: by title, the bins' edges `[B + 1]` and how many values each bin holds `[B]`.
    """
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(3.4 * columns, 1.95 * rows), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis, (title, (edges, counts)) in zip(axes, panels.items(), strict=False):
            axis.bar(edges[:-1], counts, np.diff(edges), align="edge", color=SERIES_COLOURS[0])
            axis.set_title(title)
            axis.set_xlim(edges[0], edges[-1])
            axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axis.grid(axis="y", color=theme.faint, alpha=0.18, linewidth=0.6)
            axis.set_axisbelow(True)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        return figure

    return Picture(draw)


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian average over a thirtieth of the curve, unbiased at both ends."""
    width = max(1.0, len(values) / 30)
    reach = math.ceil(3 * width)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    weight = np.convolve(np.ones_like(values), kernel)[reach : reach + len(values)]
    total: NDArray[np.float64] = np.convolve(values, kernel)[reach : reach + len(values)]
    return total / weight


# ----------------------------------------------------------------------------------------------------------- scores


def confusion(names: Sequence[str], counts: NDArray[np.integer], title: str = "") -> Picture:
    """Counts `[C, C]` of asked-for (rows) against recognised (columns), coloured by their share of the row."""
    size = len(names)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(2.0 + 0.36 * size, 1.6 + 0.36 * size), layout="constrained")
        axis = figure.subplots()
        edges = np.arange(size + 1) - 0.5
        axis.hlines(edges, -0.5, size - 0.5, color=theme.faint, alpha=0.25, linewidth=0.6)
        axis.vlines(edges, -0.5, size - 0.5, color=theme.faint, alpha=0.25, linewidth=0.6)
        for row, column in np.argwhere(counts):
            strength = share[row, column]
            colour = SERIES_COLOURS[0 if row == column else 1]
            axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1.0, 1.0, facecolor=colour, alpha=0.15 + 0.8 * strength, linewidth=0))
            axis.text(
                column, row, str(counts[row, column]), ha="center", va="center", fontsize=8, color="white" if strength > 0.6 else theme.ink
            )
        axis.set_xlim(-0.5, size - 0.5)
        axis.set_ylim(size - 0.5, -0.5)
        axis.set_aspect("equal")
        axis.set_xticks(range(size), names, rotation=45, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(size), names)
        axis.set_xlabel("recognised")
        axis.set_ylabel("asked for")
        axis.set_title(title)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        return figure

    return Picture(draw)


def class_bars(names: Sequence[str], systems: Mapping[str, Sequence[float]], chance: float | None = None, title: str = "") -> Picture:
    """A share per class: the first system as bars, the others as marks on them, chance as a dashed line."""

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(5.2, 1.0 + 0.27 * len(names)), layout="constrained")
        axis = figure.subplots()
        rows = np.arange(len(names))
        (first, bars), *others = systems.items()
        axis.barh(rows, np.ones(len(names)), height=0.62, color=theme.faint, alpha=0.14, linewidth=0)
        measured = axis.barh(rows, bars, height=0.62, color=SERIES_COLOURS[0], linewidth=0, label=first)
        for (name, values), colour, marker in zip(others, SERIES_COLOURS[1:], "Dosv^P", strict=False):
            axis.plot(
                values, rows, marker, markersize=6, color=colour, label=name, clip_on=False, linestyle="none", markeredgecolor="white"
            )
        if chance is not None:
            axis.axvline(chance, color=theme.ink, linewidth=0.9, linestyle=(0, (3, 3)), label="chance")
        axis.set_yticks(rows, names)
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.set_xlim(0.0, 1.0)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda part, _: f"{part:.0%}"))
        axis.tick_params(length=0, pad=7)
        axis.spines[:].set_visible(False)
        if title:
            axis.set_title(title, pad=22)
        marks = [handle for handle in axis.get_legend_handles_labels()[0] if handle is not measured]
        axis.legend(
            handles=[measured, *marks],
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=6,
            handlelength=1.2,
            columnspacing=1.4,
            borderaxespad=0.3,
        )
        return figure

    return Picture(draw)
