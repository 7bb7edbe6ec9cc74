"""Paired tests between models that predicted the same images."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import binomtest

from data.scan import nfc
from evaluation.intervals import LEVEL, bootstrap_weights, percentile_interval
from evaluation.metrics import WeightedMetrics
from evaluation.results import Predictions

MEASURES = ("accuracy", "balanced_accuracy", "macro_f1")


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar test (McNemar 1947): are the images that only one of two models gets right
    shared out like coin tosses? 1 where there are none.
    """
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979), for all the p-values that are looked at together."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def compare(runs: Mapping[str, Predictions], *, seed: int = 0, resamples: int = 2000) -> dict[str, Any]:
    """Content of comparison.json: every pair of `runs` that predicted the same images, in the runs' order.

    A pair: the images only one of the two gets right, McNemar's p and its Holm-adjusted value over all
    pairs, and the difference a - b of each measure with its 95 % interval over the same resamples of
    patients (images where patients are unknown). "beyond_noise" only where the interval of the accuracy's
    difference excludes 0 and the adjusted p is below 0.05: McNemar's test takes images of one patient for
    independent, the bootstrap does not correct for the number of pairs.
    """
    pairs, left_out = [], []
    aligned = {name: _sorted_by_path(run) for name, run in runs.items()}
    samples: dict[tuple[str, bytes], dict[str, np.ndarray]] = {}
    for a, b in combinations(runs, 2):
        run_a, run_b = aligned[a], aligned[b]
        if (
            run_a.classes != run_b.classes
            or run_a.paths != run_b.paths
            or (run_a.labels != run_b.labels).any()
        ):
            left_out.append({"a": a, "b": b, "why": "they did not predict the same images"})
            continue
        # of two runs that differ in what they know of the patients, the one that knows decides
        groups = run_a.groups if run_a.groups is not None else run_b.groups
        units = np.arange(len(run_a.paths)) if groups is None else np.unique(groups, return_inverse=True)[1]
        for name in (a, b):
            if (name, units.tobytes()) not in samples:
                samples[name, units.tobytes()] = _samples(aligned[name], units, seed, resamples)
        right_a, right_b = (run.probs.argmax(1) == run.labels for run in (run_a, run_b))
        only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
        of_a, of_b = samples[a, units.tobytes()], samples[b, units.tobytes()]
        differences = {key: of_a[key] - of_b[key] for key in MEASURES}
        pairs.append(
            {
                "a": a,
                "b": b,
                "n_images": len(run_a.paths),
                "unit": "image" if groups is None else "patient",
                "only_a_right": only_a,
                "only_b_right": only_b,
                "mcnemar_p": mcnemar_p(only_a, only_b),
                "difference": {key: _difference(values) for key, values in differences.items()},
            }
        )
    for pair, p in zip(pairs, holm([pair["mcnemar_p"] for pair in pairs]), strict=True):
        low, high = (pair["difference"]["accuracy"][side] for side in ("low", "high"))
        pair["mcnemar_p_holm"] = p
        pair["beyond_noise"] = p < 0.05 and low is not None and (low > 0 or high < 0)
    return {"schema": 1, "level": LEVEL, "resamples": resamples, "pairs": pairs, "not_compared": left_out}


def _sorted_by_path(run: Predictions) -> Predictions:
    paths = [nfc(path) for path in run.paths]
    order = np.array(sorted(range(len(paths)), key=paths.__getitem__))
    return Predictions(
        run.classes,
        tuple(paths[i] for i in order),
        run.labels[order],
        run.probs[order],
        groups=None if run.groups is None else run.groups[order],
    )


def _samples(run: Predictions, units: np.ndarray, seed: int, resamples: int) -> dict[str, np.ndarray]:
    """measure -> (1 + resamples,): on all images, then on each resample."""
    metrics = WeightedMetrics(run.probs, run.labels)
    weights = [np.ones((1, len(units))), *bootstrap_weights(units, resamples, seed)]
    chunks = [metrics(chunk) for chunk in weights]
    return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in MEASURES}


def _difference(values: np.ndarray) -> dict[str, float | None]:
    low, high = percentile_interval(values[1:]) or (None, None)
    return {"value": float(values[0]), "low": low, "high": high}
