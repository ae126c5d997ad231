"""JOB: what public weights of the judges a folder holds: writes its manifest, checks every file, says what is missing."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from friendly import friendly
from options import shown


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@friendly
def main(folder: Path) -> None:
    """Write FOLDER/judges.json, the manifest of the judges' public weights in FOLDER, and load each once as a check.

    Nothing is downloaded; for missing weights the source is printed.
    """
    from stages.judges.catalogue import JUDGES, load_judge
    from stages.judges.weights import PUBLISHED, describe_folder

    entries = describe_folder(folder)
    for name, published in PUBLISHED.items():
        if name not in entries:
            click.echo(f"{name:<12} missing: put {published.file} ({published.licence}) from {published.source} here")
            continue
        judges = [judge for judge, design in JUDGES.items() if design.weights == name]
        load_judge(judges[0], folder)
        click.echo(
            f"{name:<12} {entries[name]['file']}, sha256 {entries[name]['sha256'][:12]}…, {entries[name]['licence']}: {', '.join(judges)}"
        )
    if entries:
        click.echo(f"next: loa evaluate --judges {shlex.quote(shown(folder))}")


if __name__ == "__main__":
    main()
