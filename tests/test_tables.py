"""Aligned tables of text."""

from pipelines.tables import aligned


def test_columns_are_aligned_by_their_widest_cell():
    rows = [["", "steps", "why"], ["vae", "10", "a longer remark"], ["diffusion", "1,000", ""]]
    assert aligned(rows, remarks=1).splitlines() == ["           steps  why", "vae           10  a longer remark", "diffusion  1,000"]
    assert aligned(rows, left=2, indent="> ").splitlines()[1] == "> vae        10     a longer remark"
    assert aligned([["a", "b"]]) == "a  b" and aligned([]) == ""
