"""Measures against the reference implementations' numbers, closed forms, and what they must do by definition."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from pipelines.evaluation import metrics
from stages.text import normalise_transcript


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
    logits = golden["logits_reference"], golden["logits_generated"]
    assert metrics.kl_divergence(*logits) == pytest.approx(float(golden["kl_softmax"]), rel=1e-4)
    assert metrics.kl_divergence(*logits, activation="sigmoid") == pytest.approx(float(golden["kl_sigmoid"]), rel=1e-4)


def test_inception_score_is_the_references(shared):
    golden = np.load(shared / "golden" / "metrics.npz")
    mean, _ = metrics.inception_score(golden["logits_generated"], splits=4, seed=2020)
    assert mean == pytest.approx(float(golden["inception_score_4_splits_seed_2020"]), rel=1e-4)


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


def test_frechet_distance_of_float32_covariances_would_be_another(rng):
    """Why the arithmetic is in float64: what a product of float32 covariances gives is off by percents."""
    spread = np.arange(1, 129) ** -1.0
    first, second = rng.standard_normal((90, 128)) * spread + 30.0, 1.1 * rng.standard_normal((90, 128)) * spread + 30.0
    right = metrics.frechet_distance(first, second)
    assert metrics.frechet_distance(first - 30.0, second - 30.0) == pytest.approx(right)
    one, two = (np.cov(values.T.astype(np.float32), dtype=np.float32) for values in (first, second))
    shift = first.mean(0) - second.mean(0)
    single = shift @ shift + np.trace(one + two) - 2 * np.sqrt(np.abs(np.linalg.eigvals(one @ two))).sum()
    assert abs(single - right) > 1e-4 * right


def test_kl_by_hand(rng):
    reference, generated = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]])
    by_hand = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    assert metrics.kl_divergence(reference, generated, floor=0.0) == pytest.approx(by_hand)
    skewed = np.log([[0.7, 0.2, 0.1]])
    there, back = (metrics.kl_divergence(reference, skewed, direction=d) for d in ("reference||generated", "generated||reference"))
    assert back == pytest.approx(metrics.kl_divergence(skewed, reference)) and abs(there - back) > 1e-3
    single = metrics.kl_divergence([[0.0]], [[np.log(3.0)]], activation="sigmoid", floor=0.0)
    assert single == pytest.approx(0.5 * np.log(0.5 / 0.75))  # negative: KL_sigmoid is no divergence


def test_kl_with_itself_is_the_floor_of_the_reference(rng):
    logits = rng.standard_normal((20, 527))
    assert metrics.kl_divergence(logits, logits) == pytest.approx(-527e-6, rel=1e-2)
    assert metrics.kl_divergence(logits, logits, activation="sigmoid") == pytest.approx(-527e-6, rel=1e-2)
    certain = np.full((3, 5), -1e4)
    certain[:, 0] = 1e4
    assert np.isfinite(metrics.kl_divergence(certain, np.roll(certain, 1, axis=1)))  # probabilities of exactly 0 add nothing


def test_kl_refuses_what_is_not_paired(rng):
    with pytest.raises(ValueError, match=r"\[4, 5\] and \[3, 5\]"):
        metrics.kl_divergence(np.zeros((4, 5)), np.zeros((3, 5)))
    with pytest.raises(ValueError, match="finite"):
        metrics.kl_divergence(np.full((4, 5), np.inf), np.zeros((4, 5)))


def test_inception_score_has_its_bounds(rng):
    assert metrics.inception_score(np.zeros((40, 7)))[0] == pytest.approx(1.0)
    sure = 100.0 * np.eye(8)[np.arange(40) % 8]
    assert metrics.inception_score(sure, splits=1)[0] == pytest.approx(8.0)
    mean, deviation = metrics.inception_score(sure, splits=10)
    assert mean <= 4.0 and deviation > 0.0  # a part of four clips can show four classes at most
    with pytest.raises(ValueError, match="10 parts"):
        metrics.inception_score(np.zeros((9, 7)))


def test_frechet_infinity_takes_the_bias_of_few_clips_away(rng):
    reference = rng.standard_normal((4000, 16))
    generated = rng.standard_normal((3000, 16)) + 0.1
    found = metrics.frechet_infinity(reference, generated)
    true = 16 * 0.1**2
    few = metrics.frechet_distance(reference, generated[:500])
    assert found.slope > 0 and abs(found.value - true) < abs(few - true) and found.r_squared > 0.5
    assert found == metrics.frechet_infinity(reference, generated)
    assert found != metrics.frechet_infinity(reference, generated, seed=1)


def test_frechet_infinity_draws_whole_clips(rng):
    centres = rng.standard_normal((200, 8))
    rows = np.repeat(centres, 10, axis=0) + 0.01 * rng.standard_normal((2000, 8))
    reference, clip_of = rng.standard_normal((2000, 8)), np.repeat(np.arange(200), 10)
    by_clip, by_row = metrics.frechet_infinity(reference, rows, clip_of), metrics.frechet_infinity(reference, rows)
    assert by_clip.slope > 3 * by_row.slope  # 200 clips say less than 2,000 independent rows would
    shuffled = rng.permutation(2000)
    again = metrics.frechet_infinity(reference, rows[shuffled], clip_of[shuffled])
    assert again.value == pytest.approx(by_clip.value)
    with pytest.raises(ValueError, match="500 rows"):
        metrics.frechet_infinity(reference, rows[:500])


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


def test_ssim_is_what_its_definition_says(rng):
    one = rng.random((12, 9))
    two = np.clip(one + 0.1 * rng.standard_normal((12, 9)), 0.0, 1.0)
    span = max(one.max(), two.max()) - min(one.min(), two.min())
    found = []
    for row in range(12 - 6):
        for column in range(9 - 6):
            x, y = (image[row : row + 7, column : column + 7].ravel() for image in (one, two))
            covariance = np.cov(x, y)
            low = 2 * x.mean() * y.mean() + (0.01 * span) ** 2, x.mean() ** 2 + y.mean() ** 2 + (0.01 * span) ** 2
            high = 2 * covariance[0, 1] + (0.03 * span) ** 2, covariance[0, 0] + covariance[1, 1] + (0.03 * span) ** 2
            found.append(low[0] * high[0] / (low[1] * high[1]))
    assert metrics.ssim(one, two) == pytest.approx(np.mean(found))
    assert metrics.ssim(one, one) == pytest.approx(1.0) and metrics.ssim(np.zeros((8, 8)), np.zeros((8, 8))) == 1.0
    with pytest.raises(ValueError, match="7 x 7"):
        metrics.ssim(one[:6], two[:6])


def test_psnr_and_the_picture_it_is_taken_on():
    assert metrics.psnr(np.zeros((4, 4)), np.full((4, 4), 0.1)) == pytest.approx(20.0)
    assert metrics.psnr(np.ones((4, 4)), np.ones((4, 4))) == np.inf
    decibel = np.array([-100.0, -80.0, -30.0, 20.0, 40.0])
    assert metrics.mel_image(decibel * np.log(10.0) / 20.0) == pytest.approx([0.0, 0.0, 0.5, 1.0, 1.0])


def test_error_rates_count_edits_over_the_whole_set():
    words = [["the", "cat", "sat"], ["on", "it"]], [["the", "bat", "sat", "down"], ["it"]]
    assert metrics.error_rate(*words) == pytest.approx(3 / 5)  # one of each kind; not the mean of 2/3 and 1/2
    assert metrics.error_rate(["kitten"], ["sitting"]) == pytest.approx(3 / 6)
    assert metrics.error_rate(["ab"], [""]) == 1.0 and metrics.error_rate(["ab"], ["ab"]) == 0.0
    assert metrics.error_rate(["a"], ["xxxaxx"]) == 5.0
    with pytest.raises(ValueError, match="no words"):
        metrics.error_rate([""], ["something"])
    with pytest.raises(ValueError, match="2 and 1"):
        metrics.error_rate(["a", "b"], ["a"])


def test_edits_are_those_of_the_textbook(rng, rounds):
    def plainly(a, b):
        table = [[i + j if not i * j else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
        for i in range(1, len(a) + 1):
            for j in range(1, len(b) + 1):
                table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
        return table[-1][-1]

    for _ in range(rounds(50, 50_000)):
        one, two = ("".join(rng.choice(list("abc"), size=rng.integers(1, 12))) for _ in range(2))
        assert metrics.error_rate([one], [two]) == pytest.approx(plainly(one, two) / len(one))


def test_transcripts_are_compared_in_one_spelling():
    one, two = normalise_transcript("Mr. Smith ISN'T here, um, at twenty-one!"), normalise_transcript("mister smith is not here at 21")
    assert one == two == "mister smith is not here at 21"


def test_silent_share():
    assert metrics.silent_share([np.zeros(100), np.full(100, 9e-4), np.full(100, 2e-3), np.ones(100)]) == 0.5
    assert metrics.level_dbfs(np.full(10, 0.1)) == pytest.approx(-20.0) and metrics.level_dbfs([]) == -np.inf
