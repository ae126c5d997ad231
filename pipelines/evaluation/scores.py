"""Scoring sets of clips: every measure that the judges allow, each with the record of how it came about.

`score_sets` is the one road: sets in, scores with records out. `judge_scores` is its core, on embeddings alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pipelines.evaluation import metrics
from pipelines.evaluation.clips import VOICE, Channels, ClipSet, SoundCheck, check_sounds
from pipelines.evaluation.listening import ClapJudge, ClassifierJudge, Embeddings, Judge, embed_files, judge_fields
from pipelines.evaluation.records import MEASURES, Protocol, Record, Score
from pipelines.evaluation.words import Reader, word_errors
from stages.audio import AudioConfig, log_mel
from stages.files import code_version

FRECHET = "Fréchet distance by singular values"

# Which metrics follow from a judge's output. Names that differ only in the judge are different metrics.
FRECHET_OF = {
    "vggish": "fad",
    "vggish-google": "fad_google",
    "cnn14-16k": "fd",
    "cnn14-32k": "fd_32k",
    "clap": "frechet_clap",
    "classifier": "frechet_classifier",
}
KL_OF = {"cnn14-16k": "kl_panns", "cnn14-32k": "kl_panns_32k", "passt-s": "kl_passt", "classifier": "kl"}
KL_SIGMOID_OF = {"cnn14-16k": "kl_sigmoid_panns", "cnn14-32k": "kl_sigmoid_panns_32k"}
INCEPTION_OF = {"cnn14-16k": "inception_score", "cnn14-32k": "inception_score_32k"}
INFINITY_OF = {"vggish": "fad_infinity"}


# --------------------------------------------------------------------------------------------------------- all scores


@dataclass
class Scores:
    """Scores of several sets, while they are collected and afterwards.

    Attributes:
        sets: by name of column: "generated", "vae", "vocoder", "real", "other_real".
        values: measure → column → value.
        missing: measure → why the system has no score.
        notes: what a reader should know before believing a number.
        chance: what a measure gives without any skill.
        clips: column → clip id → what is known of the single clip: clap_score, recognised, confidence.
        classes: those that the classifier knows.
    """

    sets: Mapping[str, ClipSet]
    channels: Channels
    values: dict[str, dict[str, float]] = field(default_factory=lambda: {name: {} for name in MEASURES})
    records: list[Record] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    chance: dict[str, float] = field(default_factory=dict)
    clips: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    checks: dict[str, SoundCheck] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clips = {column: {clip.clip_id: {} for clip in clips.clips} for column, clips in self.sets.items()}

    def column(self, role: str) -> str:
        """The first column whose set has this role."""
        return next(column for column, clips in self.sets.items() if clips.role == role)

    @property
    def system(self) -> ClipSet:
        return self.sets[self.column("system")]

    @property
    def reference(self) -> ClipSet:
        return self.sets[self.column("reference")]

    @property
    def with_texts(self) -> dict[str, ClipSet]:
        """The sets that hold the clips of the system, with its texts."""
        pairs = self.system.pairs_in(self.reference)
        usable = {column: clips for column, clips in self.sets.items() if clips.role in ("system", "restored")}
        return usable | ({self.column("reference"): self.reference.like(self.system)} if pairs is not None else {})

    def add(self, column: str, judged_by: Mapping[str, Any], score: Score) -> None:
        """Take in one score; `judged_by` are the judge's fields of the protocol."""
        clips = self.sets[column]
        self.values[score.metric][column] = score.value
        protocol = Protocol(**{**_DEFAULTS, **judged_by, **self._set_fields(score), **score.fields, "metric": score.metric})
        made = {**clips.made, "sounds_sha256": clips.sha256} if clips.made or clips.role == "system" else {}
        check = self.checks[column].counts() if column in self.checks else {"clips": len(clips.clips)}
        record = Record(clips.name, score.value, protocol, made, check, code_version(), score.extra, ranked=clips.role == "system")
        self.records.append(record)

    def _set_fields(self, score: Score) -> dict[str, Any]:
        """What the sets decide of a protocol. References play no part in scores that are taken from the other clips alone."""
        return {
            "num_generated": len(self.system.clips),
            "channels": self.channels,
            "candidates": self.system.candidates,
            "ranker": self.system.ranker,
            "captions_sha256": self.system.captions_sha256,
            "references_sha256": None if score.fields.get("num_reference") is None else self.reference.sha256,
        }


# Of a score that is a plain mean over clips.
_DEFAULTS: dict[str, Any] = {
    "direction": None,
    "dtype": "float64",
    "seed": None,
    "rows_generated": 0,
    "num_reference": None,
    "rows_reference": None,
    "pairing": "label",
    "ddof": None,
}


def score_sets(
    sets: Mapping[str, ClipSet],
    judges: Sequence[Judge],
    readers: Sequence[Reader] = (),
    *,
    audio: AudioConfig | None = None,
    channels: Channels = "mean",
    cache: Path | None = None,
) -> Scores:
    """Every measure of every set. What cannot be measured is missing with its reason; nothing here fails for want of labels.

    Args:
        sets: by column, one of them a system and one the reference.
        readers: speech recognition, for error rates.
        audio: the front end for measures of restored sets; needed if there are any.
        cache: folder where embeddings are kept.

    Raises:
        UserError: a set holds clips that cannot be read or are not finite.
    """
    out = Scores(sets, channels)
    for column, clips in sets.items():
        if clips.role != "floor":
            out.checks[column] = check_sounds(clips, channels)
            silent = len(out.checks[column].silent) / len(clips.clips)
            out.add(column, _as_written(clips), Score("silent", silent, {"implementation": "RMS below -60 dBFS", "pairing": "none"}))
    for role in ("system", "reference"):
        out.notes += out.checks[out.column(role)].notes(out.sets[out.column(role)].name)
    for judge in judges:
        embeddings = {column: embed_files(judge, clips.files, channels, cache) for column, clips in sets.items()}
        _distances(out, judge, embeddings)
        if isinstance(judge, ClapJudge):
            _captions(out, judge, embeddings)
        if isinstance(judge, ClassifierJudge):
            _recognition(out, judge, embeddings)
    for reader in readers:
        _words(out, reader)
    for column, clips in sets.items():
        if clips.role == "restored":
            assert audio is not None, "restored clips are compared by the spectrograms of their system"
            _reconstruction(out, column, audio)
    return out


def _distances(out: Scores, judge: Judge, embeddings: Mapping[str, Embeddings]) -> None:
    """What a judge's embeddings of each set say beside those of the reference."""
    for column, clips in out.sets.items():
        if clips.role == "reference":
            continue
        result = judge_scores(judge.name, embeddings[out.column("reference")], embeddings[column], clips.pairs_in(out.reference))
        for score in result.scores:
            out.add(column, judge_fields(judge), score)
        if clips.role == "system":
            out.missing |= result.missing
            out.notes += result.notes


def _captions(out: Scores, judge: ClapJudge, embeddings: Mapping[str, Embeddings]) -> None:
    """The CLAP score: captions beside clips."""
    texts = [clip.text for clip in out.system.clips]
    if not all(texts):
        out.missing["clap_score"] = "it compares clips with their captions; name a list with --captions"
        return
    if set(texts) == {VOICE}:
        out.missing["clap_score"] = "the clips have transcripts but no captions"
        return
    captions = judge.embed_texts(texts)
    fields = {"implementation": "mean cosine", "rows_generated": len(texts), "pairing": "caption by name"}
    for column, clips in out.with_texts.items():
        rows = embeddings[column].rows[[out.sets[column].numbers[clip.clip_id] for clip in clips.clips]]
        out.add(column, judge_fields(judge), Score("clap_score", metrics.clap_score(captions, rows), fields))
        for clip, cosine in zip(clips.clips, metrics.cosines(captions, rows), strict=True):
            out.clips[column][clip.clip_id]["clap_score"] = float(cosine)
        if clips.role == "system":
            chance = metrics.clap_chance(captions, rows, [clip.label or clip.text for clip in clips.clips])
            out.chance |= {} if chance is None else {"clap_score": chance}


def _recognition(out: Scores, judge: ClassifierJudge, embeddings: Mapping[str, Embeddings]) -> None:
    """Accuracy of the classifier, and the class of every clip."""
    out.classes = judge.classes
    known = set(judge.classes)
    for column, clips in out.sets.items():
        logits = embeddings[column].logits
        assert logits is not None
        probabilities = np.exp(logits - logits.max(1, keepdims=True))
        probabilities /= probabilities.sum(1, keepdims=True)
        for clip, row in zip(clips.clips, probabilities, strict=True):
            out.clips[column][clip.clip_id] |= {"recognised": judge.classes[int(row.argmax())], "confidence": float(row.max())}
    labelled = [clip for clip in out.system.clips if clip.label in known]
    if not labelled:
        some_label = any(clip.label for clip in out.system.clips)
        out.missing["accuracy"] = "the classifier knows none of the clips' labels" if some_label else "the clips have no labels"
        return
    if len(labelled) < len(out.system.clips):
        out.notes.append(
            f"accuracy is over {len(labelled)} of {len(out.system.clips)} clips; the classifier does not know the labels of the others"
        )
    out.chance["accuracy"] = 1.0 / len(judge.classes)
    fields = {"implementation": "share of clips whose label is the likeliest class", "rows_generated": len(labelled)}
    for column in out.with_texts:
        hits = [out.clips[column][clip.clip_id]["recognised"] == clip.label for clip in labelled]
        out.add(column, judge_fields(judge), Score("accuracy", float(np.mean(hits)), fields))


def _words(out: Scores, reader: Reader) -> None:
    """Error rates of what speech recognition reads; those of the real clips are their floor."""
    transcripts = [clip.transcript for clip in out.system.clips]
    if not all(transcripts):
        out.missing |= dict.fromkeys(("wer", "cer"), "not every clip has a transcript; name a caption list that has them with --captions")
        return
    for column, clips in out.with_texts.items():
        texts = reader.read(clips, out.channels)
        for score in word_errors(transcripts, texts) if texts is not None else []:
            out.add(column, reader.fields, score)


def _reconstruction(out: Scores, column: str, audio: AudioConfig) -> None:
    """How close restored clips come to the real waveforms."""
    restored = out.sets[column]
    pairs = [(real, wave) for (real, _), (wave, _) in zip(out.reference.like(restored).waveforms(), restored.waveforms(), strict=True)]
    spectral = np.array([metrics.spectral_distance(*pair) for pair in pairs]).mean(0)
    log_spectral = np.mean([metrics.log_spectral_distance(*pair, audio.sample_rate) for pair in pairs])
    real, other = (log_mel(torch.from_numpy(np.stack(waves)), audio).numpy() for waves in zip(*pairs, strict=True))
    pictures = [(metrics.mel_image(one), metrics.mel_image(two)) for one, two in zip(real, other, strict=True)]
    levels = [level for level in (metrics.psnr(*pair) for pair in pictures) if np.isfinite(level)]
    mel = f"{audio.mel_bins}-bin log-mel, {audio.n_fft}-point transform, {audio.fmin:g} to {audio.fmax:g} Hz"
    measured = [
        ("mel_l1", f"mean absolute difference, {mel}", metrics.mel_l1(real, other)),
        ("mel_ssim", f"7 x 7 windows of the picture -80 to 20 dB, {mel}", np.mean([metrics.ssim(*pair) for pair in pictures])),
        ("log_spectral_distance", "46 ms windows every 10 ms", log_spectral),
        ("spectral_convergence", "three resolutions", spectral[0]),
        ("log_magnitude", "three resolutions", spectral[1]),
    ]
    if levels:  # an exact copy has no level to speak of
        measured.append(("mel_psnr", f"of the picture -80 to 20 dB, {mel}", np.mean(levels)))
    for metric, implementation, value in measured:
        fields = {"implementation": implementation, "pairing": "same clip", "num_reference": len(pairs)}
        out.add(column, _as_written(restored), Score(metric, float(value), fields))


def _as_written(clips: ClipSet) -> dict[str, Any]:
    """The judge's fields of scores that no judge takes part in."""
    rule = "whole clips" if clips.seconds is None else f"{clips.seconds:g} s"
    alike = {"judge": None, "judge_sha256": None, "resampler": "none", "level": "as written", "clip_rule": rule}
    return {**alike, "sample_rate": None}


# --------------------------------------------------------------------------------------------- scores from embeddings


@dataclass
class JudgeScores:
    """The scores that one judge gives one set."""

    scores: list[Score] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # metric -> why
    notes: list[str] = field(default_factory=list)

    def attempt(self, metric: str, compute: Callable[[], tuple[float, Mapping[str, float]]], **fields: Any) -> None:
        """Add a score, or why the metric refuses these clips."""
        try:
            value, extra = compute()
        except ValueError as error:
            self.missing[metric] = str(error)
        else:
            self.scores.append(Score(metric, value, fields, extra))


def judge_scores(judge: str, reference: Embeddings, generated: Embeddings, pairs: Sequence[int] | None) -> JudgeScores:
    """Every metric that a judge's embeddings of two sets allow.

    Args:
        judge: its name; it decides what the metrics are called.
        pairs: for every generated clip the number of the real clip that belongs to it, as KL needs; None if there are none.
    """
    out = JudgeScores()
    counts = {
        "num_reference": reference.num_clips,
        "rows_reference": len(reference.rows),
        "rows_generated": len(generated.rows),
        "pairing": "none",
        "ddof": 1,
    }
    if metric := FRECHET_OF.get(judge):
        _frechet(out, metric, reference, generated, windows=judge.startswith("vggish"), counts=counts)
    if metric := INFINITY_OF.get(judge):
        implementation = f"{FRECHET}, line over 1/N from 500 rows on, whole clips drawn"
        out.attempt(metric, partial(_frechet_infinity, reference, generated), implementation=implementation, seed=0, **counts)
    activations: dict[Literal["softmax", "sigmoid"], dict[str, str]] = {"softmax": KL_OF, "sigmoid": KL_SIGMOID_OF}
    for activation, names in activations.items():
        metric = names.get(judge)
        if metric and pairs is None:
            out.missing[metric] = "it compares a generated clip with the real clip of the same name, and not every clip has one"
        elif metric and pairs is not None:
            fields = counts | {"num_reference": len(pairs), "rows_reference": len(pairs), "pairing": "by name", "ddof": None}
            fields |= {"direction": "KL(reference || generated)", "implementation": f"KL of {activation}, floor 1e-6"}
            out.attempt(metric, partial(_kl, reference, generated, pairs, activation), **fields)
    if metric := INCEPTION_OF.get(judge):
        fields = counts | {"num_reference": None, "rows_reference": None, "ddof": 0}
        out.attempt(metric, partial(_inception, generated), implementation="inception score, 10 parts", seed=2020, **fields)
    return out


def _frechet(out: JudgeScores, metric: str, reference: Embeddings, generated: Embeddings, windows: bool, counts: Mapping[str, Any]) -> None:
    """`windows`: the judge gives a clip several rows, and with too few of them published figures mean nothing."""
    width, fewest = reference.rows.shape[1], min(len(reference.rows), len(generated.rows))
    if windows and fewest < 2 * width:
        out.missing[metric] = f"{fewest} windows are too few for {width} dimensions; it takes {2 * width}, which is 26 clips of 10 s"
        return
    out.attempt(metric, lambda: (metrics.frechet_distance(reference.rows, generated.rows), {}), implementation=FRECHET, **counts)
    if fewest <= width:
        few = f"{fewest} embeddings for {width} dimensions"
        out.notes.append(f"{MEASURES[metric].title}: {few}; it depends on that number, compare equal ones only")


def _frechet_infinity(reference: Embeddings, generated: Embeddings) -> tuple[float, dict[str, float]]:
    line = metrics.frechet_infinity(reference.rows, generated.rows, generated.clip_of)
    return line.value, {"slope": line.slope, "r_squared": line.r_squared}


def _kl(
    reference: Embeddings, generated: Embeddings, pairs: Sequence[int], activation: Literal["softmax", "sigmoid"]
) -> tuple[float, dict[str, float]]:
    assert reference.logits is not None and generated.logits is not None
    return metrics.kl_divergence(reference.logits[list(pairs)], generated.logits, activation), {}


def _inception(generated: Embeddings) -> tuple[float, dict[str, float]]:
    assert generated.logits is not None
    mean, deviation = metrics.inception_score(generated.logits)
    return mean, {"deviation": deviation}
