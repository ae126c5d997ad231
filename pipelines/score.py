"""JOB: score a folder of clips, whatever made them, beside a folder of real clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from friendly import friendly
from options import PlaceType, pairs, shown, work_option
from pipelines.evaluation.options import PanelOptions, panel_options
from stages.files import Place


def read_made(values: dict[str, str]) -> dict[str, Any]:
    """NAME=VALUE of the command line with numbers as numbers."""
    made = {}
    for name, text in values.items():
        try:
            made[name] = json.loads(text)
        except json.JSONDecodeError:
            made[name] = text
    return made


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--reference",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the real clips. Clips of both folders belong together by their names without suffix.",
)
@click.option(
    "--captions",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Caption list of the clips: JSON, or CSV with clip_id, caption (transcript, label).  [default: none]",
)
@panel_options
@click.option(
    "--hypotheses",
    multiple=True,
    callback=pairs,
    metavar="READER=CSV",
    help="What another recogniser has read in the clips: CSV with clip_id, text, for WER and CER.  [default: none]",
)
@click.option("--name", help="What the system is called in records and tables.  [default: the folder's name]")
@click.option("--candidates", type=click.IntRange(min=1), help="Of how many candidates each clip was chosen.  [default: unknown]")
@click.option("--ranker", help="What chose among the candidates.  [default: unknown]")
@click.option(
    "--made",
    multiple=True,
    callback=pairs,
    metavar="NAME=VALUE",
    help="How the clips were made, such as guidance_scale=3.5, for the record. May be repeated.  [default: unknown]",
)
@work_option
@click.option(
    "-o", "--output", type=PlaceType(), metavar="DIR", help="Where the scores go, a folder or URL.  [default: scores/NAME in --work]"
)
@friendly
def main(
    folder: Path,
    reference: Path,
    captions: Path | None,
    panel: PanelOptions,
    hypotheses: dict[str, str],
    name: str | None,
    made: dict[str, str],
    work: Place,
    output: Place | None,
    **chosen_from: Any,
) -> None:
    """Score FOLDER, a folder of clips from any system, beside the real clips of --reference.

    The judges are those that the options name; without any, the CLAP and the classifier that training has left in --work.
    """
    # Here, not above: what takes seconds to import is imported when there is work to do.
    from pipelines.evaluation.clips import folder_set, read_captions
    from pipelines.evaluation.panel import named_panel
    from pipelines.evaluation.run import score_folders

    listed = read_captions(captions) if captions is not None else []
    judged = named_panel(panel, work, {reader: Path(path) for reader, path in hypotheses.items()})
    name = name or folder.resolve().name
    seconds = None if panel.listening == "audioldm_eval" else panel.seconds or 10.0
    generated = folder_set(name, "system", folder, listed, made=read_made(made), seconds=seconds, **chosen_from)
    real = folder_set("real clips", "reference", reference)
    output = output or work / "scores" / name
    evaluation = score_folders(generated, real, judged, output, cache=(work / "scores" / "cache").scratch())
    click.echo(evaluation.table())
    click.echo(f"scores and records: {shown(output)}; next: loa compare {shown(output)} OTHER …")


if __name__ == "__main__":
    main()
