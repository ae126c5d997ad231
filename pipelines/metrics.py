"""How good is what was generated: measures as functions of arrays. No networks, no files.

Whatever is computed on covariances is computed in float64: with float32 a Fréchet distance of 140 came out as 114.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax
from scipy.stats import norm

Array = NDArray[np.float64]

SILENCE_DBFS = -60.0
STFT_SIZES = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))  # transform, hop, window in samples


# ---------------------------------------------------------------------------------------------- between two sets


def frechet_distance(reference: ArrayLike, generated: ArrayLike) -> float:
    """Fréchet distance between Gaussians fitted to two sets of embeddings `[N, D]` and `[K, D]`; 0 is best.

    |μ₁ - μ₂|² + tr Σ₁ + tr Σ₂ - 2 tr (Σ₁ Σ₂)^½, where the last trace is the sum of the singular values of X₁ X₂ᵀ,
    the centred sets, over √((N-1)(K-1)). That is exact and real for any N, also below D, and needs no matrix root.
    The estimate is biased upwards by about C/N: compare systems at equal N and K only.
    """
    first, second = _embeddings(reference), _embeddings(generated)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"embeddings of {first.shape[1]} and {second.shape[1]} dimensions cannot be compared")
    shift = first.mean(0) - second.mean(0)
    first, second = _square_root(first), _square_root(second)
    shared = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    distance = shift @ shift + (first**2).sum() + (second**2).sum() - 2.0 * shared
    return max(0.0, float(distance))


def _embeddings(values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or len(array) < 2:
        raise ValueError(f"a set of embeddings is [N, D] with N of at least 2, got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError("embeddings hold values that are not finite")
    return array


def _square_root(values: Array) -> Array:
    """A matrix R `[min(N, D), D]` with RᵀR = Σ."""
    centred = (values - values.mean(0)) / math.sqrt(len(values) - 1)
    if len(centred) <= centred.shape[1]:
        return centred
    root: Array = np.asarray(np.linalg.qr(centred, mode="r"))
    return root


def kl_divergence(reference: ArrayLike, generated: ArrayLike, floor: float = 1e-6) -> float:
    """KL(reference ‖ generated) of class probabilities, from logits `[N, C]` of paired clips; 0 is best.

    Mean over clips, sum over classes; `floor` is added to the generated probabilities, as in the usual toolboxes.
    """
    target = log_softmax(np.asarray(reference, dtype=np.float64), axis=1)
    estimate = np.exp(log_softmax(np.asarray(generated, dtype=np.float64), axis=1))
    return float((np.exp(target) * (target - np.log(estimate + floor))).sum(1).mean())


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
    place = np.array([number[group] for group in groups])
    apart = place[:, None] != place[None, :]
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


def silent_share(waveforms: Sequence[ArrayLike], threshold: float = SILENCE_DBFS) -> float:
    """Share of clips whose RMS lies below `threshold` dBFS. Distances between sets can look good for silent output."""
    levels = [np.sqrt(np.mean(np.square(np.asarray(wave, dtype=np.float64)))) for wave in waveforms]
    return float(np.mean([level < 10.0 ** (threshold / 20.0) for level in levels]))
