"""JOB: generate for held-out captions, and score what is heard beside what could be reached at best.

Four systems are heard for the same clips: `generated` (from the caption alone), `vae` (the real clip through VAE and
vocoder), `vocoder` (the real clip's spectrogram through the vocoder), and `real`. Every score is taken from final
waveforms, which lie in `<work>/evaluation` with the record of how they were made. A killed evaluation continues.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from pipelines import metrics, plots
from pipelines.store import FeatureStore, StoreReader, code_version
from pipelines.tracking import Tracker
from stages.audio import AudioConfig, Waveform, load_audio, log_mel, normalise, pad_or_cut, slaney_filterbank, write_wav
from stages.base import UserError, weights_hash, write_json
from stages.bundle import read_info
from stages.classifier.model import Classifier
from stages.cli import friendly, sampling_options, tracking_option, work_option
from stages.frozen import TextEncoders
from stages.generator import AudioGenerator
from stages.sampling import OPTIONS, resolve
from stages.text import clip_texts

if TYPE_CHECKING:
    from stages.variants import Variant

EVALUATION_FORMAT = 1
VOICE = "A person is speaking."  # the prompt of a speech clip without a caption
HEARD_IN_MLFLOW = 8  # clips whose sound and spectrograms are logged
SILENT_LIMIT = 0.01  # above this share of silent clips the distances say nothing


@dataclass(frozen=True)
class Measure:
    """What a score is called, and which way is good."""

    title: str
    better: str  # "higher" or "lower"
    form: str = "{:.3f}"
    about: str = ""


MEASURES = {
    "accuracy": Measure(
        "Recognised by the classifier", "higher", "{:.1%}", "share of clips whose class a classifier trained on real clips names"
    ),
    "kl": Measure("KL to the real clip", "lower", "{:.2f}", "KL(real ‖ heard) of the classifier's probabilities, clip by clip"),
    "frechet_classifier": Measure(
        "Fréchet distance, classifier", "lower", "{:.2f}", "between sets of classifier embeddings, to the real clips"
    ),
    "frechet_clap": Measure("Fréchet distance, CLAP", "lower", "{:.3f}", "between sets of CLAP audio embeddings, to the real clips"),
    "clap_score": Measure("CLAP score", "higher", "{:.3f}", "mean cosine of caption and clip; chance: captions of other classes"),
    "mel_l1": Measure("Mel distance", "lower", "{:.3f}", "mean |Δ| of log-mel spectrograms, nepers"),
    "log_spectral_distance": Measure("Log-spectral distance", "lower", "{:.2f}", "of log10 power"),
    "spectral_convergence": Measure("Spectral convergence", "lower", "{:.3f}", "three resolutions"),
    "log_magnitude": Measure("Log-magnitude distance", "lower", "{:.3f}", "three resolutions, nepers"),
    "silent": Measure("Silent clips", "lower", "{:.1%}", "RMS below -60 dBFS"),
}
# The columns of every table: without any skill, the system itself, its two ceilings, the real clips, and other real clips.
SYSTEMS = {
    "chance": "chance",
    "generated": "generated",
    "vae": "VAE + vocoder",
    "vocoder": "vocoder",
    "real": "real",
    "other_real": "other real clips",
}
HEARD = ("generated", "vae", "vocoder", "real")


@dataclass(frozen=True)
class HeldOut:
    """One clip to generate: its caption, and for speech what is said."""

    clip_id: str
    corpus: str
    text: str
    transcript: str
    label: str | None  # its class: the first label

    @property
    def key(self) -> str:
        """Tells this clip and text from all others, in file names."""
        return f"{self.clip_id}.{_digest([self.text, self.transcript], 8)}"


@dataclass(frozen=True)
class Evaluation:
    """Scores with the record of how they came about; `<work>/evaluation/evaluation.json`."""

    protocol: dict[str, Any]
    scores: dict[str, dict[str, float]]  # measure -> system -> value
    intervals: dict[str, dict[str, list[float]]]  # 95 % intervals, where there are any
    missing: dict[str, str]  # measure -> why there is no score
    notes: list[str]  # what a reader should know before believing a number
    classes: list[dict[str, Any]]  # per class: name, count, accuracy of every system
    confusion: dict[str, Any]  # names, counts: generated clips, asked for against recognised
    clips: list[dict[str, Any]]  # per clip: text, label, recognised, scores, files of every system
    format: int = EVALUATION_FORMAT

    @classmethod
    def read(cls, work: Path) -> Evaluation | None:
        """The evaluation of a project folder, or None when there is none."""
        path = Path(work) / "evaluation" / "evaluation.json"
        if not path.is_file():
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("format") != EVALUATION_FORMAT:
            raise UserError(
                f"{path} has format {values.get('format')}, this version of loa reads {EVALUATION_FORMAT}; run `loa evaluate` again"
            )
        return cls(**values)

    def summary(self) -> str:
        """The headline in one line."""
        parts = []
        for name, short in (("accuracy", "recognised"), ("frechet_clap", "Fréchet (CLAP)"), ("clap_score", "CLAP score")):
            if "generated" in (values := self.scores.get(name, {})):
                form = MEASURES[name].form.format
                beside = ", ".join(f"{SYSTEMS[s]} {form(values[s])}" for s in ("chance", "vae", "real") if s in values)
                parts.append(f"{short} {form(values['generated'])}" + (f" ({beside})" if beside else ""))
        return f"{len(self.clips)} clips: " + "; ".join(parts or ["nothing could be scored"])

    def table(self) -> str:
        """All scores as a text table, with what is missing and why."""
        columns = [s for s in SYSTEMS if any(s in values for values in self.scores.values())]
        rows = [["", *(SYSTEMS[s] for s in columns)]]
        for name, values in self.scores.items():
            arrow = "↑" if MEASURES[name].better == "higher" else "↓"
            cells = [MEASURES[name].form.format(values[s]) if s in values else "–" for s in columns]
            rows.append([f"{MEASURES[name].title} {arrow}", *cells])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        padded = [
            [f"{cell:{'<' if i == 0 else '>'}{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True))] for row in rows
        ]
        lines = ["  ".join(row).rstrip() for row in padded]
        lines += [f"{MEASURES[name].title}: not measured, {reason}" for name, reason in self.missing.items()]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)]) + "\n"


# ------------------------------------------------------------------------------------------------------- the job


def evaluate(
    work: Path,
    variant: Variant | None = None,
    *,
    bundle: Path | None = None,
    store: str | None = None,
    clap: Path | None = None,
    classifier: Path | None = None,
    num_clips: int = 100,
    split: str | None = None,
    profile: str = "loa",
    seed: int = 0,
    batch: int = 8,
    device: str | None = None,
    tracker: Tracker | None = None,
    **options: Any,
) -> Evaluation:
    """Generate one clip for each held-out caption, score all systems, and write `<work>/evaluation`.

    Args:
        variant: the system the bundle is expected to hold; anything goes if None.
        bundle: `<work>/bundle` by default.
        store: feature store with the held-out clips; `<work>/store` by default.
        clap: folder of the CLAP that scores; by default the bundle's own, which favours its captions.
        classifier: folder of the classifier; `<work>/stages/classifier` by default.
        num_clips: how many captions, taken in turn from all classes.
        split: "test" if it has clips with captions, else "validation", by default.
        profile: whose way of sampling, with `options` in place of its own (`stages.sampling.resolve`). Every clip is as long
            as the real ones, whatever the profile's `length`.
        batch: clips at a time.

    Raises:
        UserError: there is no bundle, no store, or no held-out clip with a caption.
    """
    work, tracker = Path(work).absolute(), tracker or Tracker.off()
    bundle = Path(bundle or work / "bundle")
    info = read_info(bundle)
    if variant is not None and variant.name != info.variant:
        raise UserError(f"{bundle} holds {info.variant}, expected {variant.name}; export that one or name its bundle with --bundle")
    opened = FeatureStore.open(store or str(work / "store"))
    audio = opened.audio
    if (audio.sample_rate, audio.mel_bins, audio.hop_length) != (info.audio.sample_rate, info.audio.mel_bins, info.audio.hop_length):
        raise UserError(
            f"the store {opened.root} holds clips of {audio}, the bundle {bundle} makes {info.audio}; name the store it was trained for"
        )
    reader = opened.reader(["waveform"])
    split, clips, others = choose_clips(opened.clips(), reader, split, num_clips, seed, info.speech)

    settings = {
        "bundle_sha256": weights_hash(bundle), "seed": seed, "seconds": audio.clip_seconds,
        **asdict(resolve(profile, **options | {"length": "loa"})),
    }  # fmt: skip
    place = work / "evaluation"
    sounds = Sounds(place, audio, generated=_digest(settings, 12), restored=_digest(settings["bundle_sha256"], 12))
    began = time.monotonic()
    generator = _Lazily(lambda: AudioGenerator.load(bundle, device))
    made = sounds.generate(clips, generator, settings, info.speech, batch)
    if made:
        tracker.metrics({"speed/seconds_per_clip": (time.monotonic() - began) / made})
    sounds.keep_real(clips, reader)
    sounds.restore(clips, generator, batch)
    del generator

    listener = Listener(audio, clap or bundle, classifier or work / "stages" / "classifier", device)
    heard = {system: [sounds.read(system, clip) for clip in clips] for system in HEARD}
    other = [reader.read(clip.clip_id)["waveform"] for clip in others]
    scored = score(clips, heard, other, listener, info.speech)
    protocol = {
        **settings, "variant": info.variant, "bundle": str(bundle), "store": opened.root, "split": split, "num_clips": len(clips),
        "captions_sha256": captions_hash(clips), "candidates_per_caption": 1, "sample_rate": audio.sample_rate,
        "front_end": "mean removed, peak 0.5, cut or padded to the clip length, log-mel of 16-bit waveforms",
        "kl_direction": "KL(real || heard)", "frechet": "float64, ddof 1, not square-rooted", "clap": str(clap or bundle),
        "clap_sha256": weights_hash(listener.clap_folder / "text_encoder"), "classifier_sha256": listener.classifier_sha256,
        "code_version": code_version(), "mlflow_run_id": tracker.handle().run_id,
    }  # fmt: skip
    files = [{s: sounds.path(s, clip).relative_to(place).as_posix() for s in HEARD} for clip in clips]
    clip_rows = [row | {"files": paths} for row, paths in zip(scored.clips, files, strict=True)]
    notes = list(scored.notes)
    if len(clips) < num_clips:
        notes.append(f"{num_clips} clips were asked for; the split {split} has {len(clips)}")
    if clap is None:
        notes.append("CLAP scores use the CLAP that also conditions the generator, which raises them; see --clap")
    found = Evaluation(protocol, scored.scores, scored.intervals, scored.missing, notes, scored.classes, scored.confusion, clip_rows)
    _write(found, place)
    _log(found, heard, place, audio, tracker)
    return found


def choose_clips(
    table: pd.DataFrame, available: StoreReader, split: str | None, count: int, seed: int, speech: bool = False
) -> tuple[str, list[HeldOut], list[HeldOut]]:
    """The clips to evaluate, and as many others of the same split if there are: taken in turn from all classes.

    The order depends on the seed and the clips alone, and a larger count only adds to it. Where some clips have labels,
    only those are taken. Of several captions one is drawn.

    Returns:
        The split, the clips, and the others.
    """
    table = table[[clip_id in available for clip_id in table["clip_id"]]]
    tried = [split] if split else ["test", "validation"]
    for name in tried:
        rows = [_held_out(row, seed, speech) for row in table[table["split"] == name].to_dict("records")]
        found = [clip for clip in rows if clip.text and (clip.transcript or not speech)]
        if found:
            found = [clip for clip in found if clip.label] or found
            ordered = _in_turn(found, seed)
            return name, ordered[:count], ordered[count : 2 * count]
    there = table["split"].value_counts().to_dict()
    wanted = "a transcript" if speech else "a caption"
    hint = f"the store holds {there}; choose another with --split" if there else "no clip of the store has its waveform"
    raise UserError(f"no clip of the split {' or '.join(tried)} has {wanted} to generate from; {hint}")


def _held_out(row: Mapping[str, Any], seed: int, speech: bool) -> HeldOut:
    rng = np.random.default_rng([seed, zlib.crc32(row["clip_id"].encode())])
    texts = clip_texts(row)
    text = texts[int(rng.integers(len(texts)))]
    labels = list(row["labels"]) if row["labels"] is not None else []
    transcript = str(row["transcript"] or "") if speech else ""
    return HeldOut(row["clip_id"], row["corpus"], text or (VOICE if speech else ""), transcript, str(labels[0]) if labels else None)


def _in_turn(clips: Sequence[HeldOut], seed: int) -> list[HeldOut]:
    """One clip of each class, then the next of each, …; within a class in shuffled order."""
    classes: dict[str, list[HeldOut]] = {}
    for clip in sorted(clips, key=lambda c: (c.label or "", c.clip_id)):
        classes.setdefault(clip.label or "", []).append(clip)
    rng = np.random.default_rng(seed)
    queues = [[members[i] for i in rng.permutation(len(members))] for members in classes.values()]
    return [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]


def captions_hash(clips: Sequence[HeldOut]) -> str:
    """sha256 of the list of clips and texts: scores compare only where it is the same."""
    return _digest([[clip.clip_id, clip.text, clip.transcript] for clip in clips], 64)


# ----------------------------------------------------------------------------------------------------- the sounds


class Sounds:
    """Waveforms of every system under `<work>/evaluation`, 16-bit WAV, made once.

    The folders are named by what the sounds depend on, so that an interrupted evaluation finds what it has made and
    another bundle or setting never meets it.
    """

    def __init__(self, place: Path, audio: AudioConfig, generated: str, restored: str) -> None:
        self.place, self.audio = place, audio
        self._folders = {"generated": f"generated-{generated}", "vae": f"vae-{restored}", "vocoder": f"vocoder-{restored}", "real": "real"}

    def path(self, system: str, clip: HeldOut) -> Path:
        """Where a sound lies. A clip's own sounds do not depend on its caption."""
        name = clip.key if system == "generated" else clip.clip_id
        return self.place / self._folders[system] / f"{name}.wav"

    def read(self, system: str, clip: HeldOut) -> Waveform:
        """A sound as it was written."""
        return load_audio(self.path(system, clip), self.audio.sample_rate)

    def _missing(self, system: str, clips: Sequence[HeldOut]) -> list[HeldOut]:
        return [clip for clip in clips if not self.path(system, clip).is_file()]

    def _write(self, system: str, clip: HeldOut, waveform: Waveform) -> None:
        final = self.path(system, clip)
        final.parent.mkdir(parents=True, exist_ok=True)
        draft = final.with_name(f".{final.name}.{os.getpid()}")
        write_wav(draft, waveform, self.audio.sample_rate)
        os.replace(draft, final)

    def generate(self, clips: Sequence[HeldOut], generator: _Lazily, settings: Mapping[str, Any], speech: bool, batch: int) -> int:
        """Generate what is missing; returns how many clips that were. Every clip has a seed of its own."""
        missing = self._missing("generated", clips)
        with tqdm(total=len(clips), initial=len(clips) - len(missing), desc="generate", unit="clip", disable=not missing) as bar:
            for first in range(0, len(missing), batch):
                group = missing[first : first + batch]
                waveforms = generator().generate(
                    [clip.text for clip in group],
                    transcriptions=[clip.transcript for clip in group] if speech else None,
                    seconds=self.audio.clip_seconds,
                    **{name: settings[name] for name in OPTIONS},
                    seed=[zlib.crc32(f"{settings['seed']}/{clip.clip_id}".encode()) for clip in group],
                )
                for clip, waveform in zip(group, waveforms, strict=True):
                    self._write("generated", clip, waveform)
                bar.update(len(group))
        return len(missing)

    def keep_real(self, clips: Sequence[HeldOut], reader: StoreReader) -> None:
        """Put the real clips beside the others."""
        for clip in self._missing("real", clips):
            self._write("real", clip, reader.read(clip.clip_id)["waveform"])

    def restore(self, clips: Sequence[HeldOut], generator: _Lazily, batch: int) -> None:
        """Send the real clips through the vocoder, and through VAE and vocoder."""
        for system in ("vocoder", "vae"):
            missing = self._missing(system, clips)
            for first in tqdm(range(0, len(missing), batch), desc=SYSTEMS[system], unit="batch", disable=not missing):
                group = missing[first : first + batch]
                mel = mels([self.read("real", clip) for clip in group], self.audio)
                waveforms = generator().vocode(mel) if system == "vocoder" else generator().reconstruct(mel)
                for clip, waveform in zip(group, waveforms, strict=True):
                    self._write(system, clip, pad_or_cut(waveform, self.audio.clip_samples))


class _Lazily:
    """A value made when it is first asked for: a second evaluation needs no generator."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._value: Any = None

    def __call__(self) -> Any:
        if self._value is None:
            self._value = self._make()
        return self._value


def mels(waveforms: Sequence[Waveform], audio: AudioConfig) -> NDArray[np.float32]:
    """Log-mel spectrograms `[N, F, M]` of waveforms, treated as a recording is on its way into the store."""
    ready = np.stack([pad_or_cut(normalise(wave), audio.clip_samples) for wave in waveforms])
    result: NDArray[np.float32] = log_mel(torch.from_numpy(ready), audio).numpy()
    return result


# ----------------------------------------------------------------------------------------------------- the scores


class Listener:
    """The networks that judge: CLAP, and the classifier where there is one."""

    def __init__(self, audio: AudioConfig, clap: Path, classifier: Path, device: str | None = None) -> None:
        self.audio, self.clap_folder = audio, Path(clap)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.clap = TextEncoders.load(clap, self.device)
        self.classifier: Classifier | None = None
        self.classifier_sha256: str | None = None
        self.without_classifier = f"there is no classifier at {classifier}; train one with `loa train classifier`"
        if (Path(classifier) / "config.json").is_file():
            self.classifier = Classifier.load(classifier).to(self.device)
            self.classifier_sha256 = weights_hash(classifier)

    @property
    def classes(self) -> tuple[str, ...]:
        """What the classifier can recognise."""
        return self.classifier.config.classes if self.classifier is not None else ()

    @torch.inference_mode()
    def recognise(self, waveforms: Sequence[Waveform], batch: int = 16) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The classifier's logits `[N, C]` and embeddings `[N, D]`."""
        assert self.classifier is not None
        logits, embeddings = [], []
        for first in range(0, len(waveforms), batch):
            mel = torch.from_numpy(mels(waveforms[first : first + batch], self.audio)).to(self.device)
            logits.append(self.classifier.logits(mel).double().cpu().numpy())
            embeddings.append(self.classifier.embedding(mel).double().cpu().numpy())
        return np.concatenate(logits), np.concatenate(embeddings)

    def embed(self, waveforms: Sequence[Waveform], batch: int = 16) -> NDArray[np.float64]:
        """CLAP audio embeddings `[N, D]`."""
        found = []
        for first in range(0, len(waveforms), batch):
            ready = np.stack([pad_or_cut(normalise(wave), self.audio.clip_samples) for wave in waveforms[first : first + batch]])
            found.append(self.clap.clap_audio(torch.from_numpy(ready), self.audio.sample_rate).double().cpu().numpy())
        return np.concatenate(found)

    def embed_texts(self, texts: Sequence[str], batch: int = 64) -> NDArray[np.float64]:
        """CLAP text embeddings `[N, D]`."""
        found = [self.clap.clap_text(texts[first : first + batch]).double().cpu().numpy() for first in range(0, len(texts), batch)]
        return np.concatenate(found)


@dataclass
class Scored:
    """Scores while they are collected; the fields are those of `Evaluation`."""

    scores: dict[str, dict[str, float]]
    intervals: dict[str, dict[str, list[float]]]
    missing: dict[str, str]
    notes: list[str]
    classes: list[dict[str, Any]]
    confusion: dict[str, Any]
    clips: list[dict[str, Any]]


def score(
    clips: Sequence[HeldOut], heard: Mapping[str, Sequence[Waveform]], others: Sequence[Waveform], listener: Listener, speech: bool
) -> Scored:
    """Every measure of every system. What cannot be measured is missing with its reason; nothing here fails for want of labels.

    Args:
        heard: waveforms of each system, in the order of `clips`.
        others: more real clips; as many as `clips` give the Fréchet distances a floor to be read against.
    """
    out = Scored({name: {} for name in MEASURES}, {}, {}, [], [], {}, [asdict(clip) for clip in clips])
    _recognition(out, clips, heard, others, listener)
    _closeness_to_text(out, clips, heard, others, listener, speech)
    _reconstruction(out, heard, listener.audio)
    out.scores["silent"] = {system: metrics.silent_share(waves) for system, waves in heard.items()}
    if out.scores["silent"]["generated"] > SILENT_LIMIT:
        out.notes.insert(
            0, f"{out.scores['silent']['generated']:.0%} of the generated clips are silent: do not rank this system by its distances"
        )
    out.scores = {name: {s: values[s] for s in SYSTEMS if s in values} for name, values in out.scores.items() if values}
    return out


def _recognition(
    out: Scored, clips: Sequence[HeldOut], heard: Mapping[str, Sequence[Waveform]], others: Sequence[Waveform], listener: Listener
) -> None:
    """Classifier: accuracy, confusion, KL and Fréchet distance."""
    if listener.classifier is None:
        out.missing |= dict.fromkeys(("accuracy", "kl", "frechet_classifier"), listener.without_classifier)
        return
    judged = {system: listener.recognise(waves) for system, waves in heard.items()}
    logits = {system: result[0] for system, result in judged.items()}
    embeddings = {system: result[1] for system, result in judged.items()}
    out.scores["kl"] = {s: metrics.kl_divergence(logits["real"], logits[s]) for s in HEARD if s != "real"}
    if len(others) == len(clips):
        embeddings["other_real"] = listener.recognise(others)[1]
    _frechet(out, "frechet_classifier", embeddings)

    names = listener.classes
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
    out.scores["accuracy"] = {"chance": 1.0 / len(names)} | {system: float(hit.mean()) for system, hit in hits.items()}
    out.intervals["accuracy"] = {system: list(metrics.interval(int(hit.sum()), len(hit))) for system, hit in hits.items()}
    for index in np.unique(asked):
        here = asked == index
        shares = {system: float(hit[here].mean()) for system, hit in hits.items()}
        out.classes.append({"name": names[index], "count": int(here.sum()), **shares})
    out.confusion = {"names": list(names), "counts": metrics.confusion(asked, best["generated"][known], len(names)).tolist()}


def _closeness_to_text(
    out: Scored,
    clips: Sequence[HeldOut],
    heard: Mapping[str, Sequence[Waveform]],
    others: Sequence[Waveform],
    listener: Listener,
    speech: bool,
) -> None:
    """CLAP: score and Fréchet distance."""
    sound = {system: listener.embed(waves) for system, waves in heard.items()}
    texts = [clip.text for clip in clips]
    if speech and set(texts) == {VOICE}:
        out.missing["clap_score"] = "the clips have transcripts but no captions"
    else:
        words = listener.embed_texts(texts)
        cosines = {system: metrics.cosines(words, values) for system, values in sound.items()}
        out.scores["clap_score"] = {system: float(values.mean()) for system, values in cosines.items()}
        chance = metrics.clap_chance(words, sound["generated"], [clip.label or clip.text for clip in clips])
        if chance is not None:
            out.scores["clap_score"]["chance"] = chance
        for i, row in enumerate(out.clips):
            row |= {"clap_score": float(cosines["generated"][i]), "clap_score_real": float(cosines["real"][i])}
    if len(others) == len(clips):
        sound["other_real"] = listener.embed(others)
    _frechet(out, "frechet_clap", sound)


def _frechet(out: Scored, name: str, embeddings: Mapping[str, NDArray[np.float64]]) -> None:
    """Distance of every system to the real clips."""
    count, width = embeddings["real"].shape
    if count < 2:
        out.missing[name] = "it needs at least two clips"
        return
    out.scores[name] = {
        system: metrics.frechet_distance(embeddings["real"], values) for system, values in embeddings.items() if system != "real"
    }
    if count <= width:
        out.notes.append(
            f"{MEASURES[name].title}: {count} clips for {width} dimensions; it depends on that number, compare equal ones only"
        )


def _reconstruction(out: Scored, heard: Mapping[str, Sequence[Waveform]], audio: AudioConfig) -> None:
    """How close VAE and vocoder come to the real waveform."""
    for system in ("vae", "vocoder"):
        pairs = list(zip(heard["real"], heard[system], strict=True))
        spectral = np.array([metrics.spectral_distance(real, wave) for real, wave in pairs])
        real, restored = (log_mel(torch.from_numpy(np.stack(waves)), audio).numpy() for waves in (heard["real"], heard[system]))
        out.scores["mel_l1"][system] = metrics.mel_l1(real, restored)
        out.scores["log_spectral_distance"][system] = float(
            np.mean([metrics.log_spectral_distance(*pair, audio.sample_rate) for pair in pairs])
        )
        out.scores["spectral_convergence"][system], out.scores["log_magnitude"][system] = spectral.mean(0).tolist()


# ------------------------------------------------------------------------------------------------ what is left of it


def confusion_picture(found: Evaluation, most: int = 24) -> plots.Picture | None:
    """Asked-for against recognised classes; of many classes the most frequent. None without a classifier."""
    if not found.confusion:
        return None
    counts = np.array(found.confusion["counts"])
    frequent = np.argsort(-(counts.sum(0) + counts.sum(1)), kind="stable")[:most]
    shown = sorted(i for i in frequent.tolist() if counts[i].sum() + counts[:, i].sum())
    return plots.confusion([found.confusion["names"][i] for i in shown], counts[np.ix_(shown, shown)])


def classes_picture(found: Evaluation, most: int = 24) -> plots.Picture | None:
    """Accuracy by class, of generated clips, restored ones and real ones. None without a classifier."""
    rows = sorted(found.classes, key=lambda row: -row["count"])[:most]
    if not rows:
        return None
    rows.sort(key=lambda row: str(row["name"]))
    shares = {SYSTEMS[s]: [row[s] for row in rows] for s in ("generated", "vae", "real")}
    return plots.class_bars([row["name"] for row in rows], shares, found.scores["accuracy"]["chance"])


def _write(found: Evaluation, place: Path) -> None:
    """evaluation.json last: when it is there, so is everything it speaks of."""
    for name, picture in (("confusion", confusion_picture(found)), ("classes", classes_picture(found))):
        if picture is not None:
            (place / f"{name}.png").write_bytes(picture.png())
        else:
            (place / f"{name}.png").unlink(missing_ok=True)
    (place / "table.txt").write_text(found.table(), encoding="utf-8")
    write_json(place / "evaluation.json", asdict(found))


def _log(found: Evaluation, heard: Mapping[str, Sequence[Waveform]], place: Path, audio: AudioConfig, tracker: Tracker) -> None:
    if not tracker.handle().run_id:
        return
    tracker.params(found.protocol)
    tracker.tags({f"loa.{name}": found.protocol[name] for name in ("bundle_sha256", "captions_sha256", "store")})
    tracker.metrics({f"{measure}/{system}": value for measure, values in found.scores.items() for system, value in values.items()})
    for name in ("evaluation.json", "table.txt", "confusion.png", "classes.png"):
        if (place / name).is_file():
            tracker.artifact(place / name)
    columns = [name for name in found.clips[0] if name != "files"]
    tracker.table("clips", columns, [[row.get(name) for name in columns] for row in found.clips])
    filters = slaney_filterbank(audio.sample_rate, audio.n_fft, audio.mel_bins, audio.fmin, audio.fmax)
    centres = filters @ np.linspace(0.0, audio.sample_rate / 2, filters.shape[1]) / filters.sum(1)
    for i, row in enumerate(found.clips[:HEARD_IN_MLFLOW]):
        seen = {}
        for system in reversed(HEARD):
            tracker.audio(f"{row['clip_id']}/{system}", heard[system][i], audio.sample_rate)
            seen[SYSTEMS[system]] = mels([heard[system][i]], audio)[0]
        tracker.spectrogram(f"generated/{row['clip_id']}", seen["generated"])
        picture = plots.spectrograms(seen, audio.clip_seconds, centres.tolist())
        tracker.file(f"samples/step_000000/{row['clip_id']}/spectrograms.png", picture.png(dpi=96))


def _digest(value: Any, length: int) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:length]


@click.command()
@work_option
@click.option("--bundle", type=click.Path(file_okay=False, path_type=Path), help="What to evaluate.  [default: bundle in --work]")
@click.option("--store", metavar="DIR", help="Feature store with the held-out clips.  [default: store in --work]")
@click.option(
    "--clap",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A CLAP to score with that did not help to train the bundle.",
)
@click.option("--num-clips", type=click.IntRange(min=2), default=100, show_default=True, help="Captions, taken in turn from all classes.")
@click.option("--split", metavar="NAME", help="Split of the held-out clips.  [default: test, else validation]")
@sampling_options("length")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Clips at a time.")
@tracking_option
@friendly
def main(
    work: Path, bundle: Path | None, store: str | None, clap: Path | None, num_clips: int, split: str | None,
    sampling: dict[str, Any], seed: int, batch: int, tracking_uri: str | None,
) -> None:  # fmt: skip
    """Generate for held-out captions and score what is heard.

    The same command continues an interrupted evaluation; more clips add to those there are.
    """
    variant = read_info(bundle or work / "bundle").variant
    # Each bundle and setting has a run of its own, so that MLflow can compare them.
    settings = [weights_hash(bundle or work / "bundle"), num_clips, split, asdict(resolve(**sampling)), seed]
    with Tracker.open(tracking_uri, work=work, job=f"evaluate-{_digest(settings, 8)}", name="evaluate", variant=variant) as tracker:
        found = evaluate(
            work, bundle=bundle, store=store, clap=clap, num_clips=num_clips, split=split, seed=seed, batch=batch,
            tracker=tracker, **sampling,
        )  # fmt: skip
    click.echo(found.table())
    click.echo(f"sounds and scores: {os.path.relpath(work / 'evaluation')}")


if __name__ == "__main__":
    main()
