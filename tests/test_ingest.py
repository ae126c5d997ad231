"""Recordings become clips: windows, rejections, leaks, re-runs, and the command."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from pipelines.corpora import Recording, Rejected
from pipelines.corpora.headers import probe_header, probe_headers
from pipelines.features.store import FeatureStore
from pipelines.ingest import cut, ingest, main, without_leaks
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
    assert [c.start for c in cut(recording(), 200, AUDIO, max_windows=4)] == [0, 66, 132, 198]
    assert [c.start for c in cut(recording(), 200, AUDIO, max_windows=1)] == [0]
    assert cut(recording(), 0.001, AUDIO).kind == "empty"


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
    result = without_leaks(records[:2] + records[3:])
    assert [isinstance(r, Rejected) for r in result] == [False, True, False, False]
    assert result[1].reason == "held out: in the test split of a"
    assert without_leaks(records[2:4]) == records[2:4]


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
    assert probe_headers([str(good)]) == {str(good): found["good.wav"]}


def test_headers_by_ray(ray_cluster, tmp_path):
    paths = [str(sound(tmp_path / f"{i}.wav", 0.1 + 0.1 * i)) for i in range(5)] + [str(tmp_path / "gone.wav")]
    assert probe_headers(paths, workers=2) == probe_headers(paths, workers=0)


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
    assert clips["clip_id"].tolist() == [f"folder-data_long-{i}" for i in (0, 1, 3, 4)] + ["folder-data_short"]
    assert clips["split"].tolist() == ["train"] * 4 + ["test"] and store.audio == AUDIO
    short = clips.iloc[-1]
    assert (list(short.captions), list(short.labels), short.path, short.seconds) == (["A tone."], ["Tone"], str(data / "short.wav"), 1.0)
    assert store.rejected()["reason"].str.startswith("unreadable").tolist() == [True]
    assert report.counts() == {"recordings": 2, "clips": 5, "hours": pytest.approx(report.counts()["hours"]), "captions": 5, "rejected": 1}
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
    assert report.summary().startswith("added to 5 clips: 3 clips") and report.corpora[0].rejected == {"missing file": 1}
    clips = FeatureStore.open(tmp_path / "store").clips()
    assert clips[:5].equals(old) and sorted(clips["clip_id"][5:]) == ["folder-data_broken", "folder-data_new-0", "folder-data_new-1"]
    again = ingest([data], tmp_path / "store", AUDIO)
    assert again.already and len(FeatureStore.open(tmp_path / "store").parts) == 2
    (data / "new.wav").unlink()
    assert ingest([data], tmp_path / "store", AUDIO).already  # nothing new, and nothing leaves


def test_ids_stay_unique(data, tmp_path):
    soundfile.write(data / "short.flac", np.ones(8000) * 0.1, 8000)
    report = ingest([data], tmp_path / "store", AUDIO)
    assert report.corpora[0].rejected == {"unreadable": 1, "duplicate id": 1}
    assert FeatureStore.open(tmp_path / "store").clips()["clip_id"].is_unique


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
    assert Counter(clips["split"]) == report.splits


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
