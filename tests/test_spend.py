"""What hours of sound take: the arithmetic, rates that are measured, and what a pass would do."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, cast

import pytest
import torch
from click.testing import CliRunner
from tiny_store import make_store, small

from pipelines.features.outcomes import Kept
from pipelines.features.passes import Pass, Row
from pipelines.features.rates import FILE, Rate, _timed, keep_rates, machine, made_rows, rates_here, read_rates
from pipelines.features.spend import PAPER_HOURS, clip_count, hours_of, loa_bytes, pooling_shares, series_bytes, size_text, stored
from pipelines.plan import describe
from pipelines.plan import main as plan
from pipelines.preprocess import main as preprocess
from stages.errors import UserError
from stages.variants import resolve

REPO = Path(__file__).resolve().parent.parent
FULL = resolve("audioldm2-full")


def test_the_papers_hours_in_clips() -> None:
    assert clip_count(PAPER_HOURS, 10.24) == 10_374_610
    assert hours_of(3_600_000, 100.0, nodes=10) == pytest.approx(1.0)


def test_every_pooling_is_a_third_more_storage_for_a_third_of_the_reading() -> None:
    storage, reading = pooling_shares(FULL, (1, 2, 4, 8))
    assert [FULL.loa_tokens(p) for p in (1, 2, 4, 8)] == [512, 128, 32, 8]
    assert storage == pytest.approx(680 / 512) and reading == pytest.approx(170 / 512)
    assert storage == pytest.approx(4 / 3, abs=0.01) and reading == pytest.approx(1 / 3, abs=0.01)
    assert FULL.diffusion.poolings == (1, 2, 4, 8)  # drawn equally often
    assert loa_bytes(FULL, 1) == 786_432


def test_a_shard_takes_the_bytes_that_arithmetic_says(tmp_path: Path) -> None:
    """All series of fixed shapes: a tar ends with two empty blocks and is padded to 20 blocks."""
    store = make_store(tmp_path, small(), clips=4, shard_size=4)
    row = store.ledger("mel")[0]
    assert row.num_bytes - 4 * series_bytes(small(), (1,))["mel"] in range(0, 10_240 + 1)
    assert stored(1) == 512 + 512 and stored(384) == 1024 and stored(385) == 1536
    assert size_text(999) == "999 B" and size_text(8.2e12) == "8.2 TB"


def test_the_page_on_scale_does_its_sums() -> None:
    """Every size on docs/scale.md, from the shapes of the variant."""
    page = (REPO / "docs" / "scale.md").read_text(encoding="utf-8")
    clips, sizes = clip_count(PAPER_HOURS, 10.24), series_bytes(FULL, (1, 2, 4, 8))
    assert f"**{clips:,}** clips" in page
    for name, size in sizes.items():
        assert re.search(rf"`{name}`[^|]*\| {size / 1e3:,.1f} kB \| {clips * size / 1e12:,.1f} TB", page), name
    assert f"| together | {sum(sizes.values()) / 1e3:,.1f} kB | {clips * sum(sizes.values()) / 1e12:,.1f} TB |" in page
    mean = sum(sizes[f"loa-{p}"] for p in (1, 2, 4, 8)) / 4
    all_read, one_read = sizes["latent"] + sizes["loa-1"], sizes["latent"] + mean
    assert f"{one_read / 1e3:.0f} kB instead of {all_read / 1e3:.0f} kB: {one_read / all_read:.2f} of" in page
    recipe = FULL.recipes.diffusion
    assert (recipe.steps, recipe.global_batch) == (800_000, 128)
    total = recipe.steps * recipe.global_batch / 1e12
    assert f"{total * one_read:.0f} TB instead of {total * all_read:.0f} TB" in page
    assert f"{128 * one_read / 1e6:.0f} MB/s instead of {128 * all_read / 1e6:.0f} MB/s" in page


def a_rate(name: str = "mel", **values: object) -> Rate:
    facts: dict = {"machine": machine(), "variant": "audioldm2-full", "name": name, "clips_per_second": 50.0, "clip_seconds": 10.24}
    facts |= {"device": "2 processes", "clips": "made", "weights": "none", "seconds": 1.0, "date": "2026-11-27"}
    return Rate(**facts | values)


def test_rates_are_kept_by_machine_variant_and_pass(tmp_path: Path) -> None:
    keep_rates(tmp_path, [a_rate(), a_rate("loa"), a_rate(machine="another", clips_per_second=9.0)])
    keep_rates(tmp_path, [a_rate(clips_per_second=60.0)])
    assert len(read_rates(tmp_path)) == 3
    assert rates_here(tmp_path, "audioldm2-full") == {"loa": 50.0, "mel": 60.0}
    (tmp_path / FILE).write_text("[{}]")
    with pytest.raises(UserError, match="damaged.*loa plan --measure"):
        read_rates(tmp_path)


def test_hours_come_from_measured_rates_alone() -> None:
    poolings = (1, 2, 4, 8)
    nothing = describe(FULL, PAPER_HOURS, 10_374_610, 4, poolings, [])
    assert "never measured on this machine" in nothing and "clips/s" not in nothing
    said = describe(FULL, PAPER_HOURS, 10_374_610, 4, poolings, [a_rate(), a_rate("loa", machine="a GPU machine")])
    assert "57.6 h" in said and "14.4 h" in said  # 10,374,610 / 50 / 3600, and a quarter
    assert "loa" in said.partition("never measured")[2]  # by this machine


def test_no_text_is_measured_twice(tmp_path: Path) -> None:
    """The text pass encodes equal ones once: with three captions for all clips it seemed thirty times as fast as it is."""

    class Listening:
        name, encoder, reads, batch, device = "text", True, (), 256, torch.device("cpu")
        batches: ClassVar[list[list[str]]] = []

        def load(self, device: torch.device) -> None: ...

        def encode(self, rows: Sequence[Row], clips: Sequence[object]) -> list[Kept]:
            self.batches.append([caption for row in rows for caption in row["captions"]])
            return [Kept({}) for _ in rows]

    audio = resolve("audioldm2-full", tiny=True).audio
    _timed(cast(Pass, Listening()), made_rows(tmp_path, audio), 0.01, torch.device("cpu"))
    measured = Listening.batches[-1]
    assert len(measured) > 32 and len(set(measured)) == len(measured)


def test_plan_measures_and_plans(tmp_path: Path) -> None:
    """The tiny system: all passes on made clips with random weights, then the hours they promise."""
    done = CliRunner().invoke(plan, ["--work", str(tmp_path), "--tiny", "--measure", "--seconds", "0.05", "--hours", "10", "--nodes", "2"])
    assert done.exit_code == 0, done.output
    rates = {entry["name"]: entry for entry in json.loads((tmp_path / FILE).read_text())}
    assert sorted(rates) == ["latent", "loa", "mel", "text"]
    assert all(entry["clips_per_second"] > 0 and entry["machine"] == machine() for entry in rates.values())
    assert rates["mel"]["weights"] == "none" and rates["loa"]["weights"] == "random"
    assert "on 2 nodes" in done.output and "never measured" not in done.output
    assert "--hours, --data and --store" in CliRunner().invoke(plan, ["--hours", "1", "--store", "x"]).output


def test_a_dry_run_of_a_pass_reads_and_says(tmp_path: Path) -> None:
    store = make_store(tmp_path, small(), clips=6, shard_size=3)
    before = {path: path.stat().st_mtime_ns for path in Path(store.root).rglob("*")}
    options = ["--work", str(tmp_path), "--tiny", "--dry-run"]
    done = CliRunner().invoke(preprocess, ["mel", *options])
    assert done.exit_code == 0 and "mel: 0 of 2 shards, 0 clips" in done.output, done.output

    done = CliRunner().invoke(preprocess, ["loa", *options, "--pooling", "1,8"])
    assert done.exit_code == 0, done.output
    assert "loa-1: 2 of 2 shards, 6 clips" in done.output and "loa-8: 2 of 2 shards" in done.output
    assert "by its shape" in done.output and "loa plan --measure" in done.output
    keep_rates(tmp_path, [a_rate("loa", variant=resolve("audioldm2-full", tiny=True).name, clips_per_second=0.001)])
    done = CliRunner().invoke(preprocess, ["loa", *options, "--pooling", "1,8"])
    assert "expected: 1.67 h on this machine" in done.output  # 6 clips / 0.001 / 3600
    assert {path: path.stat().st_mtime_ns for path in Path(store.root).rglob("*")} == before
