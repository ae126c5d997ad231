"""What the world does to a pass: recordings, mounts, disks and memory that fail cost time, never data."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from test_preprocess import RATE, VARIANT, clip, make_store, tars, tone

from pipelines import cluster
from pipelines.features import recording, run
from pipelines.features.passes import MelPass
from pipelines.features.run import ShardWorker, execute, select
from pipelines.features.store import FeatureStore
from pipelines.preprocess import main, run_pass
from stages.errors import UserError


@pytest.fixture
def here(monkeypatch):
    """Units are worked on in this process, by a worker of their own as on Ray."""

    def outcomes(store, work, units, workers, reserve):
        monkeypatch.setattr(run.cluster, "given", lambda: (1, "cpu"))
        for unit in units:
            row = {"shard": unit.shard, "series": json.dumps(unit.series), "clips": unit.clips, "remake": unit.remake}
            yield ShardWorker(store, work)(row)

    monkeypatch.setattr(run, "_outcomes", outcomes)


def mel_pass(store: FeatureStore, **settings) -> run.PassReport:
    work = MelPass(VARIANT.audio)
    work.reject_failed = settings.pop("reject_failed", False)
    return execute(work, store, progress=False, **{"retry_waits": (0.0,), **settings})


def sounds(tmp_path: Path, count: int) -> list[Path]:
    return [tone(tmp_path / "sounds", i) for i in range(count)]


@pytest.fixture
def calm(tmp_path, here) -> dict[str, bytes]:
    """What ten tones become in an undisturbed pass."""
    store = make_store(tmp_path / "calm", [clip(path) for path in sounds(tmp_path, 10)])
    mel_pass(store)
    return tars(store)


def away(store: FeatureStore, shard: int) -> dict[Path, Path]:
    """Where the recordings of a shard are, and where they are moved to."""
    paths = [Path(row["path"]) for row in store.shard_rows(shard)]
    return {path: path.with_suffix(".away") for path in paths}


def move(names: dict[Path, Path]) -> None:
    for old, new in names.items():
        old.rename(new)


def test_recordings_moved_away_and_back_cost_nothing(ray_cluster, tmp_path, calm):
    store = make_store(tmp_path / "store", [clip(path) for path in sounds(tmp_path, 10)])
    names = away(store, 1)
    move(names)
    with pytest.raises(UserError, match=r"not complete: 4 clips in 1 shards failed.*No such file.*None of them is rejected"):
        run_pass("mel", store, VARIANT, progress=False, retry_waits=(0.0,))
    assert store.missing_shards("mel") == store.missing_shards("waveform") == [1]
    assert not any(row.rejected for row in store.ledger("mel").values())
    move({new: old for old, new in names.items()})
    report = run_pass("mel", store, VARIANT, progress=False)
    assert (report.made, report.clips, report.rejected) == ([1], 4, 0)
    assert tars(store) == calm


def test_a_mount_that_comes_back_is_waited_for(here, tmp_path, calm, monkeypatch, caplog):
    store = make_store(tmp_path / "store", [clip(path) for path in sounds(tmp_path, 10)])
    names, waits = away(store, 0) | away(store, 2), []
    move(names)

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            move({new: old for old, new in names.items()})

    monkeypatch.setattr("time.sleep", sleep)
    with caplog.at_level(logging.WARNING):
        report = mel_pass(store, retry_waits=(1.0, 2.0, 3.0))
    assert waits == [1.0, 2.0] and "2 shards could not be made" in caplog.text
    assert report.counts() == {"in": 10, "kept": 10, "rejected": 0, "filtered": 0, "failed": 0}
    assert tars(store) == calm


def test_a_pass_stops_when_most_shards_fail(here, tmp_path):
    """It does not try thousands of shards of a mount that is away, and makes them all when it is back."""
    paths = sounds(tmp_path, 60)
    store = make_store(tmp_path / "store", [clip(path) for path in paths], shard_size=1)
    (tmp_path / "sounds").rename(tmp_path / "gone")
    report = mel_pass(store, retry_waits=(0.0, 0.0))
    assert report.made == [] and report.shards_failed == 60 - report.shards_left and report.shards_left > 0
    with pytest.raises(UserError, match=f"{report.shards_left} more shards were not tried, since too many failed"):
        report.require_whole()
    (tmp_path / "gone").rename(tmp_path / "sounds")
    assert mel_pass(store).clips == 60


def test_what_fails_for_ever_can_be_given_up_and_taken_back(here, tmp_path, calm):
    store = make_store(tmp_path / "store", [clip(path) for path in sounds(tmp_path, 10)])
    names = dict(list(away(store, 1).items())[:1])
    move(names)
    report = mel_pass(store)
    assert report.counts() == {"in": 10, "kept": 6, "rejected": 0, "filtered": 0, "failed": 4}
    report = mel_pass(store, reject_failed=True)
    assert report.counts() == {"in": 4, "kept": 3, "rejected": 1, "filtered": 0, "failed": 0}
    assert mel_pass(store).made == [] and mel_pass(store, retry_rejected="silent").made == []
    move({new: old for old, new in names.items()})
    assert mel_pass(store, retry_rejected="No such file").made == [1]
    assert tars(store) == calm
    assert mel_pass(store, retry_rejected="").made == []


def test_clips_that_come_back_are_missing_from_later_series(here, tmp_path):
    """A pass that reads a series makes a shard again when that series has gained clips."""

    class Echo(MelPass):
        name, reads = "echo", ("mel",)
        series = ("echo",)

        def encode(self, rows, clips):
            return [run_kept({"echo": {"echo.npy": features["mel"][:1]}}) for features in clips]

    from pipelines.features.outcomes import Kept as run_kept

    paths = sounds(tmp_path, 8)
    silent = paths[3]
    heard = silent.read_bytes()
    soundfile.write(silent, np.zeros(RATE), RATE)
    store = make_store(tmp_path / "store", [clip(path) for path in paths])
    mel_pass(store)
    report = execute(Echo(VARIANT.audio), store, progress=False)
    assert report.counts() == {"in": 8, "kept": 7, "rejected": 0, "filtered": 1, "failed": 0}
    silent.write_bytes(heard)
    (again,) = mel_pass(store, retry_rejected="").made
    assert [unit.shard for unit in select(store, Echo(VARIANT.audio), retry_rejected="")] == [again]
    assert execute(Echo(VARIANT.audio), store, progress=False, retry_rejected="").clips == 4
    assert store.reader(["mel", "echo"]).clip_ids == store.reader(["mel"]).clip_ids


def test_quiet_clips_are_left_out_when_asked(here, tmp_path):
    """By their loudest 20 ms; named in the ledger and counted as filtered. Which are left out belongs to the series."""
    levels = {"loud": 0.5, "soft": 0.01, "hiss": 0.0005, "none": 0.0}  # of sines: -9, -43 and -69 dB, and no sound
    for name, level in levels.items():
        waveform = level * np.sin(np.arange(RATE) * 0.3)
        waveform[: RATE // 2] *= 0.1  # half of it is 20 dB softer, which counts for nothing
        soundfile.write(tmp_path / f"{name}.wav", waveform, RATE, subtype="FLOAT")
    store = make_store(tmp_path / "store", [clip(tmp_path / f"{name}.wav") for name in levels])
    report = execute(MelPass(VARIANT.audio, skip_silence=-50.0), store, progress=False)
    assert report.counts() == {"in": 4, "kept": 2, "rejected": 1, "filtered": 1, "failed": 0}
    assert "1 rejected: 1 × silent; 1 left out: 1 × quiet" in report.sentence()
    reasons = {entry.clip_id: entry.reason for entry in store.ledger("mel")[0].rejected}
    assert reasons == {"test-none": "silent", "test-hiss": "quiet: -69.0 dB at its loudest, below -50 dB"}
    assert set(store.reader(["mel", "waveform"]).clip_ids) == {"test-loud", "test-soft"}
    assert execute(MelPass(VARIANT.audio, skip_silence=-50.0), store, progress=False).shards_done == 0
    for other in (None, -60.0):
        with pytest.raises(UserError, match=f"skip_silence: was -50.0, now {'none' if other is None else other}"):
            execute(MelPass(VARIANT.audio, skip_silence=other), store, progress=False)


def test_only_the_shards_named(here, tmp_path):
    store = make_store(tmp_path / "store", [clip(path) for path in sounds(tmp_path, 10)], shard_size=2)
    assert mel_pass(store, shards=[1, 3]).made == [1, 3]
    assert mel_pass(store, shards=[0, 1]).made == [0]
    with pytest.raises(UserError, match="names shard 5; .* has 5, 0 to 4"):
        mel_pass(store, shards=[5])
    assert store.missing_shards("mel") == [2, 4]


def test_a_node_that_cannot_read_takes_no_work(here, tmp_path, monkeypatch):
    """Every worker first reads what the driver could read; the sentence names the node and the recording."""
    store = make_store(tmp_path / "store", [clip(path) for path in sounds(tmp_path, 4)])
    find = run._find_known

    def find_then_lose(store, work, units):
        find(store, work, units)
        (tmp_path / "sounds").rename(tmp_path / "gone")

    monkeypatch.setattr(run, "_find_known", find_then_lose)
    monkeypatch.setattr(run.platform, "node", lambda: "node-7")
    monkeypatch.setattr(MelPass, "encode", None)  # not reached
    report = mel_pass(store)
    with pytest.raises(UserError, match=rf"node-7 cannot read {tmp_path}/sounds/tone\d+\.wav \(.*No such file.*mount its storage"):
        report.require_whole()


# ------------------------------------------------------------------------------------------------------- one recording


def test_storage_that_fails_in_mid_read_is_not_the_end_of_the_sound(tmp_path, monkeypatch):
    """libsndfile takes a failing read for the end of the file; the clip would be kept cut, or rejected as damaged."""
    path = tone(tmp_path, 0, seconds=2.0)
    whole = recording.read_recording(str(path), RATE, 0.0, 2.0)

    class Failing:
        def __init__(self):
            self.file = open(path, "rb")  # noqa: SIM115

        def __getattr__(self, name):
            return getattr(self.file, name)

        def readinto(self, buffer):
            if self.file.tell() > 30_000:
                raise OSError(5, "Input/output error", str(path))
            return self.file.readinto(buffer)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    real = recording.open_recording
    monkeypatch.setattr(recording, "open_recording", lambda path: Failing())
    with pytest.raises(OSError, match="Input/output error"):
        recording.read_recording(f"file://{path}", RATE, 0.0, 2.0)
    monkeypatch.setattr(recording, "open_recording", real)
    np.testing.assert_array_equal(recording.read_recording(f"file://{path}", RATE, 0.0, 2.0), whole)


def test_recordings_behind_urls_are_read_by_range(tmp_path, monkeypatch):
    """One second from the middle of five minutes takes some of the bytes."""
    import fsspec

    samples = np.random.default_rng(0).uniform(-0.3, 0.3, (300 * RATE, 1))
    soundfile.write(tmp_path / "long.wav", samples, RATE)
    data = (tmp_path / "long.wav").read_bytes()
    fsspec.filesystem("memory").pipe("/ranges/long.wav", data)
    read = []
    fetched = recording.open_recording

    def counting(path):
        file = fetched(path)
        real = file.readinto

        def readinto(buffer):
            count = real(buffer)
            read.append(count)
            return count

        monkeypatch.setattr(file, "readinto", readinto, raising=False)
        return file

    monkeypatch.setattr(recording, "open_recording", counting)
    waveform = recording.read_recording("memory://ranges/long.wav", RATE, 150.0, 1.0)
    np.testing.assert_allclose(waveform, samples[150 * RATE : 151 * RATE, 0], atol=1e-4)
    assert 0 < sum(read) < len(data) / 20
    with pytest.raises(FileNotFoundError):
        recording.read_recording("memory://ranges/absent.wav", RATE, 0.0, 1.0)
    fsspec.filesystem("memory").rm("/ranges", recursive=True)


# ----------------------------------------------------------------------------------------------------------- the command


def test_the_command_ends_with_status_1_and_what_to_do(here, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(execute, "__kwdefaults__", {**execute.__kwdefaults__, "retry_waits": ()})
    store = make_store(tmp_path / "store", [clip(path) for path in sounds(tmp_path, 10)])
    names = dict(list(away(store, 1).items())[:1])
    move(names)
    arguments = ["mel", "--work", str(tmp_path), "--tiny", "--tracking-uri", "sqlite:////proc/nowhere/mlflow.db"]
    result = CliRunner().invoke(main, [*arguments, "--shards", "0-1"])
    assert result.exit_code == 1 and "4 clips in 1 shards failed" in result.output
    assert "`loa preprocess mel --" in result.output and "` with --reject-failed gives up" in result.output
    assert store.missing_shards("mel") == [1, 2]
    result = CliRunner().invoke(main, [*arguments, "--reject-failed"])
    assert result.exit_code == 0 and "6 clips in = 5 kept + 1 rejected + 0 filtered + 0 failed" in result.output
    move({new: old for old, new in names.items()})
    result = CliRunner().invoke(main, [*arguments, "--retry-rejected", "No such file"])
    assert result.exit_code == 0 and "4 clips in = 4 kept" in result.output
    assert "expected numbers and ranges such as 0-99,120" in CliRunner().invoke(main, [*arguments, "--shards", "x"]).output
