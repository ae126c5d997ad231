"""The one interface of all judges: waveforms in, embeddings and AudioSet logits out.

    judge = load_judge("cnn14-16k", "weights/judges")           # or random_judge("cnn14-16k") where the numbers do not matter
    output = judge.embed(waveforms, sample_rate)                 # FD, IS and KL need output.embedding and output.logits
    key, record = judge.weights_hash, judge.protocol()           # for caches, and for what is printed beside a score

`JUDGES` lists the names. "vggish" and "vggish-google" are one network under the two windowings of FAD.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stages.audio import resample
from stages.checkpoints import load_weights
from stages.errors import UserError
from stages.judges.network import Network
from stages.judges.panns import CNN14_16K, CNN14_32K, Cnn14, Cnn14Config
from stages.judges.passt import PaSST, PaSSTConfig
from stages.judges.vggish import VGGish, VGGishConfig
from stages.judges.weights import Provenance, nearest, read_weights, state_hash

Waveforms = Tensor | NDArray[np.float32] | Sequence[Tensor | NDArray[np.float32]]

RESAMPLERS = ("soxr-vhq", "sinc-hann-6")


class JudgeOutput(NamedTuple):
    """Embeddings and logits of N clips; float32, on the CPU, in the order of the clips."""

    embedding: Tensor  # [N, D], or [N, W, D] for a judge that embeds windows; W is that of the longest clip
    logits: Tensor | None  # [N, 527] before softmax or sigmoid, in AudioSet's order; None for a judge that names nothing
    windows: Tensor | None = None  # [N], how many of the W windows each clip has; the others are zeros

    def rows(self) -> Tensor:
        """The embeddings as one set `[R, D]`: one row per clip, or one per window of every clip."""
        if self.windows is None:
            return self.embedding
        return self.embedding[torch.arange(self.embedding.shape[1]) < self.windows[:, None]]


@dataclass(frozen=True)
class Listening:
    """How a recording becomes the input of a judge. Scores of different listenings cannot be compared (references.md#listening).

    The default is loa's contract: soxr's best resampler, exactly 10 s, nothing removed. `AUDIOLDM_EVAL` is that of
    audioldm_eval, for approaching published numbers: whole clips of at least 32,000 samples, without their mean.
    """

    clip_seconds: float | None = 10.0  # cut or padded with zeros at the end; None keeps every clip's length
    min_samples: int = 0  # shorter clips are padded with zeros at the end, at the judge's sample rate
    remove_mean: bool = False  # of each clip, before padding
    resampler: str = "soxr-vhq"  # or "sinc-hann-6": Hann-windowed sinc of 6 zero crossings, cut off at 0.99 Nyquist

    def __post_init__(self) -> None:
        if self.resampler not in RESAMPLERS:
            raise UserError(f"resampler is {self.resampler!r}; expected {' or '.join(RESAMPLERS)}")
        if self.clip_seconds is not None and self.clip_seconds <= 0:
            raise UserError(f"clip_seconds is {self.clip_seconds}; expected a positive number of seconds, or None for whole clips")


AUDIOLDM_EVAL = Listening(clip_seconds=None, min_samples=32_000, remove_mean=True, resampler="sinc-hann-6")


class Design(NamedTuple):
    """What stands behind a judge's name."""

    weights: str  # the name under which the manifest lists its weights
    published: Callable[[], Network]  # at full size
    tiny: Callable[[], Network]  # for tests: the same front end and the same 527 classes


def _vggish(windowing: str) -> Design:
    config = VGGishConfig(windowing)
    return Design("vggish", lambda: VGGish(config), lambda: VGGish(replace(config, widths=(4, 4, 4, 8), hidden=16)))


def _cnn14(weights: str, config: Cnn14Config) -> Design:
    return Design(weights, lambda: Cnn14(config), lambda: Cnn14(replace(config, widths=(4, 4, 8, 8, 8, 16))))


JUDGES: dict[str, Design] = {
    "vggish": _vggish("audioldm_eval"),
    "vggish-google": _vggish("google"),
    "cnn14-16k": _cnn14("cnn14-16k", CNN14_16K),
    "cnn14-32k": _cnn14("cnn14-32k", CNN14_32K),
    "passt-s": Design("passt-s", lambda: PaSST(PaSSTConfig()), lambda: PaSST(PaSSTConfig(width=24, depth=2, heads=2))),
}


class PublishedJudge:
    """A network in evaluation mode that embeds clips; made by `load_judge` or `random_judge`.

    Attributes:
        name: one of `JUDGES`.
        sample_rate: of the network's input, in Hz; other rates are resampled.
        embedding_width: D.
        device: where the network runs; its output comes back to the CPU.
        has_logits: whether `JudgeOutput.logits` is given.
        weights_hash: sha256 of the weights' file, or of the weights themselves where there is no file.
    """

    def __init__(
        self,
        name: str,
        network: Network,
        weights_hash: str,
        provenance: Provenance,
        listening: Listening,
        batch: int,
        device: str | torch.device = "cpu",
    ) -> None:
        if batch < 1:
            raise UserError(f"batch is {batch}; expected a positive number of clips")
        self.name = name
        self.device = torch.device(device)
        self.network = network.eval().requires_grad_(False).to(self.device)
        if self.device.type == "cpu":  # cuDNN chooses such forms by itself
            self.network.fuse()
        self.weights_hash = weights_hash
        self.provenance = provenance
        self.listening = listening
        self.batch = batch
        self.sample_rate = network.sample_rate
        self.embedding_width = network.embedding_width
        self.has_logits = network.has_logits

    def embed(self, waveforms: Waveforms, sample_rate: int) -> JudgeOutput:
        """Listen to clips.

        Only clips of one length share a batch and nothing is normalised over a batch, so the output for a clip does not
        depend on its neighbours (up to the rounding of float32 sums, some 1e-6).

        Args:
            waveforms: `[N, T]`, or N clips `[T]` of any lengths; floating point in [-1, 1], mono.
            sample_rate: theirs, in Hz.

        Raises:
            UserError: no clip; one that is empty, not mono, not floating point or not finite; one too short or too long for
                the network where `listening.clip_seconds` is None.
        """
        if sample_rate <= 0:
            raise UserError(f"sample_rate is {sample_rate}; expected a positive number of Hz")
        clips = [self._input(clip, sample_rate, index) for index, clip in enumerate(waveforms)]
        if not clips:
            raise UserError(f"{self.name} was given no clips")
        by_length: dict[int, list[int]] = {}
        for index, clip in enumerate(clips):
            by_length.setdefault(len(clip), []).append(index)
        embeddings: list[Tensor] = [torch.empty(0)] * len(clips)
        logits: list[Tensor] = [torch.empty(0)] * len(clips)
        for indices in by_length.values():
            for first in range(0, len(indices), self.batch):
                chosen = indices[first : first + self.batch]
                embedding, named = self._forward(torch.stack([clips[i] for i in chosen]).to(self.device), chosen)
                for row, index in enumerate(chosen):
                    embeddings[index] = embedding[row]
                    if named is not None:
                        logits[index] = named[row]
        together = torch.stack(logits) if self.has_logits else None
        if embeddings[0].ndim == 1:
            return JudgeOutput(torch.stack(embeddings), together)
        windows = torch.tensor([len(rows) for rows in embeddings])
        return JudgeOutput(nn.utils.rnn.pad_sequence(embeddings, batch_first=True), together, windows)

    def protocol(self) -> dict[str, Any]:
        """Everything that decides the input of this judge, as JSON values, for the record beside a score and for cache keys."""
        return {
            "judge": self.name,
            "weights_sha256": self.weights_hash,
            **asdict(self.provenance),
            "sample_rate": self.sample_rate,
            "embedding_width": self.embedding_width,
            "dtype": "float32",
            "listening": asdict(self.listening),
        }

    @torch.inference_mode()
    def _forward(self, waveform: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        # cuDNN would round convolutions to 10 bits of mantissa (TF32), and autocast everything to 8: scores would move
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.autocast(waveform.device.type, enabled=False), exact:
            try:
                embedding, logits = self.network(waveform)
            except ValueError as error:
                raise UserError(
                    f"{error} (clip {indices[0]}); pad or cut the clips, or leave Listening.clip_seconds at 10 s which does it"
                ) from error
        return embedding.cpu(), None if logits is None else logits.cpu()

    def _input(self, clip: Tensor | NDArray[np.float32], sample_rate: int, index: int) -> Tensor:
        """One clip as the network reads it: `[T]` float32 at its rate."""
        wave = torch.as_tensor(clip).detach().cpu()
        if wave.ndim != 1 or not len(wave) or not wave.is_floating_point():
            kind = f"{list(wave.shape)} of {str(wave.dtype).removeprefix('torch.')}"
            raise UserError(f"clip {index} is {kind}; {self.name} expects mono clips [T] of floating-point samples in [-1, 1]")
        if not wave.isfinite().all():
            raise UserError(f"clip {index} contains samples that are not finite numbers")
        wave = wave.float()
        if sample_rate != self.sample_rate:
            if self.listening.resampler == "soxr-vhq":
                wave = torch.from_numpy(soxr.resample(wave.numpy(), sample_rate, self.sample_rate, quality="VHQ"))
            else:
                wave = resample(wave, sample_rate, self.sample_rate)
        if self.listening.remove_mean:
            wave = wave - wave.mean()
        length = len(wave) if self.listening.clip_seconds is None else round(self.listening.clip_seconds * self.sample_rate)
        length = max(length, self.listening.min_samples)
        return nn.functional.pad(wave[:length], (0, max(0, length - len(wave))))


def load_judge(
    name: str, folder: str | Path, listening: Listening | None = None, batch: int = 8, device: str | torch.device = "cpu"
) -> PublishedJudge:
    """The judge called `name` with the public weights of a local folder (`stages.judges.weights`).

    Args:
        listening: how recordings reach the network; None is `Listening()`, loa's contract.
        batch: clips per forward pass; it changes the speed, not the numbers.

    Raises:
        UserError: `name` is no judge; the folder, its manifest or the file is missing or altered; the weights do not fit.
    """
    design = _design(name)
    weights = read_weights(design.weights, folder)
    with torch.device("meta"):
        network = design.published()
    load_weights(network.to_empty(device="cpu"), network.published(weights.state, weights.path), weights.path)
    return PublishedJudge(name, network, weights.sha256, weights.provenance, listening or Listening(), batch, device)


def random_judge(name: str, seed: int = 0, tiny: bool = True, listening: Listening | None = None, batch: int = 8) -> PublishedJudge:
    """The judge called `name` with random weights: for tests and timings, its scores mean nothing.

    Args:
        tiny: a network of a few thousand weights with the same front end and classes; otherwise the published size.
    """
    network = random_network(name, seed, tiny)
    provenance = Provenance(file="", licence="", source=f"random weights, seed {seed}")
    return PublishedJudge(name, network, state_hash(network.state_dict()), provenance, listening or Listening(), batch)


def random_network(name: str, seed: int = 0, tiny: bool = True) -> Network:
    """The network of a judge with random weights, equal for equal seeds."""
    design = _design(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = design.tiny() if tiny else design.published()
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):  # PyTorch's own start lets differences between clips fade layer by layer
                nn.init.kaiming_normal_(module.weight)
    return network


def _design(name: str) -> Design:
    if name not in JUDGES:
        raise UserError(f"there is no judge {name!r}{nearest(name, JUDGES)}; judges: {', '.join(JUDGES)}")
    return JUDGES[name]
