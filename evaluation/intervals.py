"""95 % intervals: Wilson's for a proportion, percentile bootstrap over patients or images for the rest."""

from collections.abc import Iterator
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
LEAST_DEFINED = 0.8  # of the resamples; a class of one patient (or image) is in 0.63 of them, of two in 0.86
_CHUNK_VALUES = 2**17  # weights held at a time: 1 MB stays in the cache, twice as fast as 8 MB


def wilson_interval(proportion: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of an observed proportion of `n` > 0 trials, without continuity correction.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927). It
    has a width at 0 and at 1 too.
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    centre = (proportion + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(proportion * (1 - proportion) / n + z**2 / (4 * n**2))
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def bootstrap_weights(units: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is in each resample: whole numbers as float64, in chunks (r, N) of the rows.

    units (N,) holds the unit of each image, 0 .. G - 1: its patient, or its own number to draw images.
    Resample i takes the units in row i of np.random.default_rng(seed).integers(G, size=(resamples, G)), each
    with all its images. So two models that predicted the same images are given the same resamples.
    """
    n_units = int(units.max()) + 1
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK_VALUES // len(units))
    for start in range(0, resamples, rows):
        r = min(rows, resamples - start)
        draws = rng.integers(n_units, size=(r, n_units)) + n_units * np.arange(r)[:, None]
        counts = np.bincount(draws.ravel(), minlength=r * n_units).reshape(r, n_units)
        yield np.take(counts.astype(np.float64), units, axis=1)


def percentile_interval(samples: np.ndarray) -> tuple[float, float] | None:
    """The middle 95 % of the resamples (R,), those that are NaN left out.

    None where its ends are the same: what hardly varies, as in a perfect score or with a single patient, says
    nothing about the uncertainty, and a width of zero would claim certainty. Nor where more than
    a fifth are NaN: a class that many lack is too small to say how much its scores vary.
    """
    defined = samples[~np.isnan(samples)]
    if len(defined) < max(1, LEAST_DEFINED * len(samples)):
        return None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return (float(low), float(high)) if high - low > 1e-12 else None
