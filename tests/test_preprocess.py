"""The passes on a local cluster: what they write, what they reject, and what a crash costs."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil
import pyarrow as pa
import pytest
import soundfile
import torch
from click.testing import CliRunner

from options import Reservation
from pipelines import cluster
from pipelines.features.passes import MelPass, Pass
from pipelines.features.run import Unit, execute, make_shard
from pipelines.features.store import CLIP_SCHEMA, REJECTED_SCHEMA, FeatureStore, StoreWarning
from pipelines.preprocess import build_pass, main, run_pass
from stages.audio import fbank, load_audio, log_mel, normalise, pad_or_cut
from stages.errors import UserError
from stages.files import Place
from stages.variants import resolve

REPO = Path(__file__).resolve().parent.parent
VARIANT = resolve("audioldm2-full", tiny=True)
SPEECH = resolve("audioldm2-ljs", tiny=True)
RATE = VARIANT.audio.sample_rate
T = TypeVar("T")


def clip(path: Path | str, **values: object) -> dict[str, object]:
    name = Path(path).stem.replace(".", "-")
    row = {
        "clip_id": f"test-{name}",
        "corpus": "test",
        "path": str(path),
        "start": 0.0,
        "seconds": VARIANT.audio.clip_seconds,
        "captions": [f"the sound of {name}"],
        "transcript": "",
        "labels": [],
        "split": "train",
        "licence": "CC0",
    }
    return row | values


def tone(folder: Path, number: int, seconds: float = 1.0) -> Path:
    """A short recording unlike its neighbours."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"tone{number:03d}.wav"
    time_axis = np.arange(int(seconds * 22050)) / 22050
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * (200 + 37 * number) * time_axis), 22050)
    return path


def make_store(root: Path | str, rows: list[dict[str, object]], shard_size: int = 4) -> FeatureStore:
    table = pa.Table.from_pylist(rows, schema=CLIP_SCHEMA)
    return FeatureStore.create(root, VARIANT.audio, table, REJECTED_SCHEMA.empty_table(), shard_size=shard_size)


def tars(store: FeatureStore) -> dict[str, bytes]:
    """Every file of a store, and the ledgers, whose files count how often they were compacted."""
    root = Path(store.root)
    files = {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.glob("*/*")) if path.is_file()}
    return files | {series: b"".join(row.to_json() for row in store.ledger(series).values()) for series in store.recipes()}


def run_here(name: str, store: FeatureStore, variant=VARIANT, released=None, **settings) -> None:
    """A pass in this process, without Ray."""
    work = build_pass(name, variant, released, **settings)
    for series in work.series:
        store.begin_series(series, work.recipe(series))
    work.load(torch.device("cpu"))
    for shard in range(store.num_shards):
        make_shard(store, work, Unit(shard, tuple(work.series), store.shard_count(shard)), work.encode)


@pytest.fixture(scope="session")
def encoders(tmp_path_factory) -> dict[str, Path]:
    """Released folders of tiny, untrained encoders."""
    from stages.audiomae.model import AudioMAE
    from stages.clap.model import train_tokenizers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("stages")
    AudioMAE(VARIANT.audiomae).save(folder / "audiomae")
    VARIANT.vae.build().save_pretrained(folder / "vae/vae")
    roberta, unigram = train_tokenizers(["the sound of a tone", "a dog barks", "rain"] * 5, VARIANT.clap, VARIANT.t5)
    VARIANT.clap.build().save_pretrained(folder / "clap/text_encoder")
    VARIANT.t5.build().save_pretrained(folder / "clap/text_encoder_2")
    VARIANT.clap.feature_extractor().save_pretrained(folder / "clap/feature_extractor")
    roberta.save_pretrained(folder / "clap/tokenizer")
    unigram.save_pretrained(folder / "clap/tokenizer_2")
    return {name: folder / name for name in ("audiomae", "vae", "clap")}


@pytest.fixture
def tones(tmp_path) -> FeatureStore:
    """Ten short tones in three shards."""
    return make_store(tmp_path / "tones", [clip(tone(tmp_path / "sounds", i)) for i in range(10)])


# ------------------------------------------------------------------------------------------------------------ mel


def test_real_recordings_become_mel_and_waveform(shared, ray_cluster, tmp_path):
    found = sorted((shared / "data").rglob("*.ogg"))[:3] + sorted((shared / "data").rglob("*.mp3"))[:2]
    found += sorted((shared / "data").rglob("*.opus"))[:1] + sorted((shared / "data").rglob("*.flac"))[:2]
    store = make_store(tmp_path, [clip(path, start=0.5) for path in found])
    report = run_pass("mel", store, VARIANT, progress=False)
    assert (report.clips, report.rejected, report.shards_done, report.shards_skipped) == (len(found), 0, 2, 0)
    reader = store.reader(["mel", "waveform"])
    for row in store.shard_rows(0):
        read = reader.read(row["clip_id"])
        waveform = normalise(load_audio(row["path"], RATE, 0.5, VARIANT.audio.clip_seconds))
        waveform = pad_or_cut(waveform, VARIANT.audio.clip_samples)
        assert np.abs(read["waveform"] - waveform).max() <= 2**-16 and read["waveform"].shape == (40960,)
        mel = log_mel(torch.from_numpy(waveform)[None], VARIANT.audio)[0].numpy()
        assert read["mel"].dtype == np.float16 and read["mel"].shape == (256, 64)
        np.testing.assert_allclose(read["mel"], mel, atol=6e-3)
    assert store.recipes()["mel"]["audio"]["clip_seconds"] == VARIANT.audio.clip_seconds


def test_what_cannot_be_used_is_rejected_with_a_reason(ray_cluster, tmp_path):
    soundfile.write(tmp_path / "silent.wav", np.zeros(RATE), RATE)
    (tmp_path / "broken.mp3").write_bytes(b"not audio at all")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    good = tone(tmp_path, 1)
    bad = [clip(tmp_path / name) for name in ("silent.wav", "broken.mp3", "empty.wav")]
    store = make_store(tmp_path / "store", [clip(good), clip(good, clip_id="late", start=9.0), *bad])
    report = run_pass("mel", store, VARIANT, progress=False)
    assert (report.clips, report.rejected) == (1, 4) and "4 rejected" in report.sentence()
    for series in ("mel", "waveform"):
        rejected = {entry.clip_id: entry.reason for row in store.ledger(series).values() for entry in row.rejected}
        assert set(rejected) == {"late", "test-silent", "test-broken", "test-empty"}
        assert rejected["test-silent"] == "silent" and "1.00 s" in rejected["late"]
    assert store.reader(["mel"]).clip_ids == ["test-tone001"]


def test_only_missing_shards_are_made(ray_cluster, tones):
    assert run_pass("mel", tones, VARIANT, limit_shards=1, progress=False).shards_done == 1
    report = run_pass("mel", tones, VARIANT, progress=False)
    assert (report.shards_done, report.shards_skipped, report.clips) == (2, 1, 6)
    whole, root = tars(tones), Path(tones.root)
    rows = tones.ledger("mel")
    tar, kept = (root / "mel" / rows[shard].object for shard in (1, 0))
    tar.write_bytes(tar.read_bytes()[:1000])
    (root / "waveform" / tones.ledger("waveform")[2].object).unlink()
    before = kept.stat().st_mtime_ns
    with pytest.warns(StoreWarning, match="has 1000 bytes"):
        report = run_pass("mel", tones, VARIANT, progress=False)
    assert (report.shards_done, report.shards_skipped) == (2, 1)
    assert tars(tones) == whole and kept.stat().st_mtime_ns == before
    again = run_pass("mel", tones, VARIANT, progress=False)
    assert again.shards_done == 0 and "nothing to do" in again.sentence()


def test_a_store_on_an_object_store_is_filled_and_read(s3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOA_CACHE", str(tmp_path / "cache"))
    rows = [clip(tone(tmp_path / "sounds", i)) for i in range(6)]
    here, there = make_store(tmp_path / "store", rows), make_store(f"{s3}/store", rows)
    for store in (here, there):
        run_here("mel", store)
        store.compact("mel")
        assert store.verify("mel") == []
    assert there.ledger("mel")[1] == here.ledger("mel")[1] and there.place.tree() == here.place.tree()
    mels = [store.reader(["mel"]) for store in (here, there)]
    assert all(np.array_equal(*(reader.read(i)["mel"] for reader in mels)) for i in range(6))
    assert not (tmp_path / "s3:").exists()


def test_passes_at_once_share_the_shards(ray_cluster, tones, monkeypatch):
    monkeypatch.setattr("pipelines.features.run.OTHERS", 0.2)
    work = build_pass("mel", VARIANT)
    with ThreadPoolExecutor(1) as thread, tones.working("another pass") as other:
        for series in work.series:
            other.begin_series(series, work.recipe(series))
        with other.claim(work.series, 1) as mine:
            pass_at_once = thread.submit(run_pass, "mel", tones, VARIANT, progress=False)
            deadline = time.monotonic() + 60
            while tones.missing_shards("mel") != [1] or tones.missing_shards("waveform") != [1]:
                assert time.monotonic() < deadline and not pass_at_once.done()
                time.sleep(0.05)
            time.sleep(0.5)
            assert not pass_at_once.done()  # it waits for the shard that another is making
            work.load(torch.device("cpu"))
            make_shard(other, work, Unit(1, mine, 4), work.encode)
        assert pass_at_once.result(60).shards_done == 2
    assert tones.missing_shards("mel") == [] and Place.of(tones.root + "/jobs").list() == {}


def test_without_ray_the_bytes_are_the_same(ray_cluster, tones, tmp_path):
    run_pass("mel", tones, VARIANT, progress=False)
    calm = make_store(tmp_path / "calm", [clip(tone(tmp_path / "sounds", i)) for i in range(10)])
    threads = torch.get_num_threads()
    report = run_pass("mel", calm, VARIANT, workers=0, progress=False)
    assert (report.clips, report.shards_done, torch.get_num_threads()) == (10, 3, threads)
    assert tars(calm) == tars(tones)


def test_other_audio_settings_are_refused(ray_cluster, tones):
    with pytest.raises(UserError, match=r"clip_seconds: was 2\.56, now 10\.24.*--tiny"):
        run_pass("mel", tones, resolve("audioldm2-full"), progress=False)


# ------------------------------------------------------------------------------------------------------- crashes


class DeadlyPass(MelPass):
    """A decoder that takes its process along at one clip."""

    def encode(self, rows, clips):
        for row in rows:
            if row["clip_id"] == "test-tone004":
                os._exit(11)
        return super().encode(rows, clips)


class FaultyPass(MelPass):
    """A programming error."""

    def encode(self, rows, clips):
        raise IndexError("a fault of ours")


@pytest.fixture
def by_value():
    """Lets workers have the classes of this file, which they cannot import."""
    from ray import cloudpickle

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


def test_a_clip_that_kills_its_decoder_costs_itself_alone(ray_cluster, tones, tmp_path, by_value):
    report = execute(DeadlyPass(VARIANT.audio), tones, progress=False)
    assert (report.clips, report.rejected, report.shards_done) == (9, 1, 3)
    (entry,) = [entry for row in tones.ledger("mel").values() for entry in row.rejected]
    assert entry.clip_id == "test-tone004" and "died" in entry.reason
    calm = make_store(tmp_path / "calm", [clip(tone(tmp_path / "sounds", i)) for i in range(10)])
    run_pass("mel", calm, VARIANT, progress=False)
    kept, whole = tones.reader(["mel", "waveform"]), calm.reader(["mel", "waveform"])
    assert kept.clip_ids == [clip_id for clip_id in whole.clip_ids if clip_id != "test-tone004"]
    assert all(np.array_equal(kept.read(i)[name], whole.read(i)[name]) for i in kept.clip_ids for name in ("mel", "waveform"))


def test_a_fault_of_ours_is_raised_not_rejected(ray_cluster, tones, by_value):
    with pytest.raises(RuntimeError, match="a fault of ours"):
        execute(FaultyPass(VARIANT.audio), tones, progress=False)
    assert tones.missing_shards("mel") == [0, 1, 2]


DRIVER = """
import sys
from pipelines import cluster
from pipelines.features.passes import MelPass
from pipelines.features.run import execute
from pipelines.features.store import FeatureStore
store = FeatureStore.open(sys.argv[1])
cluster.connect(sys.argv[2])
execute(MelPass(store.audio), store, workers=1, progress=False)
"""


def shards_of(store: FeatureStore) -> int:
    return len(list(Path(store.root).glob("waveform/*.tar")))


def until(condition: Callable[[], T | None], driver: subprocess.Popen[bytes], what: str) -> T:
    """What `condition` gives once it gives something, while the driver lives."""
    deadline = time.monotonic() + 180
    while not (found := condition()):
        assert driver.poll() is None and time.monotonic() < deadline, f"the driver {what}"
        time.sleep(0.002)
    return found


def at_work() -> psutil.Process | None:
    """A worker of this process' Ray that is at a shard."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::Map"):
                return child
    return None


@pytest.mark.slow
def test_killed_workers_and_drivers_leave_the_same_bytes(ray_cluster, tmp_path, rounds):
    """Each round kills a worker within a shard, and after further shards the driver."""
    rng = np.random.default_rng()
    rows = [clip(tone(tmp_path / "sounds", i, seconds=2.5)) for i in range(rounds(80, 800))]
    killed, calm = make_store(tmp_path / "killed", rows, 2), make_store(tmp_path / "calm", rows, 2)
    environment, kills = os.environ | {"PYTHONPATH": str(REPO)}, 0
    address = ray_cluster.get_runtime_context().gcs_address
    for _ in range(rounds(1, 10)):
        before = shards_of(killed)
        driver = subprocess.Popen([sys.executable, "-c", DRIVER, killed.root, address], env=environment, cwd=REPO)
        try:
            until(lambda before=before: shards_of(killed) > before, driver, "made no shard")
            time.sleep(rng.uniform(0, 0.2))
            until(at_work, driver, "had no worker").kill()
            before, kills = shards_of(killed), kills + 1
            until(lambda before=before: shards_of(killed) > before, driver, "made no shard after its worker had died")
            time.sleep(rng.uniform(0, 0.2))
            assert driver.poll() is None, "the driver had nothing left to do"
        finally:
            driver.kill()
            driver.wait()
        kills += 1
    assert kills == rounds(2, 20)
    run_pass("mel", calm, VARIANT, progress=False)
    left = len(killed.missing_shards("mel"))
    assert 0 < left < killed.num_shards
    report = run_pass("mel", killed, VARIANT, progress=False)
    assert report.shards_done >= left - 2  # its worker may finish the shard in hand before it notices
    one, other = tars(killed), tars(calm)
    for series in ("mel", "waveform"):  # these say which commit made them, and a checkout may move on under ten rounds of kills
        assert one.pop(f"{series}/series.json") and other.pop(f"{series}/series.json")
    assert one == other


# -------------------------------------------------------------------------------------------------------- encoders


def test_loa_on_actors_and_latent_equal_the_encoders_called_directly(ray_cluster, tones, encoders):
    from diffusers import AutoencoderKL

    from stages.audiomae.model import AudioMAE, pool_loa

    with pytest.raises(UserError, match=r"'waveform' .* 0 of 3 shards exist; .*`loa preprocess mel`"):
        run_pass("loa", tones, VARIANT, encoders, progress=False)
    run_pass("mel", tones, VARIANT, progress=False)
    report = run_pass("loa", tones, VARIANT, encoders, progress=False)
    assert (report.clips, report.rejected, report.shards_done) == (10, 0, 3)
    run_here("latent", tones, VARIANT, encoders)
    mae, vae = AudioMAE.load(encoders["audiomae"]), AutoencoderKL.from_pretrained(encoders["vae"] / "vae")
    # Series that name one member twice are read one at a time.
    inputs, latents, loa = tones.reader(["mel", "waveform"]), tones.reader(["latent"]), {p: tones.reader([f"loa-{p}"]) for p in (1, 4)}
    for clip_id in inputs.clip_ids[:3]:
        given = inputs.read(clip_id)
        with torch.inference_mode():
            features = mae.features(fbank(torch.from_numpy(given["waveform"])[None], VARIANT.audio))
            posterior = vae.encode(torch.from_numpy(given["mel"]).float()[None, None]).latent_dist
        for pooling, reader in loa.items():
            read = reader.read(clip_id)["loa"]
            assert read.dtype == np.float16 and read.shape == (VARIANT.loa_tokens(pooling), VARIANT.audiomae.width)
            np.testing.assert_allclose(read, pool_loa(features, mae.config.grid, pooling)[0].numpy(), atol=5e-3)
        latent = latents.read(clip_id)["latent"]
        channels, frames, bins = VARIANT.latent_shape
        assert latent.shape == (2 * channels, frames, bins)
        np.testing.assert_allclose(latent, torch.cat([posterior.mean, posterior.std], 1)[0].numpy(), atol=5e-3, rtol=5e-3)
    recipe = tones.recipes()["loa-4"]
    assert recipe["pooling"] == 4 and len(recipe["weights"]["audiomae"]) == 64 and "code" in recipe["provenance"]


def test_other_weights_are_refused(ray_cluster, tones, encoders, tmp_path):
    from stages.audiomae.model import AudioMAE

    run_here("mel", tones)
    run_here("loa", tones, VARIANT, encoders, poolings=[4])
    torch.manual_seed(1)
    AudioMAE(VARIANT.audiomae).save(tmp_path / "other")
    with pytest.raises(UserError, match=r"weights\.audiomae: was [0-9a-f]{64}, now [0-9a-f]{64}"):
        run_pass("loa", tones, VARIANT, {"audiomae": tmp_path / "other"}, poolings=[4], progress=False)


def test_text_and_speech(encoders, tmp_path):
    from stages.frozen import TextEncoders
    from stages.phonemes import phoneme_ids

    sounds = [tone(tmp_path / "sounds", i) for i in range(3)]
    store = make_store(
        tmp_path / "store",
        [
            clip(sounds[0], captions=["rain", "the sound of a tone and a dog"]),
            clip(sounds[1], captions=[], labels=["Dog", "Rain"]),
            clip(sounds[2], captions=["rain"], transcript="Two words."),
        ],
    )
    run_here("mel", store)
    run_here("text", store, VARIANT, encoders)
    run_here("speech", store, SPEECH, encoders)
    assert store.ledger("speech")[0].rejected == ()
    network, reader = TextEncoders.load(encoders["clap"]), store.reader(["text"])
    for clip_id, texts in {
        "test-tone000": ["rain", "the sound of a tone and a dog"],
        "test-tone001": ["Dog, Rain."],
        "test-tone002": ["rain"],
    }.items():
        read = reader.read(clip_id)
        assert read["clap_text"].shape == (len(texts), VARIANT.clap.projection_dim)
        assert read["t5"].shape == (len(texts), read["t5_length"].max(), VARIANT.t5.width) and read["t5_length"].dtype == np.int16
        for i, text in enumerate(texts):
            states, mask = network.t5([text])
            length = int(mask.sum())
            assert read["t5_length"][i] == length and not read["t5"][i, length:].any()
            np.testing.assert_allclose(read["t5"][i, :length], states[0, :length].numpy(), atol=5e-3, rtol=5e-3)
            np.testing.assert_allclose(read["clap_text"][i], network.clap_text([text])[0].numpy(), atol=2e-3)
    speech = store.reader(["speech", "waveform"])
    assert speech.clip_ids == ["test-tone002"]
    read = speech.read("test-tone002")
    assert read["phonemes"].dtype == np.int16
    assert np.array_equal(read["phonemes"], phoneme_ids("Two words.", SPEECH.phonemes.max_length))
    voice = network.clap_audio(torch.from_numpy(read["waveform"])[None], RATE)[0].numpy()
    np.testing.assert_allclose(read["clap_audio"], voice, atol=2e-3)


# ---------------------------------------------------------------------------------------------------- the command


def test_the_command_makes_a_series_and_says_so(ray_cluster, tmp_path):
    make_store(tmp_path / "store", [clip(tone(tmp_path / "sounds", i)) for i in range(3)])
    arguments = ["--work", str(tmp_path), "--tiny", "--verify"]
    result = CliRunner().invoke(main, ["mel", *arguments])
    assert result.exit_code == 0 and "mel: 3 clips in 1 shards" in result.output
    assert "nothing to do" in CliRunner().invoke(main, ["mel", *arguments]).output


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["loa", "--tiny"], "`loa train audiomae --work {work} --tiny`"),
        (["latent", "--tiny"], "`loa train vae --work {work} --tiny`"),
        (["text", "--tiny"], "--with clap="),
        (["mel", "--tiny", "--store", "/nowhere/at/all"], "loa ingest"),
        (["mel", "--variant", "audioldm2-ful"], "audioldm2-full"),
        (["loa", "--tiny", "--pooling", "x"], "list of numbers"),
    ],
)
def test_the_command_explains_what_is_missing(tmp_path, arguments, says):
    make_store(tmp_path / "store", [clip(tone(tmp_path / "sounds", 0))])
    result = CliRunner().invoke(main, [*arguments, "--work", str(tmp_path)])
    said = re.sub(r"--work \S+", "--work {work}", result.output)
    assert result.exit_code and says in said and "Traceback" not in said


def test_poolings_must_divide_the_grid(encoders):
    with pytest.raises(UserError, match="--pooling 3 does not divide AudioMAE's 16 x 8 grid"):
        build_pass("loa", VARIANT, encoders, [3])
    assert build_pass("loa", VARIANT, encoders).series == ("loa-1", "loa-2", "loa-4", "loa-8")


# ------------------------------------------------------------------------------------------------------- clusters


def test_an_address_where_nothing_listens_is_refused_at_once(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as taken:  # bound but not listening
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=f"no Ray cluster answers at '{address}'"):
            cluster.connect(address)


def test_whose_cluster_it_is(ray_cluster, monkeypatch):
    assert cluster.ends_with_us()
    monkeypatch.setattr(cluster, "_started", "192.0.2.1:6379")  # one that we started earlier; this one was joined
    assert not cluster.ends_with_us()


NEEDS = {"mel": MelPass.needs, "encoder": Pass.needs}


@pytest.mark.parametrize("cpus", [1, 2, 3, 16, 200])
@pytest.mark.parametrize("gpus", [0, 1, 8])
@pytest.mark.parametrize("workers", [None, 1, 3, 64])
@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
def test_a_machine_is_divided_so_that_a_cpu_is_left(cpus, gpus, workers, needs):
    pool = cluster.divide(cluster.Machine(cpus, gpus), needs, 50, workers)
    assert 1 <= pool.smallest == pool.largest <= 50 and pool.num_cpus > 0
    assert pool.largest * pool.num_cpus <= max(1, cpus - 1) + 1e-9
    assert pool.largest * pool.num_gpus <= gpus + 1e-9
    assert (pool.num_gpus > 0) == (needs is Pass.needs and gpus > 0)


@pytest.mark.parametrize(
    ("cpus", "gpus", "needs", "reserve", "expected"),  # expected: workers, CPUs and GPUs of each
    [
        (17, 0, MelPass.needs, Reservation(), (16, 1, 0)),
        (17, 0, Pass.needs, Reservation(), (4, 4, 0)),
        (3, 0, Pass.needs, Reservation(), (1, 2, 0)),
        (33, 4, Pass.needs, Reservation(), (4, 4, 1)),
        (33, 4, Pass.needs, Reservation(gpus=0), (8, 4, 0)),  # as told, not on the GPUs that are there
        (33, 4, Pass.needs, Reservation(gpus=0.5), (8, 4, 0.5)),
        (17, 0, MelPass.needs, Reservation(cpus=2), (8, 2, 0)),
        (17, 0, Pass.needs, Reservation(gpus=1), (1, 4, 1)),  # a GPU that is not there is not replaced: `await_room` refuses
    ],
)
def test_what_a_machine_gives_to_workers(cpus, gpus, needs, reserve, expected):
    pool = cluster.divide(cluster.Machine(cpus, gpus), needs, 50, None, reserve)
    assert (pool.largest, pool.num_cpus, pool.num_gpus) == expected


def test_a_worker_that_this_machine_cannot_hold_is_refused_at_once(ray_cluster, tones, encoders):
    run_here("mel", tones)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"a worker of the loa pass needs .*1 GPU, and this machine has 4 CPUs.* `--gpu 0`"):
        run_pass("loa", tones, VARIANT, encoders, reserve=Reservation(gpus=1), progress=False)
    other = make_store(Path(tones.root) / "other", [clip("a.wav")])
    with pytest.raises(UserError, match=r"needs 1 CPU and 9000000\.0 GB of memory, .* --memory"):
        run_pass("mel", other, VARIANT, reserve=Reservation(memory=9 * 10**15), progress=False)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("kind", [Exception, RuntimeError, ConnectionError])
def test_a_ray_that_does_not_start_is_told_in_a_sentence(monkeypatch, kind):
    """Of a node that takes too long to start, Ray raises a bare Exception."""
    import ray

    def init(**settings):
        raise kind("The current node timed out during startup.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UserError, match="Ray cannot start .* timed out during startup"):
        cluster.connect("local")
    monkeypatch.setattr(ray, "init", lambda **settings: {}["a fault of ours"])
    with pytest.raises(KeyError):
        cluster.connect("local")
