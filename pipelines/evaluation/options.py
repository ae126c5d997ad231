"""The options of `loa evaluate` and `loa score` that name judges. Light: commands import it for their --help."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from stages.judges import NAMES

Function = TypeVar("Function", bound=Callable[..., Any])

LISTENING = ("loa", "audioldm_eval")


@dataclass(frozen=True)
class PanelOptions:
    """What the command line says of judges.

    Attributes:
        folder: public weights of judges, with their manifest.
        names: which of them; all but Google's windowing of VGGish if empty.
        listening: how recordings reach them: loa's way, or audioldm_eval's.
        seconds: what they take of a clip.
        clap: a CLAP to score with; the bundle's own if None.
        asr: a Whisper.
    """

    folder: Path | None = None
    names: tuple[str, ...] = ()
    listening: str = "loa"
    seconds: float | None = None
    clap: Path | None = None
    asr: Path | None = None
    batch: int = 8


def panel_options(function: Function) -> Function:
    """Options for judges and readers; what was given arrives as one argument, `panel`, a `PanelOptions`."""
    folder = click.Path(exists=True, file_okay=False, path_type=Path)

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(f"panel_{name}") for name in ("folder", "names", "listening", "seconds", "clap", "asr", "batch")}
        return function(*args, panel=PanelOptions(**given), **kwargs)

    for option in reversed(
        (
            click.option(
                "--judges",
                "panel_folder",
                type=folder,
                envvar="LOA_JUDGES",
                help="Folder of public judges' weights (`loa judges`): VGGish, CNN14, PaSST.  [default: none]",
            ),
            click.option(
                "--judge",
                "panel_names",
                multiple=True,
                type=click.Choice(NAMES),
                help="One of --judges; may be repeated.  [default: all in the folder]",
            ),
            click.option(
                "--listening",
                "panel_listening",
                type=click.Choice(LISTENING),
                default="loa",
                show_default=True,
                help="How recordings reach --judges: loa's contract, or audioldm_eval's.",
            ),
            click.option(
                "--seconds",
                "panel_seconds",
                type=click.FloatRange(min=0.32),
                help="What --judges take of a clip.  [default: 10, or the system's clip length if shorter]",
            ),
            click.option(
                "--clap", "panel_clap", type=folder, help="A CLAP to score with that did not train the system.  [default: the bundle's]"
            ),
            click.option("--asr", "panel_asr", type=folder, help="A Whisper that reads the clips, for WER and CER.  [default: none]"),
            click.option("--batch", "panel_batch", type=click.IntRange(min=1), default=8, show_default=True, help="Clips at a time."),
        )
    ):
        command = option(command)
    return command  # type: ignore[return-value]
