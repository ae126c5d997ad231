"""JOB: one page about one project folder: what it sounds like, how good it is, how it was trained, and how to go on.

`report.html` needs nothing but itself: sounds (FLAC), spectrograms, charts, style and script are inside. It shows what
there is; a folder without evaluation or without runs gives a shorter page that says what is missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from friendly import friendly
from options import PlaceType, next_step, shown, tracking_option, work_option

if TYPE_CHECKING:
    from stages.files import Place

NUM_CLIPS = 12  # captions to hear; fewer where the page would grow beyond what mails and browsers take


def write_report(
    work: str | Path | Place,
    *,
    tracking_uri: str | None = None,
    output: str | Path | Place | None = None,
    num_clips: int = NUM_CLIPS,
    picture: Path | None = None,
) -> Place:
    """Write the report of a project folder.

    Args:
        tracking_uri: where its runs are; by default as for `loa train`.
        output: `<work>/report.html` by default.
        num_clips: captions to hear at most.
        picture: also write spectrograms of a few clips there, as a PNG.

    Returns:
        Where the report lies. It replaces an earlier one only when it is whole.

    Raises:
        UserError: there is no such folder, or a picture is asked of one without an evaluation.
    """
    from pipelines.page.picture import write_picture
    from pipelines.page.project import Project
    from pipelines.page.render import render
    from stages.files import Place

    project = Project.read(work, tracking_uri)
    output = Place.of(output or project.work / "report.html")
    output.write(render(project, num_clips).encode())
    if picture is not None:
        write_picture(project, picture)
    return output


@click.command()
@work_option
@click.option(
    "-o",
    "--output",
    type=PlaceType(file_okay=True),
    metavar="FILE",
    help="Where to write.  [default: report.html in --work]",
)
@click.option("--num-clips", type=click.IntRange(0), default=NUM_CLIPS, show_default=True, help="Captions to hear, at most.")
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="PNG",
    help="Also draw three kinds of sound, real, restored and generated, as one small picture.  [default: none]",
)
@tracking_option
@friendly
def main(work: Place, output: Place | None, num_clips: int, picture: Path | None, tracking_uri: str | None) -> None:
    """Write report.html: a project's scores, sounds, curves and costs on one page that needs no network."""
    path = write_report(work, tracking_uri=tracking_uri, output=output, num_clips=num_clips, picture=picture)
    if picture is not None:
        click.echo(f"drawn: {shown(picture)}")
    click.echo(f"written: {shown(path)}; open it in a browser")
    click.echo(next_step("report"))


if __name__ == "__main__":
    main()
