"""Can the probabilities be believed? Expected calibration error, NLL, Brier score, temperature scaling.

Everywhere probs is (N, C) with rows that sum to 1, and labels (N,) holds the number of the true class.
"""

import numpy as np
from scipy.special import softmax

SMALLEST = 1e-12  # a smaller probability counts as this one: a single zero would make the NLL infinite
MAX_BINS = 15
# On few images chance alone makes bins of a few look wrong, and the more bins, the larger the ECE (Roelofs et
# al. 2022, arXiv 2012.08668): of 30 images, perfectly calibrated, 15 bins say 0.25, three say 0.11.
FEWEST_OF_BIN = 10
DRAWS = 1000  # of labels, for ece_if_calibrated
MAX_TEMPERATURE = 20.0  # the smallest is 1/20


def nll_of_images(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-log p(label) of each image (N,), in nats."""
    of_label = probs[np.arange(len(labels)), labels].astype(np.float64)
    return -np.log(np.maximum(of_label, SMALLEST))


def brier_of_images(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Sum over classes of (p - 1[class is the label])**2 of each image (N,): 0 to 2."""
    return ((probs - np.eye(probs.shape[1])[labels]) ** 2).sum(1)


def adaptive_bins(confidence: np.ndarray) -> np.ndarray:
    """The bin (N,) of each image, 0 .. B - 1 by rising confidence: at most 15 bins, and no more than leave 10
    images for each.

    Bins of equal counts (Nixon et al. 2019, arXiv 1904.01685), but equal confidences always share one: the
    one in which the first of them falls. So where nothing is tied the counts differ by at most 1.
    """
    rank = np.searchsorted(np.sort(confidence), confidence)  # of the first of its equals
    n_bins = min(MAX_BINS, max(1, len(confidence) // FEWEST_OF_BIN))
    return np.unique(rank * n_bins // len(confidence), return_inverse=True)[1]


def reliability_bins(probs: np.ndarray, labels: np.ndarray) -> list[dict[str, float | int]]:
    """Mean confidence, accuracy and count of each adaptive bin of the top class's probability."""
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    bins = adaptive_bins(confidence)
    counts = np.bincount(bins)
    return [
        {"mean_confidence": float(mean), "accuracy": float(accuracy), "count": int(count)}
        for mean, accuracy, count in zip(
            np.bincount(bins, confidence) / counts, np.bincount(bins, correct) / counts, counts, strict=True
        )
    ]


def ece(probs: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error: |accuracy - mean confidence| of the adaptive bins, averaged over images."""
    gap = (probs.argmax(1) == labels) - probs.max(1)
    return float(np.abs(np.bincount(adaptive_bins(probs.max(1)), gap)).sum() / len(labels))


def ece_if_calibrated(probs: np.ndarray, seed: int) -> dict[str, float]:
    """The ECE that chance alone would give these images: of labels drawn from the probabilities themselves.

    Consistency resampling (Bröcker & Smith 2007, doi 10.1175/WAF993.1) of these images as they are, each on
    its own. A prediction is then right with the probability of its class.
    """
    confidence, n = probs.max(1), len(probs)
    bins = adaptive_bins(confidence)
    expected = np.bincount(bins, confidence)  # right ones of each bin
    random = np.random.default_rng(seed)
    drawn = [
        np.abs(np.bincount(bins, random.random(n) < confidence) - expected).sum() / n for _ in range(DRAWS)
    ]
    return {"mean": float(np.mean(drawn)), "p95": float(np.quantile(drawn, 0.95))}


def fit_temperature(probs: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T between 1/20 and 20 for which softmax(log(probs) / T) has the lowest mean NLL.

    Above 1 it makes the model less sure (Guo et al. 2017, arXiv 1706.04599). NaN where none in between is the
    best: the images do not settle it, as when all are classified rightly, and the sharper the better.
    """
    logs = np.log(np.maximum(probs, SMALLEST))
    logs -= logs.max(1, keepdims=True)  # so that exp never overflows
    of_label = logs[np.arange(len(labels)), labels]

    def slope(inverse: float) -> float:
        """Of the mean NLL over 1/T; it only rises, the NLL being convex in 1/T."""
        return float(((softmax(logs * inverse, axis=1) * logs).sum(1) - of_label).mean())

    if not slope(1 / MAX_TEMPERATURE) < 0 < slope(MAX_TEMPERATURE):
        return np.nan
    from scipy.optimize import brentq  # slow to import, and only the end of a run needs it

    return 1 / brentq(slope, 1 / MAX_TEMPERATURE, MAX_TEMPERATURE)


def apply_temperature(probs: np.ndarray, temperature: float | np.ndarray) -> np.ndarray:
    """softmax(log(probs) / T), (N, C); the temperature is one number, or one per image (N,)."""
    per_image = np.broadcast_to(temperature, len(probs))[:, None]  # (N, 1)
    return softmax(np.log(np.maximum(probs, SMALLEST)) / per_image, axis=1)


def cross_fitted_temperatures(probs: np.ndarray, labels: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """For each image (N,) the temperature fitted on the images of all other parts; `parts` (N,) numbers them.

    Needs two parts at least. NaN where the others settle no temperature.
    """
    temperatures = np.empty(len(labels))
    for part in np.unique(parts):
        inside = parts == part
        temperatures[inside] = fit_temperature(probs[~inside], labels[~inside])
    return temperatures


def two_halves(units: np.ndarray, seed: int) -> np.ndarray:
    """Part 0 or 1 of each image (N,): half of the units (patients, or images) drawn by the seed."""
    n_units = int(units.max()) + 1
    half = np.zeros(n_units, np.int64)
    half[np.random.default_rng(seed).permutation(n_units)[: n_units // 2]] = 1
    return half[units]


def temperature_scaling(probs: np.ndarray, labels: np.ndarray, parts: np.ndarray) -> dict[str, float] | None:
    """The entry "temperature_scaling" of metrics.json, see evaluation.metrics.

    The temperature to use from now on is fitted on all images. What it is worth is measured on
    probabilities that were each scaled by a temperature fitted on the other parts. None with less than two
    parts, and where one of these fits settles no temperature.
    """
    if len(np.unique(parts)) < 2:
        return None
    temperature, of_images = fit_temperature(probs, labels), cross_fitted_temperatures(probs, labels, parts)
    if np.isnan(of_images).any():  # else all of them together settle one too
        return None
    scaled = apply_temperature(probs, of_images)
    entry = {"temperature": temperature}
    for when, p in (("before", probs), ("after", scaled)):
        entry[f"nll_{when}"] = float(nll_of_images(p, labels).mean())
        entry[f"ece_{when}"] = ece(p, labels)
        entry[f"brier_{when}"] = float(brier_of_images(p, labels).mean())
    return entry
