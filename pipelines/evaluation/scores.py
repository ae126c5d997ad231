"""The scores of an evaluation: every measure of every system that was heard for the same clips, and their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from pipelines.evaluation import listening as judging
from pipelines.evaluation import metrics
from pipelines.evaluation.clips import VOICE, HeldOut
from pipelines.evaluation.listening import ClapJudge, ClassifierJudge, Found, Heard, Judge
from pipelines.evaluation.records import MEASURES, Record, SoundCheck, check_sounds
from pipelines.evaluation.results import HEARD, SYSTEMS
from pipelines.score import read_by, word_errors
from stages.audio import AudioConfig, Waveform, log_mel
from stages.files import code_version
from stages.judges.whisper import Transcriber


@dataclass
class Scored:
    """Scores while they are collected; most fields are those of `Evaluation`."""

    clips: list[dict[str, Any]]
    scores: dict[str, dict[str, float]] = field(default_factory=lambda: {name: {} for name in MEASURES})
    found: list[tuple[str, Mapping[str, Any], Found]] = field(default_factory=list)  # (system, who heard it and how, score)
    intervals: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    classes: list[dict[str, Any]] = field(default_factory=list)
    confusion: dict[str, Any] = field(default_factory=dict)
    check: SoundCheck = SoundCheck(0)

    def add(self, system: str, heard_by: Mapping[str, Any], found: Found) -> None:
        """Take in one score; `heard_by` as `judging.hearing` tells it."""
        self.scores[found.metric][system] = found.value
        self.found.append((system, heard_by, found))

    def add_judged(self, judge: Judge, heard: Mapping[str, Heard]) -> None:
        """Take in what a judge's hearing of every system says beside the real clips."""
        for system, sounds in heard.items():
            if system == "real":
                continue
            pairs = range(sounds.num_clips) if system in HEARD else None
            scores = judging.scores(judge.name, heard["real"], sounds, pairs)
            for found in scores.found:
                self.add(system, judging.hearing(judge), found)
            if system == "generated":
                self.missing |= scores.missing
            self.notes += [note for note in scores.notes if note not in self.notes]


def score(
    clips: Sequence[HeldOut],
    heard: Mapping[str, Sequence[Waveform]],
    others: Sequence[Waveform],
    clap: ClapJudge,
    classifier: ClassifierJudge | None,
    audio: AudioConfig,
    speech: bool,
) -> Scored:
    """Every measure of every system. What cannot be measured is missing with its reason; nothing here fails for want of labels.

    Args:
        heard: waveforms of each system, in the order of `clips`.
        others: more real clips; as many as `clips` give the Fréchet distances a floor to be read against.
    """
    out = Scored([asdict(clip) for clip in clips])
    sounds = dict(heard) | ({"other_real": others} if len(others) == len(clips) else {})
    if classifier is not None:
        _recognition(out, clips, {s: judging.hear(classifier, waves, audio.sample_rate) for s, waves in sounds.items()}, classifier)
    _closeness_to_text(out, clips, {s: judging.hear(clap, waves, audio.sample_rate) for s, waves in sounds.items()}, clap, speech)
    _reconstruction(out, heard, audio)
    for system, waves in heard.items():
        out.add(system, _as_written(audio), _plain("silent", "RMS below -60 dBFS", metrics.silent_share(waves), pairing="none"))
    named = ((clip.clip_id, wave, audio.sample_rate) for clip, wave in zip(clips, heard["generated"], strict=True))
    out.check = check_sounds(named, audio.clip_seconds)
    out.notes[:0] = out.check.notes("generated")
    return out


def _recognition(out: Scored, clips: Sequence[HeldOut], heard: Mapping[str, Heard], classifier: ClassifierJudge) -> None:
    """Classifier: accuracy, confusion, KL and Fréchet distance."""
    out.add_judged(classifier, heard)
    names = classifier.classes
    logits = {system: sounds.logits for system, sounds in heard.items() if sounds.logits is not None and system in HEARD}
    best = {system: values.argmax(1) for system, values in logits.items()}
    shifted = np.exp(logits["generated"] - logits["generated"].max(1, keepdims=True))
    confidence = (shifted / shifted.sum(1, keepdims=True)).max(1)
    for i, row in enumerate(out.clips):
        row |= {"recognised": names[best["generated"][i]], "confidence": float(confidence[i]), "recognised_real": names[best["real"][i]]}
    number = {name: i for i, name in enumerate(names)}
    known = [i for i, clip in enumerate(clips) if clip.label in number]
    if not known:
        labelled = any(clip.label for clip in clips)
        out.missing["accuracy"] = "the classifier knows none of the clips' labels" if labelled else "the held-out clips have no labels"
        return
    if len(known) < len(clips):
        out.notes.append(f"accuracy is over {len(known)} of {len(clips)} clips; the classifier does not know the labels of the others")
    asked = np.array([number[str(clips[i].label)] for i in known])
    hits = {system: best[system][known] == asked for system in HEARD}
    out.scores["accuracy"]["chance"] = 1.0 / len(names)
    for system, hit in hits.items():
        found = _plain("accuracy", "share of clips whose label is the likeliest class", float(hit.mean()), rows_generated=len(hit))
        out.add(system, judging.hearing(classifier), found)
    out.intervals["accuracy"] = {system: list(metrics.interval(int(hit.sum()), len(hit))) for system, hit in hits.items()}
    for index in np.unique(asked):
        here = asked == index
        shares = {system: float(hit[here].mean()) for system, hit in hits.items()}
        out.classes.append({"name": names[index], "count": int(here.sum()), **shares})
    out.confusion = {"names": list(names), "counts": metrics.confusion(asked, best["generated"][known], len(names)).tolist()}


def _closeness_to_text(out: Scored, clips: Sequence[HeldOut], heard: Mapping[str, Heard], clap: ClapJudge, speech: bool) -> None:
    """CLAP: score and Fréchet distance."""
    texts = [clip.text for clip in clips]
    if speech and set(texts) == {VOICE}:
        out.missing["clap_score"] = "the clips have transcripts but no captions"
    else:
        words = clap.embed_texts(texts)
        for system in HEARD:
            out.add(system, judging.hearing(clap), judging.clap_found(words, heard[system]))
        chance = metrics.clap_chance(words, heard["generated"].rows, [clip.label or clip.text for clip in clips])
        if chance is not None:
            out.scores["clap_score"]["chance"] = chance
        cosines = {system: metrics.cosines(words, heard[system].rows) for system in ("generated", "real")}
        for i, row in enumerate(out.clips):
            row |= {"clap_score": float(cosines["generated"][i]), "clap_score_real": float(cosines["real"][i])}
    out.add_judged(clap, heard)


def words(
    out: Scored, clips: Sequence[HeldOut], heard: Mapping[str, Sequence[Waveform]], transcriber: Transcriber, audio: AudioConfig
) -> None:
    """Error rates of what speech recognition reads, into `out`; those of the real clips are their floor."""
    said = [clip.transcript for clip in clips]
    if not all(said):
        out.missing |= dict.fromkeys(("wer", "cer"), "not every clip has a transcript")
        return
    for system, waves in heard.items():
        for found in word_errors(said, transcriber.transcribe(waves, audio.sample_rate)):
            out.add(system, read_by(transcriber), found)


def _reconstruction(out: Scored, heard: Mapping[str, Sequence[Waveform]], audio: AudioConfig) -> None:
    """How close VAE and vocoder come to the real waveform."""
    mel = f"{audio.mel_bins}-bin log-mel, {audio.n_fft}-point transform, {audio.fmin:g} to {audio.fmax:g} Hz"
    for system in ("vae", "vocoder"):
        pairs = list(zip(heard["real"], heard[system], strict=True))
        spectral = np.array([metrics.spectral_distance(real, wave) for real, wave in pairs]).mean(0)
        log_spectral = np.mean([metrics.log_spectral_distance(*pair, audio.sample_rate) for pair in pairs])
        real, restored = (log_mel(torch.from_numpy(np.stack(waves)), audio).numpy() for waves in (heard["real"], heard[system]))
        pictures = [(metrics.mel_image(one), metrics.mel_image(two)) for one, two in zip(real, restored, strict=True)]
        levels = [level for level in (metrics.psnr(*pair) for pair in pictures) if np.isfinite(level)]
        found = [
            ("mel_l1", f"mean absolute difference, {mel}", metrics.mel_l1(real, restored)),
            ("mel_ssim", f"7 x 7 windows of the picture -80 to 20 dB, {mel}", np.mean([metrics.ssim(*pair) for pair in pictures])),
            ("log_spectral_distance", "46 ms windows every 10 ms", log_spectral),
            ("spectral_convergence", "three resolutions", spectral[0]),
            ("log_magnitude", "three resolutions", spectral[1]),
        ]
        if levels:  # an exact copy has no level to speak of
            found.append(("mel_psnr", f"of the picture -80 to 20 dB, {mel}", np.mean(levels)))
        for metric, implementation, value in found:
            out.add(system, _as_written(audio), _plain(metric, implementation, float(value), pairing="same clip", num_reference=len(pairs)))


def _plain(metric: str, implementation: str, value: float, **fields: Any) -> Found:
    """A score that is a plain mean over clips."""
    plain = {"rows_generated": 0, "num_reference": None, "rows_reference": None, "pairing": "label", "ddof": None}
    return Found(metric, value, {**plain, "implementation": implementation, **fields}, {})


def _as_written(audio: AudioConfig) -> dict[str, Any]:
    """`judging.hearing` of scores that no judge takes part in."""
    return {
        "judge": None, "judge_sha256": None, "sample_rate": audio.sample_rate, "resampler": "none", "level": "as written",
        "clip_rule": f"{audio.clip_seconds:g} s",
    }  # fmt: skip


def records(scored: Scored, name: str, common: Mapping[str, Any], made: Mapping[str, Mapping[str, Any]]) -> list[Record]:
    """One record per score of every system that makes sound.

    Args:
        name: what the evaluated system is called.
        common: the protocol fields that the two sets decide.
        made: how the sounds of each system came about.
    """
    called = {"generated": name, "vae": f"{name}: VAE + vocoder", "vocoder": f"{name}: vocoder", "real": "real clips"}
    found, version = [], code_version()
    for system, heard_by, one in scored.found:
        protocol = judging.protocol_of(one, heard_by, common)
        check = scored.check.counts() if system == "generated" else {"clips": len(scored.clips)}
        shown, ranked = called.get(system, SYSTEMS[system]), system == "generated"
        found.append(Record(shown, one.value, protocol, made.get(system, {}), check, version, one.extra, ranked))
    return found
