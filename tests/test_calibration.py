"""Calibration errors against plain loops, temperatures against the ones that were put in."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import binom
from sklearn.metrics import brier_score_loss, log_loss

from evaluation.calibration import (
    adaptive_bins,
    apply_temperature,
    brier_of_images,
    cross_fitted_temperatures,
    ece,
    ece_if_calibrated,
    fit_temperature,
    nll_of_images,
    reliability_bins,
    temperature_scaling,
    two_halves,
)


def calibrated(n: int, n_classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, C), and labels (N,) drawn with the probabilities softmax(logits)."""
    random = np.random.RandomState(seed)
    logits = random.normal(0, 1.5, (n, n_classes))
    labels = (softmax(logits, axis=1).cumsum(1) < random.rand(n, 1)).sum(1)
    return logits, labels


@given(st.lists(st.integers(0, 40), min_size=1, max_size=120))
def test_bins_are_ordered_and_keep_ties_together(numbers):
    confidence = np.array(numbers) / 40
    bins = adaptive_bins(confidence)
    assert sorted(set(bins)) == list(range(bins.max() + 1))
    assert bins.max() < 15
    order = np.argsort(confidence)
    for i, j in pairwise(order):
        assert bins[i] == bins[j] if confidence[i] == confidence[j] else bins[i] <= bins[j]


@pytest.mark.parametrize(
    ("n", "n_bins"), [(1, 1), (7, 1), (19, 1), (20, 2), (39, 3), (149, 14), (150, 15), (1000, 15)]
)
def test_bins_have_equal_counts_of_ten_at_least_without_ties(n, n_bins):
    counts = np.bincount(adaptive_bins(np.random.RandomState(n).rand(n)))
    assert len(counts) == n_bins
    assert np.ptp(counts) <= 1


def test_ece_by_hand():
    # 20 sure images in one bin (0.9, 15 right), 10 unsure ones in another (0.6, 3 right); no room for more
    probs = np.array([[0.9, 0.1]] * 20 + [[0.4, 0.6]] * 10)
    labels = np.array([0] * 15 + [1] * 5 + [1] * 3 + [0] * 7)
    assert ece(probs, labels) == pytest.approx((20 * 0.15 + 10 * 0.3) / 30)
    low, high = reliability_bins(probs, labels)
    assert low == pytest.approx({"mean_confidence": 0.6, "accuracy": 0.3, "count": 10})
    assert high == pytest.approx({"mean_confidence": 0.9, "accuracy": 0.75, "count": 20})


@pytest.mark.parametrize(("n", "n_bins"), [(9, 1), (57, 5), (997, 15)])
def test_ece_of_distinct_confidences_equals_a_plain_loop(n, n_bins):
    logits, labels = calibrated(n)
    probs = softmax(2 * logits, axis=1)
    order = np.argsort(probs.max(1))
    expected = 0.0
    for b in range(n_bins):  # image of rank k is in bin floor(B k / N)
        inside = [image for rank, image in enumerate(order) if rank * n_bins // n == b]
        expected += abs((probs[inside].argmax(1) == labels[inside]).sum() - probs[inside].max(1).sum())
    assert ece(probs, labels) == pytest.approx(expected / n)


def test_ece_is_near_0_for_calibrated_and_large_for_overconfident_probabilities():
    logits, labels = calibrated(40_000)
    assert ece(softmax(logits, axis=1), labels) < 0.01
    assert ece(softmax(3 * logits, axis=1), labels) > 0.1


def test_ece_of_a_calibrated_model_by_hand():
    # 15 images of one confidence share a bin: the ECE is |k / 15 - 0.75| with k of Binomial(15, 0.75)
    k = np.arange(16)
    gaps, chances = np.abs(k / 15 - 0.75), binom.pmf(k, 15, 0.75)
    by_size = np.argsort(gaps)
    p95 = gaps[by_size][np.searchsorted(chances[by_size].cumsum(), 0.95)]
    found = ece_if_calibrated(np.array([[0.05, 0.75, 0.2]] * 15), 0)
    spread = np.sqrt(chances @ gaps**2 - (chances @ gaps) ** 2) / np.sqrt(1000)
    assert found["mean"] == pytest.approx(chances @ gaps, abs=3 * spread)
    assert found["p95"] == pytest.approx(p95)


@pytest.mark.parametrize("n", [9, 102])
def test_ece_of_a_calibrated_model_is_that_of_labels_drawn_from_its_probabilities(n):
    probs = softmax(calibrated(n)[0], axis=1)
    random = np.random.default_rng(99)
    drawn = [ece(probs, random.multinomial(1, probs).argmax(1)) for _ in range(3000)]
    found = ece_if_calibrated(probs, 0)
    assert found["mean"] == pytest.approx(np.mean(drawn), rel=0.04)
    assert found["p95"] == pytest.approx(np.quantile(drawn, 0.95), rel=0.06)
    assert found == ece_if_calibrated(probs, 0) != ece_if_calibrated(probs, 1)


@pytest.mark.parametrize("n_classes", [2, 5])
def test_nll_and_brier_equal_scikit_learn(n_classes):
    logits, labels = calibrated(300, n_classes)
    probs = softmax(logits, axis=1)
    all_classes = range(n_classes)
    assert nll_of_images(probs, labels).mean() == pytest.approx(log_loss(labels, probs, labels=all_classes))
    assert brier_of_images(probs, labels).mean() == pytest.approx(
        brier_score_loss(labels, probs, labels=all_classes, scale_by_half=False)
    )


def test_a_zero_probability_of_the_label_costs_a_finite_amount():
    assert nll_of_images(np.array([[1.0, 0.0]]), np.array([1])) == pytest.approx(-np.log(1e-12))


@pytest.mark.parametrize("factor", [0.5, 2.0, 6.0])
def test_the_temperature_that_was_put_in_is_found(factor):
    logits, labels = calibrated(20_000)
    probs = softmax(factor * logits, axis=1)
    found = fit_temperature(probs, labels)
    assert found == pytest.approx(factor, rel=0.03)
    grid = found * np.array([0.98, 0.995, 1.005, 1.02])
    nll = [log_loss(labels, apply_temperature(probs, t)) for t in (found, *grid)]
    assert min(nll) == nll[0]


@pytest.mark.parametrize(
    ("probs", "labels", "better"),
    [
        ([[0.8, 0.2], [0.3, 0.7]], [0, 1], 0.04),  # all right
        ([[0.999, 0.001], [0.001, 0.999]], [0, 1], 0.04),  # below 0.18 the NLL is 0 to the last digit
        ([[0.501, 0.499], [0.499, 0.501], [0.499, 0.501]], [0, 1, 0], 0.04),  # right in the main, and unsure
        ([[0.8, 0.2], [0.3, 0.7]], [1, 0], 25),  # all wrong
        ([[1.0, 0.0], [1.0, 0.0]], [0, 1], 25),  # tell nothing
    ],
)
def test_no_temperature_is_fitted_where_one_beyond_the_bounds_is_as_good_or_better(probs, labels, better):
    probs, labels = np.array(probs), np.array(labels)
    nll = [
        log_loss(labels, apply_temperature(probs, t), labels=[0, 1])
        for t in (*np.geomspace(0.05, 20), better)
    ]
    assert min(nll) == nll[-1]
    assert np.isnan(fit_temperature(probs, labels))
    assert temperature_scaling(probs.repeat(2, 0), labels.repeat(2), np.tile([0, 1], len(labels))) is None


def test_a_part_that_settles_no_temperature_leaves_none_for_all():
    logits, labels = calibrated(300)
    probs = softmax(2 * logits, axis=1)
    parts = (probs.argmax(1) != labels).astype(int)  # all that are right in one part
    assert fit_temperature(probs, labels) > 1
    assert temperature_scaling(probs, labels, parts) is None


def test_apply_temperature():
    logits, _ = calibrated(50)
    probs = softmax(logits, axis=1)
    assert apply_temperature(probs, 1.0) == pytest.approx(probs)
    assert apply_temperature(probs, 2.5) == pytest.approx(softmax(logits / 2.5, axis=1))
    per_image = np.linspace(0.5, 3, 50)
    assert apply_temperature(probs, per_image) == pytest.approx(softmax(logits / per_image[:, None], axis=1))
    assert np.isfinite(apply_temperature(np.array([[1.0, 0.0]]), 0.05)).all()


def test_no_part_has_a_say_in_its_own_temperature():
    logits, labels = calibrated(300)
    probs = softmax(2 * logits, axis=1)
    parts = np.random.RandomState(1).choice([1, 2, 5], 300)
    before = cross_fitted_temperatures(probs, labels, parts)
    for part in (1, 2, 5):
        inside = parts == part
        assert np.unique(before[inside]) == pytest.approx(fit_temperature(probs[~inside], labels[~inside]))
        changed = np.where(inside, (labels + 1) % 3, labels)
        after = cross_fitted_temperatures(probs, changed, parts)
        assert (after[inside] == before[inside]).all()
        assert (after[~inside] != before[~inside]).all()


def test_scaling_mends_overconfidence_and_claims_only_what_it_mends_on_other_parts():
    logits, labels = calibrated(3000)
    probs = softmax(3 * logits, axis=1)
    entry = temperature_scaling(probs, labels, np.arange(3000) % 5)
    assert entry["temperature"] == fit_temperature(probs, labels)
    assert entry["nll_before"] == pytest.approx(log_loss(labels, probs))
    assert entry["ece_after"] < 0.03 < 0.1 < entry["ece_before"]
    assert entry["brier_after"] < entry["brier_before"]
    on_itself = log_loss(labels, apply_temperature(probs, entry["temperature"]))
    assert on_itself < entry["nll_after"] < entry["nll_before"]


def test_nothing_to_fit_on_gives_none():
    logits, labels = calibrated(20)
    assert temperature_scaling(softmax(logits, axis=1), labels, np.full(20, 3)) is None


def test_halves_keep_patients_together_and_follow_the_seed():
    units = np.repeat(np.arange(31), 3)
    half = two_halves(units, 4)
    assert all(len(set(half[units == unit])) == 1 for unit in range(31))
    assert sorted(np.bincount(half)) == [45, 48]
    assert (half == two_halves(units, 4)).all()
    assert (half != two_halves(units, 5)).any()
