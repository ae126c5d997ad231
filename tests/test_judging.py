"""What judges hear, kept by content; scores of folders of sound."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner

from pipelines import evaluate as job
from pipelines.evaluation import listening as judging
from pipelines.evaluation import metrics
from pipelines.evaluation.clips import HeldOut, captions_hash, write_captions
from pipelines.evaluation.listening import ClapJudge, Heard, Level, clip_files, hear_files, scores
from pipelines.evaluation.records import read_records
from pipelines.score import score_folders
from stages.errors import UserError
from stages.judges.judge import Judgement, Listening, random_judge

RATE = 16_000


def tone(number, seconds=1.0, channels=1):
    time = np.arange(round(seconds * RATE)) / RATE
    rng = np.random.default_rng(number)
    wave = 0.3 * np.sin(2 * np.pi * (200 + 40 * number) * time) + 0.02 * rng.standard_normal(len(time))
    return wave if channels == 1 else np.stack([wave, -0.5 * wave], 1)


@pytest.fixture
def sets(tmp_path):
    """Twelve generated and twelve real clips of the same names."""
    for folder, shift in (("generated", 0), ("real", 3)):
        (tmp_path / folder).mkdir()
        for i in range(12):
            soundfile.write(tmp_path / folder / f"clip-{i:02d}.wav", tone(i + shift), RATE)
    return tmp_path


class Counting:
    """A judge that hears level and pitch, and counts the clips it was given."""

    name = "cnn14-16k"

    def __init__(self, name="cnn14-16k", weights="w1", clip_seconds=1.0):
        self.name, self.weights_hash, self.clip_seconds, self.heard = name, weights, clip_seconds, 0

    def embed(self, waveforms, sample_rate):
        self.heard += len(waveforms)
        rows = [[np.std(w), np.abs(np.diff(w)).mean(), np.abs(w).max()] for w in waveforms]
        rows = torch.tensor(np.array(rows), dtype=torch.float32)
        return Judgement(rows, torch.cat([10 * rows, -rows], 1))

    def protocol(self):
        listening = {"clip_seconds": self.clip_seconds, "min_samples": 0, "remove_mean": False, "resampler": "soxr-vhq"}
        return {"judge": self.name, "weights_sha256": self.weights_hash, "sample_rate": RATE, "listening": listening}


# --------------------------------------------------------------------------------------------------------- the cache


def test_what_was_heard_is_not_heard_again(sets):
    files = list(clip_files(sets / "generated").values())
    judge = Counting()
    first = hear_files(judge, files, cache=sets / "cache")
    again = hear_files(judge, files, cache=sets / "cache")
    fresh = hear_files(Counting(), files)
    assert judge.heard == 12
    for other in (again, fresh):
        assert (other.rows == first.rows).all() and (other.logits == first.logits).all() and (other.clip_of == first.clip_of).all()


def test_the_cache_goes_by_content_not_by_name(sets):
    judge, cache = Counting(), sets / "cache"
    before = hear_files(judge, list(clip_files(sets / "generated").values()), cache=cache)
    soundfile.write(sets / "generated" / "clip-03.wav", tone(40), RATE)  # the same name, another sound
    (sets / "generated" / "clip-11.wav").rename(sets / "generated" / "zz.wav")  # another name, the same sound
    after = hear_files(judge, list(clip_files(sets / "generated").values()), cache=cache)
    assert judge.heard == 13
    changed = [i for i in range(12) if (before.rows[i] != after.rows[i]).any()]
    assert changed == [3]
    assert (after.rows == hear_files(Counting(), list(clip_files(sets / "generated").values())).rows).all()


@pytest.mark.parametrize("change", [{"weights": "w2"}, {"clip_seconds": 2.0}, {"name": "cnn14-32k"}])
def test_other_weights_and_settings_are_heard_anew(sets, change):
    files = list(clip_files(sets / "generated").values())
    hear_files(Counting(), files, cache=sets / "cache")
    other = Counting(**change)
    hear_files(other, files, cache=sets / "cache")
    assert other.heard == 12
    first_channel = Counting()
    hear_files(first_channel, files, "first", cache=sets / "cache")
    assert first_channel.heard == 12


def test_damaged_entries_are_heard_anew_and_nothing_in_them_is_run(sets):
    import pickle

    files = list(clip_files(sets / "generated").values())
    judge = Counting()
    first = hear_files(judge, files, cache=sets / "cache")
    entries = sorted((sets / "cache").rglob("*.npz"))
    assert len(entries) == 12
    entries[0].write_bytes(b"half of a")
    entries[1].write_bytes(entries[1].read_bytes()[:200])

    class Trap:
        def __reduce__(self):
            return (open, (str(sets / "sprung"), "w"))

    with entries[2].open("wb") as file:
        np.savez(file, rows=np.array([Trap()], dtype=object), logits=np.zeros(3))
    entries[3].write_bytes(pickle.dumps(Trap()))
    again = hear_files(judge, files, cache=sets / "cache")
    assert judge.heard == 16 and (again.rows == first.rows).all() and not (sets / "sprung").exists()


def test_clips_of_several_rates_and_channels_are_heard(sets):
    soundfile.write(sets / "generated" / "clip-05.wav", tone(5, channels=2), RATE)
    soundfile.write(sets / "generated" / "clip-06.flac", tone(6)[::2], RATE // 2)
    (sets / "generated" / "clip-06.wav").unlink()
    files = clip_files(sets / "generated")
    assert list(files) == [f"clip-{i:02d}" for i in range(12)]
    mean, first = (hear_files(Counting(), list(files.values()), channels).rows for channels in ("mean", "first"))
    assert mean[5, 0] == pytest.approx(first[5, 0] / 4, rel=1e-3)  # the channels are w and -w / 2
    assert (np.delete(mean, 5, 0) == np.delete(first, 5, 0)).all()


def test_a_published_judge_hears_files_as_it_hears_waveforms(sets):
    judge = random_judge("cnn14-16k", listening=Listening(clip_seconds=1.0))
    files = list(clip_files(sets / "generated").values())
    heard = hear_files(judge, files, cache=sets / "cache")
    directly = judge.embed([file.read("mean")[0] for file in files], RATE)
    assert np.allclose(heard.rows, directly.embedding.numpy(), atol=1e-5) and heard.logits.shape == (12, 527)
    windows = random_judge("vggish", listening=Listening(clip_seconds=2.0))
    heard = hear_files(windows, files[:3], cache=sets / "cache")
    assert heard.clip_of.tolist() == [0, 0, 1, 1, 2, 2] and heard.num_clips == 3  # two windows of 0.96 s in 2 s
    assert (hear_files(windows, files[:3], cache=sets / "cache").rows == heard.rows).all()


# -------------------------------------------------------------------------------------------------------- the scores


def heard(rng, clips, rows=1, width=4, classes=6):
    return Heard(rng.standard_normal((clips * rows, width)), np.repeat(np.arange(clips), rows), rng.standard_normal((clips, classes)))


def test_every_judge_gives_its_metrics():
    rng = np.random.default_rng(0)
    reference, generated = heard(rng, 30), heard(rng, 30)
    found = {one.metric: one for one in scores("cnn14-16k", reference, generated, range(30)).found}
    assert set(found) == {"fd", "inception_score", "kl_panns", "kl_sigmoid_panns"}
    assert found["fd"].value == metrics.frechet_distance(reference.rows, generated.rows)
    assert found["kl_panns"].value == metrics.kl_divergence(reference.logits, generated.logits)
    assert found["kl_panns"].fields["direction"] == "KL(reference || generated)"
    assert found["inception_score"].fields["seed"] == 2020 and "deviation" in found["inception_score"].extra
    assert {one.metric for one in scores("passt-s", reference, generated, range(30)).found} == {"kl_passt"}


def test_kl_pairs_clips_by_their_numbers():
    rng = np.random.default_rng(0)
    reference, generated = heard(rng, 8), heard(rng, 3)
    (kl,) = scores("passt-s", reference, generated, [5, 0, 2]).found
    assert kl.value == metrics.kl_divergence(reference.logits[[5, 0, 2]], generated.logits) and kl.fields["num_reference"] == 3
    unpaired = scores("passt-s", reference, generated, None)
    assert not unpaired.found and "same name" in unpaired.missing["kl_passt"]


def test_fad_wants_windows_and_fd_says_when_clips_are_few():
    rng = np.random.default_rng(0)
    few = scores("vggish", heard(rng, 3, 2), heard(rng, 3, 2), None)
    assert "6 windows are too few for 4 dimensions" in few.missing["fad"] and "500 rows" in few.missing["fad_infinity"]
    many = scores("vggish", heard(rng, 60, 10), heard(rng, 60, 10), None)
    assert {one.metric for one in many.found} == {"fad", "fad_infinity"} and not many.missing
    assert many.found[0].fields["rows_generated"] == 600 and many.found[0].fields["num_reference"] == 60
    assert "3 embeddings for 4 dimensions" in scores("cnn14-16k", heard(rng, 3), heard(rng, 3), None).notes[0]


def test_folders_give_a_record_per_score(sets):
    clips = [HeldOut(f"clip-{i:02d}", "", f"a tone of {i}", "", None) for i in range(12)]
    write_captions(sets / "captions.json", clips)
    found = score_folders(
        sets / "generated", sets / "real", [Counting()], name="A", captions=sets / "captions.json", seconds=1.0, candidates=1,
        made={"guidance_scale": 3.5},
    )  # fmt: skip
    by_metric = {record.protocol.metric: record for record in found.records}
    assert set(by_metric) == {"fd", "inception_score", "kl_panns", "kl_sigmoid_panns"} and not found.missing
    protocol = by_metric["kl_panns"].protocol
    assert protocol.captions_sha256 == captions_hash(clips) and protocol.num_generated == protocol.num_reference == 12
    assert (protocol.judge, protocol.judge_sha256, protocol.clip_rule) == ("cnn14-16k", "w1", "cut or padded to 1 s")
    assert by_metric["fd"].protocol.references_sha256 and by_metric["inception_score"].protocol.references_sha256 is None
    assert by_metric["fd"].made["guidance_scale"] == 3.5 and by_metric["fd"].check["clips"] == 12
    assert "FD ↓" in found.table()


def test_scores_do_not_depend_on_where_the_clips_lie_or_in_what_order(sets):
    first = score_folders(sets / "generated", sets / "real", [Counting()], name="A", seconds=None)
    for folder in ("generated", "real"):
        (sets / f"moved-{folder}" / "deep").mkdir(parents=True)
        for i, path in enumerate(sorted((sets / folder).iterdir(), reverse=True)):
            path.rename(sets / f"moved-{folder}" / ("deep" if i % 2 else "") / path.name)
    assert score_folders(sets / "moved-generated", sets / "moved-real", [Counting()], name="A", seconds=None).records == first.records


def test_clips_that_hold_no_sound_are_refused_and_silence_is_told(sets):
    soundfile.write(sets / "generated" / "clip-00.wav", np.zeros(RATE), RATE)
    soundfile.write(sets / "generated" / "clip-01.wav", tone(1, 0.5), RATE)
    found = score_folders(sets / "generated", sets / "real", [Counting()], name="A", seconds=1.0)
    assert found.notes[0].startswith("8% of the generated clips are silent: do not rank")
    assert any("short: clip-01" in note for note in found.notes)
    assert found.records[0].check == {"clips": 12, "silent": 1, "clipped": 0, "short": 1} and found.records[0].silent_share > 0.01
    soundfile.write(sets / "generated" / "clip-02.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    (sets / "generated" / "clip-04.wav").write_bytes(b"not sound")
    with pytest.raises(UserError, match="2 of 12 clips.*clip-02, clip-04"):
        score_folders(sets / "generated", sets / "real", [Counting()], name="A")


def test_folders_that_do_not_fit_are_refused(sets):
    with pytest.raises(UserError, match="no recordings"):
        (sets / "empty").mkdir()
        score_folders(sets / "empty", sets / "real", [Counting()], name="A")
    with pytest.raises(UserError, match="no folder"):
        score_folders(sets / "nowhere", sets / "real", [Counting()], name="A")
    write_captions(sets / "captions.json", [HeldOut("clip-00", "", "x", "", None), HeldOut("clip-99", "", "y", "", None)])
    with pytest.raises(
        UserError, match=r"1 of its clips are not there \(clip-99\); 11 clips there are not on it \(clip-01, .* and 8 more\)"
    ):
        score_folders(sets / "generated", sets / "real", [Counting()], name="A", captions=sets / "captions.json")
    soundfile.write(sets / "real" / "clip-03.flac", tone(3), RATE)
    with pytest.raises(UserError, match="several recordings named clip-03"):
        score_folders(sets / "generated", sets / "real", [Counting()], name="A")


class Words:
    """CLAP's networks, as far as `ClapJudge` uses them."""

    extractor = SimpleNamespace(sampling_rate=RATE)

    @classmethod
    def load(cls, folder, device=None):
        return cls()

    def clap_audio(self, waveform, sample_rate):
        return torch.nn.functional.normalize(torch.stack([waveform.std(1), waveform.diff(dim=1).abs().mean(1)], 1), dim=-1)

    def clap_text(self, texts):
        return torch.nn.functional.normalize(torch.tensor([[1.0, float(len(text) % 3)] for text in texts]), dim=-1)


@pytest.fixture
def clap(monkeypatch):
    monkeypatch.setattr(judging, "TextEncoders", Words)
    monkeypatch.setattr(judging, "weights_hash", lambda folder: f"weights of {folder.parent.name}")


def test_clap_scores_need_captions_and_come_with_the_real_clips(sets, clap):
    judge = ClapJudge(sets / "clap")
    without = score_folders(sets / "generated", sets / "real", [judge], name="A", seconds=None)
    assert [r.protocol.metric for r in without.records] == ["frechet_clap"] and "--captions" in without.missing["clap_score"]
    write_captions(sets / "c.json", [HeldOut(f"clip-{i:02d}", "", "x" * i, "", None) for i in range(12)])
    found = score_folders(sets / "generated", sets / "real", [judge], name="A", captions=sets / "c.json", seconds=None)
    values = {(r.system, r.protocol.metric): r for r in found.records}
    assert set(values) == {("A", "frechet_clap"), ("A", "clap_score"), ("real clips", "clap_score")}
    assert values["A", "clap_score"].protocol == values["real clips", "clap_score"].protocol
    protocol = values["A", "clap_score"].protocol
    rule = "cut to 10 s, shorter clips repeated"
    assert (protocol.level, protocol.clip_rule, protocol.pairing) == ("as recorded", rule, "caption by name")


def test_a_clap_hears_recordings_as_they_are_and_a_trained_one_as_it_was_trained(sets, clap):
    waves = [np.float32([0.1, 0.2, 0.1]), np.float32([0.4, 0.8, 0.4])]
    as_they_are = ClapJudge(sets)
    assert all(torch.equal(as_they_are._ready(wave, RATE), torch.from_numpy(wave)) for wave in waves)
    trained = ClapJudge(sets, Level(RATE, 4 / RATE, 0.5, "HQ"))
    quiet, loud = (trained._ready(wave, RATE) for wave in waves)
    assert torch.allclose(quiet, loud) and quiet.abs().max() == pytest.approx(0.5) and quiet.shape == (4,)
    several = [tone(i, seconds).astype(np.float32) for i, seconds in enumerate([1.0, 1.0, 0.5, 1.0])]
    alone = [as_they_are.embed([wave], RATE).embedding for wave in several]
    assert torch.allclose(as_they_are.embed(several, RATE).embedding, torch.cat(alone))


# ------------------------------------------------------------------------------------------------------------- speech


def spoken(sets, said):
    write_captions(sets / "said.json", [HeldOut(f"clip-{i:02d}", "", "speech", said, None) for i in range(12)])
    return sets / "said.json"


def test_error_rates_of_words_that_others_have_read(sets):
    captions = spoken(sets, "Mr. Smith isn't here.")
    with (sets / "read.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clip_id", "text"])
        writer.writerows([f"clip-{i:02d}", "mister smith is not hear" if i < 6 else "Mister Smith is not here!"] for i in range(12))
    found = score_folders(
        sets / "generated", sets / "real", [], name="A", captions=captions, hypotheses=sets / "read.csv", reader="whisper-large-v3"
    )
    values = {record.protocol.metric: record for record in found.records}
    assert values["wer"].value == pytest.approx(0.5 / 5) and values["cer"].value == pytest.approx(0.5 * 2 / 24)
    assert values["wer"].protocol.judge == "whisper-large-v3" and values["wer"].protocol.captions_sha256
    with pytest.raises(UserError, match="--reader"):
        score_folders(sets / "generated", sets / "real", [], name="A", captions=captions, hypotheses=sets / "read.csv")
    with pytest.raises(UserError, match="transcripts"):
        score_folders(sets / "generated", sets / "real", [], name="A", hypotheses=sets / "read.csv", reader="w")
    (sets / "read.csv").write_text("clip_id,text\nclip-00,hello\n")
    with pytest.raises(UserError, match="lacks 11 of the 12"):
        score_folders(sets / "generated", sets / "real", [], name="A", captions=captions, hypotheses=sets / "read.csv", reader="w")


def test_speech_recognition_reads_generated_and_real_clips(sets):
    class Reader:
        name, weights_hash, sample_rate = "whisper-tiny", "w" * 64, RATE

        def transcribe(self, waveforms, sample_rate):
            return ["hello there" if np.abs(np.fft.rfft(w)).argmax() < 300 else "hello" for w in waveforms]

    found = score_folders(sets / "generated", sets / "real", [], name="A", captions=spoken(sets, "hello"), transcriber=Reader())
    rates = {r.system: r.value for r in found.records if r.protocol.metric == "wer"}
    assert rates == {"A": 3 / 12, "real clips": 0.0}  # 200, 240 and 280 Hz
    assert {r.protocol.judge_sha256 for r in found.records} == {"w" * 64}


# -------------------------------------------------------------------------------------------------------- the command


def run(*words):
    return CliRunner().invoke(job.main, [str(word) for word in words])


@pytest.fixture
def weights(sets):
    """A folder of public weights whose judges are small and random."""
    (sets / "weights").mkdir()
    return sets / "weights"


def test_the_command_scores_folders_with_chosen_judges(sets, weights, monkeypatch):
    asked = {}

    def published(folder, names, listening, batch, device):
        asked.update(folder=folder, names=names, listening=listening)
        return [random_judge("cnn14-16k", listening=listening)]

    monkeypatch.setattr(judging, "published_judges", published)
    folders_given = ["--work", sets / "w", "--generated", sets / "generated", "--reference", sets / "real"]
    result = run(
        *folders_given, "--judges", weights, "--judge", "cnn14-16k", "--seconds", "1", "--guidance-scale", "2", "--candidates", "1"
    )
    assert result.exit_code == 0, result.output
    assert "FD ↓" in result.output and "4 records" in result.output
    assert asked["names"] == ("cnn14-16k",) and asked["listening"].clip_seconds == 1.0
    records = read_records(sets / "w" / "scores" / "generated")
    assert {r.system for r in records} == {"generated"} and records[0].protocol.candidates == 1
    made = dict(records[0].made)
    assert made.pop("sounds_sha256") and {name: value for name, value in made.items() if value is not None} == {"guidance_scale": 2.0}
    assert "num_inference_steps" in made and "candidates" not in made  # those belong to the protocol
    again = run(*folders_given, "--judges", weights, "--seconds", "1", "--name", "again", "-o", sets / "there")
    assert again.exit_code == 0 and read_records(sets / "there")[0].protocol.candidates is None
    theirs = run(*folders_given, "--judges", weights, "--seconds", "1", "--profile", "authors", "--steps", "100", "-o", sets / "theirs")
    assert theirs.exit_code == 0, theirs.output
    record = read_records(sets / "theirs")[0]
    assert record.protocol.candidates == 3 and (record.made["eta"], record.made["num_inference_steps"]) == (1.0, 100)
    whole = run(*folders_given, "--judges", weights, "--listening", "audioldm_eval", "-o", sets / "whole")
    assert whole.exit_code == 0, whole.output
    assert (
        read_records(sets / "whole")[0].protocol.resampler == "sinc-hann-6" and read_records(sets / "whole")[0].protocol.channels == "first"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--generated", "{}/generated"], "--reference"),
        (["--generated", "{}/generated", "--reference", "{}/real"], "nothing is at hand to judge with"),
        (["--generated", "{}/generated", "--reference", "{}/real", "--num-clips", "5"], "--num-clips chooses clips of a store"),
        (["--generated", "{}/generated", "--reference", "{}/real", "--judge", "vggish"], "--judges"),
        (["--ranker", "clap"], "--ranker goes with --generated"),
        (["--generated", "{}/generated", "--reference", "{}/real", "--judges", "{}/real"], "judges.json"),
    ],
)
def test_the_command_says_what_is_lacking(sets, words, said):
    result = run("--work", sets / "w", *(word.format(sets) for word in words))
    assert result.exit_code == 1 and said in result.output and "Traceback" not in result.output


def test_vggish_is_taken_once_unless_named(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(judging, "read_manifest", lambda folder: {"vggish": {}, "passt-s": {}})
    monkeypatch.setattr(judging, "load_judge", lambda name, folder, listening, batch, device: loaded.append((name, listening)))
    judging.published_judges(tmp_path)
    judging.published_judges(tmp_path, ["vggish-google"])
    judging.published_judges(tmp_path, ["passt-s"], Listening(clip_seconds=None, min_samples=32_000))
    assert [name for name, _ in loaded] == ["vggish", "passt-s", "vggish-google", "passt-s"]
    assert loaded[-1][1].clip_seconds == 10.0  # PaSST knows no places beyond
    monkeypatch.setattr(judging, "read_manifest", lambda folder: {})
    with pytest.raises(UserError, match="lists no weights"):
        judging.published_judges(tmp_path)
