"""Recordings as strangers have them: what a pass keeps of them, what it rejects, and why."""

import errno
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_failures import here, mel_pass  # noqa: F401
from test_preprocess import RATE, VARIANT, clip, make_store, tars, tone

from pipelines.features.passes import MelPass
from pipelines.features.run import ShardWorker
from pipelines.features.shards import ShardWriter

NOISE = np.random.default_rng(0).uniform(-0.3, 0.3, (2 * RATE, 1))


def verdicts(tmp_path: Path, names: list[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Waveforms of what is kept, reasons of what is rejected, by file name."""
    rows = [clip(tmp_path / name, clip_id=f"clip-{i}") for i, name in enumerate(names)]
    store = make_store(tmp_path / "store", rows, shard_size=16)
    mel_pass(store)
    by_id = {f"clip-{i}": name for i, name in enumerate(names)}
    (row,) = store.ledger("waveform").values()
    reader = store.reader(["waveform"])
    kept = {by_id[clip_id]: reader.read(clip_id)["waveform"] for clip_id in reader.clip_ids}
    return kept, {by_id[entry.clip_id]: entry.reason for entry in row.rejected}


def test_sound_of_any_form_is_kept(here, tmp_path):  # noqa: F811
    """8 bits, 192 kHz, twelve channels, an MP3 called .wav, and names with newlines, blanks and letters of all kinds."""
    soundfile.write(tmp_path / "8-bit.wav", NOISE, RATE, subtype="PCM_U8")
    soundfile.write(tmp_path / "192-kHz.wav", np.repeat(NOISE, 12, 0), 192_000)
    soundfile.write(tmp_path / "12-channel.wav", np.hstack([NOISE, np.zeros((len(NOISE), 11))]), RATE)
    soundfile.write(tmp_path / "mp3.wav", NOISE, RATE, format="MP3")
    named = ["a\nb.wav", "Hühner & Ätsch 鳥🐦.wav", " .wav"]
    for name in named:
        soundfile.write(tmp_path / name, NOISE, RATE)
    names = ["8-bit.wav", "192-kHz.wav", "12-channel.wav", "mp3.wav", *named]
    kept, rejected = verdicts(tmp_path, names)
    assert rejected == {} and set(kept) == set(names)
    reference = kept[named[0]]
    for name in ("8-bit.wav", "12-channel.wav", "mp3.wav", *named):  # the first channel alone is read
        correlation = np.corrcoef(kept[name], reference)[0, 1]
        assert correlation > (0.8 if name == "mp3.wav" else 0.99), (name, correlation)  # MP3 cuts noise above its band


def test_content_that_is_bad_is_rejected_with_its_reason(here, tmp_path):  # noqa: F811
    (tmp_path / "zero.wav").write_bytes(b"")
    soundfile.write(tmp_path / "no-samples.wav", np.zeros(0), RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(RATE, np.nan, np.float32), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "one-nan.wav", np.where(np.arange(RATE) == 99, np.inf, 0.1).astype(np.float32), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "whole.flac", NOISE, RATE)
    data = (tmp_path / "whole.flac").read_bytes()
    (tmp_path / "header.flac").write_bytes(data[:60])
    (tmp_path / "text.mp3").write_text("no sound")
    names = ["zero.wav", "no-samples.wav", "nan.wav", "one-nan.wav", "header.flac", "text.mp3", "whole.flac"]
    kept, rejected = verdicts(tmp_path, names)
    assert set(kept) == {"whole.flac"} and set(rejected) == set(names[:-1])
    assert "not finite" in rejected["nan.wav"] and "not finite" in rejected["one-nan.wav"]
    assert "no samples" in rejected["no-samples.wav"] and "cannot be decoded" in rejected["text.mp3"]
    assert all(str(tmp_path / name) in reason for name, reason in rejected.items())


def test_of_a_truncated_recording_what_is_there_is_kept(here, tmp_path):  # noqa: F811
    soundfile.write(tmp_path / "whole.wav", NOISE, RATE)
    data = (tmp_path / "whole.wav").read_bytes()
    (tmp_path / "half.wav").write_bytes(data[: len(data) // 2])
    kept, rejected = verdicts(tmp_path, ["whole.wav", "half.wav"])
    assert rejected == {} and not kept["half.wav"][RATE:].any() and kept["half.wav"][: RATE - 100].any()


def test_a_recording_that_may_not_be_read_fails(here, tmp_path, monkeypatch):  # noqa: F811
    """No permission is the world's fault, not the content's. root may read everything, so `open` is what refuses."""
    path = tone(tmp_path, 0)
    store = make_store(tmp_path / "store", [clip(path)])
    if os.geteuid() == 0:
        import builtins

        real = open

        def refuse(name, *arguments, **settings):
            if str(name) == str(path):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(name, *arguments, **settings)

        monkeypatch.setattr(builtins, "open", refuse)
    else:
        path.chmod(0)
    report = mel_pass(store)
    (result,) = report.failing.values()
    assert result.failures == [f"{path}: Permission denied"] and store.missing_shards("mel") == [0]


# ------------------------------------------------------------------------------------------------- disks and memory


def test_a_disk_that_fills_up_costs_nothing(here, tmp_path):  # noqa: F811
    """In the middle of a shard no more can be written: the limit of a process on file sizes stands for a full disk."""
    rows = [clip(tone(tmp_path / "sounds", i, seconds=2.5)) for i in range(8)]
    store, calm = make_store(tmp_path / "store", rows), make_store(tmp_path / "calm", rows)
    mel_pass(calm)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a shard of mels takes 140 kB; Python ignores SIGXFSZ
    try:
        report = mel_pass(store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert report.counts() == {"in": 8, "kept": 0, "rejected": 0, "filtered": 0, "failed": 8}
    assert all("File too large" in failure for result in report.failing.values() for failure in result.failures)
    left = [path.name for path in Path(store.root).rglob("*") if path.is_file() and (path.suffix == ".tar" or path.name.startswith("."))]
    assert left == []  # no shard, and no draft of one
    mel_pass(store)
    assert tars(store) == tars(calm)


@pytest.mark.parametrize("error", [MemoryError("no memory"), RuntimeError("[enforce fail] can't allocate memory: 1 GB")])
def test_too_little_memory_is_no_rejection(tmp_path, monkeypatch, error):
    store = make_store(tmp_path / "store", [clip(tone(tmp_path, 0))])
    work = MelPass(VARIANT.audio)

    def fail(*_):
        raise error

    monkeypatch.setattr("pipelines.features.passes.clip_mel", fail)
    row = ShardWorker(store, work)({"shard": 0, "series": json.dumps(work.series), "clips": 1, "remake": False})
    assert json.loads(row["result"])["failed"] == 1 and row["failure"] == "" and store.missing_shards("mel") == [0]


def test_a_slow_disk_holds_the_encoder_back(here, tmp_path, monkeypatch):  # noqa: F811
    """Members that wait for the writer stay few, whatever the shard's size."""
    import threading

    from pipelines.features import shard_work

    rows = [clip(tone(tmp_path / "sounds", i)) for i in range(24)]
    store = make_store(tmp_path / "store", rows, shard_size=24)
    encoded, written, most = [0], [0], [0]
    real_encode, real_add, pause = MelPass.encode, ShardWriter.add, threading.Event()

    def encode(self, rows, clips):
        encoded[0] += len(rows)
        most[0] = max(most[0], encoded[0] - written[0])
        return real_encode(self, rows, clips)

    def add(self, clip_id, members):
        pause.wait(0.02)
        real_add(self, clip_id, members)
        written[0] += self.series == "waveform"

    monkeypatch.setattr(MelPass, "encoder", "vae")  # only those of encoders have a writer beside them
    monkeypatch.setattr(MelPass, "encode", encode)
    monkeypatch.setattr(ShardWriter, "add", add)
    assert mel_pass(store).clips == 24
    assert 2 <= most[0] <= shard_work.WAITING + 3
