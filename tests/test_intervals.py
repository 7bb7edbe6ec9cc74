"""Wilson's interval and the bootstrap's draws and percentiles."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from evaluation.intervals import bootstrap_weights, percentile_interval, wilson_interval


def test_wilson_of_81_in_263():
    # z = 1.96: centre (81 + 1.92) / (263 + 3.84) = 0.3107,
    # half width 1.96 / 266.84 * sqrt(263 * 0.308 * 0.692 + 0.96) = 0.0555
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 2)[0] == 0  # and not -5e-17


@given(st.integers(1, 3000), st.data())
def test_wilson_equals_scipy(n, data):
    k = data.draw(st.integers(0, n))
    low, high = wilson_interval(k / n, n)
    expected = binomtest(k, n).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert 0 <= low <= high <= 1


@pytest.mark.parametrize("grouped", [False, True])
def test_weights_count_the_images_of_the_units_drawn(grouped):
    n, resamples = 500, 900  # several chunks, the last one smaller
    units = (
        np.random.RandomState(0).permutation(np.r_[np.arange(60), np.arange(440) % 37])
        if grouped
        else np.arange(n)
    )
    chunks = list(bootstrap_weights(units, resamples, 7))
    assert len(chunks) > 2
    weights = np.concatenate(chunks)
    n_units = units.max() + 1
    draws = np.random.default_rng(7).integers(n_units, size=(resamples, n_units))
    assert weights.shape == (resamples, n)
    for row in (0, 1, 450, resamples - 1):
        images = np.concatenate([np.flatnonzero(units == unit) for unit in draws[row]])
        assert weights[row].tolist() == np.bincount(images, minlength=n).tolist()


def test_a_set_of_any_size_is_resampled():
    first, second = bootstrap_weights(np.arange(300_000), 2, 0)
    assert first.shape == second.shape == (1, 300_000) and first.sum() == second.sum() == 300_000


def test_percentiles_leave_undefined_resamples_out():
    samples = np.r_[np.random.RandomState(0).permutation(1001), [np.nan] * 250]  # 0 .. 1000
    assert percentile_interval(samples) == pytest.approx((25, 975))


@pytest.mark.parametrize(
    "samples",
    [[1.0, 1.0, 1.0], [0.1 + 0.2, 0.3, 0.3], [np.nan, np.nan], [0.3, np.nan], [0.3, 0.4, 0.5, np.nan]],
)
def test_resamples_that_all_agree_or_are_often_undefined_give_no_interval(samples):
    assert percentile_interval(np.array(samples)) is None
