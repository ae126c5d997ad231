"""How good is what was generated: measures as functions of arrays. No networks, no files; docs/evaluation.md has the formulas.

Whatever is computed on covariances is computed in float64: with float32 a Fréchet distance of 140 came out as 114.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import uniform_filter
from scipy.special import log_expit, log_softmax, logsumexp
from scipy.stats import linregress, norm

Array = NDArray[np.float64]

SILENCE_DBFS = -60.0
STFT_SIZES = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))  # transform, hop, window in samples


# ---------------------------------------------------------------------------------------------- between two sets


def frechet_distance(reference: ArrayLike, generated: ArrayLike) -> float:
    """Fréchet distance between Gaussians fitted to two sets of embeddings `[N, D]` and `[K, D]`; 0 is best.

    |μ₁ - μ₂|² + tr Σ₁ + tr Σ₂ - 2 tr (Σ₁ Σ₂)^½, where the last trace is the sum of the singular values of X₁ X₂ᵀ,
    the centred sets, over √((N-1)(K-1)). That is exact and real for any N, also below D, and needs no matrix root.
    The estimate is biased upwards by about C/N: compare systems at equal N and K only.

    This is FAD for VGGish embeddings, FD for CNN14's, FAD-CLAP for CLAP's (references.md#fad-and-fd).

    Raises:
        ValueError: fewer than two rows, other widths, or values that are not finite.
    """
    return _distance(_Gaussian.of(reference), _Gaussian.of(generated))


@dataclass(frozen=True)
class _Gaussian:
    """Mean `[D]` and a matrix R `[min(N, D), D]` with RᵀR = Σ (ddof 1)."""

    mean: Array
    root: Array

    @classmethod
    def of(cls, values: ArrayLike) -> _Gaussian:
        array = np.asarray(values, dtype=np.float64)
        if array.ndim != 2 or len(array) < 2:
            raise ValueError(f"a set of embeddings is [N, D] with N of at least 2, got {list(array.shape)}")
        if not np.isfinite(array).all():
            raise ValueError("embeddings hold values that are not finite")
        mean = array.mean(0)
        centred = (array - mean) / math.sqrt(len(array) - 1)
        return cls(mean, centred if len(centred) <= centred.shape[1] else np.asarray(np.linalg.qr(centred, mode="r")))


def _distance(first: _Gaussian, second: _Gaussian) -> float:
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"embeddings of {len(first.mean)} and {len(second.mean)} dimensions cannot be compared")
    shift = first.mean - second.mean
    shared = np.linalg.svd(first.root @ second.root.T, compute_uv=False).sum()
    return max(0.0, float(shift @ shift + (first.root**2).sum() + (second.root**2).sum() - 2.0 * shared))


@dataclass(frozen=True)
class Extrapolation:
    """A score as a straight line in 1/N: its value at infinite N, and how well the line fits."""

    value: float
    slope: float
    r_squared: float


def frechet_infinity(
    reference: ArrayLike,
    generated: ArrayLike,
    clip_of: ArrayLike | None = None,
    *,
    points: int = 25,
    smallest: int = 500,
    seed: int = 0,
) -> Extrapolation:
    """FAD∞: the Fréchet distance that infinitely many generated clips would have; 0 is best, and it may fall below.

    At `points` sizes from `smallest` rows to all, rows are drawn with replacement from the generated set alone; a line
    is fitted to the distances over 1/N and read at 1/N = 0 (references.md#fad-at-infinite-size).

    Args:
        clip_of: the clip `[K]` that each generated row belongs to: whole clips are drawn then, because rows of one
            clip are alike. None draws single rows, as the reference does.

    Raises:
        ValueError: the generated set has not more than `smallest` rows.
    """
    rows = np.asarray(generated, dtype=np.float64)
    if len(rows) <= smallest:
        raise ValueError(f"an extrapolation from {smallest} rows on needs more rows than that, got {len(rows)}")
    target, rng = _Gaussian.of(reference), np.random.default_rng(seed)
    labels = np.arange(len(rows)) if clip_of is None else np.unique(np.asarray(clip_of), return_inverse=True)[1]
    order = np.argsort(labels, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    fewest = math.ceil(len(groups) * smallest / len(rows))
    inverse, distances = [], []
    for count in np.linspace(fewest, len(groups), points).astype(int):
        drawn = np.concatenate([groups[i] for i in rng.integers(len(groups), size=count)])
        inverse.append(1.0 / len(drawn))
        distances.append(_distance(target, _Gaussian.of(rows[drawn])))
    line = linregress(inverse, distances)
    return Extrapolation(float(line.intercept), float(line.slope), float(line.rvalue**2))


# ------------------------------------------------------------------------------------------- class probabilities


def kl_divergence(
    reference: ArrayLike,
    generated: ArrayLike,
    activation: Literal["softmax", "sigmoid"] = "softmax",
    direction: Literal["reference||generated", "generated||reference"] = "reference||generated",
    floor: float = 1e-6,
) -> float:
    """KL of class probabilities, from logits `[N, C]` of paired clips; lower is better.

    Mean over clips of Σ_c p (ln p - ln(q + floor)), p the probabilities of the set named first in `direction`. Both
    common toolboxes take p from the real clip, another one the other way round (references.md#kl). "sigmoid" is
    KL_sigmoid: the same sum without the Bernoulli complements, so it is no divergence and may be negative. Because of
    `floor` a set against itself gives about -C·floor, not 0.

    Raises:
        ValueError: the shapes differ, there is no clip, or logits are not finite.
    """
    sets = {"reference": _logits(reference), "generated": _logits(generated)}
    if sets["reference"].shape != sets["generated"].shape:
        shapes = " and ".join(str(list(values.shape)) for values in sets.values())
        raise ValueError(f"KL compares paired clips: logits of one shape, got {shapes}")
    first, _, second = direction.partition("||")
    logarithm = {"softmax": partial(log_softmax, axis=1), "sigmoid": log_expit}[activation]
    target, estimate = logarithm(sets[first]), np.exp(logarithm(sets[second]))
    return float((np.exp(target) * (target - np.log(estimate + floor))).sum(1).mean())


def inception_score(logits: ArrayLike, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Inception score of generated clips from their logits `[N, C]`; higher is better, at most min(C, N / splits).

    exp of the mean KL(p(c|clip) ‖ p(c)) in each of `splits` parts of the shuffled clips; mean and deviation (ddof 0) over
    the parts. Ten parts and shuffle seed 2020 are the published choice; other numbers of parts give other scores.

    Raises:
        ValueError: fewer clips than parts, or logits that are not finite.
    """
    values = _logits(logits)
    if len(values) < splits:
        raise ValueError(f"an inception score of {splits} parts needs at least as many clips, got {len(values)}")
    values = log_softmax(values, axis=1)[np.random.RandomState(seed).permutation(len(values))]
    edges = [i * len(values) // splits for i in range(splits + 1)]
    scores = []
    for begin, end in pairwise(edges):
        part = values[begin:end]
        marginal = logsumexp(part, axis=0) - math.log(len(part))
        scores.append(math.exp((np.exp(part) * (part - marginal)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def _logits(values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or not len(array):
        raise ValueError(f"logits are [N, C] with N of at least 1, got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError("logits hold values that are not finite")
    return array


# ------------------------------------------------------------------------------------------------ between pairs


def cosines(first: ArrayLike, second: ArrayLike) -> Array:
    """Cosine of each pair of rows, `[N]`; their mean over captions and clips is the CLAP score."""
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    result: Array = (one * two).sum(1) / np.maximum(lengths, 1e-8)
    return result


def clap_score(text: ArrayLike, audio: ArrayLike) -> float:
    """Mean cosine between the CLAP embeddings `[N, D]` of captions and of the clips made for them; higher is better."""
    return float(cosines(text, audio).mean())


def clap_chance(text: ArrayLike, audio: ArrayLike, groups: Sequence[object]) -> float | None:
    """The CLAP score of clips with captions that are not theirs: mean cosine over all pairs from different groups.

    Args:
        groups: for each clip what makes captions alike, such as its class.

    Returns:
        None when all clips are of one group.
    """
    one, two = (np.asarray(x, dtype=np.float64) for x in (text, audio))
    one, two = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-8) for x in (one, two))
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    group_of = np.array([number[group] for group in groups])
    apart = group_of[:, None] != group_of[None, :]
    return float((one @ two.T)[apart].mean()) if apart.any() else None


# -------------------------------------------------------------------------------------------------- recognition


def confusion(asked: ArrayLike, recognised: ArrayLike, classes: int) -> NDArray[np.int64]:
    """How often class `row` was asked for and class `column` recognised, `[C, C]`."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (np.asarray(asked, dtype=int), np.asarray(recognised, dtype=int)), 1)
    return counts


def interval(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for the share of hits: what so few trials can tell of it."""
    if trials == 0:
        return 0.0, 1.0
    z = float(norm.ppf(0.5 + confidence / 2))
    share, weight = hits / trials, z * z / trials
    centre = (share + weight / 2) / (1 + weight)
    reach = z * math.sqrt(share * (1 - share) / trials + weight / (4 * trials)) / (1 + weight)
    return max(0.0, centre - reach), min(1.0, centre + reach)


# ----------------------------------------------------------------------------------------------- reconstruction


def mel_l1(reference: ArrayLike, estimate: ArrayLike) -> float:
    """Mean absolute difference of log-mel spectrograms of equal shape, in nepers; 0 is best."""
    return float(np.abs(np.asarray(reference, dtype=np.float64) - np.asarray(estimate, dtype=np.float64)).mean())


def mel_image(log_mel: ArrayLike) -> Array:
    """A log-mel spectrogram (nepers) as a picture in [0, 1] on which PSNR and SSIM are taken: -80 to 20 dB (references.md#mel-pictures)."""
    image: Array = np.clip((20.0 / math.log(10.0) * np.asarray(log_mel, dtype=np.float64) + 80.0) / 100.0, 0.0, 1.0)
    return image


def psnr(reference: ArrayLike, estimate: ArrayLike) -> float:
    """Peak signal-to-noise ratio of two pictures in [0, 1] of equal shape, in dB; higher is better, ∞ for equal ones."""
    error = float(np.mean((np.asarray(reference, dtype=np.float64) - np.asarray(estimate, dtype=np.float64)) ** 2))
    return -10.0 * math.log10(error) if error else math.inf


def ssim(reference: ArrayLike, estimate: ArrayLike, window: int = 7) -> float:
    """Structural similarity of two pictures `[H, W]`; higher is better, 1 for equal ones.

    Uniform windows of 7 x 7 with sample covariance, K₁ 0.01, K₂ 0.03, mean over whole windows; the data range is that
    of the two together (references.md#mel-pictures).

    Raises:
        ValueError: the shapes differ, or a side is shorter than the window.
    """
    one, two = np.asarray(reference, dtype=np.float64), np.asarray(estimate, dtype=np.float64)
    if one.shape != two.shape or one.ndim != 2 or min(one.shape) < window:
        raise ValueError(
            f"SSIM compares two pictures of one shape, {window} x {window} or more, got {list(one.shape)} and {list(two.shape)}"
        )
    mean_one, mean_two = uniform_filter(one, window), uniform_filter(two, window)
    sample = window**2 / (window**2 - 1)
    variances = sample * (uniform_filter(one**2, window) - mean_one**2 + uniform_filter(two**2, window) - mean_two**2)
    covariance = sample * (uniform_filter(one * two, window) - mean_one * mean_two)
    span = max(one.max(), two.max()) - min(one.min(), two.min())
    floor_mean, floor_variance = (0.01 * span) ** 2 or 1e-12, (0.03 * span) ** 2 or 1e-12
    likeness = (2 * mean_one * mean_two + floor_mean) / (mean_one**2 + mean_two**2 + floor_mean)
    likeness *= (2 * covariance + floor_variance) / (variances + floor_variance)
    edge = window // 2
    return float(likeness[edge:-edge, edge:-edge].mean())


def spectral_distance(reference: ArrayLike, estimate: ArrayLike) -> tuple[float, float]:
    """Two views of how far the spectrum of `estimate` `[T]` is from that of `reference` `[T]`; 0 is best for both.

    Returns:
        Spectral convergence ‖|Y| - |X|‖ / ‖|Y|‖, and the mean absolute difference of ln magnitudes, both averaged over
        the usual three resolutions.
    """
    one, two = np.asarray(reference, dtype=np.float64), np.asarray(estimate, dtype=np.float64)
    length = min(len(one), len(two))
    convergence, difference = [], []
    for size, hop, window in STFT_SIZES:
        target, other = (_magnitudes(wave[:length], size, hop, window) for wave in (one, two))
        convergence.append(np.linalg.norm(target - other) / np.maximum(np.linalg.norm(target), 1e-8))
        difference.append(np.abs(np.log(np.maximum(target, 1e-5)) - np.log(np.maximum(other, 1e-5))).mean())
    return float(np.mean(convergence)), float(np.mean(difference))


def log_spectral_distance(reference: ArrayLike, estimate: ArrayLike, sample_rate: int) -> float:
    """Root mean square over frequency, mean over time, of the log power ratio of two waveforms `[T]`; 0 is best.

    46 ms windows every 10 ms; powers below 1e-12 count as 1e-12, so that silence is compared as silence.
    """
    one, two = np.asarray(reference, dtype=np.float64), np.asarray(estimate, dtype=np.float64)
    length, size = min(len(one), len(two)), round(sample_rate * 2048 / 44_100)
    target, other = (_magnitudes(wave[:length], size, sample_rate // 100, size) ** 2 for wave in (one, two))
    ratio = np.log10(np.maximum(target, 1e-12)) - np.log10(np.maximum(other, 1e-12))
    return float(np.sqrt((ratio**2).mean(1)).mean())


def _magnitudes(waveform: Array, size: int, hop: int, window: int) -> Array:
    """|STFT| `[frames, size // 2 + 1]` of whole windows under a periodic Hann window."""
    waveform = np.pad(waveform, (0, max(0, window - len(waveform))))
    frames = np.lib.stride_tricks.sliding_window_view(waveform, window)[::hop]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    magnitudes: Array = np.abs(np.fft.rfft(frames * hann, n=size))
    return magnitudes


# -------------------------------------------------------------------------------------------------------- words


def error_rate(references: Sequence[Sequence[str]], hypotheses: Sequence[Sequence[str]]) -> float:
    """(substitutions + deletions + insertions) / tokens of the references, over the whole set; 0 is best, above 1 is possible.

    Lists of words give WER, strings (sequences of characters, blanks included) CER. The average is over tokens, not
    over utterances (references.md#word-errors). What counts as a word is decided before: `stages.text.normalise_transcript`.

    Raises:
        ValueError: the numbers of utterances differ, or the references hold no token.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"each reference wants one hypothesis, got {len(references)} and {len(hypotheses)}")
    total = sum(len(reference) for reference in references)
    if not total:
        raise ValueError("the references hold no words to compare with")
    return sum(_edits(*pair) for pair in zip(references, hypotheses, strict=True)) / total


def _edits(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Levenshtein distance, a row at a time."""
    codes = {token: i for i, token in enumerate({*reference, *hypothesis})}
    other = np.array([codes[token] for token in hypothesis], dtype=int)
    places = np.arange(len(other) + 1)
    row = places.copy()
    for token in reference:
        best = row + 1  # deletion
        best[1:] = np.minimum(best[1:], row[:-1] + (other != codes[token]))  # substitution, or none
        row = np.minimum.accumulate(best - places) + places  # insertions, any number in a row
    return int(row[-1])


# ----------------------------------------------------------------------------------------------------- soundness


def level_dbfs(waveform: ArrayLike) -> float:
    """RMS level of `[T]` samples in dB of full scale; -∞ for digital silence or no samples."""
    samples = np.asarray(waveform, dtype=np.float64)
    power = float(np.mean(np.square(samples))) if samples.size else 0.0
    return 10.0 * math.log10(power) if power > 0.0 else -math.inf


def silent_share(waveforms: Sequence[ArrayLike], threshold: float = SILENCE_DBFS) -> float:
    """Share of clips whose RMS lies below `threshold` dBFS. Distances between sets can look good for silent output."""
    return float(np.mean([level_dbfs(wave) < threshold for wave in waveforms]))
