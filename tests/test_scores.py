"""Embeddings, cached by content; scores of sets of clips; `loa score`."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner

from pipelines import score as command
from pipelines.evaluation import listening, metrics, panel
from pipelines.evaluation.clips import Clip, captions_hash, folder_set, read_captions, write_captions
from pipelines.evaluation.listening import ClapJudge, Embeddings, InputRule, embed_files, embed_waveforms
from pipelines.evaluation.records import read_records
from pipelines.evaluation.scores import judge_scores, score_sets
from pipelines.evaluation.words import AsrReader, Hypotheses
from stages.errors import UserError
from stages.judges.catalogue import JudgeOutput, Listening, random_judge

RATE = 16_000


def files_of(folder):
    return folder_set("generated", "system", folder).files


def score(sets, judges=(), readers=(), captions=None, reference="real", generated="generated", name="A", seconds=None, **attributes):
    """Scores of a folder beside another, as `loa score` takes them."""
    listed = read_captions(captions) if captions else []
    ours = folder_set(name, "system", sets / generated, listed, seconds=seconds, **attributes)
    return score_sets({"generated": ours, "real": folder_set("real clips", "reference", sets / reference)}, judges, readers)


def of_metric(scores, system="A"):
    return {record.protocol.metric: record for record in scores.records if record.system == system}


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
    """A judge that embeds level and pitch, and counts the clips it was given."""

    name = "cnn14-16k"

    def __init__(self, name="cnn14-16k", weights="w1", clip_seconds=1.0):
        self.name, self.weights_hash, self.clip_seconds, self.embedded = name, weights, clip_seconds, 0

    def embed(self, waveforms, sample_rate):
        self.embedded += len(waveforms)
        rows = [[np.std(w), np.abs(np.diff(w)).mean(), np.abs(w).max()] for w in waveforms]
        rows = torch.tensor(np.array(rows), dtype=torch.float32)
        return JudgeOutput(rows, torch.cat([10 * rows, -rows], 1))

    def protocol(self):
        listening = {"clip_seconds": self.clip_seconds, "min_samples": 0, "remove_mean": False, "resampler": "soxr-vhq"}
        return {"judge": self.name, "weights_sha256": self.weights_hash, "sample_rate": RATE, "listening": listening}


# --------------------------------------------------------------------------------------------------------- the cache


def test_what_was_embedded_is_not_embedded_again(sets):
    files = files_of(sets / "generated")
    judge = Counting()
    first = embed_files(judge, files, cache=sets / "cache")
    again = embed_files(judge, files, cache=sets / "cache")
    fresh = embed_files(Counting(), files)
    assert judge.embedded == 12
    for other in (again, fresh):
        assert (other.rows == first.rows).all() and (other.logits == first.logits).all() and (other.clip_of == first.clip_of).all()


def test_the_cache_goes_by_content_not_by_name(sets):
    judge, cache = Counting(), sets / "cache"
    before = embed_files(judge, files_of(sets / "generated"), cache=cache)
    soundfile.write(sets / "generated" / "clip-03.wav", tone(40), RATE)  # the same name, another sound
    (sets / "generated" / "clip-11.wav").rename(sets / "generated" / "zz.wav")  # another name, the same sound
    after = embed_files(judge, files_of(sets / "generated"), cache=cache)
    assert judge.embedded == 13
    changed = [i for i in range(12) if (before.rows[i] != after.rows[i]).any()]
    assert changed == [3]
    assert (after.rows == embed_files(Counting(), files_of(sets / "generated")).rows).all()


@pytest.mark.parametrize("cache", [None, "cache"])
def test_copies_are_embedded_once(sets, cache):
    """Twice would be work for nothing, and with several threads another rounding: what was scored would not be what the cache keeps."""
    soundfile.write(sets / "generated" / "copy.wav", *soundfile.read(sets / "generated" / "clip-03.wav"))
    files, judge = files_of(sets / "generated"), Counting()
    embeddings = embed_files(judge, files, cache=cache and sets / cache)
    assert judge.embedded == 12 and embeddings.num_clips == 13
    assert files[12].path.name == "copy.wav" and (embeddings.rows[12] == embeddings.rows[3]).all()


@pytest.mark.parametrize("change", [{"weights": "w2"}, {"clip_seconds": 2.0}, {"name": "cnn14-32k"}])
def test_other_weights_and_settings_are_embedded_anew(sets, change):
    files = files_of(sets / "generated")
    embed_files(Counting(), files, cache=sets / "cache")
    other = Counting(**change)
    embed_files(other, files, cache=sets / "cache")
    assert other.embedded == 12
    first_channel = Counting()
    embed_files(first_channel, files, "first", cache=sets / "cache")
    assert first_channel.embedded == 12


def test_damaged_entries_are_embedded_anew_and_nothing_in_them_is_run(sets):
    import pickle

    files = files_of(sets / "generated")
    judge = Counting()
    first = embed_files(judge, files, cache=sets / "cache")
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
    again = embed_files(judge, files, cache=sets / "cache")
    assert judge.embedded == 16 and (again.rows == first.rows).all() and not (sets / "sprung").exists()


def test_clips_of_several_rates_and_channels_are_embedded(sets):
    soundfile.write(sets / "generated" / "clip-05.wav", tone(5, channels=2), RATE)
    soundfile.write(sets / "generated" / "clip-06.flac", tone(6)[::2], RATE // 2)
    (sets / "generated" / "clip-06.wav").unlink()
    files = files_of(sets / "generated")
    assert [file.path.stem for file in files] == [f"clip-{i:02d}" for i in range(12)]
    mean, first = (embed_files(Counting(), files, channels).rows for channels in ("mean", "first"))
    assert mean[5, 0] == pytest.approx(first[5, 0] / 4, rel=1e-3)  # the channels are w and -w / 2
    assert (np.delete(mean, 5, 0) == np.delete(first, 5, 0)).all()


def test_a_published_judge_embeds_files_as_it_embeds_waveforms(sets):
    judge = random_judge("cnn14-16k", listening=Listening(clip_seconds=1.0))
    files = files_of(sets / "generated")
    found = embed_files(judge, files, cache=sets / "cache")
    directly = embed_waveforms(judge, [file.read("mean")[0] for file in files], RATE)
    assert np.allclose(found.rows, directly.rows, atol=1e-5) and found.logits.shape == (12, 527)
    windows = random_judge("vggish", listening=Listening(clip_seconds=2.0))
    found = embed_files(windows, files[:3], cache=sets / "cache")
    assert found.clip_of.tolist() == [0, 0, 1, 1, 2, 2] and found.num_clips == 3  # two windows of 0.96 s in 2 s
    assert (embed_files(windows, files[:3], cache=sets / "cache").rows == found.rows).all()


# -------------------------------------------------------------------------------------------------------- the scores


def embeddings(rng, clips, rows=1, width=4, classes=6):
    return Embeddings(rng.standard_normal((clips * rows, width)), np.repeat(np.arange(clips), rows), rng.standard_normal((clips, classes)))


def test_every_judge_gives_its_metrics():
    rng = np.random.default_rng(0)
    reference, generated = embeddings(rng, 30), embeddings(rng, 30)
    found = {one.metric: one for one in judge_scores("cnn14-16k", reference, generated, range(30)).scores}
    assert set(found) == {"fd", "inception_score", "kl_panns", "kl_sigmoid_panns"}
    assert found["fd"].value == metrics.frechet_distance(reference.rows, generated.rows)
    assert found["kl_panns"].value == metrics.kl_divergence(reference.logits, generated.logits)
    assert found["kl_panns"].fields["direction"] == "KL(reference || generated)"
    assert found["inception_score"].fields["seed"] == 2020 and "deviation" in found["inception_score"].extra
    assert {one.metric for one in judge_scores("passt-s", reference, generated, range(30)).scores} == {"kl_passt"}


def test_kl_pairs_clips_by_their_numbers():
    rng = np.random.default_rng(0)
    reference, generated = embeddings(rng, 8), embeddings(rng, 3)
    (kl,) = judge_scores("passt-s", reference, generated, [5, 0, 2]).scores
    assert kl.value == metrics.kl_divergence(reference.logits[[5, 0, 2]], generated.logits) and kl.fields["num_reference"] == 3
    unpaired = judge_scores("passt-s", reference, generated, None)
    assert not unpaired.scores and "same name" in unpaired.missing["kl_passt"]


def test_fad_wants_windows_and_fd_says_when_clips_are_few():
    rng = np.random.default_rng(0)
    few = judge_scores("vggish", embeddings(rng, 3, 2), embeddings(rng, 3, 2), None)
    assert "6 windows are too few for 4 dimensions" in few.missing["fad"] and "500 rows" in few.missing["fad_infinity"]
    many = judge_scores("vggish", embeddings(rng, 60, 10), embeddings(rng, 60, 10), None)
    assert {one.metric for one in many.scores} == {"fad", "fad_infinity"} and not many.missing
    assert many.scores[0].fields["rows_generated"] == 600 and many.scores[0].fields["num_reference"] == 60
    assert "3 embeddings for 4 dimensions" in judge_scores("cnn14-16k", embeddings(rng, 3), embeddings(rng, 3), None).notes[0]


def test_sets_give_a_record_per_score(sets):
    clips = [Clip(f"clip-{i:02d}", "", f"a tone of {i}", "", None) for i in range(12)]
    write_captions(sets / "captions.json", clips)
    scores = score(sets, [Counting()], captions=sets / "captions.json", seconds=1.0, candidates=1, made={"guidance_scale": 3.5})
    by_metric = of_metric(scores)
    assert set(by_metric) == {"fd", "inception_score", "kl_panns", "kl_sigmoid_panns", "silent"} and not scores.missing
    protocol = by_metric["kl_panns"].protocol
    assert protocol.captions_sha256 == captions_hash(clips) and protocol.num_generated == protocol.num_reference == 12
    assert (protocol.judge, protocol.judge_sha256, protocol.clip_rule) == ("cnn14-16k", "w1", "cut or padded to 1 s")
    assert by_metric["fd"].protocol.references_sha256 and by_metric["inception_score"].protocol.references_sha256 is None
    assert by_metric["fd"].made["guidance_scale"] == 3.5 and by_metric["fd"].check["clips"] == 12
    assert by_metric["fd"].protocol.candidates == 1
    assert [record.protocol.metric for record in scores.records if record.system == "real clips"] == ["silent"]


def test_scores_do_not_depend_on_where_the_clips_lie_or_in_what_order(sets):
    first = score(sets, [Counting()])
    for folder in ("generated", "real"):
        (sets / f"moved-{folder}" / "deep").mkdir(parents=True)
        for i, path in enumerate(sorted((sets / folder).iterdir(), reverse=True)):
            path.rename(sets / f"moved-{folder}" / ("deep" if i % 2 else "") / path.name)
    assert score(sets, [Counting()], generated="moved-generated", reference="moved-real").records == first.records


def test_clips_that_hold_no_sound_are_refused_and_silence_is_reported(sets):
    soundfile.write(sets / "generated" / "clip-00.wav", np.zeros(RATE), RATE)
    soundfile.write(sets / "generated" / "clip-01.wav", tone(1, 0.5), RATE)
    scores = score(sets, [Counting()], seconds=1.0)
    assert scores.notes[0].startswith("8% of the clips of A are silent: do not rank")
    assert any("short: clip-01" in note for note in scores.notes)
    record = of_metric(scores)["fd"]
    assert record.check == {"clips": 12, "silent": 1, "clipped": 0, "short": 1} and record.silent_share > 0.01
    assert scores.values["silent"] == {"generated": 1 / 12, "real": 0.0}
    soundfile.write(sets / "generated" / "clip-02.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    (sets / "generated" / "clip-04.wav").write_bytes(b"not sound")
    with pytest.raises(UserError, match="2 of 12 clips of A.*clip-02, clip-04"):
        score(sets, [Counting()])


def test_folders_that_do_not_fit_are_refused(sets):
    (sets / "empty").mkdir()
    with pytest.raises(UserError, match="no recordings"):
        folder_set("A", "system", sets / "empty")
    with pytest.raises(UserError, match="no folder"):
        folder_set("A", "system", sets / "nowhere")
    listed = [Clip("clip-00", "", "x", "", None), Clip("clip-99", "", "y", "", None)]
    missing = r"1 of its clips are missing \(clip-99\); 11 clips there are not in it \(clip-01, .* and 8 more\)"
    with pytest.raises(UserError, match=missing):
        folder_set("A", "system", sets / "generated", listed)
    soundfile.write(sets / "real" / "clip-03.flac", tone(3), RATE)
    with pytest.raises(UserError, match="several recordings named clip-03"):
        folder_set("A", "reference", sets / "real")


def test_unpaired_sets_give_distances_alone(sets):
    (sets / "real" / "clip-03.wav").rename(sets / "real" / "another.wav")
    scores = score(sets, [Counting()])
    assert set(of_metric(scores)) == {"fd", "inception_score", "silent"} and "same name" in scores.missing["kl_panns"]


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
    monkeypatch.setattr(listening, "TextEncoders", Words)
    monkeypatch.setattr(listening, "weights_hash", lambda folder: f"weights of {folder.parent.name}")


def test_clap_scores_need_captions_and_come_with_the_real_clips(sets, clap):
    judge = ClapJudge(sets / "clap")
    without = score(sets, [judge])
    assert set(of_metric(without)) == {"frechet_clap", "silent"} and "--captions" in without.missing["clap_score"]
    write_captions(sets / "c.json", [Clip(f"clip-{i:02d}", "", "x" * (i + 1), "", None) for i in range(12)])
    soundfile.write(sets / "real" / "unasked.wav", tone(9), RATE)  # a real clip that no caption asks for
    scores = score(sets, [judge], captions=sets / "c.json")
    values = {(r.system, r.protocol.metric): r for r in scores.records if r.protocol.metric != "silent"}
    assert set(values) == {("A", "frechet_clap"), ("A", "clap_score"), ("real clips", "clap_score")}
    assert values["A", "clap_score"].protocol == values["real clips", "clap_score"].protocol
    assert values["A", "frechet_clap"].protocol.num_reference == 13 and "clap_score" not in scores.clips["real"]["unasked"]
    protocol = values["A", "clap_score"].protocol
    rule = "cut to 10 s, shorter clips repeated"
    assert (protocol.level, protocol.clip_rule, protocol.pairing) == ("as recorded", rule, "caption by name")


def test_a_clap_takes_recordings_as_they_are_and_a_trained_one_as_it_was_trained(sets, clap):
    waves = [np.float32([0.1, 0.2, 0.1]), np.float32([0.4, 0.8, 0.4])]
    as_they_are = ClapJudge(sets)
    assert all(torch.equal(as_they_are._input(wave, RATE), torch.from_numpy(wave)) for wave in waves)
    trained = ClapJudge(sets, InputRule(RATE, 4 / RATE, 0.5, "HQ"))
    quiet, loud = (trained._input(wave, RATE) for wave in waves)
    assert torch.allclose(quiet, loud) and quiet.abs().max() == pytest.approx(0.5) and quiet.shape == (4,)
    several = [tone(i, seconds).astype(np.float32) for i, seconds in enumerate([1.0, 1.0, 0.5, 1.0])]
    alone = [as_they_are.embed([wave], RATE).embedding for wave in several]
    assert torch.allclose(as_they_are.embed(several, RATE).embedding, torch.cat(alone))


# ------------------------------------------------------------------------------------------------------------- speech


def spoken(sets, said):
    write_captions(sets / "said.json", [Clip(f"clip-{i:02d}", "", "speech", said, None) for i in range(12)])
    return sets / "said.json"


def test_error_rates_of_words_that_others_have_read(sets):
    captions = spoken(sets, "Mr. Smith isn't here.")
    with (sets / "read.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clip_id", "text"])
        writer.writerows([f"clip-{i:02d}", "mister smith is not hear" if i < 6 else "Mister Smith is not here!"] for i in range(12))
    scores = score(sets, readers=[Hypotheses("whisper-large-v3", sets / "read.csv")], captions=captions)
    values = of_metric(scores)
    assert values["wer"].value == pytest.approx(0.5 / 5) and values["cer"].value == pytest.approx(0.5 * 2 / 24)
    assert values["wer"].protocol.judge == "whisper-large-v3" and values["wer"].protocol.captions_sha256
    assert "wer" not in of_metric(scores, "real clips")
    assert "transcript" in score(sets, readers=[Hypotheses("w", sets / "read.csv")]).missing["wer"]
    (sets / "read.csv").write_text("clip_id,text\nclip-00,hello\n")
    with pytest.raises(UserError, match="lacks 11 of the 12"):
        score(sets, readers=[Hypotheses("w", sets / "read.csv")], captions=captions)


def test_speech_recognition_reads_generated_and_real_clips(sets):
    class Reader:
        name, weights_hash, sample_rate = "whisper-tiny", "w" * 64, RATE

        def transcribe(self, waveforms, sample_rate):
            return ["hello there" if np.abs(np.fft.rfft(w)).argmax() < 300 else "hello" for w in waveforms]

    scores = score(sets, readers=[AsrReader(Reader())], captions=spoken(sets, "hello"))
    assert scores.values["wer"] == {"generated": 3 / 12, "real": 0.0}  # 200, 240 and 280 Hz
    assert {r.protocol.judge_sha256 for r in scores.records if r.protocol.metric in ("wer", "cer")} == {"w" * 64}


# -------------------------------------------------------------------------------------------------------- the command


def run(*words):
    return CliRunner().invoke(command.main, [str(word) for word in words])


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

    monkeypatch.setattr(panel, "published_judges", published)
    folders = [sets / "generated", "--reference", sets / "real", "--work", sets / "w", "--judges", weights]
    result = run(
        *folders, "--judge", "cnn14-16k", "--seconds", "1", "--made", "guidance_scale=2", "--made", "scheduler=ddim", "--candidates", "1"
    )
    assert result.exit_code == 0, result.output
    assert "FD ↓" in result.output and "loa compare" in result.output
    assert asked["names"] == ("cnn14-16k",) and asked["listening"].clip_seconds == 1.0
    records = [r for r in read_records(sets / "w" / "scores" / "generated") if r.protocol.metric == "fd"]
    assert [r.system for r in records] == ["generated"] and records[0].protocol.candidates == 1
    made = dict(records[0].made)
    assert made.pop("sounds_sha256") and made == {"guidance_scale": 2, "scheduler": "ddim"}
    assert (sets / "w" / "scores" / "generated" / "evaluation.json").is_file()
    again = run(*folders, "--seconds", "1", "--name", "again", "-o", sets / "there")
    assert again.exit_code == 0 and {r.protocol.candidates for r in read_records(sets / "there")} == {None}
    whole = run(*folders, "--listening", "audioldm_eval", "-o", sets / "whole")
    assert whole.exit_code == 0, whole.output
    record = next(r for r in read_records(sets / "whole") if r.protocol.metric == "fd")
    assert record.protocol.resampler == "sinc-hann-6" and record.protocol.channels == "first"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{}/generated"], "Missing option '--reference'"),
        (["{}/generated", "--reference", "{}/real"], "nothing to judge with"),
        (["{}/generated", "--reference", "{}/real", "--judge", "vggish"], "--judges"),
        (["{}/generated", "--reference", "{}/real", "--judges", "{}/real"], "judges.json"),
        (["{}/generated", "--reference", "{}/real", "--hypotheses", "read.csv"], "READER=CSV"),
    ],
)
def test_the_command_says_what_is_missing(sets, words, message):
    result = run("--work", sets / "w", *(word.format(sets) for word in words))
    assert result.exit_code in (1, 2) and message in result.output and "Traceback" not in result.output


def test_vggish_is_taken_once_unless_named(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(listening, "read_manifest", lambda folder: {"vggish": {}, "passt-s": {}})
    monkeypatch.setattr(listening, "load_judge", lambda name, folder, listening, batch, device: loaded.append((name, listening)))
    listening.published_judges(tmp_path)
    listening.published_judges(tmp_path, ["vggish-google"])
    listening.published_judges(tmp_path, ["passt-s"], Listening(clip_seconds=None, min_samples=32_000))
    assert [name for name, _ in loaded] == ["vggish", "passt-s", "vggish-google", "passt-s"]
    assert loaded[-1][1].clip_seconds == 10.0  # PaSST knows no places beyond
    monkeypatch.setattr(listening, "read_manifest", lambda folder: {})
    with pytest.raises(UserError, match="lists no weights"):
        listening.published_judges(tmp_path)
