"""Measures against the reference implementations' numbers, closed forms, and what they must do by definition."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from pipelines import metrics


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def exactly(mean, covariance, count, rng):
    """Samples whose mean and covariance (ddof 1) are as wanted, not only in expectation."""
    noise = rng.standard_normal((count, len(mean)))
    noise -= noise.mean(0)
    noise = noise @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(noise.T))).T)
    return mean + noise @ np.linalg.cholesky(covariance).T


def test_frechet_distance_is_the_references(shared):
    golden = np.load(shared / "golden" / "metrics.npz")
    full = metrics.frechet_distance(golden["reference"], golden["generated"])
    assert full == pytest.approx(float(golden["frechet"]), rel=1e-4)
    few = metrics.frechet_distance(golden["reference"], golden["few"])
    assert few == pytest.approx(float(golden["frechet_fewer_rows_than_columns"]), rel=1e-3)


def test_kl_divergence_is_the_references(shared):
    golden = np.load(shared / "golden" / "metrics.npz")
    kl = metrics.kl_divergence(golden["logits_reference"], golden["logits_generated"])
    assert kl == pytest.approx(float(golden["kl_softmax"]), rel=1e-4)


def test_frechet_distance_has_its_closed_forms(rng):
    diagonal = exactly(np.zeros(3), np.diag([1.0, 4.0, 9.0]), 50, rng)
    other = exactly(np.zeros(3), np.diag([4.0, 4.0, 1.0]), 60, rng)
    assert metrics.frechet_distance(diagonal, other) == pytest.approx(5.0)
    shift = np.array([1.0, -2.0, 0.5])
    assert metrics.frechet_distance(diagonal, diagonal + shift) == pytest.approx(shift @ shift)
    assert metrics.frechet_distance(diagonal, diagonal) == pytest.approx(0.0, abs=1e-8)
    line, wide = (exactly(np.array([m]), np.array([[s**2]]), 30, rng) for m, s in ((0.0, 1.0), (3.0, 2.5)))
    assert metrics.frechet_distance(line, wide) == pytest.approx(3.0**2 + 1.5**2)


@pytest.mark.parametrize("count", [8, 200])
def test_frechet_distance_is_symmetric_and_blind_to_order_and_rotation(rng, count):
    first, second = rng.standard_normal((count, 24)), rng.standard_normal((count + 7, 24)) * 2 + 1
    distance = metrics.frechet_distance(first, second)
    rotation = np.linalg.qr(rng.standard_normal((24, 24)))[0]
    assert metrics.frechet_distance(second, first) == pytest.approx(distance)
    assert metrics.frechet_distance(first @ rotation, second @ rotation) == pytest.approx(distance)
    assert metrics.frechet_distance(rng.permutation(first), second) == pytest.approx(distance)


def test_frechet_distance_agrees_with_a_matrix_root(rng):
    first, second = rng.standard_normal((90, 12)) @ rng.standard_normal((12, 12)), rng.standard_normal((70, 12))
    root = sqrtm(np.cov(first.T) @ np.cov(second.T)).real
    shift = first.mean(0) - second.mean(0)
    by_definition = shift @ shift + np.trace(np.cov(first.T) + np.cov(second.T) - 2 * root)
    assert metrics.frechet_distance(first, second) == pytest.approx(by_definition)


def test_frechet_distance_refuses_what_it_cannot_measure(rng):
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        metrics.frechet_distance(rng.standard_normal((5, 3)), rng.standard_normal((5, 4)))
    with pytest.raises(ValueError, match="at least 2"):
        metrics.frechet_distance(rng.standard_normal((1, 3)), rng.standard_normal((5, 3)))
    with pytest.raises(ValueError, match="finite"):
        metrics.frechet_distance(np.full((5, 3), np.nan), rng.standard_normal((5, 3)))


def test_clap_score_and_its_chance(rng):
    text = np.eye(3)[[0, 0, 1, 2]]
    assert metrics.clap_score(text, 5 * text) == pytest.approx(1.0)
    assert metrics.clap_score(text, -text) == pytest.approx(-1.0)
    assert metrics.clap_chance(text, text, ["a", "a", "b", "c"]) == pytest.approx(0.0)
    assert metrics.clap_chance(text, text, ["a"] * 4) is None


def test_confusion_counts_rows_as_asked():
    counts = metrics.confusion([0, 0, 1, 2], [0, 1, 1, 0], 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_interval_is_wilsons():
    low, high = metrics.interval(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert metrics.interval(0, 0) == (0.0, 1.0)
    assert metrics.interval(5, 5)[1] == 1.0


def test_reconstruction_measures_are_zero_for_equals_and_grow_with_noise(rng):
    wave = np.sin(np.arange(16_000) * 0.1) * 0.3
    noise = rng.standard_normal(16_000)
    assert metrics.spectral_distance(wave, wave) == (0.0, 0.0)
    assert metrics.log_spectral_distance(wave, wave, 16_000) == 0.0
    little, much = (metrics.spectral_distance(wave, wave + level * noise) for level in (1e-3, 1e-1))
    assert little[0] < much[0] and little[1] < much[1]
    assert metrics.log_spectral_distance(wave, wave + 1e-3 * noise, 16_000) < metrics.log_spectral_distance(
        wave, wave + 0.1 * noise, 16_000
    )


def test_reconstruction_measures_know_gain():
    wave = np.random.default_rng(1).standard_normal(16_000)
    convergence, difference = metrics.spectral_distance(wave, 0.5 * wave)
    assert convergence == pytest.approx(0.5)
    assert difference == pytest.approx(np.log(2.0), rel=1e-3)
    assert metrics.log_spectral_distance(wave, 0.1 * wave, 16_000) == pytest.approx(2.0, rel=1e-3)
    assert metrics.mel_l1(np.zeros((4, 2)), np.full((4, 2), -0.25)) == 0.25


def test_silent_share():
    assert metrics.silent_share([np.zeros(100), np.full(100, 9e-4), np.full(100, 2e-3), np.ones(100)]) == 0.5
