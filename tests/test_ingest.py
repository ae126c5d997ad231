"""Recordings become clips: windows, rejections, leaks, re-runs, and the command."""

import gc
import json
import os
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from pipelines import corpora
from pipelines.corpora import Recording, Rejected, sources
from pipelines.corpora.cut import Clip, Windows, cut
from pipelines.corpora.headers import Headers, Probed, probe_header, probe_headers
from pipelines.corpora.spool import BATCH, RowFile, Spool
from pipelines.corpora.twins import changed_by_twins, without_twins
from pipelines.features.store import FeatureStore
from pipelines.ingest import ingest, main
from stages.audio import AudioConfig
from stages.errors import UserError

AUDIO = AudioConfig(clip_seconds=2.0)


def sound(path: Path, seconds: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.sin(np.arange(round(seconds * 8000)) * 0.1), 8000)
    return path


def recording(**changes) -> Recording:
    return Recording(**{"corpus": "c", "recording_id": "r", "path": "/x.wav"} | changes)


def places(clips):
    return [(c.clip_id, round(c.start, 3), round(c.seconds, 3)) for c in clips]


def test_windows():
    assert places(cut(recording(), 1.5, AUDIO)) == [("c-r", 0, 1.5)]
    assert places(cut(recording(), 2.9, AUDIO)) == [("c-r", 0, 2.0)]
    assert places(cut(recording(), 3.0, AUDIO)) == [("c-r-0", 0, 2.0), ("c-r-1", 2.0, 1.0)]
    assert places(cut(recording(start=10.0, seconds=4.5), 60, AUDIO)) == [("c-r-0", 10, 2), ("c-r-1", 12, 2)]
    assert cut(recording(), 0.001, AUDIO).kind == "empty"
    assert cut(recording(start=3.0), 2.0, AUDIO).kind == "outside the recording"


def test_long_recordings_are_used_whole_or_by_a_choice_of_their_id():
    clips = cut(recording(), 300, AUDIO)  # five minutes
    assert len(clips) == 150 and sum(c.seconds for c in clips) == 300 and len({c.clip_id for c in clips}) == 150
    drawn = cut(recording(), 300, AUDIO, Windows(most=5))
    assert len(drawn) == 5 and set(drawn) < set(clips)
    assert places(drawn) == places(cut(recording(path="/moved.wav"), 300, AUDIO, Windows(most=5)))
    assert drawn != cut(recording(), 300, AUDIO, Windows(most=5, seed=1))
    others = {tuple(c.start for c in cut(recording(recording_id=f"r{i}"), 300, AUDIO, Windows(most=5))) for i in range(20)}
    assert len(others) == 20


def test_short_ones_are_left_out_when_asked():
    assert cut(recording(), 1.5, AUDIO, Windows(min_seconds=1.6)).kind == "short"
    assert places(cut(recording(), 1.5, AUDIO, Windows(min_seconds=1.5))) == [("c-r", 0, 1.5)]
    assert places(cut(recording(), 3.2, AUDIO, Windows(min_seconds=1.5))) == [("c-r", 0, 2.0)]


def test_stretches_cut_out_beforehand():
    def stretch(file_seconds):
        return places(cut(recording(start=30.0, seconds=10.0, precut=True), file_seconds, AudioConfig()))

    assert stretch(10.0) == [("c-r", 0, 10.0)]
    assert stretch(8.0) == [("c-r", 0, 8.0)]  # only the segment, and not all of it
    assert stretch(300.0) == [("c-r", 30, 10.0)]  # the whole video
    assert stretch(36.0) == [("c-r", 30, 6.0)]
    assert places(cut(recording(start=0.0, seconds=10.0, precut=True), 10.02, AudioConfig())) == [("c-r", 0, 10.02)]


def test_speech_is_never_cut():
    assert places(cut(recording(transcript="hello"), 1.9, AUDIO)) == [("c-r", 0, 1.9)]
    assert cut(recording(transcript="hello"), 2.5, AUDIO).kind == "speech longer than a clip"
    assert places(cut(recording(transcript="hello", start=1.0, seconds=1.0), 1.9, AUDIO)) == [("c-r", 1.0, 0.9)]
    assert cut(recording(transcript="hello", start=1.0, seconds=1.0), 1.5, AUDIO).kind == "outside the recording"
    assert cut(recording(transcript="hello", start=9.0, seconds=1.0), 1.5, AUDIO).kind == "outside the recording"


def test_held_out_sounds_leave_the_training_of_other_corpora():
    records = [
        recording(corpus="a", split="test", origin="youtube:1"),
        recording(corpus="b", origin="youtube:1"),
        recording(corpus="b", split="test", origin="youtube:1"),
        recording(corpus="a", origin="youtube:2"),
        recording(corpus="a"),
    ]
    result = without_twins(records[:2] + records[3:], LENGTHS)
    assert [isinstance(r, Rejected) for r in result] == [False, True, False, False]
    assert result[1].reason == "held out: in the test split of a, as r"
    assert without_twins(records[2:4], LENGTHS) == records[2:4]


LENGTHS = {"/x.wav": 20.0, "/y.wav": 20.0}


def test_exact_copies():
    """In training the copy with words stays and takes over those of the others; held-out ones stay, and their copies leave training."""
    plain = recording(corpus="a", content="1", labels=("Dog",), licence="CC0")
    worded = recording(corpus="b", path="/y.wav", content="1", captions=("A dog.",), licence="MIT")
    other = recording(corpus="a", recording_id="s", content="2")
    first, second, third = without_twins([plain, worded, other], LENGTHS)
    assert first.kind == "duplicate" and "b-r" in first.reason and third == other
    assert (second.captions, second.labels, second.licence) == (("A dog.",), ("Dog",), "MIT; CC0")
    for order in ([0, 1], [1, 0]):
        pair = [plain, recording(corpus="b", content="1", split="test")]
        result = without_twins([pair[i] for i in order], LENGTHS)
        assert {type(r): r.corpus for r in result} == {Rejected: "a", Recording: "b"}
    tests = [recording(corpus=c, content="1", split="test") for c in "ab"]
    assert without_twins(tests, LENGTHS) == tests


def test_segments_of_one_file_are_no_copies():
    segments = [
        recording(recording_id=f"s{i}", content="1", start=2.0 * i, seconds=2.0, split=s) for i, s in enumerate(("train", "train", "test"))
    ]
    assert without_twins(segments, LENGTHS) == segments
    whole = recording(corpus="other", content="1")
    assert [r.kind for r in without_twins([*segments, whole], LENGTHS) if isinstance(r, Rejected)] == ["held out"]


def test_twins_among_many_are_those_among_all(rounds):
    """Only recordings that have a twin are looked at; what becomes of them is what becomes of them among all."""
    for seed in range(rounds(20, 400)):
        rng = np.random.default_rng(seed)
        many = [
            recording(
                corpus="ab"[rng.integers(2)],
                recording_id=f"r{i}",
                path=f"/{rng.integers(2)}.wav",
                content=("", *"1234567")[rng.integers(8)],
                origin=("", "", "", *"uvwxyz")[rng.integers(9)],
                split=("train", "train", "test")[rng.integers(3)],
                start=float(rng.integers(3)),
                seconds=(None, 2.0)[rng.integers(2)],
                captions=("A.",) * int(rng.integers(2)),
                transcript="so" * int(rng.integers(2)),
            )
            for i in range(rng.integers(1, 30))
        ]
        changed = changed_by_twins(lambda many=many: iter(many), lambda path: 20.0)
        assert [changed.get(i, r) for i, r in enumerate(many)] == without_twins(many, dict.fromkeys(("/0.wav", "/1.wav"), 20.0))


def test_records_come_back_from_the_disk_as_they_were(tmp_path):
    records = [
        recording(captions=("Ein Hund.", ""), labels=("Dog", "🐕"), start=0.1, seconds=2.5, precut=True, licence="CC0"),
        recording(recording_id="s", transcript="so\nwhat", origin="youtube:1", split="test", content="ab"),
        Rejected("c", "/gone.wav", "c-gone", "missing file"),
        Rejected("c", "", "", ""),
    ] * 3000
    spool = Spool(tmp_path / "spool", iter(records))
    assert list(spool) == records == list(spool) and spool.recordings == 6000
    assert list(Spool(tmp_path / "none", [])) == []


def test_an_ingest_holds_some_thousand_records_at_a_time(tmp_path, monkeypatch):
    """However many there are: what becomes of them is looked at whenever rows are written, and when the headers are read."""
    count, alive = 3 * BATCH, []

    def read(*arguments):
        for i in range(count):
            yield recording(corpus="folder", recording_id=f"r{i:07d}", path=f"/corpus/{i:07d}.wav", captions=("A sound.",))

    def look():
        alive.append(sum(isinstance(thing, (Recording, Clip)) for thing in gc.get_objects()))

    def probed(paths, number, workers, reserve):
        for place, path in enumerate(paths):
            yield path, Probed(3.9, "", f"{zlib.crc32(path.encode()):032x}")
            if place % BATCH == 0:
                look()

    def flush(rows, before=RowFile._flush):
        before(rows)
        look()

    monkeypatch.setattr(corpora, "wanted", lambda *arguments: ([("folder", tmp_path)], []))
    monkeypatch.setattr(corpora, "read", read)
    monkeypatch.setattr(sources, "probe_headers", probed)
    monkeypatch.setattr(RowFile, "_flush", flush)
    before = sum(isinstance(thing, (Recording, Clip)) for thing in gc.get_objects())
    report = ingest([tmp_path], tmp_path / "store", AUDIO, workers=0, shard_size=1000)
    assert report.counts()["clips"] == 2 * count == FeatureStore.open(tmp_path / "store").num_clips
    assert len(alive) >= 9 and max(alive) - before < 1.5 * BATCH


def test_headers_of_anything(tmp_path):
    good = sound(tmp_path / "good.wav", 1.5)
    (tmp_path / "text.wav").write_text("this is no sound at all")
    (tmp_path / "zero.wav").touch()
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "half.flac").write_bytes(sound(tmp_path / "f.flac", 2).read_bytes()[:30])
    sound(tmp_path / "none.wav", 0)
    names = ("good.wav", "text.wav", "zero.wav", "pipe.wav", "half.flac", "none.wav", "gone.wav")
    found = {name: probe_header(str(tmp_path / name)) for name in names}
    assert found["good.wav"] == (pytest.approx(1.5), "")
    (tmp_path / "copy.wav").write_bytes(good.read_bytes())
    files = dict(probe_headers([str(tmp_path / name) for name in ("good.wav", "copy.wav", "text.wav", "f.flac")], 4))
    contents = [file.content for file in files.values()]
    assert contents[0] == contents[1] != contents[3] and len(contents[0]) == 32 and contents[2] == ""
    reasons = {name: problem.partition(":")[0] for name, (_, problem) in found.items()}
    assert reasons == {
        "good.wav": "",
        "text.wav": "unreadable",
        "zero.wav": "empty",
        "pipe.wav": "unreadable",
        "half.flac": "unreadable",
        "none.wav": "empty",
        "gone.wav": "missing file",
    }
    assert str(tmp_path) not in found["text.wav"][1]
    assert dict(probe_headers([str(good)], 1)) == {str(good): (*found["good.wav"], contents[0])}
    kept = Headers(files.items())
    assert {path: kept[path] for path in files} == files
    with pytest.raises(KeyError):
        kept["/elsewhere.wav"]


def test_headers_by_ray(ray_cluster, tmp_path):
    paths = [str(sound(tmp_path / f"{i}.wav", 0.1 + 0.1 * i)) for i in range(5)] + [str(tmp_path / "gone.wav")]
    assert dict(probe_headers(paths, 6, workers=2)) == dict(probe_headers(paths, 6, workers=0))


@pytest.fixture
def data(tmp_path):
    sound(tmp_path / "data" / "long.wav", 9.0)
    sound(tmp_path / "data" / "short.wav", 1.0)
    (tmp_path / "data" / "broken.wav").write_text("no")
    (tmp_path / "data" / "captions.csv").write_text("file,caption,label,split\nshort.wav,A tone.,Tone,test\nlong.wav,Long.,,train\n")
    return tmp_path / "data"


def test_ingest_makes_a_store_once(data, tmp_path):
    report = ingest([data], tmp_path / "store", AUDIO)
    store = FeatureStore.open(tmp_path / "store")
    clips = store.clips().sort_values("clip_id")
    assert clips["clip_id"].tolist() == [f"folder-data_long-{i}" for i in range(5)] + ["folder-data_short"]
    assert clips["split"].tolist() == ["train"] * 5 + ["test"] and store.audio == AUDIO
    short = clips.iloc[-1]
    assert (list(short.captions), list(short.labels), short.path, short.seconds) == (["A tone."], ["tone"], str(data / "short.wav"), 1.0)
    assert store.rejected()["reason"].str.startswith("unreadable").tolist() == [True]
    counts = report.counts()
    assert counts["hours"] * 3600 == pytest.approx(10) and counts["hours_left_out"] == pytest.approx(0)
    assert {k: v for k, v in counts.items() if "hours" not in k} == {
        "listed": 3,
        "recordings": 2,
        "clips": 6,
        "captions": 6,
        "filtered": 0,
        "rejected": 1,
    }
    assert "1 unreadable" in report.table() and not report.already

    before = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    again = ingest([data], tmp_path / "store", AUDIO)
    assert again.already and again.counts() == report.counts() and "already ingested" in again.summary()
    with pytest.raises(UserError, match="clip_seconds: was 2.0, now 4.0.*--work"):
        ingest([data], tmp_path / "store", AudioConfig(clip_seconds=4.0))
    assert {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()} == before


def test_what_is_new_in_a_folder_is_added(data, tmp_path):
    ingest([data], tmp_path / "store", AUDIO)
    old = FeatureStore.open(tmp_path / "store").clips()
    sound(data / "new.wav", 3.0)
    sound(data / "broken.wav", 1.0)  # mended
    (data / "long.wav").unlink()
    report = ingest([data], tmp_path / "store", AUDIO)
    assert report.summary().startswith("added to 6 clips: 3 clips") and report.corpora[0].rejected == {"missing file": 1}
    clips = FeatureStore.open(tmp_path / "store").clips()
    assert clips[:6].equals(old) and sorted(clips["clip_id"][6:]) == ["folder-data_broken", "folder-data_new-0", "folder-data_new-1"]
    again = ingest([data], tmp_path / "store", AUDIO)
    assert again.already and len(FeatureStore.open(tmp_path / "store").parts) == 2
    (data / "new.wav").unlink()
    assert ingest([data], tmp_path / "store", AUDIO).already  # nothing new, and nothing leaves


def test_ids_stay_unique(data, tmp_path):
    """Equal names with other suffixes, in other folders of one name, or like another's window: each is a recording of its own."""
    soundfile.write(data / "short.flac", np.ones(8000) * 0.1, 8000)
    soundfile.write(data / "long-0.wav", np.ones(8000) * 0.2, 8000)
    soundfile.write(data / "short_flac.wav", np.ones(8000) * 0.3, 8000)
    (tmp_path / "b" / "data").mkdir(parents=True)
    soundfile.write(tmp_path / "b" / "data" / "long.wav", np.ones(8000) * 0.4, 8000)
    soundfile.write(tmp_path / "b" / "data" / "short_wav.wav", np.ones(8000) * 0.5, 8000)
    report = ingest([data, tmp_path / "b" / "data"], tmp_path / "store", AUDIO)
    assert [c.rejected for c in report.corpora] == [{"unreadable": 1}, {}] and report.counts()["recordings"] == 7
    clips = FeatureStore.open(tmp_path / "store").clips()
    assert clips["clip_id"].is_unique and clips["path"].nunique() == 7
    assert {"folder-data_short_wav", "folder-data_short_flac", "folder-data_long"} < set(
        clips["clip_id"].str.replace(r"-\d$", "", regex=True)
    )


def test_nothing_usable(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="contains no recordings; searched it and the folders directly below for AudioSet"):
        ingest([tmp_path / "none"], tmp_path / "store", AUDIO)
    (tmp_path / "none" / "x.wav").write_text("no")
    with pytest.raises(UserError, match="nothing in .* can be used.*Rejected: 1 unreadable; the first is .*x.wav"):
        ingest([tmp_path / "none"], tmp_path / "store", AUDIO)
    assert not (tmp_path / "store").exists()


def test_limit_takes_some_of_every_corpus(shared, tmp_path):
    folders = [shared / "data" / name for name in ("audioset", "wavcaps", "ljspeech")]
    report = ingest(folders, tmp_path / "store", AudioConfig(), limit=7)
    assert {c.corpus: c.recordings for c in report.corpora} == {"audioset": 7, "wavcaps": 7, "ljspeech": 7}


def test_real_recordings(shared, tmp_path):
    report = ingest([shared / "data"], tmp_path / "store", AudioConfig())
    found = {c.corpus: (c.recordings, c.clips, c.rejected) for c in report.corpora}
    assert found == {
        "audiocaps": (0, 0, {"missing file": 51308}),
        "audioset": (240, 240, {}),
        "ljspeech": (60, 60, {}),
        "msd": (18, 49, {}),
        "gigaspeech": (96, 96, {"no speech": 4, "speech longer than a clip": 1}),
        "wavcaps": (80, 80, {"missing file": 1232}),
    }
    clips = FeatureStore.open(tmp_path / "store").clips()
    assert len(clips) == 525 and (clips["seconds"] <= 10.24).all() and (clips["seconds"] > 0).all()
    assert Counter(clips["split"]) == report.splits and (clips["licence"] != "").all()
    assert report.counts()["listed"] == 494 + 51308 + 5 + 1232
    assert any("51,308 times missing file" in warning for warning in report.warnings())


def test_licences_choose(data, tmp_path):
    (data / "captions.csv").write_text("file,caption,licence\nshort.wav,A tone.,CC0 1.0\n")
    with pytest.raises(UserError, match="nothing in .* can be used.* 3 other licence"):
        ingest([data], tmp_path / "store", AUDIO, licences=["GPL*"])
    report = ingest([data], tmp_path / "store", AUDIO, licences=["cc0*", "CC BY"])
    assert report.corpora[0].filtered == {"other licence": 2} and report.corpora[0].rejected == {}
    assert FeatureStore.open(tmp_path / "store").clips()["licence"].tolist() == ["CC0 1.0"]
    everything = ingest([data], tmp_path / "all", AUDIO)
    assert set(FeatureStore.open(tmp_path / "all").clips()["licence"]) == {"CC0 1.0", "not stated"} and not everything.corpora[0].filtered


def test_counts_add_up(data, tmp_path):
    """Whatever an option or a defect takes away, every line of what was listed is in one of the counts."""
    soundfile.write(data / "tiny.wav", np.ones(1600) * 0.1, 8000)
    (data / "copy.wav").write_bytes((data / "long.wav").read_bytes())
    (data / "captions.csv").write_text("file,caption\nshort.wav,A tone.\ngone.wav,Gone.\n")
    report = ingest([data], tmp_path / "store", AUDIO, min_seconds=0.5, max_windows=2)
    counts = report.counts()
    assert counts["listed"] == 6 == counts["recordings"] + counts["filtered"] + counts["rejected"]
    assert report.corpora[0].filtered == {"short": 1}
    assert report.corpora[0].rejected == {"missing file": 1, "unreadable": 1, "duplicate": 1}
    assert counts["clips"] == 3 and counts["hours_left_out"] * 3600 == pytest.approx(5)
    assert "listed 6 = 2 recordings used + 1 filtered + 3 rejected" in report.summary()


def test_dry_run_writes_nothing(data, tmp_path):
    run = CliRunner().invoke(main, [str(data), "--work", str(tmp_path / "w"), "--tiny", "--clip-seconds", "2.56", "--dry-run"])
    assert run.exit_code == 0 and not (tmp_path / "w").exists(), run.output
    assert "5 clips" in run.output and "nothing was written" in run.output and "loa-1" in run.output
    made = ingest([data], tmp_path / "store", AUDIO)
    assert ingest([data], tmp_path / "store", AUDIO, dry_run=True).counts() == made.counts()


def test_a_table_of_no_use_is_said_aloud(data, tmp_path):
    (data / "captions.csv").write_text("sound;words\nshort.wav;A tone.\n")
    run = CliRunner().invoke(main, [str(data), "--work", str(tmp_path / "w"), "--clip-seconds", "2"])
    assert run.exit_code == 0, run.output
    assert "WARNING" in run.output and "its columns are sound, words; expected one that names the recording (file, " in run.output


def test_command(data, tmp_path):
    run = CliRunner().invoke(main, [str(data), "--work", str(tmp_path / "w"), "--tiny", "--max-windows", "2", "--clip-seconds", "2"])
    assert run.exit_code == 0 and "already" not in run.output, run.output
    assert "1 unreadable" in run.output and str(tmp_path / "w" / "store") in run.output
    assert (
        "already ingested: 3 clips"
        in CliRunner()
        .invoke(main, ["--data", str(data), "--work", str(tmp_path / "w"), "--tiny", "--max-windows", "2", "--clip-seconds", "2"])
        .output
    )
    assert json.loads((tmp_path / "w" / "store" / "store.json").read_text())["audio"]["clip_seconds"] == 2.0
    for arguments, said in (([], "name the folder"), ([str(tmp_path / "gone")], "does not exist")):
        run = CliRunner().invoke(main, [*arguments, "--work", str(tmp_path / "w2")])
        assert run.exit_code == 1 and said in run.output and "Traceback" not in run.output
