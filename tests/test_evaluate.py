"""Evaluation end to end on made clips, with a generator and a CLAP that cost nothing."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from tiny_bundle import make_bundle

from pipelines import evaluate as command
from pipelines.evaluation import listening, run, words
from pipelines.evaluation import panel as panels
from pipelines.evaluation.clips import VOICE, Selection, choose_clips, folder_set, read_captions
from pipelines.evaluation.listening import ClapJudge, ClassifierJudge, as_trained
from pipelines.evaluation.options import PanelOptions
from pipelines.evaluation.panel import Panel
from pipelines.evaluation.records import read_records, side_by_side
from pipelines.evaluation.results import Evaluation
from pipelines.features.store import CLIP_SCHEMA, REJECTED_SCHEMA, FeatureStore
from stages.audio import AudioConfig, encode_flac, log_mel, normalise
from stages.bundle import read_info
from stages.classifier.model import Classifier, ClassifierConfig
from stages.errors import UserError
from stages.judges.catalogue import Listening, random_judge

AUDIO = AudioConfig(clip_seconds=0.64)
RECONSTRUCTION = {"mel_l1", "mel_psnr", "mel_ssim", "log_spectral_distance", "spectral_convergence", "log_magnitude"}
PITCH = {"low": 200.0, "high": 3000.0}


def tone(label, number):
    time = np.arange(AUDIO.clip_samples) / AUDIO.sample_rate
    noise = np.random.default_rng(number).standard_normal(len(time))
    return normalise((np.sin(2 * np.pi * PITCH[label] * (1 + 0.05 * number) * time) + 0.01 * noise).astype(np.float32))


def make_store(folder, sounds=("low", "high"), count=12, split="test", **changes):
    """`count` tones, alternating between the pitches, which are their labels unless `changes` says otherwise."""
    rows, waves = [], {}
    for i in range(count):
        label = sounds[i % len(sounds)]
        clip_id = f"tones-{i:02d}"
        waves[clip_id] = tone(label, i)
        row = {
            "clip_id": clip_id,
            "corpus": "tones",
            "path": f"/x/{i}.wav",
            "start": 0.0,
            "seconds": 0.64,
            "transcript": "",
            "captions": [f"a {label} tone", f"{label} beeping"],
            "labels": [label],
            "split": split,
            "licence": "",
        }
        rows.append(row | changes)
    store = FeatureStore.create(folder, AUDIO, pa.Table.from_pylist(rows, CLIP_SCHEMA), REJECTED_SCHEMA.empty_table())
    store.begin_series("waveform", {"codec": "flac"})
    store.write_shard(
        "waveform", 0, ((r["clip_id"], {"waveform.flac": encode_flac(waves[r["clip_id"]], 16_000)}) for r in store.shard_rows(0))
    )
    return store


class FakeGenerator:
    """Plays the tone that the caption names; `seen` are the prompts of all instances."""

    seen: list = []
    stop_after = None  # prompts until somebody presses Ctrl-C
    level = 1.0

    @classmethod
    def load(cls, bundle, device=None):
        return cls()

    def generate(self, prompts, *, seed, transcriptions=None, seconds, **sampling):
        if self.stop_after is not None and len(self.seen) >= self.stop_after:
            raise KeyboardInterrupt
        self.seen.extend(zip(prompts, seed, transcriptions or [None] * len(prompts), strict=True))
        return np.stack([self.level * tone("low" if "low" in p else "high", s % 7) for p, s in zip(prompts, seed, strict=True)])

    def vocode(self, mel):
        return np.stack([tone("low" if m[:, :20].mean() > m[:, 40:].mean() else "high", 3) for m in mel])

    def reconstruct(self, mel):
        return self.vocode(mel)


class FakeClap:
    """Embeds a clip by its mean spectrum and a caption by that of the tone it names."""

    @classmethod
    def load(cls, folder, device=None):
        return cls()

    def clap_audio(self, waveform, sample_rate):
        return torch.nn.functional.normalize(log_mel(waveform, AUDIO).mean(1) + 8.0, dim=-1)

    def clap_text(self, texts):
        return self.clap_audio(torch.from_numpy(np.stack([tone("low" if "low" in t else "high", 0) for t in texts])), 16_000)


def evaluate(work, num_clips=100, seed=0, captions=None, judges=(), readers=(), batch=8, **options):
    """`run.evaluate` with sampling `options`; `judges` join those that training has left."""
    selection, panel = Selection(num_clips, captions=captions, seed=seed), PanelOptions(batch=batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panels, "_published", lambda options, seconds, device: list(judges))
        patch.setattr(panels, "_readers", lambda options, device: list(readers))
        named = {name: options.pop(name) for name in ("bundle", "store", "name", "tracker") if name in options}
        return run.evaluate(work, selection, options, panel, **named)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A project folder with a store and a classifier, and fakes for the costly networks."""
    monkeypatch.setattr(run, "AudioGenerator", FakeGenerator)
    monkeypatch.setattr(listening, "TextEncoders", FakeClap)
    monkeypatch.setattr(listening, "weights_hash", lambda folder: f"weights of {folder.name}")
    monkeypatch.setattr(run, "read_info", lambda folder: SimpleNamespace(variant="tones", audio=AUDIO, speech=False))
    monkeypatch.setattr(run, "weights_hash", lambda folder: f"weights of {folder.name}")
    monkeypatch.setattr(run.plots.Picture, "png", lambda picture, dpi=0: b"drawn in test_report.py")
    monkeypatch.setattr(FakeGenerator, "seen", [])
    make_store(tmp_path / "store")
    torch.manual_seed(0)
    classifier = Classifier(ClassifierConfig(("high", "low"), width=8))
    mel = log_mel(torch.from_numpy(np.stack([tone(label, i) for label in ("high", "low") for i in range(12)])), AUDIO)
    optimizer = torch.optim.Adam(classifier.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(classifier(mel), torch.arange(2).repeat_interleave(12)).backward()
        optimizer.step()
    classifier.save(tmp_path / "stages" / "classifier")
    return tmp_path


def test_everything_is_scored_beside_its_ceilings(work):
    found = evaluate(work, num_clips=6, batch=4)
    own = {"accuracy", "kl", "frechet_classifier", "frechet_clap", "clap_score", "silent"}
    assert set(found.scores) == own | RECONSTRUCTION and not found.missing
    assert list(found.scores["accuracy"]) == ["chance", "generated", "vae", "vocoder", "real"]
    assert found.scores["accuracy"]["chance"] == 0.5 and found.scores["accuracy"]["generated"] == 1.0
    assert found.scores["clap_score"]["generated"] > found.scores["clap_score"]["chance"]
    assert "other_real" in found.scores["frechet_clap"] and "real" not in found.scores["frechet_clap"]
    low, high = found.intervals["accuracy"]["generated"]
    assert low < 1.0 and high == 1.0
    assert found.classes == [
        {"name": n, "count": 3, **dict.fromkeys(("generated", "vae", "vocoder", "real"), 1.0)} for n in ("high", "low")
    ]
    assert found.confusion == {"names": ["high", "low"], "counts": [[3, 0], [0, 3]]}
    assert Evaluation.read(work) == found
    place = work / "evaluation"
    assert all((place / path).is_file() for row in found.clips for path in row["files"].values())
    assert (place / "confusion.png").is_file() and (place / "classes.png").is_file()
    assert "Recognised by the classifier ↑" in (place / "table.txt").read_text() and "recognised 100.0%" in found.summary()
    assert found.protocol["captions_sha256"] and found.protocol["bundle_sha256"] == "weights of bundle"


def test_a_stopped_evaluation_continues_and_ends_the_same(work, monkeypatch):
    monkeypatch.setattr(FakeGenerator, "stop_after", 2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(work, num_clips=6, batch=2)
    assert Evaluation.read(work) is None
    monkeypatch.setattr(FakeGenerator, "stop_after", None)
    resumed = evaluate(work, num_clips=6, batch=4)
    assert len(FakeGenerator.seen) == 6
    monkeypatch.setattr(FakeGenerator, "load", None)  # nothing is missing: no generator is loaded
    assert evaluate(work, num_clips=6) == resumed
    monkeypatch.undo()


def test_more_clips_add_to_those_there_are_and_other_settings_start_anew(work):
    evaluate(work, num_clips=4)
    evaluate(work, num_clips=6)
    assert len(FakeGenerator.seen) == 6
    evaluate(work, num_clips=4, guidance_scale=1.0)
    assert len(FakeGenerator.seen) == 10
    evaluate(work, num_clips=4, bundle=work / "other")
    assert len(FakeGenerator.seen) == 14


def test_without_a_classifier_accuracy_is_absent_with_a_reason(work):
    (work / "stages" / "classifier").rename(work / "elsewhere")
    found = evaluate(work, num_clips=4)
    assert "loa train classifier" in found.missing["accuracy"]
    assert "accuracy" not in found.scores and "clap_score" in found.scores and not found.confusion
    assert not (work / "evaluation" / "confusion.png").exists()
    assert "not measured" in found.table()


def test_without_labels_or_with_unknown_ones_accuracy_is_absent(work):
    make_store(work / "unlabelled", labels=[])
    assert evaluate(work, store=str(work / "unlabelled"), num_clips=4).missing["accuracy"] == "the clips have no labels"
    make_store(work / "unknown", labels=["theremin"])
    assert "knows none" in evaluate(work, store=str(work / "unknown"), num_clips=4).missing["accuracy"]


def test_silence_is_called_out(work, monkeypatch):
    monkeypatch.setattr(FakeGenerator, "level", 1e-4)
    found = evaluate(work, num_clips=4)
    assert found.scores["silent"]["generated"] == 1.0 and found.scores["silent"]["real"] == 0.0
    assert found.notes[0].startswith("100% of the clips of tones are silent")


def test_every_score_has_its_record(work):
    found = evaluate(work, num_clips=6, name="tones, first try")
    records = {(r.system, r.protocol.metric): r for r in read_records(work)}
    own = {"generated": "tones, first try", "vae": "tones, first try: VAE + vocoder", "vocoder": "tones, first try: vocoder"}
    shown = own | {"real": "real clips", "other_real": "other real clips"}
    expected = {(shown[s], m): value for m, values in found.scores.items() for s, value in values.items() if s != "chance"}
    assert {key: record.value for key, record in records.items()} == expected
    fad = records["tones, first try", "frechet_clap"]
    assert fad.protocol.captions_sha256 == found.protocol["captions_sha256"] and fad.protocol.num_generated == 6
    assert (fad.protocol.judge, fad.protocol.judge_sha256, fad.protocol.ddof) == ("clap", "weights of text_encoder", 1)
    assert fad.protocol.level == "mean removed, peak 0.5" and fad.protocol.clip_rule == "cut or padded to 0.64 s"
    assert fad.made["guidance_scale"] == 3.5 and fad.made["weights_sha256"] == "weights of bundle" and fad.check["clips"] == 6
    assert records["tones, first try", "kl"].protocol.direction == "KL(reference || generated)"
    found = side_by_side(list(records.values()))
    assert {system for (system, _), record in found.records.items() if record.ranked} == {"tones, first try"}


def test_a_frozen_caption_list_is_taken_as_it_is(work):
    first = evaluate(work, num_clips=4)
    frozen = work / "evaluation" / "captions.json"
    assert [clip.clip_id for clip in read_captions(frozen)] == [row["clip_id"] for row in first.clips]  # in the order they were drawn
    (work / "frozen.json").write_bytes(frozen.read_bytes())
    evaluate(work, num_clips=6, seed=1)
    again = evaluate(work, num_clips=6, captions=work / "frozen.json")
    assert again.protocol["captions_sha256"] == first.protocol["captions_sha256"] and again.scores == first.scores
    (work / "own.csv").write_text("clip_id,caption\ntones-03,a high one\ntones-00,a low one\n")
    own = evaluate(work, captions=work / "own.csv")
    assert [(row["clip_id"], row["text"], row["label"]) for row in own.clips] == [
        ("tones-03", "a high one", "high"),
        ("tones-00", "a low one", "low"),
    ]
    assert "other_real" in own.scores["frechet_clap"]
    (work / "own.csv").write_text("clip_id,caption\nnowhere,a high one\n")
    with pytest.raises(UserError, match="lacks 1 of the 1 clips.*nowhere"):
        evaluate(work, captions=work / "own.csv")


def test_published_judges_score_all_sets(work):
    judge = random_judge("cnn14-16k", listening=Listening(clip_seconds=0.64))
    found = evaluate(work, num_clips=6, judges=[judge])
    assert list(found.scores["fd"]) == ["generated", "vae", "vocoder", "other_real"]
    assert list(found.scores["kl_panns"]) == ["generated", "vae", "vocoder"]
    assert "10 parts" in found.missing["inception_score"] and found.protocol["judges"]["cnn14-16k"] == judge.weights_hash
    assert "fd" not in evaluate(work, num_clips=6).scores


def test_folders_score_as_the_store_does(work):
    """The demo's own judges give the same distances to the clips that an evaluation left on disk."""
    found = evaluate(work, num_clips=6)
    place = work / "evaluation"
    judges = [ClapJudge(work / "bundle", as_trained(AUDIO)), ClassifierJudge(work / "stages" / "classifier", AUDIO)]
    (vocoder,) = place.glob("vocoder-*")
    (work / "six").mkdir()
    for path in vocoder.iterdir():
        (work / "six" / path.name).write_bytes((place / "real" / path.name).read_bytes())
    ours, real = folder_set("vocoder", "system", vocoder), folder_set("real clips", "reference", work / "six")
    folders = run.score_folders(ours, real, Panel(judges), work / "scores")
    metrics = {"frechet_clap", "frechet_classifier", "kl", "silent"}
    assert set(folders.scores) == metrics and {r.protocol.metric for r in read_records(work / "scores")} == metrics
    for metric in metrics:
        assert folders.scores[metric]["generated"] == pytest.approx(found.scores[metric]["vocoder"], rel=1e-4), metric


def test_speech_is_read_back(work, monkeypatch):
    class Reader:
        name, weights_hash, sample_rate = "whisper", "w", 16_000

        def transcribe(self, waveforms, sample_rate):
            return ["printing in the only sense"] * len(waveforms)

    monkeypatch.setattr(run, "read_info", lambda folder: SimpleNamespace(variant="tones", audio=AUDIO, speech=True))
    make_store(work / "speech", captions=[], labels=[], transcript="printing, in the other sense")
    found = evaluate(work, store=str(work / "speech"), num_clips=4, readers=[words.AsrReader(Reader())])
    assert found.scores["wer"] == dict.fromkeys(("generated", "vae", "vocoder", "real"), pytest.approx(1 / 5)) and "cer" in found.scores
    monkeypatch.setattr(run, "read_info", lambda folder: SimpleNamespace(variant="tones", audio=AUDIO, speech=False))
    assert "transcript" in evaluate(work, num_clips=4, readers=[words.AsrReader(Reader())]).missing["wer"]


def test_speech_is_generated_from_transcripts(work, monkeypatch):
    monkeypatch.setattr(run, "read_info", lambda folder: SimpleNamespace(variant="tones", audio=AUDIO, speech=True))
    make_store(work / "speech", captions=[], labels=[], transcript="printing, in the only sense")
    found = evaluate(work, store=str(work / "speech"), num_clips=4)
    assert {(text, said) for text, _, said in FakeGenerator.seen} == {(VOICE, "printing, in the only sense")}
    assert "clap_score" in found.missing and "frechet_clap" in found.scores


def test_a_bundle_of_another_rate_is_refused(work, monkeypatch):
    monkeypatch.setattr(
        run, "read_info", lambda folder: SimpleNamespace(variant="tones", audio=AudioConfig(sample_rate=48_000), speech=False)
    )
    with pytest.raises(UserError, match="sample_rate 16000 against 48000"):
        evaluate(work)


def test_tracked_evaluations_show_scores_and_sounds(work):
    logged = {}

    class Notes:
        def handle(self):
            return SimpleNamespace(run_id="r1")

        def __getattr__(self, name):
            return lambda *args, **kwargs: logged.setdefault(name, []).append(args)

    found = evaluate(work, num_clips=2, tracker=Notes())
    scores = logged["metrics"][-1][0]
    assert scores["accuracy/generated"] == found.scores["accuracy"]["generated"] and "frechet_clap/vae" in scores
    assert len(logged["audio"]) == 8 and len(logged["spectrogram"]) == 2 and found.protocol["mlflow_run_id"] == "r1"
    assert logged["table"][0][1][0] == "clip_id" and len(logged["table"][0][2]) == 2


def test_a_whole_bundle_is_evaluated(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    assert read_info(bundle).audio == AUDIO
    make_store(tmp_path / "store", count=4)
    found = evaluate(tmp_path, num_clips=2, num_inference_steps=2)
    assert found.protocol["variant"] == read_info(bundle).variant and len(found.protocol["judges"]["clap"]) == 64
    assert np.isfinite([value for values in found.scores.values() for value in values.values()]).all()
    assert evaluate(tmp_path, num_clips=2, num_inference_steps=2) == found


def test_clips_are_taken_in_turn_from_all_classes(tmp_path):
    store = make_store(tmp_path, sounds=("low", "low", "high"))
    reader = store.reader(["waveform"])
    chosen = choose_clips(reader, Selection(6))
    clips, others = chosen.clips, chosen.others
    assert chosen.split == "test" and [c.label for c in clips] == ["high", "low"] * 3
    assert len(others) == 6 and not {c.clip_id for c in clips} & {c.clip_id for c in others}
    assert choose_clips(reader, Selection(4)).clips == clips[:4]
    assert choose_clips(reader, Selection(6, seed=1)).clips != clips
    assert {c.text for c in clips} <= {text for label in PITCH for text in (f"a {label} tone", f"{label} beeping")}


def test_validation_stands_in_for_a_missing_test_split(tmp_path):
    store = make_store(tmp_path, split="validation")
    assert choose_clips(store.reader(["waveform"]), Selection(2)).split == "validation"
    with pytest.raises(UserError, match=r"split test has a caption.*'validation': 12.*--split"):
        choose_clips(store.reader(["waveform"]), Selection(2, "test"))


def test_a_missing_bundle_is_a_plain_sentence(tmp_path):
    result = CliRunner().invoke(command.main, ["--work", str(tmp_path)])
    assert result.exit_code == 1 and "loa export" in result.output and "Traceback" not in result.output


def test_an_evaluation_of_another_format_is_refused(work):
    evaluate(work, num_clips=2)
    path = work / "evaluation" / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        Evaluation.read(work)
