"""Metrics: pure functions of probabilities (N, C) and labels (N,). Fractions, not percent.

The schema of metrics.json, as full_metrics returns it
------------------------------------------------------
An INTERVAL ENTRY is {"value", "low", "high", "method"}: the metric on all images, its 95 % interval, and
"bootstrap" or "wilson". A PROPORTION (a count over a count) also has "wilson": [low, high], Wilson's score
interval over images, which takes the images of one patient for independent.
  * "bootstrap": percentiles over resamples of the patients, each with all its images, or of the images where
    patients are not known. A resample is scored as the data are; where the metric is undefined on it, it is
    left out, as a mean over classes is where a class that has images lost them all. Low and high are null
    where all resamples agree, as for a perfect score, or more than a fifth are left
    out.
  * "wilson": proportions where patients are not known; then low and high are those of the key "wilson". And
    proportions where patients are known but all resamples agree; then they are Wilson's over the patients.
  * What is undefined, as the sensitivity of a class without images, is null in every field, never 0.

schema                    1
n_images, n_groups        images; patients (null where not known)
classes                   the names, in the order of the columns of the probabilities

accuracy                  a proportion; the predicted class is the one of highest probability
balanced_accuracy         mean sensitivity of the classes that have images
macro_f1                  mean F1 of the classes that have images or were predicted; one that has none and was
                          predicted counts as 0
mcc                       Matthews' correlation for C classes (Gorodkin 2004); null where all labels are one
                          class, else 0 where all predictions are
cohen_kappa               unweighted; null where all labels and all predictions are one and the same class
macro_roc_auc             mean of roc_auc over the classes for which it is defined
macro_average_precision   mean of average_precision over the classes for which it is defined
nll                       mean of -ln p(label), in nats; p below 1e-12 counts as 1e-12
brier                     mean over images of the sum over classes of (p - 1[is the label])**2: 0 to 2
ece                       expected calibration error of the top class over the bins of "calibration", which a
                          resample keeps. Chance adds to the error of a bin, and once more in a resample: the
                          resamples are shifted to have the value as their mean, and cut at 0
                          (accuracy to ece are interval entries)

per_class                 {name: {...}}, each class against the rest
  support                 images of the class
  true_positives, false_positives, false_negatives, true_negatives    counts of images
  sensitivity             a proportion; null for a class without images
  specificity             a proportion; null where there is no other class
  precision               a proportion; null for a class never predicted
  f1                      2 TP / (2 TP + FP + FN); null for a class without images that was never predicted
  roc_auc                 null where the class, or the rest, has no images; a tie is half right
  average_precision       sum of (step of recall) x (precision there), equal scores being one step; null where
                          the class, or the rest, has no images
                          (sensitivity to average_precision are interval entries)

confusion_matrix          C x C counts: a row per true class, a column per predicted class

calibration
  bins                    [{"mean_confidence", "accuracy", "count"}, ...] by rising confidence: at most 15, no
                          more than leave 10 images for each, and of equal counts as far as equal
                          confidences, which share a bin, allow
  ece_if_calibrated       {"mean", "p95"}: of the ECE in 1000 draws of all labels from the probabilities of
                          these images, each on its own: what chance alone gives a perfectly calibrated model.
                          Where images of one patient are alike, chance gives more
  temperature_scaling     null where all images are in one part, and where no temperature between 1/20 and 20
                          is the best for those outside one part: all are right, and the sharper the better,
                          or the probabilities tell nothing. Else
    temperature           fitted on all images, for use on new ones
    nll_before, nll_after, ece_before, ece_after, brier_before, brier_after
                          "after" is cross-fitted: each image is scaled by the temperature fitted on the parts
                          it is not in. Parts are the folds, or else two halves of the patients (images)

interval                  {"level": 0.95, "resamples", "unit": "patient" or "image"}
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.errors import UserError
from evaluation.calibration import (
    adaptive_bins,
    brier_of_images,
    ece_if_calibrated,
    nll_of_images,
    reliability_bins,
    temperature_scaling,
    two_halves,
)
from evaluation.intervals import LEVEL, bootstrap_weights, percentile_interval, wilson_interval

_PER_CLASS = ("sensitivity", "specificity", "precision", "f1", "roc_auc", "average_precision")


def classification_metrics(probs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, balanced accuracy (mean recall of the classes present), macro-F1 and cross-entropy loss.

    The class is the one of highest probability. The loss is the mean of -log p(label) over images, in nats.
    Macro-F1 is over the classes that have images or were predicted.
    """
    confusion = confusion_matrix(labels, probs.argmax(1), probs.shape[1])
    present, predicted = confusion.any(1), confusion.any(0)
    found = _of_confusion(confusion[None].astype(np.float64), present, predicted & ~present)
    return {
        "loss": float(nll_of_images(probs, labels).mean()),
        "acc": float(found["accuracy"][0]),
        "balanced_acc": float(found["balanced_accuracy"][0]),
        "macro_f1": float(found["macro_f1"][0]),
    }


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, n_classes: int) -> np.ndarray:
    """(C, C) counts: a row per true class, a column per predicted class."""
    return np.bincount(labels * n_classes + predictions, minlength=n_classes**2).reshape(n_classes, n_classes)


def majority_baseline(train_labels: np.ndarray, val_labels: np.ndarray) -> tuple[int, float]:
    """The most frequent training class and its share of the validation images: a score that means nothing."""
    majority = int(np.bincount(train_labels).argmax())
    return majority, float((val_labels == majority).mean())


def full_metrics(
    probs: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    *,
    groups: np.ndarray | None = None,
    parts: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, Any]:
    """The content of metrics.json, in the schema at the head of this module; plain numbers, None for null.

    probs (N, C) with rows that sum to 1; labels (N,) 0 .. C - 1; groups (N,) the patient of each image; parts
    (N,) the fold of each image, for the cross-fitted temperature. The same seed gives the same numbers.

    Raises UserError where there are no images or probabilities are not finite.
    """
    probs, labels = np.asarray(probs, np.float64), np.asarray(labels, np.int64)
    if len(labels) == 0:
        raise UserError("there are no images to compute metrics of")
    broken = int((~np.isfinite(probs)).any(1).sum())
    if broken:
        raise UserError(
            f"the probabilities of {broken} of {len(labels)} images are not finite: the model's weights are"
            " broken; take another checkpoint or train again"
        )
    grouped = groups is not None
    units = np.unique(groups, return_inverse=True)[1] if grouped else np.arange(len(labels))
    metrics = WeightedMetrics(probs, labels)
    value = {key: of_one[0] for key, of_one in metrics(np.ones((1, len(labels)))).items()}
    chunks = [metrics(weights) for weights in bootstrap_weights(units, resamples, seed)]
    samples = {key: np.concatenate([chunk[key] for chunk in chunks]) for key in value}
    samples["ece"] = np.maximum(0, samples["ece"] + value["ece"] - samples["ece"].mean())

    predictions = probs.argmax(1)
    confusion = confusion_matrix(labels, predictions, len(classes))
    per_class = {}
    for c, name in enumerate(classes):
        trials = {"sensitivity": labels == c, "specificity": labels != c, "precision": predictions == c}
        per_class[name] = _counts(confusion, c) | {
            key: _interval_entry(value[key][c], samples[key][:, c], units, grouped, trials.get(key))
            for key in _PER_CLASS
        }
    trials = {"accuracy": np.ones(len(labels), bool)}
    headline = {
        key: _interval_entry(value[key], samples[key], units, grouped, trials.get(key))
        for key in value
        if key not in _PER_CLASS
    }
    return {
        "schema": 1,
        "n_images": len(labels),
        "n_groups": int(units.max()) + 1 if grouped else None,
        "classes": list(classes),
        **headline,
        "per_class": per_class,
        "confusion_matrix": confusion.tolist(),
        "calibration": {
            "bins": reliability_bins(probs, labels),
            "ece_if_calibrated": ece_if_calibrated(probs, seed),
            "temperature_scaling": temperature_scaling(
                probs, labels, two_halves(units, seed) if parts is None else parts
            ),
        },
        "interval": {"level": LEVEL, "resamples": resamples, "unit": "patient" if grouped else "image"},
    }


def _counts(confusion: np.ndarray, c: int) -> dict[str, int]:
    support, predicted, right = confusion[c].sum(), confusion[:, c].sum(), confusion[c, c]
    return {
        "support": int(support),
        "true_positives": int(right),
        "false_positives": int(predicted - right),
        "false_negatives": int(support - right),
        "true_negatives": int(confusion.sum() - support - predicted + right),
    }


def _interval_entry(
    value: float, samples: np.ndarray, units: np.ndarray, grouped: bool, trials: np.ndarray | None
) -> dict[str, Any]:
    """The interval entry of one metric. trials (N,) marks the images a proportion counts over; else None."""
    entry: dict[str, Any] = dict.fromkeys(("value", "low", "high", "method"))
    if trials is not None:
        entry["wilson"] = None
    if np.isnan(value):
        return entry
    entry["value"] = float(value)
    entry["method"] = "bootstrap"
    interval = percentile_interval(samples)
    if trials is not None:
        entry["wilson"] = list(wilson_interval(value, int(trials.sum())))
        if not grouped or interval is None:
            entry["method"] = "wilson"
            interval = wilson_interval(value, len(np.unique(units[trials])))
    if interval is not None:
        entry["low"], entry["high"] = interval
    return entry


class WeightedMetrics:
    """All metrics of full_metrics for many weightings of the same images at once.

    Called with weights (r, N), whole numbers as float64 (how often each image counts), gives the headline
    metrics (r,) and those of the classes (r, C), NaN where undefined. What does not depend on the weights, as
    the order of the scores, is computed once, so a resample costs a few passes over its weights.
    """

    def __init__(self, probs: np.ndarray, labels: np.ndarray):
        self.n_classes = probs.shape[1]
        predictions = probs.argmax(1)
        classes = np.arange(self.n_classes)
        self.present = np.isin(classes, labels)
        self.only_predicted = np.isin(classes, predictions) & ~self.present
        self.cells = _Sums(labels * self.n_classes + predictions)
        self.bins = _Sums(adaptive_bins(probs.max(1)))
        self.gap = (predictions == labels) - probs.max(1)  # (N,)
        self.per_image = np.stack([nll_of_images(probs, labels), brier_of_images(probs, labels)], axis=1)
        self.rankings = [_Ranking(probs[:, c], labels == c) for c in range(self.n_classes)]

    def __call__(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        total = weights.sum(1)
        confusion = np.zeros((len(weights), self.n_classes**2))
        confusion[:, self.cells.keys] = self.cells(weights)
        confusion = confusion.reshape(-1, self.n_classes, self.n_classes)
        of_classes = _of_confusion(confusion, self.present, self.only_predicted)
        areas = [ranking(weights) for ranking in self.rankings]
        of_classes["roc_auc"] = np.stack([auc for auc, _ in areas], axis=1)  # (r, C)
        of_classes["average_precision"] = np.stack([ap for _, ap in areas], axis=1)
        nll, brier = (weights @ self.per_image / total[:, None]).T
        return of_classes | {
            "macro_roc_auc": _mean_over(self.present, of_classes["roc_auc"]),
            "macro_average_precision": _mean_over(self.present, of_classes["average_precision"]),
            "nll": nll,
            "brier": brier,
            "ece": np.abs(self.bins(weights * self.gap)).sum(1) / total,
        }


def _of_confusion(
    confusion: np.ndarray, present: np.ndarray, only_predicted: np.ndarray
) -> dict[str, np.ndarray]:
    """Metrics of confusion matrices (r, C, C): headline ones (r,), those of the classes (r, C).

    present, only_predicted (C,): the classes that have images among the data, and of the others those that
    are predicted. Every mean is over them, whatever a resample lacks.
    """
    right = np.diagonal(confusion, axis1=1, axis2=2)  # (r, C)
    support, predicted = confusion.sum(2), confusion.sum(1)  # (r, C)
    total, all_right = support.sum(1), right.sum(1)  # (r,)
    rest = total[:, None] - support
    sensitivity = _ratio(right, support)
    f1 = np.where(only_predicted, 0.0, _ratio(2 * right, support + predicted))
    # chance: what labels and predictions of these frequencies would agree on if independent, times total**2
    chance = (support * predicted).sum(1)
    covariance = all_right * total - chance
    of_labels, of_predictions = (total**2 - (n**2).sum(1) for n in (support, predicted))
    mcc = _ratio(covariance, np.sqrt(of_labels * of_predictions))
    return {
        "accuracy": all_right / total,
        "balanced_accuracy": _mean_over(present, sensitivity),
        "macro_f1": _mean_over(present | only_predicted, np.where(present & (support == 0), np.nan, f1)),
        "mcc": np.where((of_labels > 0) & (of_predictions == 0), 0.0, mcc),
        "cohen_kappa": _ratio(covariance, total**2 - chance),
        "sensitivity": sensitivity,
        "specificity": _ratio(rest - (predicted - right), rest),
        "precision": _ratio(right, predicted),
        "f1": f1,
    }


class _Sums:
    """Sums of (r, N) over the images of equal key: (r, K), a column for each of `keys` (K,)."""

    def __init__(self, key: np.ndarray):
        self.order = np.argsort(key, kind="stable")
        self.keys, self.starts = np.unique(key[self.order], return_index=True)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(np.take(values, self.order, axis=1), self.starts, axis=1)


class _Ranking:
    """ROC-AUC and average precision of one class against the rest, for many weightings; ties are exact.

    Both are sums over the positive images, so only the cumulated weights at their places are needed.
    """

    def __init__(self, scores: np.ndarray, positive: np.ndarray):
        self.order = np.argsort(-scores, kind="stable")  # best score first
        self.positives = self.order[positive[self.order]]
        ranked, own = -scores[self.order], -scores[self.positives]
        # images (positive images) scored higher than this positive one; and those scored at least as high
        self.above, self.down_to = np.searchsorted(ranked, own), np.searchsorted(ranked, own, "right")
        self.own_above, self.own_down_to = np.searchsorted(own, own), np.searchsorted(own, own, "right")

    def __call__(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        of_positives = np.take(weights, self.positives, axis=1)
        cumulated = _cumulated(np.take(weights, self.order, axis=1))
        own_cumulated = _cumulated(of_positives)
        all_down_to = np.take(cumulated, self.down_to, axis=1)
        own_down_to = np.take(own_cumulated, self.own_down_to, axis=1)
        rest_down_to = all_down_to - own_down_to
        rest_above = np.take(cumulated, self.above, axis=1) - np.take(own_cumulated, self.own_above, axis=1)
        total = own_cumulated[:, -1]
        # pairs in the wrong order; of two equal scores half a pair is wrong
        wrong = (of_positives * (rest_above + rest_down_to)).sum(1) / 2
        precision = own_down_to / np.maximum(all_down_to, 1)  # 0 / 1 only where the image has no weight
        rest = cumulated[:, -1] - total
        return 1 - _ratio(wrong, total * rest), _ratio((of_positives * precision).sum(1), total * (rest > 0))


def _cumulated(weights: np.ndarray) -> np.ndarray:
    """(r, N) -> (r, N + 1): the sum of the first k columns, k = 0 .. N."""
    sums = np.zeros((weights.shape[0], weights.shape[1] + 1))
    np.cumsum(weights, axis=1, out=sums[:, 1:])
    return sums


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient, NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator != 0)


def _mean_over(classes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(C,), (r, C) -> (r,): NaN where a class is that the mean is over."""
    return values[:, classes].mean(1)
