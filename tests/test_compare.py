"""`loa compare`: systems side by side, and the published numbers apart from them."""

import csv
import dataclasses
import io

import pytest
from click.testing import CliRunner
from test_records import record

from pipelines.compare import FORMATS, compare, main
from pipelines.evaluation.published import TABLES
from pipelines.evaluation.records import write_records
from stages.errors import UserError

KL = {"metric": "kl_passt", "judge": "passt-s", "direction": "KL(reference || generated)"}
CLAP = {"metric": "clap_score", "judge": "clap", "num_reference": None}


def systems():
    return [
        record("A", 2.0),
        record("A", 1.5, **KL),
        record("A", 0.25, **CLAP),
        record("A", 3.3, metric="fad_infinity"),
        record("B <b>", 1.5),
        record("B <b>", 1.75, **KL),
        record("silent", 0.5, silent=500),
        record("A: VAE", 1.0, metric="fad_infinity"),
    ]


def test_measures_of_the_papers_table_come_first_and_the_best_is_marked():
    measured, published = compare(systems(), "II")
    assert measured.columns == ("FAD ↓", "KL, PaSST ↓", "CLAP score ↑", "FAD∞ ↓")
    rows = dict(measured.rows)
    assert list(rows) == ["A", "B <b>", "silent", "A: VAE"]
    assert [cell.shown for cell in rows["A"]] == ["2.00", "1.50", "0.250", "3.30"]
    assert [cell.best for cell in rows["A"]] == [False, True, False, False] and rows["B <b>"][0].best
    assert not rows["silent"][0].best and any("silent: of 957 clips 500 silent; not ranked" in note for note in measured.notes)
    assert any("KL(reference || generated)" in note and "957 clips against 957" in note for note in measured.notes)
    assert published.title.startswith("Published, not measured here") and dict(published.rows)["AudioLDM 2-AC"][2].value == 1.67
    assert [cell.shown for cell in dict(published.rows)["AudioLDM 2-Full"]] == ["29510", "346M", "1.78", "1.60", "0.191", "3.83", "3.77"]


def test_mixed_protocols_are_refused():
    with pytest.raises(UserError, match="fad of A and of C were not measured alike: they differ in judge_sha256"):
        compare([*systems(), record("C", 1.0, judge_sha256="f" * 64)])


@pytest.mark.parametrize("form", FORMATS)
def test_published_numbers_stand_in_a_block_of_their_own(form):
    page = FORMATS[form](compare(systems(), "II"))
    title = "Published, not measured here"
    assert page.index("Measured") < page.index(title) < page.index("AudioLDM 2-AC-Large")
    assert page.index("silent") < page.index(title) and "B &lt;b&gt;" in page if form == "html" else "B <b>" in page
    alone = FORMATS[form](compare(systems(), None))
    assert title not in alone and "AudioLDM 2-AC" not in alone


def test_text_is_aligned_and_markdown_is_a_table():
    text = FORMATS["text"](compare(systems(), None)).splitlines()
    header, first, second = text[2:5]
    assert header.index("FAD ↓") + len("FAD ↓") == first.index("2.00") + 4 == second.index("1.50*") + 4
    markdown = FORMATS["markdown"](compare([record("a|b"), record("B", 1.0)], None))
    assert "| a\\|b | 2.00 |" in markdown and "| B | **1.00** |" in markdown


def test_csv_keeps_whole_numbers():
    rows = list(csv.DictReader(io.StringIO(FORMATS["csv"](compare([record("A", 1.23456789)], "IV")))))
    assert rows[0] == {"block": "Measured", "system": "A", "measure": "FAD ↓", "value": "1.23456789"}
    assert {row["block"] for row in rows[1:]} == {f"Published, not measured here. {TABLES['IV'].title}"}


def test_published_tables_are_whole_and_agree_with_the_papers_text():
    for table in TABLES.values():
        assert all(len(values) == len(table.columns) for values in table.rows.values())
        assert all(system in table.rows and column in table.columns for system, column in table.uncertain)
    music = TABLES["III"].rows
    before, after = music["MusicGen-Medium, reproduced"], music["AudioLDM 2-Full"]
    gains = [1 - after[0] / before[0], 1 - after[1] / before[1], after[2] / before[2] - 1]
    assert gains == pytest.approx([0.36, 0.11, 0.034], abs=0.005)  # the text of the paper says 36 %, 11 % and 3.4 %


def test_the_command_reads_folders_and_writes_files(tmp_path):
    for name in ("A", "B"):
        write_records(tmp_path / name / "records", [one for one in systems() if one.system.startswith(name)])
    result = CliRunner().invoke(main, [str(tmp_path / "A"), str(tmp_path / "B" / "records")])
    assert result.exit_code == 0 and "Table II" in result.output and "1.50*" in result.output
    result = CliRunner().invoke(main, [str(tmp_path / "A"), "--table", "none", "--format", "markdown", "-o", str(tmp_path / "page.md")])
    assert result.exit_code == 0 and "Published" not in (tmp_path / "page.md").read_text()
    other = dataclasses.replace(record("C", 1.0), protocol=record(num_generated=100).protocol)
    write_records(tmp_path / "C", [other])
    result = CliRunner().invoke(main, [str(tmp_path / "A"), str(tmp_path / "C")])
    assert result.exit_code == 1 and "num_generated (957 against 100)" in result.output and "Traceback" not in result.output
    result = CliRunner().invoke(main, [str(tmp_path)])
    assert result.exit_code == 1 and "loa evaluate" in result.output
