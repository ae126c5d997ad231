"""Judges: networks that embed clips so that sets of clips can be compared. What a judge computed is cached by content.

A judge is a published network of `stages.judges`, or the small CLAP and classifier that training left (`ClapJudge`,
`ClassifierJudge`): each has `name`, `weights_hash`, `embed(waveforms, sample_rate)` and `protocol()`.
"""

from __future__ import annotations

import typing
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from pipelines.evaluation.clips import AudioFile, Channels
from stages.audio import PEAK, AudioConfig, Waveform, log_mel, normalise, pad_or_cut
from stages.classifier.model import Classifier
from stages.errors import UserError
from stages.files import digest, replacing, weights_hash
from stages.frozen import TextEncoders
from stages.judges.catalogue import JUDGES, JudgeOutput, Listening, load_judge
from stages.judges.weights import read_manifest

CACHE_FORMAT = 1
AT_A_TIME = 16  # clips in memory while a judge embeds
ClipOutput = tuple[NDArray[Any], NDArray[Any] | None]  # a clip's embeddings [R, D] and logits [C]


class Judge(typing.Protocol):
    """A network that embeds clips."""

    name: str
    weights_hash: str

    def embed(self, waveforms: Sequence[Waveform], sample_rate: int) -> JudgeOutput:
        """Embeddings and logits of mono clips `[T]` in [-1, 1]."""

    def protocol(self) -> dict[str, Any]:
        """Everything that decides the embeddings, as JSON values."""


def judge_fields(judge: Judge) -> dict[str, Any]:
    """The fields of a record's protocol that say which network embedded the clips, and how they reached it."""
    protocol = judge.protocol()
    listening = protocol["listening"]
    seconds, shortest, peak = listening.get("clip_seconds"), listening.get("min_samples", 0), listening.get("peak")
    level = [*(["mean removed"] if listening.get("remove_mean") else []), *([f"peak {peak:g}"] if peak else [])]
    rule = f"whole clips, padded to {shortest} samples" if seconds is None else f"cut or padded to {seconds:g} s"
    return {
        "judge": judge.name,
        "judge_sha256": judge.weights_hash,
        "sample_rate": protocol["sample_rate"],
        "resampler": listening["resampler"],
        "level": ", ".join(level) or "as recorded",
        "clip_rule": listening.get("clip_rule", rule),
    }


# -------------------------------------------------------------------------------------- judges that training has left


@dataclass(frozen=True)
class InputRule:
    """How recordings become the input of a CLAP or a classifier from a folder."""

    sample_rate: int  # Hz
    clip_seconds: float | None  # cut, or padded with zeros; None leaves that to the network
    peak: float | None  # the mean is removed and the peak brought here, as in training; None leaves recordings as they are
    resampler: str  # a quality of soxr


def as_trained(audio: AudioConfig) -> InputRule:
    """As recordings reach the training of CLAP and classifier."""
    return InputRule(audio.sample_rate, audio.clip_seconds, PEAK, "HQ")


class FolderJudge:
    """A CLAP or a classifier as `loa train` releases them, behind the interface of judges."""

    def __init__(self, name: str, folder: Path, rule: InputRule, forward: Callable[[Tensor], JudgeOutput]) -> None:
        self.name, self.rule, self._forward = name, rule, forward
        self.weights_hash = weights_hash(folder)

    @torch.inference_mode()
    def embed(self, waveforms: Sequence[Waveform], sample_rate: int) -> JudgeOutput:
        """Embeddings `[N, D]` of clips `[T]`, and logits `[N, C]` from a classifier."""
        inputs = (self._input(wave, sample_rate) for wave in waveforms)
        outputs = []
        for _, alike in groupby(inputs, key=len):
            while group := list(islice(alike, AT_A_TIME)):
                outputs.append(self._forward(torch.stack(group)))
        logits = [output.logits for output in outputs if output.logits is not None]
        return JudgeOutput(torch.cat([output.embedding for output in outputs]), torch.cat(logits) if logits else None)

    def protocol(self) -> dict[str, Any]:
        """As `stages.judges.catalogue.PublishedJudge.protocol`."""
        seconds, peak = self.rule.clip_seconds, self.rule.peak
        listening = {
            "clip_rule": "cut to 10 s, shorter clips repeated" if seconds is None else f"cut or padded to {seconds:g} s",
            "remove_mean": peak is not None,
            "peak": peak,
            "resampler": f"soxr-{self.rule.resampler.lower()}",
        }
        return {"judge": self.name, "weights_sha256": self.weights_hash, "sample_rate": self.rule.sample_rate, "listening": listening}

    def _input(self, waveform: Waveform, sample_rate: int) -> Tensor:
        """`[T]` as the network takes it."""
        rate, seconds = self.rule.sample_rate, self.rule.clip_seconds
        if rate != sample_rate:
            waveform = soxr.resample(waveform, sample_rate, rate, quality=self.rule.resampler)
        if self.rule.peak is not None:
            waveform = normalise(waveform)
        return torch.from_numpy(waveform if seconds is None else pad_or_cut(waveform, round(seconds * rate)))


class ClapJudge(FolderJudge):
    """A CLAP in the layout of a diffusers AudioLDM 2 folder; it embeds captions, too.

    Args:
        rule: None leaves recordings as they are and takes the first 10 s, shorter ones repeated: the way of published scores.
    """

    def __init__(self, folder: Path, rule: InputRule | None = None, device: torch.device | str = "cpu") -> None:
        self._encoders = TextEncoders.load(folder, device)
        rule = rule or InputRule(self._encoders.extractor.sampling_rate, None, None, "VHQ")
        super().__init__("clap", Path(folder) / "text_encoder", rule, self._embed)

    def embed_texts(self, texts: Sequence[str], batch: int = 64) -> NDArray[np.float64]:
        """CLAP text embeddings `[N, D]`."""
        parts = [self._encoders.clap_text(texts[first : first + batch]).double().cpu().numpy() for first in range(0, len(texts), batch)]
        return np.concatenate(parts)

    def _embed(self, waveforms: Tensor) -> JudgeOutput:
        return JudgeOutput(self._encoders.clap_audio(waveforms, self.rule.sample_rate).float().cpu(), None)


class ClassifierJudge(FolderJudge):
    """The classifier trained on a store's labels; `audio` is that store's."""

    def __init__(self, folder: Path, audio: AudioConfig, device: torch.device | str = "cpu") -> None:
        self._network, self._audio, self._device = Classifier.load(folder).to(device), audio, device
        self.classes = self._network.config.classes
        super().__init__("classifier", folder, as_trained(audio), self._embed)

    def _embed(self, waveforms: Tensor) -> JudgeOutput:
        embedding = self._network.embedding(log_mel(waveforms, self._audio).to(self._device))
        return JudgeOutput(embedding.cpu(), self._network.head(embedding).cpu())


def published_judges(
    folder: Path, names: Sequence[str] = (), listening: Listening | None = None, batch: int = 8, device: torch.device | str = "cpu"
) -> list[Judge]:
    """The judges whose public weights lie in `folder`, or those of them that are named.

    Without names, VGGish takes side-by-side windows only: those of AudioLDM's figures.
    """
    manifest = read_manifest(folder)
    chosen = names or [name for name, design in JUDGES.items() if design.weights in manifest and name != "vggish-google"]
    if not chosen:
        raise UserError(f"the manifest of {folder} lists no weights; put public weights there first (docs/evaluation.md)")
    listening = listening or Listening()
    # PaSST knows places in time up to 10 s only
    own_listening = {"passt-s": listening if listening.clip_seconds else replace(listening, clip_seconds=10.0)}
    return [load_judge(name, folder, own_listening.get(name, listening), batch, device) for name in chosen]


# ---------------------------------------------------------------------------------------------------------- embeddings


@dataclass(frozen=True)
class Embeddings:
    """A judge's output for a set of N clips."""

    rows: NDArray[np.float64]  # [R, D]: one row per clip, or several
    clip_of: NDArray[np.int64]  # [R], the clip of each row
    logits: NDArray[np.float64] | None  # [N, C]

    @property
    def num_clips(self) -> int:
        return int(self.clip_of[-1]) + 1

    @classmethod
    def of(cls, per_clip: Sequence[ClipOutput]) -> Embeddings:
        """From each clip's embeddings `[R, D]` and logits `[C]`."""
        clip_of = np.repeat(np.arange(len(per_clip)), [len(rows) for rows, _ in per_clip])
        logits = [values for _, values in per_clip if values is not None]
        stacked = np.stack(logits).astype(np.float64) if logits else None
        return cls(np.concatenate([rows for rows, _ in per_clip]).astype(np.float64), clip_of, stacked)


def embed_waveforms(judge: Judge, waveforms: Sequence[Waveform], sample_rate: int) -> Embeddings:
    """Embed clips that are in memory, as validation in training does."""
    return Embeddings.of(_per_clip(judge.embed(waveforms, sample_rate), len(waveforms)))


def embed_files(judge: Judge, files: Sequence[AudioFile], channels: Channels = "mean", cache: Path | None = None) -> Embeddings:
    """Embed recordings, copies once; those in the cache are not embedded again.

    The key of an entry is the sha256 of the recording's bytes, the judge's weights and every setting of its input:
    a recording that changes, under whatever name, is embedded anew.
    """
    settings = [CACHE_FORMAT, channels, judge.protocol()]
    keys = [digest([file.sha256, *settings], 40) for file in files]
    folder = None if cache is None else Path(cache) / judge.name
    outputs: dict[str, ClipOutput] = {}
    missing: dict[str, AudioFile] = {}
    for key, file in zip(keys, files, strict=True):
        if folder is not None and key not in outputs and (cached := _read_entry(folder / f"{key}.npz")) is not None:
            outputs[key] = cached
        elif key not in outputs:
            missing.setdefault(key, file)
    with tqdm(total=len({*keys}), initial=len(outputs), desc=judge.name, unit="clip", disable=not missing) as bar:
        for group in _of_one_rate(missing, channels):
            computed = _per_clip(judge.embed([wave for _, wave, _ in group], group[0][2]), len(group))
            for (key, _, _), output in zip(group, computed, strict=True):
                outputs[key] = output
                if folder is not None:
                    _write_entry(folder / f"{key}.npz", output)
            bar.update(len(group))
    return Embeddings.of([outputs[key] for key in keys])


def _per_clip(output: JudgeOutput, count: int) -> list[ClipOutput]:
    """Embeddings `[R, D]` and logits `[C]`, clip by clip."""
    embedding, windows = output.embedding.numpy(), output.windows
    rows = [embedding[i : i + 1] if windows is None else embedding[i, : int(windows[i])] for i in range(count)]
    return [(rows[i], None if output.logits is None else output.logits[i].numpy()) for i in range(count)]


def _of_one_rate(files: Mapping[str, AudioFile], channels: Channels) -> Iterator[list[tuple[str, Waveform, int]]]:
    """(key, clip, rate) in groups of at most AT_A_TIME neighbours of one sample rate."""
    group: list[tuple[str, Waveform, int]] = []
    for key, file in files.items():
        wave, rate = file.read(channels)
        if group and (len(group) == AT_A_TIME or group[0][2] != rate):
            yield group
            group = []
        group.append((key, wave, rate))
    if group:
        yield group


def _read_entry(path: Path) -> ClipOutput | None:
    """A cache entry; None where there is none or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["rows"], arrays["logits"] if "logits" in arrays.files else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write_entry(path: Path, output: ClipOutput) -> None:
    with replacing(path, ".npz") as draft:
        if output[1] is None:
            np.savez(draft, rows=output[0])
        else:
            np.savez(draft, rows=output[0], logits=output[1])
