"""Every figure taken from others is cited, every citation leads to an entry of docs/references.md, and every entry is cited.

Run alone: python -m pytest tests/test_references.py -q
"""

import re

from test_repo import REPO, text_of, tracked

PAGE = REPO / "docs" / "references.md"
# How notes outside the repository were cited
ELSEWHERE = r"\bfacts,? (?:\d|page\b|section)|\bregister \d|\bnotes, section|\breference notes"


def entries() -> dict[str, str]:
    """Anchor, as GitHub makes it from a heading of the third level, → text of the entry."""
    parts = re.split(r"^(#{2,3}) (.+)\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    third = [(title, text) for level, title, text in zip(*[iter(parts[1:])] * 3, strict=True) if level == "###"]
    found = [(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-"), text) for title, text in third]
    assert len(dict(found)) == len(found), "two entries have one anchor"
    return dict(found)


def cited(pattern: str) -> list[tuple[str, str]]:
    """(file, what the pattern's group caught) over all files but this one and the page, which says how to cite."""
    files = [path for path in tracked() if path not in (PAGE, REPO / "tests" / "test_references.py")]
    return [(str(path.relative_to(REPO)), match) for path in files for match in re.findall(pattern, text_of(path))]


def test_citations_lead_to_entries() -> None:
    known = entries()
    citations = cited(r"references\.md#([\w-]*)")
    assert len(citations) > 50
    assert [(file, anchor) for file, anchor in citations if anchor not in known] == []


def test_entries_are_cited() -> None:
    """What nothing cites any more leaves the page."""
    uncited = set(entries()) - {anchor for _, anchor in cited(r"references\.md#([\w-]*)")}
    assert sorted(uncited) == []


def test_entries_name_their_source() -> None:
    assert [anchor for anchor, text in entries().items() if not re.search(r"^From: \S", text, re.MULTILINE)] == []


def test_rows_cited_from_the_fidelity_page_exist() -> None:
    numbered = re.findall(r"^\| (\d+) \|", (REPO / "docs" / "fidelity.md").read_text(encoding="utf-8"), re.MULTILINE)
    rows = [(file, row) for file, listed in cited(r"fidelity\.md,? rows? ((?:\d+(?:, | and )?)+)") for row in re.findall(r"\d+", listed)]
    assert rows
    assert [(file, row) for file, row in rows if row not in numbered] == []


def test_nothing_cites_notes_outside_the_repository() -> None:
    old = cited(f"({ELSEWHERE})")
    assert old == []
