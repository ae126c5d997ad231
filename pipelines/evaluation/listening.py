"""What judges hear in clips, kept by content, and the scores that follow from it.

A judge is a published network of `stages.judges`, or the small CLAP and classifier that training left (`ClapJudge`,
`ClassifierJudge`): each has `name`, `weights_hash`, `embed(waveforms, sample_rate)` and `protocol()`.
"""

from __future__ import annotations

import hashlib
import os
import typing
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from pipelines.corpora.files import walk_audio
from pipelines.evaluation import metrics
from pipelines.evaluation.records import MEASURES, Protocol, some
from pipelines.evaluation.records import digest as digest_of
from stages.audio import PEAK, AudioConfig, Waveform, load_audio, log_mel, normalise, pad_or_cut, probe
from stages.classifier.model import Classifier
from stages.errors import UserError
from stages.files import weights_hash
from stages.frozen import TextEncoders
from stages.judges.judge import JUDGES, Judgement, Listening, load_judge
from stages.judges.weights import read_manifest

CACHE_FORMAT = 1
AT_A_TIME = 16  # clips in memory while a judge listens
FRECHET = "Fréchet distance by singular values"
Channels = Literal["mean", "first"]


class Judge(typing.Protocol):
    """A network that listens."""

    name: str
    weights_hash: str

    def embed(self, waveforms: Sequence[Waveform], sample_rate: int) -> Judgement:
        """Embeddings and logits of mono clips `[T]` in [-1, 1]."""

    def protocol(self) -> dict[str, Any]:
        """What decides what it hears, as JSON values."""


@dataclass(frozen=True)
class Level:
    """How a CLAP or a classifier from a folder is to hear recordings."""

    sample_rate: int  # Hz
    clip_seconds: float | None  # cut, or padded with zeros; None leaves that to the network
    peak: float | None  # the mean is removed and the peak brought here, as in training; None leaves recordings as they are
    resampler: str  # a quality of soxr


def as_trained(audio: AudioConfig) -> Level:
    """As recordings reach the training of CLAP and classifier."""
    return Level(audio.sample_rate, audio.clip_seconds, PEAK, "HQ")


class FolderJudge:
    """A CLAP or a classifier as `loa train` releases them, behind the interface of judges."""

    def __init__(self, name: str, folder: Path, level: Level, hear: Callable[[Tensor], Judgement]) -> None:
        self.name, self.level, self._hear = name, level, hear
        self.weights_hash = weights_hash(folder)

    @torch.inference_mode()
    def embed(self, waveforms: Sequence[Waveform], sample_rate: int) -> Judgement:
        """Embeddings `[N, D]` of clips `[T]`, and logits `[N, C]` from a classifier."""
        ready = (self._ready(wave, sample_rate) for wave in waveforms)
        heard = []
        for _, alike in groupby(ready, key=len):
            while group := list(islice(alike, AT_A_TIME)):
                heard.append(self._hear(torch.stack(group)))
        logits = [part.logits for part in heard if part.logits is not None]
        return Judgement(torch.cat([part.embedding for part in heard]), torch.cat(logits) if logits else None)

    def protocol(self) -> dict[str, Any]:
        """As `stages.judges.judge.Judge.protocol`."""
        seconds, peak = self.level.clip_seconds, self.level.peak
        listening = {
            "clip_rule": "cut to 10 s, shorter clips repeated" if seconds is None else f"cut or padded to {seconds:g} s",
            "remove_mean": peak is not None, "peak": peak, "resampler": f"soxr-{self.level.resampler.lower()}",
        }  # fmt: skip
        return {"judge": self.name, "weights_sha256": self.weights_hash, "sample_rate": self.level.sample_rate, "listening": listening}

    def _ready(self, waveform: Waveform, sample_rate: int) -> Tensor:
        """`[T]` as the network is to hear it."""
        rate, seconds = self.level.sample_rate, self.level.clip_seconds
        if rate != sample_rate:
            waveform = soxr.resample(waveform, sample_rate, rate, quality=self.level.resampler)
        if self.level.peak is not None:
            waveform = normalise(waveform)
        return torch.from_numpy(waveform if seconds is None else pad_or_cut(waveform, round(seconds * rate)))


class ClapJudge(FolderJudge):
    """A CLAP in the layout of a diffusers AudioLDM 2 folder; it reads captions, too.

    Args:
        level: None leaves recordings as they are and hears the first 10 s, shorter ones repeated: the way of published scores.
    """

    def __init__(self, folder: Path, level: Level | None = None, device: torch.device | str = "cpu") -> None:
        self._encoders = TextEncoders.load(folder, device)
        level = level or Level(self._encoders.extractor.sampling_rate, None, None, "VHQ")
        super().__init__("clap", Path(folder) / "text_encoder", level, self._listen)

    def embed_texts(self, texts: Sequence[str], batch: int = 64) -> NDArray[np.float64]:
        """CLAP text embeddings `[N, D]`."""
        found = [self._encoders.clap_text(texts[first : first + batch]).double().cpu().numpy() for first in range(0, len(texts), batch)]
        return np.concatenate(found)

    def _listen(self, waveforms: Tensor) -> Judgement:
        return Judgement(self._encoders.clap_audio(waveforms, self.level.sample_rate).float().cpu(), None)


class ClassifierJudge(FolderJudge):
    """The classifier trained on a store's labels; `audio` is that store's."""

    def __init__(self, folder: Path, audio: AudioConfig, device: torch.device | str = "cpu") -> None:
        self._network, self._audio, self._device = Classifier.load(folder).to(device), audio, device
        self.classes = self._network.config.classes
        super().__init__("classifier", folder, as_trained(audio), self._listen)

    def _listen(self, waveforms: Tensor) -> Judgement:
        embedding = self._network.embedding(log_mel(waveforms, self._audio).to(self._device))
        return Judgement(embedding.cpu(), self._network.head(embedding).cpu())


def published_judges(
    folder: Path, names: Sequence[str] = (), listening: Listening | None = None, batch: int = 8, device: torch.device | str = "cpu"
) -> list[Judge]:
    """The judges whose public weights lie in `folder`, or those of them that are named.

    Without names, VGGish listens in side-by-side windows only: those of AudioLDM's figures (evaluation facts, section 3).
    """
    there = read_manifest(folder)
    chosen = names or [name for name, design in JUDGES.items() if design.weights in there and name != "vggish-google"]
    if not chosen:
        raise UserError(f"the manifest of {folder} lists no weights; put public weights there first (docs/evaluation.md)")
    heard = listening or Listening()
    # PaSST knows places in time up to 10 s only
    within = {"passt-s": heard if heard.clip_seconds else replace(heard, clip_seconds=10.0)}
    return [load_judge(name, folder, within.get(name, heard), batch, device) for name in chosen]


# -------------------------------------------------------------------------------------------------- being heard


@dataclass(frozen=True)
class Heard:
    """What a judge heard in a set of N clips."""

    rows: NDArray[np.float64]  # embeddings [R, D]: one row per clip, or several
    clip_of: NDArray[np.int64]  # [R], the clip of each row
    logits: NDArray[np.float64] | None  # [N, C]

    @property
    def num_clips(self) -> int:
        return int(self.clip_of[-1]) + 1

    @classmethod
    def of(cls, per_clip: Sequence[tuple[NDArray[Any], NDArray[Any] | None]]) -> Heard:
        """From each clip's embeddings `[R, D]` and logits `[C]`."""
        clip_of = np.repeat(np.arange(len(per_clip)), [len(rows) for rows, _ in per_clip])
        logits = [named for _, named in per_clip if named is not None]
        together = np.stack(logits).astype(np.float64) if logits else None
        return cls(np.concatenate([rows for rows, _ in per_clip]).astype(np.float64), clip_of, together)


def hear(judge: Judge, waveforms: Sequence[Waveform], sample_rate: int) -> Heard:
    """Let a judge listen to clips that are in memory."""
    return Heard.of(_split(judge.embed(waveforms, sample_rate), len(waveforms)))


def _split(judgement: Judgement, count: int) -> list[tuple[NDArray[Any], NDArray[Any] | None]]:
    """Embeddings `[R, D]` and logits `[C]`, clip by clip."""
    embedding, windows = judgement.embedding.numpy(), judgement.windows
    rows = [embedding[i : i + 1] if windows is None else embedding[i, : int(windows[i])] for i in range(count)]
    return [(rows[i], None if judgement.logits is None else judgement.logits[i].numpy()) for i in range(count)]


@dataclass(frozen=True)
class ClipFile:
    """A recording on disk, known by its content."""

    path: Path
    sha256: str

    @classmethod
    def of(cls, path: Path) -> ClipFile:
        with Path(path).open("rb") as stream:
            return cls(Path(path), hashlib.file_digest(stream, "sha256").hexdigest())

    def read(self, channels: Channels) -> tuple[Waveform, int]:
        """The clip `[T]` at its own rate, and that rate in Hz."""
        rate = probe(self.path).sample_rate
        return load_audio(self.path, rate, channel=None if channels == "mean" else 0), rate


def clip_files(folder: Path) -> dict[str, ClipFile]:
    """The recordings of a folder by name (without suffix), in the order of names.

    Raises:
        UserError: the folder does not exist, holds no recording, or two of one name.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is no folder; name one with recordings (WAV, FLAC, OGG, MP3 or AIFF)")
    paths = [Path(path) for path in walk_audio(Path(folder))]
    names = [path.stem for path in paths]
    if not names:
        raise UserError(f"{folder} holds no recordings (WAV, FLAC, OGG, MP3 or AIFF)")
    if len(set(names)) < len(names):
        twice = some(sorted(name for name in set(names) if names.count(name) > 1))
        raise UserError(f"{folder} holds several recordings named {twice}; clips are told apart by their file names without suffix")
    return {path.stem: ClipFile.of(path) for path in sorted(paths, key=lambda path: path.stem)}


def hear_files(judge: Judge, files: Sequence[ClipFile], channels: Channels = "mean", cache: Path | None = None) -> Heard:
    """Let a judge listen to recordings; what it has heard before under `cache` it does not hear again.

    The key of an entry is the sha256 of the recording's bytes, the judge's weights and every setting of how it listens:
    a recording that changes, under whatever name, is heard anew.
    """
    settings = [CACHE_FORMAT, channels, judge.protocol()]
    found: dict[int, tuple[NDArray[Any], NDArray[Any] | None]] = {}
    places = [None if cache is None else Path(cache) / judge.name / f"{digest_of([file.sha256, *settings], 40)}.npz" for file in files]
    for i, place in enumerate(places):
        if place is not None and (known := _recall(place)) is not None:
            found[i] = known
    waiting = [i for i in range(len(files)) if i not in found]
    with tqdm(total=len(files), initial=len(found), desc=judge.name, unit="clip", disable=not waiting) as bar:
        for group in _of_one_rate(waiting, files, channels):
            heard = _split(judge.embed([wave for _, wave, _ in group], group[0][2]), len(group))
            for (i, _, _), (rows, logits) in zip(group, heard, strict=True):
                found[i] = rows, logits
                if (place := places[i]) is not None:
                    _remember(place, rows, logits)
            bar.update(len(group))
    return Heard.of([found[i] for i in range(len(files))])


def _of_one_rate(waiting: Iterable[int], files: Sequence[ClipFile], channels: Channels) -> Iterator[list[tuple[int, Waveform, int]]]:
    """(number, clip, rate) in groups of at most AT_A_TIME neighbours of one sample rate."""
    group: list[tuple[int, Waveform, int]] = []
    for i in waiting:
        wave, rate = files[i].read(channels)
        if group and (len(group) == AT_A_TIME or group[0][2] != rate):
            yield group
            group = []
        group.append((i, wave, rate))
    if group:
        yield group


def _recall(place: Path) -> tuple[NDArray[Any], NDArray[Any] | None] | None:
    """A cache entry; None where there is none or it is damaged."""
    try:
        with np.load(place, allow_pickle=False) as kept:
            return kept["rows"], kept["logits"] if "logits" in kept.files else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _remember(place: Path, rows: NDArray[Any], logits: NDArray[Any] | None) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_name(f".{place.name}.{os.getpid()}.npz")
    if logits is None:
        np.savez(draft, rows=rows)
    else:
        np.savez(draft, rows=rows, logits=logits)
    os.replace(draft, place)


# ------------------------------------------------------------------------------------- from what was heard to scores


@dataclass(frozen=True)
class Found:
    """A score with its part of the protocol."""

    metric: str
    value: float
    fields: Mapping[str, Any]  # of Protocol: formula, rows, pairing, direction, …
    extra: Mapping[str, float]


# Which metrics follow from what a judge hears. Names that differ only in the judge are different metrics.
FRECHET_OF = {
    "vggish": "fad", "vggish-google": "fad_google", "cnn14-16k": "fd", "cnn14-32k": "fd_32k", "clap": "frechet_clap",
    "classifier": "frechet_classifier",
}  # fmt: skip
KL_OF = {"cnn14-16k": "kl_panns", "cnn14-32k": "kl_panns_32k", "passt-s": "kl_passt", "classifier": "kl"}
KL_SIGMOID_OF = {"cnn14-16k": "kl_sigmoid_panns", "cnn14-32k": "kl_sigmoid_panns_32k"}
INCEPTION_OF = {"cnn14-16k": "inception_score", "cnn14-32k": "inception_score_32k"}
INFINITY_OF = {"vggish": "fad_infinity"}


@dataclass
class Scores:
    """What one judge has to say of one system."""

    found: list[Found]
    missing: dict[str, str]  # metric -> why
    notes: list[str]


def scores(judge: str, reference: Heard, generated: Heard, pairs: Sequence[int] | None) -> Scores:
    """Every metric that a judge's hearing of two sets allows.

    Args:
        judge: its name; it decides what the metrics are called.
        pairs: for every generated clip the number of the real clip that belongs to it, as KL needs; None if there are none.
    """
    out = Scores([], {}, [])
    counts = {
        "num_reference": reference.num_clips, "rows_reference": len(reference.rows), "rows_generated": len(generated.rows),
        "pairing": "none", "ddof": 1,
    }  # fmt: skip

    def attempt(metric: str, compute: Callable[[], tuple[float, Mapping[str, float]]], **fields: Any) -> None:
        try:
            value, extra = compute()
        except ValueError as error:
            out.missing[metric] = str(error)
        else:
            out.found.append(Found(metric, value, fields, extra))

    if metric := FRECHET_OF.get(judge):
        width, fewest = reference.rows.shape[1], min(len(reference.rows), len(generated.rows))
        if judge.startswith("vggish") and fewest < 2 * width:
            out.missing[metric] = f"{fewest} windows are too few for {width} dimensions; it takes {2 * width}, which is 26 clips of 10 s"
        else:
            attempt(metric, lambda: (metrics.frechet_distance(reference.rows, generated.rows), {}), implementation=FRECHET, **counts)
            if fewest <= width:
                few = f"{fewest} embeddings for {width} dimensions"
                out.notes.append(f"{MEASURES[metric].title}: {few}; it depends on that number, compare equal ones only")
    if metric := INFINITY_OF.get(judge):

        def extrapolate() -> tuple[float, dict[str, float]]:
            line = metrics.frechet_infinity(reference.rows, generated.rows, generated.clip_of)
            return line.value, {"slope": line.slope, "r_squared": line.r_squared}

        attempt(metric, extrapolate, implementation=f"{FRECHET}, line over 1/N from 500 rows on, whole clips drawn", seed=0, **counts)
    activations: dict[Literal["softmax", "sigmoid"], dict[str, str]] = {"softmax": KL_OF, "sigmoid": KL_SIGMOID_OF}
    for activation, names in activations.items():
        metric = names.get(judge)
        if metric and pairs is None:
            out.missing[metric] = "it compares a generated clip with the real clip of the same name, and not every clip has one"
        elif metric and pairs is not None:
            fields = counts | {"num_reference": len(pairs), "rows_reference": len(pairs), "pairing": "by name", "ddof": None}
            fields |= {"direction": "KL(reference || generated)", "implementation": f"KL of {activation}, floor 1e-6"}
            attempt(metric, partial(_kl, reference, generated, pairs, activation), **fields)
    if metric := INCEPTION_OF.get(judge):

        def inception() -> tuple[float, dict[str, float]]:
            assert generated.logits is not None
            mean, deviation = metrics.inception_score(generated.logits)
            return mean, {"deviation": deviation}

        fields = counts | {"num_reference": None, "rows_reference": None, "ddof": 0}
        attempt(metric, inception, implementation="inception score, 10 parts", seed=2020, **fields)
    return out


def _kl(
    reference: Heard, generated: Heard, pairs: Sequence[int], activation: Literal["softmax", "sigmoid"]
) -> tuple[float, dict[str, float]]:
    assert reference.logits is not None and generated.logits is not None
    return metrics.kl_divergence(reference.logits[list(pairs)], generated.logits, activation), {}


def clap_found(texts: NDArray[np.float64], generated: Heard) -> Found:
    """The CLAP score of clips beside their captions' embeddings `[N, D]`."""
    fields = {
        "implementation": "mean cosine", "rows_generated": len(generated.rows), "rows_reference": None, "num_reference": None,
        "pairing": "caption by name", "ddof": None,
    }  # fmt: skip
    return Found("clap_score", metrics.clap_score(texts, generated.rows), fields, {})


def hearing(judge: Judge) -> dict[str, Any]:
    """The fields of a protocol that say who heard the clips, and how."""
    told = judge.protocol()
    listening = told["listening"]
    seconds, shortest, peak = listening.get("clip_seconds"), listening.get("min_samples", 0), listening.get("peak")
    level = [*(["mean removed"] if listening.get("remove_mean") else []), *([f"peak {peak:g}"] if peak else [])]
    rule = f"whole clips, padded to {shortest} samples" if seconds is None else f"cut or padded to {seconds:g} s"
    return {
        "judge": judge.name, "judge_sha256": judge.weights_hash, "sample_rate": told["sample_rate"], "resampler": listening["resampler"],
        "level": ", ".join(level) or "as recorded", "clip_rule": listening.get("clip_rule", rule),
    }  # fmt: skip


def protocol_of(found: Found, heard_by: Mapping[str, Any], common: Mapping[str, Any]) -> Protocol:
    """The whole protocol of a score.

    Args:
        heard_by: the fields of `hearing`.
        common: what the two sets decide: num_generated, captions_sha256, references_sha256, channels, candidates, ranker.
    """
    # References play no part in scores that are taken from the generated clips alone.
    alone = {"references_sha256": None} if found.fields.get("num_reference") is None else {}
    fixed = {"metric": found.metric, "dtype": "float64", "direction": None, "seed": None}
    return Protocol(**{**fixed, **heard_by, **common, **alone, **found.fields})


def set_hash(files: Mapping[str, ClipFile]) -> str:
    """sha256 of the names and contents of a set of recordings."""
    return digest_of(sorted([name, file.sha256] for name, file in files.items()), 64)
