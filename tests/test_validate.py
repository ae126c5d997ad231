"""`loa validate` on recordings and stores, sound and damaged, and that it writes nothing."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from tiny_store import make_store, small

import loa
from pipelines.validate import validate
from stages.audio import check_audio
from stages.errors import AudioError, UserError

RATE = 16_000


def sound(path: Path, samples: np.ndarray | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.sin(np.arange(RATE) * 0.1) if samples is None else samples, RATE, **options)
    return path


def snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p.relative_to(root)): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture
def recordings(tmp_path) -> Path:
    root = tmp_path / "data"
    sound(root / "good.wav")
    sound(root / "good.flac")
    sound(root / "silent.wav", np.zeros(RATE))
    holed = 0.1 * np.ones(RATE, np.float32)
    holed[RATE // 2] = np.nan
    sound(root / "nan.wav", holed, subtype="FLOAT")
    whole = sound(root / "cut.flac", 0.1 * np.random.default_rng(0).standard_normal(4 * RATE)).read_bytes()
    (root / "cut.flac").write_bytes(whole[: len(whole) // 2])
    (root / "empty.wav").touch()
    (root / "text.wav").write_text("no sound")
    (root / "captions.csv").write_text("file,caption\ngood.wav,A tone.\ngone.wav,Gone.\ngood.flac,A tone,too many\n")
    return root


def test_recordings(recordings):
    before = snapshot(recordings)
    findings = validate(recordings, progress=False)
    failing = {os.path.basename(f.row): f.kind for f in findings.failures}
    assert failing == {
        "silent.wav": "silent",
        "nan.wav": "damaged",
        "cut.flac": "damaged",
        "empty.wav": "empty",
        "text.wav": "unreadable",
        "gone.wav": "missing file",
        "captions.csv": "malformed line",
    }
    assert findings.checked["recordings"] == 7 and snapshot(recordings) == before
    assert "7 fail" in findings.summary() and "nan.wav" in findings.table(20) and "and 6 more" in findings.table(1)


def test_the_command_says_which_rows_fail(recordings, tmp_path):
    run = CliRunner().invoke(loa.main, ["validate", str(recordings), "--json", str(tmp_path / "all.json"), "--show", "2"])
    assert run.exit_code == 1 and "… and 5 more" in run.output and "`loa ingest` leaves out what fails" in run.output, run.output
    content = json.loads((tmp_path / "all.json").read_text())
    assert len(content["failures"]) == 7 and all(f["reason"] for f in content["failures"]) and content["repairs"] == []
    for name in ("silent.wav", "nan.wav", "cut.flac", "empty.wav", "text.wav", "captions.csv"):
        os.remove(recordings / name)
    run = CliRunner().invoke(loa.main, ["validate", str(recordings)])
    assert run.exit_code == 0 and "2 recordings; all are sound" in run.output, run.output
    for target, said in ((tmp_path / "nowhere", "does not exist"), ("memory://nowhere", "holds no feature store")):
        run = CliRunner().invoke(loa.main, ["validate", str(target)])
        assert run.exit_code == 1 and said in run.output and "Traceback" not in run.output, run.output


def test_real_recordings_are_sound(shared):
    """The corpora's excerpts, MP3 and Ogg among them; what is listed and not there fails, and nothing else."""
    for corpus in ("msd", "ljspeech"):
        findings = validate(shared / "data" / corpus, progress=False)
        assert findings.failures == [] and findings.checked["recordings"] > 10, findings.failures


def test_a_long_recording_takes_little_memory(tmp_path, monkeypatch):
    """Blocks are decoded one by one: none of them is the whole recording."""
    path = sound(tmp_path / "long.wav", np.tile(0.1 * np.sin(np.arange(RATE) * 0.1), 60))
    largest = 0
    read = soundfile.SoundFile.read

    def noted(self, frames=-1, *args, **kwargs):
        nonlocal largest
        block = read(self, frames, *args, **kwargs)
        largest = max(largest, len(block))
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", noted)
    assert check_audio(path) == 60.0 and 0 < largest <= 1 << 16
    with pytest.raises(AudioError, match="cannot be opened"):
        check_audio(tmp_path / "gone.wav")


@pytest.fixture(scope="module")
def store_folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("validate")
    make_store(root, small(), clips=12, shard_size=4)
    return root


def object_of(root: Path, series: str, shard: int) -> Path:
    """The tar of a shard."""
    (path,) = (root / "store" / series).glob(f"{shard:06d}*.tar")
    return path


def test_a_store(store_folder, tmp_path):
    before = snapshot(store_folder)
    findings = validate(store_folder / "store", progress=False)
    assert findings.failures == [] and findings.checked == {"series": 2, "shards": 6, "clips": 24}
    assert validate(store_folder, progress=False).checked == findings.checked  # the work folder of that store
    run = CliRunner().invoke(loa.main, ["validate", "--work", str(store_folder)])
    assert run.exit_code == 0 and "24 clips; all are sound" in run.output, run.output
    assert snapshot(store_folder) == before


@pytest.fixture
def damaged(store_folder, tmp_path) -> Path:
    return Path(shutil.copytree(store_folder, tmp_path / "work"))


def test_a_flipped_bit_and_a_missing_shard_are_found_and_the_repair_named(damaged):
    tar = object_of(damaged, "mel", 1)
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    object_of(damaged, "waveform", 2).unlink()
    before = snapshot(damaged)
    run = CliRunner().invoke(loa.main, ["validate", str(damaged / "store")])
    assert run.exit_code == 1 and snapshot(damaged) == before
    assert "mel 000001" in run.output and "corrupt" in run.output and "waveform 000002" in run.output, run.output
    repairs = [line for line in run.output.splitlines() if line.startswith("repair: ")]
    assert any(line.endswith("--verify") and "loa preprocess mel --store" in line for line in repairs) and len(repairs) == 2
    run = CliRunner().invoke(loa.main, ["validate", "--work", str(damaged)])
    assert f"repair: loa preprocess mel --work {damaged} --verify" in run.output, run.output


def test_numbers_that_are_not_finite_are_found(damaged):
    """Bytes as the ledger has them, yet poison: only decoding shows it."""
    from pipelines.features.store import FeatureStore

    store = FeatureStore.open(damaged / "store")
    store.begin_series("poison", {"format": 1})
    for shard in range(store.num_shards):
        ids = [row["clip_id"] for row in store.shard_rows(shard)]
        values = [np.full(3, np.nan if (shard, i) == (1, 2) else 0.0, np.float16) for i in range(len(ids))]
        store.write_shard("poison", shard, [(clip_id, {"poison.npy": value}) for clip_id, value in zip(ids, values, strict=True)])
    (failure,) = validate(damaged / "store", progress=False).failures
    assert failure.part == "poison 000001" and failure.reason == "not finite: poison"
    assert failure.row == store.shard_rows(1)[2]["clip_id"]


def test_no_recordings(tmp_path):
    with pytest.raises(UserError, match="contains no recordings"):
        validate(tmp_path, progress=False)


def test_links_that_lead_out_are_followed_on_request(tmp_path):
    sound(tmp_path / "elsewhere" / "linked.wav")
    sound(tmp_path / "data" / "here.wav")
    (tmp_path / "data" / "link.wav").symlink_to(tmp_path / "elsewhere" / "linked.wav")
    assert ["--follow-links" in failure.reason for failure in validate(tmp_path / "data", progress=False).failures] == [True]
    followed = validate(tmp_path / "data", progress=False, follow_links=True)
    assert followed.failures == [] and followed.checked["recordings"] == 2
