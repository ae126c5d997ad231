"""Records of scores, what may stand side by side, frozen caption lists, and clips that no score should be taken from."""

import dataclasses
import json

import numpy as np
import pytest
import soundfile

from pipelines.evaluation.clips import AudioFile, Clip, ClipSet, captions_hash, check_sounds, read_captions, write_captions
from pipelines.evaluation.records import MEASURES, Protocol, Record, read_records, side_by_side, write_records
from stages.errors import UserError

FAD = Protocol(
    metric="fad",
    implementation="Fréchet distance",
    judge="vggish",
    judge_sha256="a" * 64,
    sample_rate=16_000,
    resampler="soxr-vhq",
    channels="mean",
    level="as recorded",
    clip_rule="cut or padded to 10 s",
    num_generated=957,
    rows_generated=9570,
    num_reference=957,
    rows_reference=9570,
    pairing="none",
    direction=None,
    ddof=1,
    dtype="float64",
    seed=None,
    captions_sha256="c" * 64,
    references_sha256="d" * 64,
    candidates=1,
    ranker=None,
)


def record(system="A", value=2.0, silent=0, made=None, **changes):
    check = {"clips": 957, "silent": silent, "clipped": 0, "short": 0}
    return Record(system, value, dataclasses.replace(FAD, **changes), made or {"guidance_scale": 3.5}, check, "r1")


def test_records_are_kept_one_per_score_and_read_back(tmp_path):
    records = [record(), record(metric="kl_passt", direction="KL(reference || generated)", value=1.25), record("B: VAE")]
    write_records(tmp_path / "evaluation" / "records", records)
    assert len(list((tmp_path / "evaluation" / "records").glob("*.json"))) == 3
    for place in (tmp_path, tmp_path / "evaluation", tmp_path / "evaluation" / "records"):
        assert sorted(read_records(place), key=str) == sorted(records, key=str)
    write_records(tmp_path / "evaluation" / "records", records[:1])
    assert read_records(tmp_path) == records[:1]
    (path,) = (tmp_path / "evaluation" / "records").glob("*.json")
    assert read_records(path) == records[:1]


def test_a_record_holds_what_a_score_depends_on(tmp_path):
    write_records(tmp_path, [record()])
    (path,) = tmp_path.glob("*.json")
    written = json.loads(path.read_text())
    assert written["format"] == 1 and written["made"] == {"guidance_scale": 3.5}
    assert written["protocol"] == dataclasses.asdict(FAD)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 1, "protocol": {"metric": "fad"}}'])
def test_what_is_no_record_is_refused(tmp_path, text):
    (tmp_path / "fad.x.json").write_text(text)
    with pytest.raises(UserError, match=r"fad\.x\.json is no record|format None"):
        read_records(tmp_path)


def test_records_of_another_format_or_metric_are_refused(tmp_path):
    write_records(tmp_path, [record()])
    (path,) = tmp_path.glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 9}))
    with pytest.raises(UserError, match="format 9.*reads 1"):
        read_records(path)
    with pytest.raises(UserError, match="'fid' is no metric"):
        record(metric="fid")
    with pytest.raises(UserError, match="nan, which is no score"):
        record(value=float("nan"))
    with pytest.raises(UserError, match="holds no records.*loa evaluate"):
        read_records(tmp_path / "empty")


def test_systems_measured_alike_stand_side_by_side():
    found = side_by_side([record("A", 2.0), record("B", 1.5, made={"guidance_scale": 7.0}), record("B", 0.4, metric="clap_score")])
    assert found.systems == ("A", "B") and found.metrics == ("fad", "clap_score")
    assert found.best("fad") == {"B"} and found.best("clap_score") == set()  # nothing to compare with
    ahead = side_by_side([record("A", 0.2, metric="clap_score"), record("B", 0.4, metric="clap_score")])
    assert ahead.best("clap_score") == {"B"}
    assert side_by_side([record("A", 2.001), record("B", 2.004)]).best("fad") == {"A", "B"}  # equal as printed


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("judge_sha256", "b" * 64),
        ("num_generated", 900),
        ("captions_sha256", None),
        ("direction", "KL(generated || reference)"),
        ("candidates", 3),
        ("resampler", "sinc-hann-6"),
        ("clip_rule", "whole clips"),
        ("references_sha256", "e" * 64),
        ("ddof", 0),
    ],
)
def test_mixed_protocols_are_refused_by_the_fields_that_differ(field, other):
    with pytest.raises(UserError, match=rf"fad of A and of B were not measured alike: they differ in {field} \(.* against .*\)"):
        side_by_side([record("A"), record("B", **{field: other})])


def test_every_field_of_a_protocol_counts():
    """A field added later must be compared, too."""
    for field in dataclasses.fields(Protocol):
        changed = dataclasses.replace(FAD, **{field.name: "something else"})
        assert set(FAD.differences(changed)) == {field.name}


def test_several_differences_are_all_named():
    with pytest.raises(UserError, match="num_generated.*957 against 100.*captions_sha256.*not stated"):
        side_by_side([record("A"), record("B", num_generated=100, captions_sha256=None)])


def test_one_system_has_one_score_of_a_metric():
    assert side_by_side([record("A"), record("A")]).systems == ("A",)
    with pytest.raises(UserError, match="two scores of fad, 2 and 3.*--name"):
        side_by_side([record("A", 2.0), record("A", 3.0)])
    with pytest.raises(UserError, match="two scores"):
        side_by_side([record("A"), record("A", made={"guidance_scale": 7.0})])
    with pytest.raises(UserError, match="no scores"):
        side_by_side([])


def test_real_and_restored_clips_stand_beside_and_are_not_ranked():
    beside = dataclasses.replace(record("real clips", 0.1), ranked=False)
    assert side_by_side([record("A", 2.0), record("B", 1.5), beside]).best("fad") == {"B"}


def test_silent_systems_are_not_ranked():
    found = side_by_side([record("A", 2.0), record("B", 1.0, silent=10), record("C", 3.0, silent=9)])
    assert found.unranked == ("B",) and found.best("fad") == {"A"}  # 10 of 957 are more than 1 %, 9 are not


CLIPS = [Clip("a", "c", "rain", "", "Rain"), Clip("b", "c", "wind", "so it said", None)]


def test_a_caption_list_is_frozen_with_its_hash(tmp_path):
    write_captions(tmp_path / "captions.json", CLIPS)
    assert read_captions(tmp_path / "captions.json") == CLIPS
    assert captions_hash(CLIPS) == captions_hash(CLIPS[::-1]) != captions_hash(CLIPS[:1])
    assert CLIPS[0].key != Clip("a", "c", "hail", "", None).key
    text = (tmp_path / "captions.json").read_text()
    (tmp_path / "captions.json").write_text(text.replace("rain", "hail"))
    with pytest.raises(UserError, match="changed after it was frozen"):
        read_captions(tmp_path / "captions.json")


def test_a_caption_list_may_be_a_csv(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text('clip_id,caption,transcript\na,rain,\nb,"wind",so it said\n')
    assert captions_hash(read_captions(path)) == captions_hash(CLIPS)
    for text, said in [
        ("clip_id,text\na,rain\n", "columns clip_id, text"),
        ("clip_id,caption\n", "names no clip"),
        ("clip_id,caption\na,x\na,y\n", "clips twice: a"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            read_captions(path)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UserError, match="no caption list"):
        read_captions(tmp_path / "list.json")


def sound_set(folder, sounds, **attributes):
    for name, wave in sounds.items():
        soundfile.write(folder / f"{name}.wav", wave, 16_000, subtype="FLOAT")
    clips = tuple(Clip(name, "", "", "", None) for name in sounds)
    return ClipSet("generated", "system", clips, tuple(AudioFile.of(folder / f"{name}.wav") for name in sounds), **attributes)


def test_silent_clipped_and_short_clips_are_found(tmp_path):
    tone = (0.3 * np.sin(np.arange(16_000) * 0.1)).astype(np.float32)
    sounds = {"fine": tone, "silent": 1e-4 * tone, "clipped": np.clip(10 * tone, -1, 1), "short": tone[:9000]}
    sounds["peak"] = tone / np.abs(tone).max()  # single samples at full scale are not clipped
    check = check_sounds(sound_set(tmp_path, sounds, seconds=1.0))
    assert (check.silent, check.clipped, check.short) == (("silent",), ("clipped",), ("short",))
    assert check.counts() == {"clips": 5, "silent": 1, "clipped": 1, "short": 1}
    notes = check.notes("generated")
    assert notes[0].startswith("20% of the clips of generated are silent: do not rank") and "short: short" in notes[-1]
    assert check_sounds(sound_set(tmp_path, {"fine": tone}, seconds=1.02)).notes("generated") == []  # 50 ms are forgiven


@pytest.mark.parametrize("wave", [np.full(100, np.nan, np.float32), np.array([0.0, np.inf], np.float32), np.zeros(0, np.float32)])
def test_clips_without_numbers_are_refused(tmp_path, wave):
    with pytest.raises(UserError, match="1 of 2 clips of generated.*: broken"):
        check_sounds(sound_set(tmp_path, {"fine": np.ones(100, np.float32), "broken": wave}))


def test_measures_say_which_way_is_good():
    assert {measure.better for measure in MEASURES.values()} == {"higher", "lower"}
    assert MEASURES["fad"].heading == "FAD ↓" and MEASURES["clap_score"].heading == "CLAP score ↑"
