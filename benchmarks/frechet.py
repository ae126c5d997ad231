"""FD on 957 CNN14-sized embeddings: the low-rank form of pipelines/metrics.py and the plain matrix root, in one run.

python benchmarks/frechet.py            seconds on two cores, a minute and a half on a busy one
"""

from __future__ import annotations

import time

import numpy as np
from scipy.linalg import sqrtm

from pipelines.evaluation.metrics import frechet_distance

CLIPS, WIDTH = 957, 2048  # AudioCaps' test clips; the layer that FD is taken from


def embeddings(rng: np.random.Generator, mixing: np.ndarray) -> np.ndarray:
    """Features as a network gives them: not negative, correlated, with variances that fall off as a power."""
    spread = np.arange(1, WIDTH + 1) ** -0.5
    return np.maximum(0.0, (rng.standard_normal((CLIPS, WIDTH)) * spread) @ mixing + 0.1).astype(np.float32)


def by_matrix_root(reference: np.ndarray, generated: np.ndarray) -> float:
    """The definition, as the usual toolboxes compute it."""
    first, second = (values.astype(np.float64) for values in (reference, generated))
    one, two = np.cov(first.T), np.cov(second.T)
    shift = first.mean(0) - second.mean(0)
    return float(shift @ shift + np.trace(one) + np.trace(two) - 2.0 * np.trace(sqrtm(one @ two)).real)


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    mixing = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]
    reference, generated = embeddings(rng, mixing), 1.2 * embeddings(rng, mixing)
    seconds = []
    for title, distance in (("low-rank form", frechet_distance), ("matrix root", by_matrix_root)):
        began = time.perf_counter()
        value = distance(reference, generated)
        seconds.append(time.perf_counter() - began)
        print(f"{title:<14} {value:12.6f}   {seconds[-1]:7.2f} s", flush=True)
    print(f"{CLIPS} clips of {WIDTH} dimensions: x{seconds[1] / seconds[0]:.0f}")
