"""The demo's corpus: layouts, splits and words, the same bytes every time, and kinds that can be told apart."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from pipelines import corpora
from pipelines.demo_corpus.make import make_demo_corpus
from pipelines.demo_corpus.sounds import KINDS, Traits, make_clip
from pipelines.demo_corpus.words import MUSIC, TEMPLATES, TEST_TEMPLATES, WORDS, caption
from stages.audio import AudioConfig, log_mel, normalise
from stages.errors import UserError


def digest(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def everything(folder: Path) -> list:
    return [r for name, root in corpora.discover(folder) for r in corpora.read(name, root)]


def test_sounds_in_the_published_layouts(tmp_path):
    labels = ["Bark", "Rain", "Piano"]
    made = make_demo_corpus(tmp_path / "a", clips_per_kind=30, seconds=0.6, kinds=labels, speech=0)
    records = everything(tmp_path / "a")
    assert all(isinstance(r, corpora.Recording) for r in records)
    assert Counter(r.corpus for r in records) == made.recordings and sum(made.recordings.values()) == 90
    assert str(made) == "90 recordings of 3 kinds of sound"
    assert set(made.recordings) == {"wavcaps", "audioset", "audiocaps", "msd"}
    for record in records:
        assert soundfile.info(record.path).duration == pytest.approx(0.6, abs=0.08)
        assert record.corpus == "audiocaps" or set(record.labels) & set(labels)
        assert record.captions or record.corpus == "audioset"
    splits = Counter(r.split for r in records)
    assert 0.07 < splits["test"] / 90 < 0.14 and splits["validation"] > 0
    tested = {next(iter(set(r.labels) & set(labels))) for r in records if r.split == "test" and r.labels and r.captions}
    assert tested == set(labels)
    worded = [r for r in records if r.corpus in ("wavcaps", "audiocaps")]
    told = {split: {text for r in worded if r.split == split for text in r.captions} for split in splits}
    assert told["test"] and told["test"].isdisjoint(told["train"])

    assert make_demo_corpus(tmp_path / "a", clips_per_kind=30, seconds=0.6, kinds=labels, speech=0) == made
    make_demo_corpus(tmp_path / "b", clips_per_kind=30, seconds=0.6, kinds=labels, speech=0)
    first, second = digest(tmp_path / "a"), digest(tmp_path / "b")
    card = "demo_corpus.json"  # names its folder
    assert first.pop(card) and second.pop(card) and first == second
    with pytest.raises(UserError, match="holds a demo corpus made with"):
        make_demo_corpus(tmp_path / "a", seed=1, clips_per_kind=30, seconds=0.6, kinds=labels, speech=0)
    with pytest.raises(UserError, match="unknown kinds of sound: Unicorn"):
        make_demo_corpus(tmp_path / "c", kinds=["Unicorn"])


def test_every_kind_has_a_sound_and_words():
    assert list(KINDS) == list(WORDS) and set(MUSIC) < set(KINDS)


def test_speech_in_the_published_layouts(tmp_path):
    pytest.importorskip("espeakng_loader", reason="espeak-ng is not installed (extra: speech)")
    for name in ("a", "b"):
        made = make_demo_corpus(tmp_path / name, clips_per_kind=3, seconds=2.56, kinds=["Laser"], speech=12)
    assert made.recordings["ljspeech"] == 12 and made.recordings["gigaspeech"] == 4
    assert digest(tmp_path / "a").keys() == digest(tmp_path / "b").keys()
    assert (tmp_path / "a/ljspeech/metadata.csv").read_text() == (tmp_path / "b/ljspeech/metadata.csv").read_text()
    records = [r for r in everything(tmp_path / "a") if r.corpus in ("ljspeech", "gigaspeech")]
    spoken = [r for r in records if isinstance(r, corpora.Recording)]
    assert Counter(r.corpus for r in spoken) == {"ljspeech": 12, "gigaspeech": 12}
    assert [r.reason for r in records if isinstance(r, corpora.Rejected)] == ["no speech: <SIL>"] * 4
    for record in spoken:
        waveform, rate = soundfile.read(record.path)
        first_sample = round(record.start * rate)
        stretch = waveform[first_sample:][: None if record.seconds is None else round(record.seconds * rate)]
        assert 0.5 < len(stretch) / rate <= 2.56 and np.abs(stretch).max() > 0.05
        assert record.transcript.endswith(".") and record.transcript[0].isupper()


def test_every_kind_is_sound_of_the_asked_length():
    for label in KINDS:
        for pitch in (-1.0, 1.0):
            waveform = KINDS[label](np.random.default_rng(0), Traits(pitch, -pitch), 16000)
            assert waveform.shape == (16000,) and np.isfinite(waveform).all() and np.abs(waveform).max() > 0.01
        waveform, _ = make_clip(label, np.random.default_rng(1), 2.56)
        again, _ = make_clip(label, np.random.default_rng(1), 2.56)
        assert waveform.dtype == np.float32 and len(waveform) == 40960 and 0.2 < np.abs(waveform).max() <= 0.91
        np.testing.assert_array_equal(waveform, again)


def test_kinds_are_told_apart_on_a_coarse_spectrogram():
    """A linear classifier on the statistics of 16 x 16 cells of 16 frames by 8 bins: what is left after heavy blur."""
    labels, each = list(KINDS), 24
    waves = [normalise(make_clip(label, np.random.default_rng([k, i]), 2.56)[0]) for k, label in enumerate(labels) for i in range(each)]
    audio = AudioConfig(clip_seconds=2.56)
    mels = torch.cat([log_mel(part, audio) for part in torch.from_numpy(np.stack(waves)).split(32)])
    cells = mels.clamp(min=-8).reshape(len(waves), 16, 16, 8, 8).mean((2, 4))
    swing = torch.fft.rfft(cells - cells.mean(1, keepdim=True), dim=1).abs()[:, 1:].flatten(1) / 16
    features = torch.cat([cells.mean(1), cells.std(1), swing], 1)
    answers = torch.arange(len(labels)).repeat_interleave(each)
    train = torch.arange(len(waves)) % each < 16
    features = (features - features[train].mean(0)) / (features[train].std(0) + 1e-6)
    weights = torch.zeros(features.shape[1] + 1, len(labels), requires_grad=True)
    features = torch.cat([features, torch.ones(len(waves), 1)], 1)
    optimizer = torch.optim.Adam([weights], 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(features[train] @ weights, answers[train]) + 1e-3 * weights.square().sum()
        loss.backward()
        optimizer.step()
    right = (features @ weights).argmax(1) == answers
    assert right[~train].float().mean() > 0.95


def test_captions_are_true_and_varied():
    rng = np.random.default_rng(0)
    low_and_fast = {caption(rng, "Bark", Traits(-0.9, 0.9)) for _ in range(300)}
    assert len(low_and_fast) > 40
    assert not any(word in text for text in low_and_fast for word in ("small", "high", "slowly"))
    assert any("deep" in text and "quickly" in text for text in low_and_fast)
    plain = {caption(rng, "Organ", Traits(0, 0)) for _ in range(100)}
    assert len(plain) == len(TEMPLATES) and "An organ plays chords." in plain
    trained = {word for label in KINDS for _ in range(200) for word in _words(caption(rng, label, _traits(rng)))}
    tested = {word for label in KINDS for _ in range(50) for word in _words(caption(rng, label, _traits(rng), TEST_TEMPLATES))}
    assert tested <= trained


def _words(text: str) -> list[str]:
    return text.lower().replace(",", "").replace(".", "").split()


def _traits(rng: np.random.Generator) -> Traits:
    return Traits(float(rng.uniform(-1, 1)), float(rng.uniform(-1, 1)))
