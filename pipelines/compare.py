"""JOB: scores of several systems side by side, and what papers print as a block of its own.

Every value of a column was measured by one protocol; records that mix protocols are refused (`pipelines.evaluation.records`).
"""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from friendly import friendly
from options import PlaceType, next_step, shown
from pipelines.evaluation.published import TABLES, PublishedTable
from pipelines.evaluation.records import MEASURES, SILENT_LIMIT, Comparison, Protocol, Record, read_records, side_by_side
from pipelines.tables import aligned

if TYPE_CHECKING:
    from stages.files import Place


class Cell(NamedTuple):
    """What a table shows, and the value behind it."""

    shown: str
    value: float | str | None = None
    best: bool = False


@dataclass(frozen=True)
class Block:
    """One table: systems down, measures across, and sentences below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]  # (system, cells)
    notes: tuple[str, ...]


def compare(records: Sequence[Record], table: str | None = "II") -> list[Block]:
    """The systems of `records` side by side, and the published table beside them.

    Args:
        table: a name of `TABLES`; its measures come first. None leaves published numbers out.

    Raises:
        UserError: the records mix protocols.
    """
    published = TABLES[table] if table is not None else None
    blocks = [_measured(side_by_side(records), published.metrics if published else ())]
    return [*blocks, _published(published)] if published else blocks


def _measured(comparison: Comparison, first: Sequence[str]) -> Block:
    metrics = sorted(comparison.metrics, key=lambda name: (name not in first, first.index(name) if name in first else 0))
    best = {metric: comparison.best(metric) for metric in metrics}
    rows = []
    for system in comparison.systems:
        cells = []
        for metric in metrics:
            record = comparison.records.get((system, metric))
            cells.append(
                Cell(MEASURES[metric].form.format(record.value), record.value, system in best[metric]) if record is not None else Cell("–")
            )
        rows.append((system, tuple(cells)))
    notes = [f"{MEASURES[metric].title}: {_protocol(_of(comparison, metric))}" for metric in metrics]
    for system in comparison.systems:
        of_system = [record for (name, _), record in comparison.records.items() if name == system]
        check = max((dict(record.check) for record in of_system), key=lambda counts: len(counts))
        flaws = [f"{count} {kind}" for kind, count in check.items() if kind != "clips" and count]
        if flaws:
            refused = f"; not ranked, for more than {SILENT_LIMIT:.0%} are silent" if system in comparison.unranked else ""
            notes.append(f"{system}: of {check['clips']} clips {', '.join(flaws)}{refused}")
    return Block("Measured", tuple(MEASURES[metric].heading for metric in metrics), tuple(rows), tuple(notes))


def _of(comparison: Comparison, metric: str) -> Protocol:
    return next(record.protocol for (_, name), record in comparison.records.items() if name == metric)


def _protocol(protocol: Protocol) -> str:
    """What a reader must know of a column, in one line; records hold all of it."""
    parts = [protocol.implementation]
    if protocol.judge is not None:
        parts.append(f"judged by {protocol.judge}" + (f" {protocol.judge_sha256[:12]}" if protocol.judge_sha256 else ""))
    parts.append(protocol.clip_rule)
    against = f" against {protocol.num_reference}" if protocol.num_reference is not None else ""
    parts.append(f"{protocol.num_generated} clips{against}")
    parts += [protocol.direction] if protocol.direction else []
    parts.append(f"captions {protocol.captions_sha256[:12]}" if protocol.captions_sha256 else "no caption list")
    candidates = "an unknown number" if protocol.candidates is None else str(protocol.candidates)
    parts.append(f"each clip the best of {candidates}" if protocol.candidates != 1 else "one candidate per caption")
    return ", ".join(parts)


def _published(table: PublishedTable) -> Block:
    numbers = {c: [v[i] for v in table.rows.values() if isinstance(v[i], float)] for i, c in enumerate(table.columns)}
    decimals = {c: max((len(str(value).partition(".")[2]) for value in values), default=0) for c, values in numbers.items()}

    def cell(system: str, column: str, value: float | str | None) -> Cell:
        shown = f"{value:.{decimals[column]}f}" if isinstance(value, float) else "–" if value is None else str(value)
        return Cell(shown + (" (?)" if (system, column) in table.uncertain else ""), value)

    rows = tuple(
        (system, tuple(cell(system, column, value) for column, value in zip(table.columns, values, strict=True)))
        for system, values in table.rows.items()
    )
    doubt = ("(?) marks a likely reading of a damaged digit",) if table.uncertain else ()
    caution = (
        "published, not measured here: other captions, weights and settings; the same system differs by more than 1 FAD between papers"
    )
    return Block(f"Published, not measured here. {table.title}", table.columns, rows, (caution, *table.notes, *doubt))


# ------------------------------------------------------------------------------------------------------- renderings


def as_text(blocks: Sequence[Block]) -> str:
    """Plain text; a star marks the best of a column."""
    return "\n".join(_text_table(block) for block in blocks)


def _text_table(block: Block) -> str:
    head = ("", *(f"{column} " for column in block.columns))  # a blank where values have their star
    rows = [head, *((system, *(cell.shown + ("*" if cell.best else " ") for cell in cells)) for system, cells in block.rows)]
    return "\n".join([block.title, "", aligned(rows), "", *(f"- {note}" for note in block.notes)]) + "\n"


def as_markdown(blocks: Sequence[Block]) -> str:
    """GitHub's tables; the best of a column in bold."""
    pages = []
    for block in blocks:
        rows = [["", *block.columns], ["---", *("---:" for _ in block.columns)]]
        rows += [[system, *(f"**{cell.shown}**" if cell.best else cell.shown for cell in cells)] for system, cells in block.rows]
        table = "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows)
        pages.append(f"### {block.title}\n\n{table}\n\n" + "\n".join(f"- {note}" for note in block.notes) + "\n")
    return "\n".join(pages)


def as_csv(blocks: Sequence[Block]) -> str:
    """One line per value: block, system, measure, value."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["block", "system", "measure", "value"])
    for block in blocks:
        for system, cells in block.rows:
            named = zip(block.columns, cells, strict=True)
            writer.writerows([block.title, system, column, cell.value] for column, cell in named if cell.value is not None)
    return file.getvalue()


def as_html(blocks: Sequence[Block]) -> str:
    """One page without anything from outside."""
    parts = []
    for block in blocks:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in block.columns)
        body = "".join(
            f"<tr><th>{html.escape(system)}</th>"
            + "".join(f"<td{' class=best' if cell.best else ''}>{html.escape(cell.shown)}</td>" for cell in cells)
            + "</tr>"
            for system, cells in block.rows
        )
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in block.notes)
        parts.append(f"<h2>{html.escape(block.title)}</h2><table><tr><td></td>{head}</tr>{body}</table><ul>{notes}</ul>")
    style = "body{font:16px/1.5 system-ui;margin:2em auto;max-width:70em;padding:0 1em}table{border-collapse:collapse}"
    style += "th,td{padding:.2em .8em;text-align:right;border-bottom:1px solid #8884}th:first-child{text-align:left}.best{font-weight:700}"
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>Scores side by side</title><style>{style}</style>"
    return page + "".join(parts) + "</html>\n"


FORMATS: dict[str, Callable[[Sequence[Block]], str]] = {"text": as_text, "markdown": as_markdown, "csv": as_csv, "html": as_html}


@click.command()
@click.argument("sources", nargs=-1, required=True, type=PlaceType(exists=True, file_okay=True), metavar="RECORD_OR_FOLDER...")
@click.option(
    "--table",
    type=click.Choice([*TABLES, "none"], case_sensitive=False),
    default="II",
    show_default=True,
    help="Published table to stand beside: AudioCaps, MusicCaps, LJSpeech, ablation.",
)
@click.option("--format", "form", type=click.Choice(list(FORMATS)), default="text", show_default=True)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write to a file.  [default: the screen]")
@friendly
def main(sources: tuple[Place, ...], table: str, form: str, output: Path | None) -> None:
    """Put systems side by side that `loa evaluate` has scored.

    A source is a record, a folder of records, or a project folder. Scores that were not measured alike are refused, with the
    fields in which their protocols differ. Published numbers stand apart: they were not measured here.
    """
    records = [record for source in sources for record in read_records(source)]
    page = FORMATS[form](compare(records, None if table == "none" else table))
    if output is None:
        click.echo(page, nl=False)
    else:
        output.write_text(page, encoding="utf-8")
        click.echo(f"{len({record.system for record in records})} systems side by side: {shown(output)}")
    click.echo(next_step("compare"), err=True)  # the tables alone are the output


if __name__ == "__main__":
    main()
