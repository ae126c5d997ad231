"""Licences travel from the clip table into every stage's card and the bundle's, and export says what they forbid."""

from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from test_bundle import release_all
from tiny_bundle import write_stages
from tiny_store import make_store, run_here, small

from pipelines.export import export
from pipelines.export import main as export_command
from pipelines.features.store import CLIP_SCHEMA, REJECTED_SCHEMA, FeatureStore
from pipelines.train import train_stage
from stages.base import read_card
from stages.bundle import read_info
from stages.files import write_json
from stages.licences import NO_DERIVATIVES, NON_COMMERCIAL, SHARE_ALIKE, UNKNOWN, terms, union, warnings
from stages.variants import resolve


@pytest.mark.parametrize(
    ("licence", "kinds"),
    [
        ("CC0", set()),
        ("http://creativecommons.org/licenses/by/3.0/", set()),
        ("Attribution", set()),
        ("LJSpeech, public domain", set()),
        ("MIT", set()),
        ("CC BY-NC 4.0", {NON_COMMERCIAL}),
        ("Attribution NonCommercial", {NON_COMMERCIAL}),
        ("https://creativecommons.org/licenses/by-nc-nd/3.0", {NON_COMMERCIAL, NO_DERIVATIVES}),
        ("CC BY-NC-SA 4.0", {NON_COMMERCIAL, SHARE_ALIKE}),
        ("CC BY-SA 4.0", {SHARE_ALIKE}),
        ("WavCaps, academic use", {NON_COMMERCIAL}),
        ("GigaSpeech, non-commercial research", {NON_COMMERCIAL}),
        ("", {UNKNOWN}),
        ("labels CC BY 4.0", {UNKNOWN}),  # AudioSet: of the words alone
        ("captions MIT", {UNKNOWN}),
        ("captions CC BY-SA 4.0", {SHARE_ALIKE, UNKNOWN}),
        ("FMA, licence of the track not stated", {UNKNOWN}),
        ("all rights reserved", {UNKNOWN}),
    ],
)
def test_terms_are_read_from_the_words_of_licences(licence: str, kinds: set[str]) -> None:
    assert terms(licence) == kinds


def test_a_clip_that_several_stages_learnt_from_counts_once() -> None:
    assert union({"CC0": 5, "MIT": 2}, {"CC0": 7}) == {"CC0": 7, "MIT": 2}


def test_every_kind_of_terms_has_one_sentence_with_its_counts() -> None:
    sentences = warnings({"CC BY-NC-ND 3.0": 4, "CC BY-NC 4.0": 1200, "CC BY-SA 4.0": 7, "": 3, "CC0": 1000}, ["clap"])
    assert [sentence.split()[0] for sentence in sentences] == ["1,204", "4", "7", "3", "the"]
    assert "CC BY-NC 4.0 (1,200), CC BY-NC-ND 3.0 (4)" in sentences[0] and "(none) (3)" in sentences[3]
    assert warnings({"CC0": 10, "CC BY 4.0": 3}) == []


def mixed_store(root: Path, licences: list[str]) -> FeatureStore:
    """The clips of a tiny store, with these licences in turn."""
    variant = small(steps=2)
    rows = make_store(root / "plain", variant, clips=12, shard_size=4).clips().sort_values("clip_id").to_dict("records")
    for i, row in enumerate(rows):
        row["licence"] = licences[i % len(licences)]
        row["split"] = "train" if i < 9 else "validation"
    table = pa.Table.from_pylist([{name: row[name] for name in CLIP_SCHEMA.names} for row in rows], CLIP_SCHEMA)
    store = FeatureStore.create(str(root / "store"), variant.audio, table, pa.Table.from_pylist([], REJECTED_SCHEMA), shard_size=4)
    run_here("mel", store, variant)
    return store


def test_licences_travel_into_the_card_of_a_stage(tmp_path: Path) -> None:
    variant = small(steps=2)
    mixed_store(tmp_path, ["CC0", "CC BY-NC 4.0", ""])
    train_stage("vae", variant, tmp_path, workers=0)
    assert read_card(tmp_path / "stages" / "vae", "vae")["licences"] == {
        "clips": {"": 3, "CC BY-NC 4.0": 3, "CC0": 3},  # of the nine training clips
        "inputs": {},
        "unstated": [],
    }


def test_the_bundle_has_the_union_and_export_warns(tmp_path: Path) -> None:
    release_all(tmp_path, resolve("audioldm2-ac", tiny=True))
    said = {
        "vae": {"clips": {"CC0": 9, "CC BY-ND 4.0": 2}, "inputs": {}, "unstated": []},
        "vocoder": {"clips": {"CC0": 9}, "inputs": {}, "unstated": []},
        "diffusion": {"clips": {"CC0": 8}, "inputs": {"CC BY-NC 4.0": 3}, "unstated": []},
        "translator": {"clips": {"CC0": 8}, "inputs": {}, "unstated": ["clap"]},
    }
    for stage, licences in said.items():
        card = read_card(tmp_path / "stages" / stage, stage)
        write_json(tmp_path / "stages" / stage / "stage.json", card | {"licences": licences})
    out = export(tmp_path)
    assert read_info(out).licences == {"clips": {"CC BY-NC 4.0": 3, "CC BY-ND 4.0": 2, "CC0": 9}, "unstated": ["clap"]}

    done = CliRunner().invoke(export_command, ["--work", str(tmp_path), "--tracking-uri", f"sqlite:///{tmp_path}/m.db"])
    assert done.exit_code == 0, done.output
    assert "3 training clips are for non-commercial" in done.output and "2 training clips are without derivatives" in done.output
    assert "the weights of clap do not say what they were trained on" in done.output


def test_weights_from_a_bundle_bring_its_licences(tmp_path: Path) -> None:
    """A stage given as a folder of a bundle says what the bundle says; public weights without a card say nothing."""
    release_all(tmp_path, resolve("audioldm2-ac", tiny=True))
    for stage in ("clap", "vae", "vocoder", "translator", "diffusion"):
        card = read_card(tmp_path / "stages" / stage, stage)
        write_json(tmp_path / "stages" / stage / "stage.json", card | {"licences": {"clips": {"CC0": 1}, "inputs": {}, "unstated": []}})
    other = write_stages(tmp_path / "other", seed=9)
    mixed = export(tmp_path, given={"vocoder": str(other["vocoder"])}, out=tmp_path / "mixed")
    assert read_info(mixed).licences == {"clips": {"CC0": 1}, "unstated": ["vocoder"]}
    again = export(tmp_path, given={"vae": str(mixed)}, out=tmp_path / "again")
    assert read_info(again).licences == {"clips": {"CC0": 1}, "unstated": ["vocoder"]}
